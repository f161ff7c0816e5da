"""From a configuration to everything that a run is made of."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cached_property

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
from .methods import CombinedMethod, DistillationMethod, MethodConfig, get_method
from .student import SELF_TAUGHT, build_student, load_teacher, prompt_teacher
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
        """The same data and copies of the same models under other methods; `teacher` may also be none or "ema"."""
        model, data = replace(self.run.model, teacher=teacher), self.run.data
        if teacher is None:
            model, data = replace(model, class_map=None), replace(data, unlabelled=None, teacher_size=None)
        other = Parts(replace(self.run, methods=methods, model=model, data=data))
        names = ["eval_source", "train_source", "student"] + ["teacher"] * (teacher == self.run.model.teacher)
        for name in names:
            part = getattr(self, name)
            other.__dict__[name] = copy.deepcopy(part) if isinstance(part, DetectorAdapter) else part
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
        """The pretrained teacher, if there is one."""
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
        teacher = load_teacher(model.teacher)
        prompt_teacher(teacher, self.class_names, model.class_map)
        return teacher

    @_part
    def student(self) -> DetectorAdapter:
        return build_student(
            self.run.model.student, self.teacher, self.class_names, self.size, self.run.model.class_map
        )

    @property
    def size(self) -> dict[str, int]:
        """Of the student's images at inference, as image processors have it."""
        return resize_spec(self.run.data)

    @property
    def teacher_spec(self) -> DetectorSpec | None:
        """Of whatever teaches."""
        if self.self_taught:
            return self.student.spec
        return None if self.teacher is None else self.teacher.spec

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
        return next(iter(methods.values())) if len(methods) == 1 else CombinedMethod(methods)

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
        args = self.run.training
        seed = args.seed if args.data_seed is None else args.data_seed
        split = config.train_split if training else config.eval_split
        columns = align_classes(source.class_names, self.class_names, f"split {split!r}", "the training data")
        return DetectionStream(
            source,
            RowTransform(config, training=training, seed=seed, label_map=columns.tolist()),
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
            SELF_TAUGHT if self.self_taught else self.teacher,
            self.method,
            self.run.training,
            train_dataset=self.training_stream(),
            eval_dataset=self.evaluation_stream(),
            category_ids=self.category_ids,
            class_map=self.run.model.class_map,
            run_config=self.run.to_yaml(),
        )
