"""The training loop: Transformers' Trainer with a teacher, exact COCO evaluation and exact resume."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import EarlyStoppingCallback, PreTrainedModel, ProgressCallback, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, IntervalStrategy, TrainOutput

from . import stopping
from .bad_steps import FOLDER as BAD_STEPS
from .bad_steps import Step, StepGuard, guard_loss, write_batches
from .checkpoints import PARTIAL, clear, complete, moved_in, newest_checkpoint, publish, read_manifest, rotate
from .classes import SharedClasses
from .config import TrainingConfig
from .criterion import DetectionCriterion, TransformersCriterion
from .data import DetectionStream, build_loader, require_agreement, require_same, summary, write_left_out
from .detectors import get_adapter
from .detectors.base import DetectorAdapter, DetectorOutput
from .distiller import Distiller, DistillerOutput
from .ema import EMACallback
from .errors import UserError
from .evaluation import STATS, evaluate_detector
from .fast_criterion import LOSSES, use_fast_criterion
from .files import write_whole
from .hub import public_config, write_model_card
from .methods import CombinedMethod, DistillationMethod
from .pace import Pace
from .phases import phase
from .randomness import RandomState
from .student import SELF_TAUGHT
from .teacher_cache import TeacherCache
from .vote import Vote

logger = logging.getLogger(__name__)

METHOD_WEIGHTS = "_method.safetensors"  # the underscore keeps it off the Hub: Trainer does not upload `_*`
RUN_CONFIG = "asd_hf.yaml"
EMA_FOLDER = "ema"
KEPT_BAD_STEPS = 3  # each is as large as the student
_TORCH_WRITER = "inline_container"  # stands in what torch.save says of a file that cannot be written
LOG_WINDOW = "log_window_{rank}.safetensors"  # what is summed up for the next entry of the log


class DistillationTrainer(Trainer):
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
        card: what the model card says beyond the run's own figures, see `hub.write_model_card`.
        **kwargs: passed on to Transformers' Trainer (callbacks, optimizers, ...).

    Raises:
        UserError: teacher without method or the reverse, no class in common, a method made for other classes than
            those in common, a moving average that teaches and is not kept, or does not where the method wants it,
            several GPUs in one process, FSDP or DeepSpeed.
    """

    loss_is_scaled_for_ga = False  # losses are means over a micro-batch: Trainer divides by the accumulation steps
    _partial: Path | None = None  # where a checkpoint is being written

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
        card: dict | None = None,
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
        self.category_ids, self.run_config, self.card = category_ids, run_config, card
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
        super().__init__(
            model=Distiller(student, criterion, method, classes),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=student.processor,
            **kwargs,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError("FSDP and DeepSpeed are not supported: start with distributed_type MULTI_GPU")
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
        self.watch_attention()
        if args.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        self._scalars: dict[str, list[Tensor]] = defaultdict(list)
        self.pace = Pace(args.device, args.log_phases)
        self.add_callback(self.pace)
        self.accelerator.backward = phase("backward")(self.accelerator.backward)
        self.bad_steps = 0  # left out, since their loss or gradient is not finite
        self._guard: StepGuard | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """Trainer's own, which goes on from a checkpoint exactly, whenever that was written.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest whole one of the output folder.

        Raises:
            UserError: there is no data or no checkpoint, the number of steps is not known, or the checkpoint is
                damaged or of other data, another student or method.
            Stopped: by a signal; after the step, which is saved.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise UserError(f"{self.args.output_dir} holds no checkpoint to go on from")
        if self.train_dataset is None:
            raise UserError("training needs a train_dataset")
        if self.args.max_steps <= 0 and self.train_dataset.batches_per_epoch is None:
            raise UserError("the length of this data source is not known: set training.max_steps")
        source = self.train_dataset.source
        require_agreement(source.faults)
        self._vote = Vote(self.args.world_size)
        self._due, self.bad_steps = {"evaluate": False, "save": False}, 0
        self._last_step = {"grad_norm": 0.0, "learning_rate": 0.0}
        self._guard = self._left = self._random_state = self._closed_step = self._saved_step = None
        if resume_from_checkpoint:
            resume_from_checkpoint = str(resume_from_checkpoint)
            self._left = self._check_data(resume_from_checkpoint)["left"]
            self.args.eval_on_start = False  # it was done
            require_same(Path(resume_from_checkpoint).parent, source.faults)
        if self.is_world_process_zero():
            write_left_out(Path(self.args.output_dir), source.faults)
        try:
            with stopping.deferred():
                output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                    callback.training_bar.close()  # what is said of the end stands on a line of its own
        if text := summary(source):
            logger.info("training data: %s", text)
        return output

    def _check_data(self, checkpoint: str) -> dict:
        """The manifest of a checkpoint, if it was trained on this data; says what makes the order another one."""
        manifest, here = read_manifest(Path(checkpoint)), self._order()
        was = manifest["order"]
        if was["data"] != here["data"]:
            raise UserError(
                f"{checkpoint} was trained on other data, or the data has changed since (fingerprint {was['data']}, "
                f"now {here['data']}): set another training.output_dir, or restore the data"
            )
        changed = [f"{name} was {was[name]}, is {here[name]}" for name in here if was[name] != here[name]]
        if changed:
            logger.warning("%s: images come in another order than they would have: %s", checkpoint, ", ".join(changed))
        return manifest

    def _order(self) -> dict[str, str | int]:
        """All that the order of the training images follows from."""
        stream = self.train_dataset
        return {
            "data": stream.source.fingerprint,
            "seed": stream.seed,
            "ranks": stream.world_size,
            "workers": stream.num_workers,
            "batch size": stream.batch_size,
            "accumulation steps": self.args.gradient_accumulation_steps,
            "shuffle buffer": stream.shuffle_buffer,
        }

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
        outputs = model(
            **{key: inputs[key] for key in ("pixel_values", "pixel_mask", "labels")},
            teacher=self.ask_teacher(inputs),
            measure_gradients=measure,
        )
        if self.args.logging_strategy != IntervalStrategy.NO:
            self._collect(outputs)
        loss = guard_loss(outputs.loss)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        if self._guards():
            if self._guard is None:
                self._guard = StepGuard(self.accelerator.unwrap_model(model), self.optimizer.optimizer)
            if self._guard.step is None:
                self._guard.begin(self.state.global_step)
            self._guard.step.batches.append(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def _guards(self) -> bool:
        """Whether bad steps are left out here, and not by the scaler of fp16, which meets them as it goes."""
        return self.optimizer is not None and self.accelerator.scaler is None

    def _get_grad_norm(self, model, grad_norm=None):
        """Trainer's own, the last before the optimizer's step, which is left out if any norm is not finite.

        Raises:
            UserError: `training.max_bad_steps` were left out.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if self._guards():
            self._count_bad_steps(wait=True)  # the step before: it is known by now
            finite = norm.isfinite()
            if grad_norm is not None and self._method_norm is not None:
                finite = finite & self._method_norm.isfinite()
            self._guard.judge(finite)
            self._count_bad_steps(wait=False)
        return norm

    def _count_bad_steps(self, wait: bool) -> None:
        """Keeps and counts the bad step that the guard has heard of; `wait` for it to hear of the last one."""
        if self._guard is None:
            return
        for step in self._guard.bad(wait):
            self.bad_steps += 1
            folder = Path(self.args.output_dir) / BAD_STEPS / f"step-{step.number + 1}"
            if self.bad_steps <= KEPT_BAD_STEPS:
                self._keep_bad_step(step, folder)
            logger.warning(
                "step %d was left out: its loss or gradient is not finite (%d of at most %d such steps)%s",
                step.number + 1,
                self.bad_steps,
                self.args.max_bad_steps,
                f"; `asd-hf replay {folder}` shows where" if self.bad_steps <= KEPT_BAD_STEPS else "",
            )
            if self.bad_steps >= self.args.max_bad_steps:
                raise UserError(
                    f"{self.bad_steps} steps had a loss or gradient that is not finite, the last of them step "
                    f"{step.number + 1} (training.max_bad_steps): lower training.learning_rate, or see with "
                    f"`asd-hf replay` what {folder.parent} holds of the first ones"
                )

    def _keep_bad_step(self, step: Step, folder: Path) -> None:
        try:
            write_batches(step, folder, self.args.process_index)
            if self.args.should_save:
                self._write(folder, self.accelerator.unwrap_model(self.model))
                images = [[int(label["image_id"]) for label in batch["labels"]] for batch in step.batches]
                write_whole(folder / "step.json", json.dumps({"step": step.number, "images": images}) + "\n")
        except (OSError, SafetensorError) as error:  # a full disk must not end a training that goes on
            logger.warning("%s could not be written: %s", folder, error)

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
                return self.classes.teacher(self.cache(inputs["teacher"]))
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
        if "train_loss" in logs:  # of the whole training, not of its steps since it was last interrupted
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        if self.bad_steps:
            logs["bad_steps"] = self.bad_steps
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

    def _run_epoch(
        self,
        *,
        epoch,
        train_dataloader,
        epochs_trained,
        steps_trained_in_current_epoch,
        resume_from_checkpoint,
        **kwargs,
    ):
        """Tells the stream which epoch it is and where to begin in it."""
        resumed = resume_from_checkpoint is not None and epoch == epochs_trained
        if resumed and self._take_up(resume_from_checkpoint, epoch, **kwargs):
            return
        skipped = steps_trained_in_current_epoch if resumed else 0
        self.train_dataset.set_epoch(epoch)
        self.train_dataset.skip_batches = skipped
        if skipped:
            train_dataloader = DataLoader(_Resumed(train_dataloader, skipped), batch_size=None, collate_fn=_as_it_is)
        super()._run_epoch(
            epoch=epoch,
            train_dataloader=train_dataloader,
            epochs_trained=epochs_trained,
            steps_trained_in_current_epoch=steps_trained_in_current_epoch,
            resume_from_checkpoint=resume_from_checkpoint,
            **kwargs,
        )

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

    # -- checkpoints, and how they are taken up again -----------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args, learning_rate=None) -> None:
        """Trainer's own, which closes each step and then each epoch; here the run stops if it was told to.

        Raises:
            Stopped: the step is saved, with what was still to be done at it.
        """
        control, step = self.control, self.state.global_step
        self._last_step = {"grad_norm": args[1], "learning_rate": learning_rate}
        self._at_epoch_end, self._closed_step = self._closed_step == step, step
        self._due = {"evaluate": control.should_evaluate, "save": control.should_save}
        # What an epoch's end brings need not be saved where the step is: it is done when that is taken up.
        if stop := self._vote(stopping.requested()):
            control.should_evaluate, control.should_save = False, self._saved_step != step
        elif control.should_evaluate and self.args.world_size == 1:
            try:
                random_state = RandomState.now()
                super()._maybe_log_save_evaluate(*args, learning_rate=learning_rate)
            except stopping.Stopped:
                random_state.restore()
                if self._saved_step != step:
                    self._save_checkpoint(self.model, None)
                raise
            return
        else:
            self._due = dict.fromkeys(self._due, False)
        super()._maybe_log_save_evaluate(*args, learning_rate=learning_rate)
        if stop:
            raise stopping.stop()

    def _evaluate(self, *args, **kwargs) -> dict[str, float]:
        metrics = super()._evaluate(*args, **kwargs)
        self._due = dict.fromkeys(self._due, False)
        return metrics

    def _save_checkpoint(self, model, trial) -> None:
        """Trainer's own, written beside and named when it is complete; only then are older ones deleted.

        Raises:
            UserError: it could not be written; what was there before is as it was.
        """
        self._count_bad_steps(wait=True)
        state, folder = self.state, Path(super()._get_output_dir(trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self._partial = folder / PARTIAL
        partial = self._partial / checkpoint.name
        try:
            if self.args.should_save:
                clear(self._partial)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            save_file(self._log_window(), partial / LOG_WINDOW.format(rank=self.args.process_index))
            best = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            if best == checkpoint or best.is_dir():
                state.best_model_checkpoint = str(best)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                state.save_to_json(str(partial / TRAINER_STATE_NAME))
                early = self.control.should_training_stop and state.global_step < state.max_steps
                left = self._due | {"epoch_ended": self._at_epoch_end, "stopped_early": early}
                complete(partial, {"step": state.global_step, "order": self._order(), "left": left})
                publish(partial, checkpoint)
                rotate(checkpoint, self.args.save_total_limit, state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()
        except (OSError, SafetensorError, RuntimeError) as error:
            if type(error) is RuntimeError and _TORCH_WRITER not in str(error):
                raise
            clear(self._partial)
            reason = " ".join(str(error).split())[:200]
            if isinstance(error, RuntimeError):
                reason = f"a file ended early, is the disk full? ({reason})"
            raise UserError(f"{checkpoint} cannot be written: {reason}; whole checkpoints are as they were") from error
        finally:
            self._partial = None
        self._saved_step = state.global_step

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._partial is None else str(self._partial)

    def _log_window(self) -> dict[str, Tensor]:
        """What was summed up since the last entry of the log."""
        return {f"scalars/{name}": torch.stack(values) for name, values in self._scalars.items()} | {
            "loss": self._tr_loss,
            "total_loss": torch.tensor(self._total_loss_scalar, dtype=torch.float64),
            "last_logged": torch.tensor(self._globalstep_last_logged),
            "bad_steps": torch.tensor(self.bad_steps),
            **{name: torch.as_tensor(value, dtype=torch.float64) for name, value in self._last_step.items()},
        }

    def _load_log_window(self, file: Path) -> None:
        if not file.is_file():  # written by fewer ranks
            return
        window = {name: value.to(self.args.device) for name, value in load_file(file).items()}
        self._tr_loss = window.pop("loss")
        self._total_loss_scalar = window.pop("total_loss").item()
        self._globalstep_last_logged = window.pop("last_logged").item()
        self.bad_steps = window.pop("bad_steps").item()
        self._last_step = {name: window.pop(name).item() for name in self._last_step}
        for name, values in window.items():
            self._scalars[name.removeprefix("scalars/")] = list(values.unbind())

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, *args) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(max_steps, num_update_steps_per_epoch, *args)
        # All steps of an epoch are done, but its evaluation, say, is not.
        left = self._left
        self._epoch_is_open = left is not None and batches == 0 and (not left["epoch_ended"] or left["evaluate"])
        return epochs - self._epoch_is_open, batches

    def _take_up(
        self, checkpoint, epoch, *, model, trial, ignore_keys_for_eval, start_time, num_update_steps_per_epoch, **_
    ) -> bool:
        """Does what was left to do at the checkpoint's step; whether the epoch is over with it, or the training."""
        left, step = self._left, self.state.global_step
        self._load_rng_state(checkpoint)
        self._load_log_window(Path(checkpoint) / LOG_WINDOW.format(rank=self.args.process_index))
        last = self._last_step
        arguments = (self._tr_loss, last["grad_norm"], model, trial, epoch, ignore_keys_for_eval, start_time)
        self._saved_step, self._closed_step = step, step if left["epoch_ended"] else None
        if left["evaluate"]:
            self.control.should_evaluate, self.control.should_save = True, left["save"]
            self._maybe_log_save_evaluate(*arguments, learning_rate=last["learning_rate"])
        self.control.should_training_stop |= left["stopped_early"] or step >= self.state.max_steps
        at_the_end = step % num_update_steps_per_epoch == 0
        if (at_the_end or self.control.should_training_stop) and not left["epoch_ended"]:
            self._closed_step = step
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._maybe_log_save_evaluate(*arguments, learning_rate=last["learning_rate"])
        self._random_state = RandomState.now()
        return self.control.should_training_stop or self._epoch_is_open

    def _load_rng_state(self, checkpoint) -> None:
        """Trainer's own; later, what the generators were when the checkpoint had been taken up."""
        if self._random_state is None:
            super()._load_rng_state(checkpoint)
        else:
            self._random_state.restore()

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        name = EarlyStoppingCallback.__name__
        if (saved := self.state.stateful_callbacks.get(name)) is not None:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, EarlyStoppingCallback):  # as patient as now, but it has waited already
                    callback.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]

    # -- what is saved: the student as a plain Transformers model, the method's weights beside it ---------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        distiller = self.accelerator.unwrap_model(self.model)
        folder = Path(output_dir or self.args.output_dir)
        with moved_in(folder) as new:
            self._write(new, distiller)

    def _write(self, folder: Path, distiller: Distiller) -> None:
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

    def create_model_card(self, **kwargs) -> None:
        if self.is_world_process_zero() and self.card is not None:
            write_model_card(self.args.output_dir, **self.card)


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


class _Resumed(IterableDataset):
    """A loader that begins within an epoch, behind as many empty batches as Trainer will discard to get there."""

    def __init__(self, loader: DataLoader, skipped: int) -> None:
        self.loader, self.skipped = loader, skipped

    def __iter__(self):
        yield from repeat(None, self.skipped)
        yield from self.loader


def _as_it_is(batch):
    return batch


def _restore(model: PreTrainedModel, folder: Path) -> None:
    """By `from_pretrained`, never by the file's own names: Transformers renames weights when it saves them."""
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder} does not exist")
    saved, report = type(model).from_pretrained(folder, output_loading_info=True)
    if saved.config.id2label != model.config.id2label:
        raise UserError(f"{folder} is a checkpoint of a student with other classes, or in another order: start anew")
    try:
        if report["missing_keys"]:
            raise RuntimeError(f"{len(report['missing_keys'])} weights are missing")
        model.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} is a checkpoint of another student than the configuration's: {reason}") from error
