"""The training loop: Transformers' Trainer with a teacher and exact COCO evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PreTrainedModel, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy

from . import stopping
from .bad_steps import guard_loss
from .checkpoints import moved_in
from .classes import SharedClasses
from .config import TrainingConfig
from .criterion import DetectionCriterion, TransformersCriterion
from .data import DetectionStream, build_loader
from .detectors import get_adapter
from .detectors.base import DetectorAdapter, DetectorOutput
from .distiller import Distiller, DistillerOutput
from .ema import EMACallback
from .errors import UserError
from .evaluation import STATS, evaluate_detector
from .fast_criterion import LOSSES, use_fast_criterion
from .hub import public_config
from .loading import SELF_TAUGHT
from .matrices import MatrixRecorder, has_matrices
from .methods import CombinedMethod, DistillationMethod
from .norms import SameStatistics
from .pace import Pace
from .phases import Stopwatch, phase
from .progress import TrainingBar
from .resumable import ResumableTrainer
from .streams import SideStream
from .teacher_cache import TeacherCache

METHOD_WEIGHTS = "_method.safetensors"  # the underscore keeps it off the Hub: Trainer does not upload `_*`
RUN_CONFIG = "asd_hf.yaml"
METRICS = "metrics.json"  # of the end, by these models, if they are there
MODELS = ("teacher", "student", "ema")
EMA_FOLDER = "ema"


class DistillationTrainer(ResumableTrainer):
    """Trains a student on labels and on a frozen teacher's predictions.

    Args:
        student: adapter of the model to train. What must not be trained has `requires_grad` off already.
        teacher: adapter of the teacher, which is frozen and put into eval mode; its predictions on disk, which the
            `RowTransform` of `train_dataset` must have as well; "ema" for the moving average of the student, see
            `args.ema_decay`; `None` to train on the labels alone.
        method: what makes the student imitate the teacher; `None` if and only if `teacher` is.
        args: TrainingConfig.
        train_dataset: stream of training samples; its class indices are the student's.
        eval_dataset: stream of evaluation samples with their ground truth.
        category_ids: the data set's own id of each class index; 1 to C by default.
        class_map: what the teacher calls a class of the student, where the names differ.
        run_config: YAML of the whole run, stored beside each checkpoint.
        **kwargs: passed on to Transformers' Trainer (callbacks, optimizers, ...).

    Raises:
        UserError: teacher without method or the reverse, no class in common, a method made for other classes than
            those in common, a moving average that teaches and is not kept, or does not where the method wants it,
            several GPUs in one process.
    """

    loss_is_scaled_for_ga = False  # losses are means over a micro-batch: Trainer divides by the accumulation steps

    def __init__(
        self,
        student: DetectorAdapter,
        teacher: DetectorAdapter | TeacherCache | str | None,
        method: DistillationMethod | CombinedMethod | None,
        args: TrainingConfig,
        train_dataset: DetectionStream | None = None,
        eval_dataset: DetectionStream | None = None,
        category_ids: Sequence[int] | None = None,
        class_map: Mapping[str, str] | None = None,
        run_config: str | None = None,
        **kwargs,
    ) -> None:
        if (teacher is None) != (method is None):
            raise UserError("a teacher needs a method and a method a teacher: give both (model.teacher, method.name)")
        if args.n_gpu > 1:
            raise UserError(
                "several GPUs in one process cannot share detection labels: start with `accelerate launch`"
            )
        if teacher == SELF_TAUGHT and not args.ema_decay:
            raise UserError("model.teacher is the student's moving average: set training.ema_decay, say to 0.9998")
        if method is not None and method.self_taught and teacher != SELF_TAUGHT:
            raise UserError("the method is taught by the student's own moving average: set model.teacher: ema")
        self.adapter, self.method = student, method
        self.category_ids, self.run_config = category_ids, run_config
        criterion = make_criterion(student, args)
        classes = None
        if teacher is not None:
            teacher_spec = student.spec if teacher == SELF_TAUGHT else teacher.spec
            classes = SharedClasses(student.spec, teacher_spec, class_map).to(args.device)
            if method.class_names != classes.names:
                raise UserError(
                    f"the method was made for {len(method.class_names)} classes, but teacher and student share "
                    f"{len(classes.names)}: make it with SharedClasses(...).specs(student.spec, teacher.spec)"
                )
        self.classes, self.class_map = classes, class_map
        if args.channels_last:
            for adapter in (student, teacher):
                if isinstance(adapter, DetectorAdapter):
                    adapter.backbone.to(memory_format=torch.channels_last)
        super().__init__(
            model=Distiller(student, criterion, method, classes),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=student.processor,
            **kwargs,
        )
        for callback in [c for c in self.callback_handler.callbacks if type(c) is ProgressCallback]:
            self.remove_callback(callback)  # Trainer's own; a notebook has another
            self.add_callback(TrainingBar)
        if args.world_size > 1:
            self.add_callback(SameStatistics(student.model))  # before the moving average
        self.ema: EMACallback | None = None
        if args.ema_decay:
            self.ema = EMACallback(student.model, args.ema_decay)
            self.add_callback(self.ema)
            self.ema_adapter = get_adapter(self.ema.model, student.processor)
        self.cache = teacher if isinstance(teacher, TeacherCache) else None
        self.teacher: DetectorAdapter | None = self.ema_adapter if teacher == SELF_TAUGHT else teacher
        if self.cache is not None:
            self.cache.check(method)
            self.teacher = None
        if self.teacher is not None:
            self.teacher.model.requires_grad_(False).eval().to(args.device)
        self._beside = SideStream(args.device if args.teacher_stream and self.teacher else torch.device("cpu"))
        if self.teacher is not None and eval_dataset is not None and has_matrices(method):
            self.add_callback(MatrixRecorder(student, self.teacher, classes, method, eval_dataset))
        self.watch_attention()
        if args.torch_compile:
            for adapter in filter(None, (student, self.teacher)):
                adapter.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        if args.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        self.pace = Pace(args.device, args.log_phases)
        self.add_callback(self.pace)
        self.accelerator.backward = phase("backward")(self.accelerator.backward)

    def _build_accelerator_args(self, **kwargs) -> dict[str, Any]:
        """Trainer's own, but Accelerate compiles nothing: the losses match on the host, where no compiler follows."""
        return super()._build_accelerator_args(**kwargs) | {"dynamo_plugin": TorchDynamoPlugin(backend="no")}

    def watch_attention(self, watch: bool = True) -> None:
        """Lets those models show their attention whose attention the method asks for; or no longer."""
        if self.method is None:
            return
        if "attention" in self.method.requires:
            self.adapter.watch_attention(watch)
        if "attention" in self.method.requires | self.method.teacher_requires:
            self.teacher.watch_attention(watch)

    # -- the step ---------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        measure = None
        if self.method is not None:
            self.method.step = step = self.state.global_step
            measure = "sums" if (step + 1) % max(int(self.state.logging_steps), 1) == 0 else None
        # Phases are measured one after the other.
        with nullcontext() if Stopwatch.active else self._beside.running():
            teacher = self.ask_teacher(inputs)
        outputs = model(
            **{key: inputs[key] for key in ("pixel_values", "pixel_mask", "labels")},
            teacher=teacher,
            join_teacher=self._beside.join,
            measure_gradients=measure,
        )
        if self.args.logging_strategy != IntervalStrategy.NO:
            self._collect(outputs)
        loss = guard_loss(outputs.loss)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args, **kwargs):
        with self.pace.waiting():
            return super().get_batch_samples(*args, **kwargs)

    def _collect(self, outputs: DistillerOutput) -> None:
        """Keeps this step's scalars on the device, until the next log averages them."""
        scalars = {f"loss/{name}": loss.detach() for name, loss in outputs.losses.items()}
        if self.method is not None:
            scalars |= self.method.statistics
        if outputs.gradient_norms is not None:
            ours, task = outputs.gradient_norms["distillation"], outputs.gradient_norms["detection"]
            scalars["distillation_gradient_share"] = ours / (ours + task).clamp(min=1e-12)
            scalars["distillation_gradient_cosine"] = outputs.gradient_cosine
        for name, value in scalars.items():
            self._scalars[name].append(value)

    @torch.no_grad()
    def ask_teacher(self, inputs: dict) -> DetectorOutput | None:
        """The teacher's predictions on its own view of a batch, reduced to the classes that it shares."""
        if self.cache is not None:
            if "teacher" not in inputs:
                raise UserError("the training samples lack the teacher's predictions: give RowTransform predictions")
            with phase("teacher"):
                return self.classes.teacher(self.cache(inputs["teacher"], inputs["pixel_mask"]))
        if self.teacher is None:
            return None
        view = "teacher_" if "teacher_pixel_values" in inputs else ""
        with phase("teacher"), self.accelerator.autocast():
            output = self.teacher(inputs[view + "pixel_values"], inputs[view + "pixel_mask"])
        return self.classes.teacher(output)

    def create_optimizer(self, model=None):
        """AdamW in few groups: backbone and sampling points at a fraction of the rate, the method at its own."""
        if self.optimizer is not None:
            return self.optimizer
        args, distiller = self.args, self.model if model is None else model
        backbone = {id(p) for p in self.adapter.backbone.parameters()}
        groups: dict[tuple[float, float], list[Tensor]] = {(args.learning_rate, args.weight_decay): []}
        for name, parameter in distiller.named_parameters():
            if not parameter.requires_grad:
                continue
            rate = args.learning_rate
            if name.startswith("method."):
                rate = rate if args.method_learning_rate is None else args.method_learning_rate
            elif id(parameter) in backbone:
                rate *= args.backbone_lr_scale
            elif any(fragment in name for fragment in self.adapter.slow_parameters):
                rate *= args.sampling_lr_scale
            # Biases and norms are vectors. A method's parameters are scaffolding: why keep them small?
            decay = args.weight_decay if parameter.dim() > 1 and not name.startswith("method.") else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
        optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(args, distiller)
        self.optimizer = optimizer_class(
            [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items() if params],
            **kwargs,
        )
        return self.optimizer

    @phase("optimizer")
    def _clip_grad_norm(self, model):
        """Student and method are clipped apart: a loud sampler must not shorten the student's step."""
        self.accelerator.unscale_gradients()
        distiller = self.accelerator.unwrap_model(model)
        self._method_norm = None
        if distiller.method is not None and (own := list(distiller.method.parameters())):
            limit = self.args.method_max_grad_norm
            self._method_norm = torch.nn.utils.clip_grad_norm_(
                own, self.args.max_grad_norm if limit is None else limit
            )
        return torch.nn.utils.clip_grad_norm_(distiller.student.parameters(), self.args.max_grad_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.pace.read()
        if "loss" in logs and self._scalars:
            means = torch.stack([torch.stack(v).float().mean() for v in self._scalars.values()])
            means = self.accelerator.reduce(means, reduction="mean").tolist()
            logs |= dict(zip(self._scalars, means, strict=True))
            self._scalars.clear()
        super().log(logs, start_time)

    # -- data: the stream shards itself over ranks and workers, Accelerate never touches it ---------------------------

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset.batch_size != self.args.per_device_train_batch_size:
            raise UserError(
                f"the training stream makes batches of {self.train_dataset.batch_size}, but "
                f"training.per_device_train_batch_size is {self.args.per_device_train_batch_size}"
            )
        return self._loader(self.train_dataset)

    def get_eval_dataloader(self, eval_dataset: DetectionStream | None = None) -> DataLoader:
        stream = self.eval_dataset if eval_dataset is None else eval_dataset
        if stream is None:
            raise UserError("evaluation needs an eval_dataset")
        return self._loader(stream)

    def get_test_dataloader(self, test_dataset: DetectionStream) -> DataLoader:
        return self._loader(test_dataset)

    def _loader(self, stream: DetectionStream) -> DataLoader:
        made_for, here = (stream.rank, stream.world_size), (self.args.process_index, self.args.world_size)
        if made_for != here:
            raise UserError(
                f"the stream was made for rank {made_for[0]} of {made_for[1]}, this is rank {here[0]} of {here[1]}: "
                "give DetectionStream rank=args.process_index and world_size=args.world_size"
            )
        pin = self.args.dataloader_pin_memory and self.args.device.type == "cuda"
        return build_loader(stream, self.args.dataloader_num_workers, pin_memory=pin)

    def num_examples(self, dataloader: DataLoader) -> int:
        return dataloader.dataset.source.num_rows

    # -- evaluation -------------------------------------------------------------------------------------------------

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """COCO's numbers of the student, as `eval_AP` and so on, and of its moving average, as `eval_ema_AP`."""
        metrics, models = {}, {"": self.adapter}
        if self.ema is not None:
            models["ema_"] = self.ema_adapter
        for name, adapter in models.items():
            training = adapter.model.training
            with stopping.deferred(False):
                result, evaluator = self.evaluate_adapter(adapter, dataloader)
            adapter.model.train(training)
            metrics |= {f"{metric_key_prefix}_{name}{stat}": result[stat] for stat in STATS}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=evaluator.num_images)

    def evaluate_adapter(self, adapter: DetectorAdapter, dataloader: DataLoader | None = None):
        """(COCO numbers, evaluator) of any detector on the evaluation data; all ranks must call it."""
        watched = adapter.with_attention
        if watched:
            adapter.watch_attention(False)
        with self.accelerator.autocast():
            evaluated = evaluate_detector(
                adapter,
                self.get_eval_dataloader() if dataloader is None else dataloader,
                class_names=self.adapter.spec.class_names,
                category_ids=self.category_ids,
                class_map=self.class_map if adapter is self.teacher else None,
                device=self.args.device,
                progress=not self.args.disable_tqdm and self.is_world_process_zero(),
            )
        if watched:
            adapter.watch_attention()
        return evaluated

    # -- what is saved: the student as a plain Transformers model, the method's weights beside it ---------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        with moved_in(Path(output_dir or self.args.output_dir)) as folder:
            self._write(folder)

    def _write(self, folder: Path) -> None:
        distiller = self.accelerator.unwrap_model(self.model)
        models = {folder: distiller.student}
        if self.ema is not None:
            models[folder / EMA_FOLDER] = self.ema.model
        for where, model in models.items():
            model.save_pretrained(where)
            self.processing_class.save_pretrained(where)
        if distiller.method is not None and (weights := distiller.method.state_dict()):
            save_file(weights, folder / METHOD_WEIGHTS)
        if self.run_config is not None:
            (folder / RUN_CONFIG).write_text(self.run_config, encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder, distiller = Path(resume_from_checkpoint), self.accelerator.unwrap_model(self.model)
        _restore(distiller.student, folder)
        if self.ema is not None:
            _restore(self.ema.model, folder / EMA_FOLDER)
        if distiller.method is not None and distiller.method.state_dict():
            if not (folder / METHOD_WEIGHTS).is_file():
                raise UserError(
                    f"{folder} holds no weights of the method ({METHOD_WEIGHTS}): was it trained by another?"
                )
            try:
                distiller.method.load_state_dict(load_file(folder / METHOD_WEIGHTS))
            except RuntimeError as error:
                raise UserError(
                    f"{folder} was trained with other options of the method, or another teacher's classes: "
                    f"{' '.join(str(error).split())[:200]}"
                ) from error

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def push_to_hub(self, *args, **kwargs):
        """Trainer's own, with the configuration that is pushed freed of the paths of this machine."""
        private, self.run_config = self.run_config, self.run_config and public_config(self.run_config)
        try:
            return super().push_to_hub(*args, **kwargs)  # saves the model again, and the configuration with it
        finally:
            self.run_config = private
            if private is not None and self.is_world_process_zero():
                (Path(self.args.output_dir) / RUN_CONFIG).write_text(private, encoding="utf-8")


def make_criterion(
    student: DetectorAdapter, args: TrainingConfig
) -> DetectionCriterion | TransformersCriterion | None:
    """The detection loss of the student's family, or None where the adapter computes it, with the student's
    `loss_function`; this is asd_hf's from now on, or Transformers' own with `args.fast_criterion` off.

    Raises:
        UserError: `args.class_loss_weight` is given, which the losses of some families do not know; or
            `args.fast_criterion` is off and Transformers has no loss of this family.
    """
    if not args.fast_criterion and student.spec.family not in LOSSES:
        raise UserError(f"training.fast_criterion: Transformers has no loss for {student.spec.family}: remove it")
    if not student.own_loss:
        weight = student.class_loss_weight if args.class_loss_weight is None else args.class_loss_weight
        if not args.fast_criterion:
            return TransformersCriterion(student.model, weight)
        return DetectionCriterion.from_config(student.model.config, student.spec.activation, weight)
    if args.class_loss_weight is not None:
        raise UserError(
            f"training.class_loss_weight does not apply to {student.spec.family}, whose configuration has weights of "
            "its own: remove it, and set them in model.student.config"
        )
    student.fast_loss = args.fast_criterion
    if args.fast_criterion:
        use_fast_criterion(student.model)
    return None


def _restore(model: PreTrainedModel, folder: Path) -> None:
    """By `from_pretrained`, never by the file's own names: Transformers renames weights when it saves them."""
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder} does not exist")
    saved, report = type(model).from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    if saved.config.id2label != model.config.id2label:
        raise UserError(f"{folder} is a checkpoint of a student with other classes, or in another order: start anew")
    try:
        if report["missing_keys"]:
            raise RuntimeError(f"{len(report['missing_keys'])} weights are missing")
        model.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} is a checkpoint of another student than the configuration's: {reason}") from error
