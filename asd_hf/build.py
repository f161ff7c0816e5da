"""From a configuration to everything that a run is made of."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch

from .classes import SharedClasses, align_classes, find_classes
from .config import RunConfig
from .data import (
    DataConfig,
    DetectionStream,
    RowTransform,
    Source,
    open_source,
    open_training_source,
    require_whole,
    resize_spec,
    teacher_view,
)
from .detectors.base import DetectorAdapter, DetectorSpec
from .errors import UserError
from .hub import is_at_hand
from .loading import SELF_TAUGHT, load_teacher, prompt_teacher
from .methods import CombinedMethod, DistillationMethod, MethodConfig, get_method
from .model_config import StudentConfig
from .student import build_student
from .teacher_cache import CacheWriter, Contents, TeacherCache
from .trainer import DistillationTrainer


class _part(cached_property):
    """A cached property that remembers also why it could not be had."""

    def __get__(self, instance, owner=None):
        failures = instance.__dict__.setdefault("_failures", {})
        if self.attrname in failures:
            raise failures[self.attrname]
        try:
            return super().__get__(instance, owner)
        except UserError as error:
            failures[self.attrname] = error
            raise


class Parts:
    """What a configuration names; each part is built when it is first asked for.

    Raises:
        UserError: by the part that cannot be built.
    """

    def __init__(self, run: RunConfig) -> None:
        self.run = run

    def under(self, methods: dict[str, MethodConfig], teacher: str | None) -> Parts:
        """The same data and the same models under other methods; `teacher` may also be none or "ema"."""
        model, data = replace(self.run.model, teacher=teacher), self.run.data
        if teacher is None:
            model, data = replace(model, class_map=None), replace(data, unlabelled=None, teacher_size=None)
        if teacher != self.run.model.teacher:
            model = replace(model, teacher_cache=None)
        other = Parts(replace(self.run, methods=methods, model=model, data=data))
        names = ["eval_source", "train_source", "student"]
        if teacher == self.run.model.teacher:
            names += ["teacher", "cache"]
        other.__dict__.update({name: getattr(self, name) for name in names})
        return other

    def from_disk(self, cache: TeacherCache) -> Parts:
        """The same with predictions on disk in the teacher's place."""
        other = self.under(self.run.methods, self.run.model.teacher)
        other.__dict__.update(teacher=None, cache=cache)
        return other

    @_part
    def eval_source(self) -> Source:
        data = self.run.data
        source = open_source(data.source, data.eval_split, data)
        if data.bad_rows == "skip":  # a run that lives with bad training data must not die at its first evaluation
            require_whole(open_source(data.source, data.eval_split, data, keep_bad=True), data.num_eval_images)
        return source

    @_part
    def train_source(self) -> Source:
        source = open_training_source(self.run.data)
        if source.class_names:
            return source
        # Images without labels alone: the classes are those that the student is evaluated on.
        return replace(source, class_names=self.eval_source.class_names, category_ids=self.eval_source.category_ids)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The student's classes: those of the training data."""
        return tuple(self.train_source.class_names)

    @property
    def category_ids(self) -> list[int]:
        """The data's own id of each class: that of the evaluation split, where it has the class."""
        rows = find_classes(self.class_names, self.eval_source.class_names)
        ids = zip(self.train_source.category_ids, rows, strict=True)
        return [own if row is None else self.eval_source.category_ids[row] for own, row in ids]

    @property
    def self_taught(self) -> bool:
        """The teacher is the student's own moving average, which the trainer makes."""
        return self.run.model.teacher == SELF_TAUGHT

    @_part
    def teacher(self) -> DetectorAdapter | None:
        """The pretrained teacher, if there is one; None also where its predictions on disk take its place."""
        data, model = self.run.data, self.run.model
        if self.self_taught:
            if model.class_map:
                raise UserError("model.class_map has no use with model.teacher: ema: remove it")
            return None
        if model.teacher is None:
            for key, value in (
                ("data.unlabelled", data.unlabelled),
                ("data.teacher_size", data.teacher_size),
                ("model.class_map", model.class_map),
            ):
                if value:
                    raise UserError(f"{key} has no use without a teacher: set model.teacher, or remove {key}")
            return None
        return self._load_teacher() if model.teacher_cache is None else None

    def _load_teacher(self) -> DetectorAdapter:
        model = self.run.model
        teacher = load_teacher(model.teacher)
        prompt_teacher(teacher, self.class_names, model.class_map)
        return teacher

    @_part
    def cache(self) -> TeacherCache | None:
        """The teacher's predictions on disk, if they take its place, once they are found to be those of this run."""
        model = self.run.model
        if model.teacher_cache is None:
            return None
        if model.teacher is None:
            raise UserError("model.teacher_cache has no use without a teacher: set model.teacher, or remove it")
        if self.self_taught:
            raise UserError(
                "model.teacher_cache: the student's moving average is another in each step, so no predictions of it "
                "can be kept: remove model.teacher_cache"
            )
        cache = TeacherCache(model.teacher_cache)
        found = cache.manifest.check(
            self.run.data,
            self.data_seed,
            self.train_source,
            self._lender,
            model.teacher,
            self.class_names,
            model.class_map,
        )
        if found:
            raise UserError(
                f"model.teacher_cache: {model.teacher_cache} was not made for this training: {'; '.join(found)}: "
                "build it again (asd-hf cache), or train with the teacher (model.teacher_cache=null)"
            )
        return cache

    def cache_writer(
        self,
        views: int | None = None,
        canonical: bool = False,
        top_queries: int | None = None,
        top_classes: int | None = None,
    ) -> CacheWriter:
        """What writes the teacher's predictions for the method, see there; the teacher moves to the device."""
        training = self.run.training
        if self.teacher is None or self.method is None:
            raise UserError(
                "only what a pretrained teacher tells a method can be kept: set model.teacher and method.name"
            )
        self.teacher.model.to(training.device)
        contents = Contents.of(
            self.method,
            replace(self.teacher.spec, class_names=self.classes.names),
            top_queries,
            top_classes,
        )
        precision = "bf16" if training.bf16 else "fp16" if training.fp16 else "no"
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}[precision]
        return CacheWriter(
            self.teacher,
            self.run.model.teacher,
            self.train_source,
            self.run.data,
            self.data_seed,
            contents,
            self.class_names,
            self.run.model.class_map,
            views=views,
            canonical=canonical,
            batch_size=training.per_device_eval_batch_size,
            num_workers=training.dataloader_num_workers,
            precision=precision,
            autocast=lambda: torch.autocast(training.device.type, dtype, enabled=dtype is not None),
        )

    @_part
    def _lender(self) -> DetectorAdapter | None:
        """A teacher whose predictions are on disk, to compare its weights and to build the student of it.

        None if nothing is built of it and its weights are not on this machine. It leaves the memory with the student's
        construction, before any training.
        """
        model, student = self.run.model, self.run.model.student
        student = StudentConfig(checkpoint=student) if isinstance(student, str) else student
        builds = student.copy_weights or (student.checkpoint is None and student.base == "teacher")
        return self._load_teacher() if builds or is_at_hand(model.teacher) else None

    @_part
    def student(self) -> DetectorAdapter:
        model = self.run.model
        teacher = self.teacher if self.cache is None else self._lender
        student = build_student(model.student, teacher, self.class_names, self.size, model.class_map)
        self.__dict__.pop("_lender", None)
        return student

    @property
    def size(self) -> dict[str, int]:
        """Of the student's images at inference, as image processors have it."""
        return resize_spec(self.run.data)

    @property
    def teacher_spec(self) -> DetectorSpec | None:
        """Of whatever teaches."""
        if self.self_taught:
            return self.student.spec
        teacher = self.teacher if self.cache is None else self.cache
        return None if teacher is None else teacher.spec

    @_part
    def classes(self) -> SharedClasses | None:
        if self.teacher_spec is None:
            return None
        return SharedClasses(self.student.spec, self.teacher_spec, self.run.model.class_map)

    @_part
    def method(self) -> DistillationMethod | CombinedMethod | None:
        run = self.run
        if not run.methods:
            if self.teacher_spec is not None:
                raise UserError("model.teacher teaches by a method: set method.name, or model.teacher=null")
            return None
        if self.teacher_spec is None:
            raise UserError(f"method.name is {run.method_name!r}, which needs a teacher: set model.teacher")
        for name in run.methods:
            if get_method(name).self_taught and not self.self_taught:
                raise UserError(
                    f"{name} is taught by the student's own moving average: set model.teacher: ema and "
                    "training.ema_decay"
                )
        specs = self.classes.specs(self.student.spec, self.teacher_spec)
        methods = {name: get_method(name)(config, *specs) for name, config in run.methods.items()}
        method = next(iter(methods.values())) if len(methods) == 1 else CombinedMethod(methods)
        if self.cache is not None:
            self.cache.check(method)
        return method

    @property
    def data_seed(self) -> int:
        """Of the order of the training data and of its augmentation."""
        args = self.run.training
        return args.seed if args.data_seed is None else args.data_seed

    def training_stream(self) -> DetectionStream:
        """This rank's share of the training data, both views of it where the teacher has its own."""
        return self._stream(self.train_source, self.run.data, training=True)

    def evaluation_stream(self, teacher: bool = False, num_images: int | None = None) -> DetectionStream:
        """This rank's share of the evaluation data, as the student or the teacher sees it.

        Args:
            num_images: only this many images, the first of the split; by default as many as the configuration says.
        """
        config = teacher_view(self.run.data) if teacher else self.run.data
        config = config if num_images is None else replace(config, num_eval_images=num_images)
        return self._stream(self.eval_source, config, training=False)

    def _stream(self, source: Source, config: DataConfig, training: bool) -> DetectionStream:
        args, seed = self.run.training, self.data_seed
        split = config.train_split if training else config.eval_split
        columns = align_classes(source.class_names, self.class_names, f"split {split!r}", "the training data")
        return DetectionStream(
            source,
            RowTransform(
                config,
                training=training,
                seed=seed,
                label_map=columns.tolist(),
                predictions=self.cache if training else None,
            ),
            batch_size=args.per_device_train_batch_size if training else args.per_device_eval_batch_size,
            rank=args.process_index,
            world_size=args.world_size,
            num_workers=args.dataloader_num_workers,
            seed=seed,
            shuffle=training,
            shuffle_buffer=config.shuffle_buffer,
            drop_last=training,
            num_rows=None if training else config.num_eval_images,
        )

    def trainer(self) -> DistillationTrainer:
        """The trainer of all parts."""
        return DistillationTrainer(
            self.student,
            SELF_TAUGHT if self.self_taught else self.cache or self.teacher,
            self.method,
            self.run.training,
            train_dataset=self.training_stream(),
            eval_dataset=self.evaluation_stream(),
            category_ids=self.category_ids,
            class_map=self.run.model.class_map,
            run_config=self.run.to_yaml(),
        )
