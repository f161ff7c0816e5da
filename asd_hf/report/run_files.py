"""What a run has left in its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME

from ..checkpoints import all_checkpoints
from ..config import NO_METHOD, RunConfig, build_config, override, read_sections
from ..errors import UserError
from ..matrices import FOLDER as MATRICES
from ..trainer import EMA_FOLDER, METRICS, RUN_CONFIG

# All that is asked of the training's own settings; others may suit the machine that trained alone.
_TRAINING = ("per_device_eval_batch_size", "dataloader_num_workers", "use_cpu")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass
class RunFiles:
    """A run's folder, read.

    Attributes:
        config: with no more of its training than evaluation needs.
        training: what was given of it.
        metrics: of the end, see `commands.train.train`; empty of a run that has not ended.
        log: Trainer's, by rising step.
        max_steps: that the run has or shall have.
        weights: folder of the student, or of its moving average where one is kept.
    """

    folder: Path
    config: RunConfig
    training: dict[str, Any]
    metrics: dict[str, Any]
    log: list[dict[str, float]]
    max_steps: int
    weights: Path

    @property
    def judged(self) -> str:
        """Of `metrics`: the student that one would deploy."""
        return "ema" if self.weights.name == EMA_FOLDER else "student"

    @property
    def method(self) -> str:
        name = self.config.method_name
        return "no distillation" if name == NO_METHOD else name

    @property
    def steps(self) -> int:
        return max((entry["step"] for entry in self.log), default=0)

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of all entries of the log that have it, by rising step."""
        values = {entry["step"]: entry[key] for entry in self.log if key in entry}
        return sorted(values.items())

    @property
    def seconds(self) -> float | None:
        """Of training, without evaluations and checkpoints, by the time of a step in the log."""
        done, total = 0, 0.0
        for step, seconds in self.curve("step_runtime"):
            total += seconds * (step - done)
            done = step
        return total or None

    def matrices(self) -> dict[int, dict[str, Tensor]]:
        """The sampling matrices of one image by step, see `matrices.MatrixRecorder`."""
        files = {
            int(file.stem.removeprefix("step-")): file for file in (self.folder / MATRICES).glob("step-*.safetensors")
        }
        return {step: load_file(files[step]) for step in sorted(files)}


def read_run(folder: Path, overrides: list[str] | None = None) -> RunFiles:
    """Reads the folder of a run of `asd-hf train`, which need not have ended.

    Args:
        overrides: `section.key=value` in place of what the run had, such as where its data lies now.

    Raises:
        UserError: it holds no run, or a file of it cannot be read.
    """
    if not (folder / RUN_CONFIG).is_file():
        checkpoints = all_checkpoints(folder)
        if not checkpoints or not (checkpoints[-1] / RUN_CONFIG).is_file():
            raise UserError(f"{folder} holds no run of asd-hf train: it has no {RUN_CONFIG}")
        config_file = checkpoints[-1] / RUN_CONFIG
    else:
        config_file = folder / RUN_CONFIG
    raw = read_sections(config_file)
    for item in overrides or []:
        override(raw, item)
    training = raw.get("training", {})
    kept = {key: training[key] for key in _TRAINING if key in training} | {"output_dir": str(folder), "report_to": []}
    config = build_config(raw | {"training": kept}, str(config_file))
    metrics = _json(folder / METRICS) if (folder / METRICS).is_file() else {}
    state = _state(folder)
    homes = [home for home in (folder, *reversed(all_checkpoints(folder))) if _has_weights(home)]
    if not homes:
        raise UserError(f"{folder} holds no weights of a student yet")
    averaged = homes[0] / EMA_FOLDER
    return RunFiles(
        folder=folder,
        config=config,
        training=training,
        metrics=metrics,
        log=state.get("log_history", []),
        max_steps=state.get("max_steps", 0),
        weights=averaged if _has_weights(averaged) else homes[0],
    )


def _state(folder: Path) -> dict:
    """Trainer's: of the end, or of the newest checkpoint."""
    homes = [folder, *reversed(all_checkpoints(folder))]
    file = next((home / TRAINER_STATE_NAME for home in homes if (home / TRAINER_STATE_NAME).is_file()), None)
    return {} if file is None else _json(file)


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in WEIGHTS)


def _json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
