"""Transformers' Trainer that loses nothing: whole checkpoints, exact resume, orderly stops, bad steps left out."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from itertools import repeat
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput

from . import stopping
from .bad_steps import FOLDER as BAD_STEPS
from .bad_steps import Step, StepGuard, write_batches
from .checkpoints import PARTIAL, clear, complete, newest_checkpoint, publish, read_manifest, rotate, writing
from .data import require_agreement, require_same, summary, write_left_out
from .errors import UserError
from .files import write_whole
from .randomness import RandomState
from .ranks import require_shared
from .vote import Vote

logger = logging.getLogger(__name__)

KEPT_BAD_STEPS = 3  # each is as large as the student
_TORCH_WRITER = ("inline_container", "iostream")  # stand in what torch.save says of a file that cannot be written
LOG_WINDOW = "log_window_{rank}.safetensors"  # what is summed up for the next entry of the log


class ResumableTrainer(Trainer):
    """Trains on a `DetectionStream` with `TrainingConfig`; what a run is, its subclass says. See docs/robustness.md.

    A subclass gives `_write`, and losses that passed through `bad_steps.guard_loss`.

    Attributes:
        bad_steps: how many were left out, since their loss or gradient is not finite.
    """

    _partial: Path | None = None  # where a checkpoint is being written
    _guard: StepGuard | None = None
    _method_norm: Tensor | None = None  # of gradients that a subclass clips apart from those of the model
    bad_steps = 0

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._scalars: dict[str, list[Tensor]] = defaultdict(list)  # what the next entry of the log averages

    def _write(self, folder: Path) -> None:
        """Writes all that is trained into `folder`."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """Trainer's own, which goes on from a checkpoint exactly, whenever that was written.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest whole one of the output folder.

        Raises:
            UserError: there is no data or no checkpoint, the number of steps is not known, the checkpoint is
                damaged or of other data, another student or method, or the ranks do not share the output folder.
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
        if self.args.save_strategy != SaveStrategy.NO:
            require_shared(Path(self.args.output_dir))
        self._vote = Vote(self.args.world_size, self.args.ddp_timeout_delta)
        self._due, self.bad_steps = {"evaluate": False, "save": False}, 0
        self._last_step = {"grad_norm": 0.0, "learning_rate": 0.0}
        self._guard = self._left = self._random_state = self._closed_step = self._saved_step = None
        if resume_from_checkpoint:
            resume_from_checkpoint = str(resume_from_checkpoint)
            require_same(Path(resume_from_checkpoint).parent, source.faults)
            self._left = self._check_data(resume_from_checkpoint)["left"]
            self.args.eval_on_start = False  # it was done
        if self.is_world_process_zero():
            with writing(Path(self.args.output_dir)):
                write_left_out(Path(self.args.output_dir), source.faults)
        try:
            with stopping.deferred():
                output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                    callback.training_bar.close()  # what is said of the end stands on a line of its own
        if self.state.global_step > self.state.max_steps:
            logger.warning(
                "%s has %d steps, more than the %d of this run: nothing was trained",
                resume_from_checkpoint,
                self.state.global_step,
                self.state.max_steps,
            )
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

    # -- steps that are left out --------------------------------------------------------------------------------------

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
                self._write(folder)
                images = [[int(label["image_id"]) for label in batch["labels"]] for batch in step.batches]
                write_whole(folder / "step.json", json.dumps({"step": step.number, "images": images}) + "\n")
        except (OSError, SafetensorError) as error:  # a full disk must not end a training that goes on
            logger.warning("%s could not be written: %s", folder, error)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:  # of the whole training, not of its steps since it was last interrupted
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        if self.bad_steps:
            logs["bad_steps"] = self.bad_steps
        super().log(logs, start_time)

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
            if isinstance(error, RuntimeError) and not any(part in str(error) for part in _TORCH_WRITER):
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


class _Resumed(IterableDataset):
    """A loader that begins within an epoch, behind as many empty batches as Trainer will discard to get there."""

    def __init__(self, loader: DataLoader, skipped: int) -> None:
        self.loader, self.skipped = loader, skipped

    def __iter__(self):
        yield from repeat(None, self.skipped)
        yield from self.loader


def _as_it_is(batch):
    return batch
