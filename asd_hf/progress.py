"""What long work shows while it runs, on stderr; nothing but warnings under `--quiet`, which is `ASD_HF_QUIET=1`."""

from __future__ import annotations

import logging
import os
import shutil
import sys

from tqdm import auto
from transformers import ProgressCallback

QUIET = "ASD_HF_QUIET"  # of the environment: processes that this one starts are quiet as well


def is_quiet() -> bool:
    return os.environ.get(QUIET, "") not in ("", "0")


def terminal_width() -> int:
    """Columns of the terminal; what goes elsewhere, into a file, is not folded."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000


class tqdm(auto.tqdm):
    """The progress bar of every long work here."""

    def __init__(self, *args, disable: bool = False, **options) -> None:
        super().__init__(*args, disable=disable or is_quiet(), **options)


class TrainingBar(ProgressCallback):
    """Trainer's bar, with a table above it in place of all that is logged: the log itself keeps every number."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._titles: list[str] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is None:
            return
        if "loss" in logs:
            cells = {"step": f"{state.global_step:>6}"} | _cells(logs)
            widths = [max(len(title), len(cell), 5) for title, cell in cells.items()]
            rows = [cells.values()]
            if self._titles != list(cells):
                self._titles = list(cells)
                rows.insert(0, cells)
            for row in rows:
                self._write("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
        for prefix, model in {"eval_": "student", "eval_ema_": "moving average"}.items():
            numbers = {key.removeprefix(prefix): value for key, value in logs.items() if key.startswith(f"{prefix}AP")}
            if numbers:
                shown = ", ".join(f"{name} {100 * value:.1f}" for name, value in numbers.items() if value >= 0)
                self._write(f"{state.global_step:>6}  {model}: {shown or 'no objects'}")

    def _write(self, line: str) -> None:
        self.training_bar.write(line, file=sys.stderr)


def _cells(logs: dict[str, float]) -> dict[str, str]:
    """Of one entry of the log, by the title of the column. Losses of the detector itself are named `loss/loss_...`."""
    terms = {name: value for name, value in logs.items() if name.startswith("loss/")}
    detection = sum(value for name, value in terms.items() if name.startswith("loss/loss_"))
    cells = {"epoch": f"{logs['epoch']:.2f}", "loss": f"{logs['loss']:>6.3f}"}
    if any(not name.startswith("loss/loss_") for name in terms):
        cells |= {"detection": f"{detection:.3f}", "distillation": f"{sum(terms.values()) - detection:.3f}"}
    columns = {
        "share": ("distillation_gradient_share", ".0%"),
        "gradient": ("grad_norm", ".2f"),
        "rate": ("learning_rate", ">7.1e"),
        "s/step": ("step_runtime", ">6.3f"),
        "bad steps": ("bad_steps", ""),
    }
    return cells | {title: format(logs[key], form) for title, (key, form) in columns.items() if key in logs}


class _AboveBars(logging.StreamHandler):
    """Writes to stderr, and a bar that is there moves down a line."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            auto.tqdm.write(self.format(record), file=self.stream)
        except Exception:  # as every handler: a log that cannot be written ends nothing
            self.handleError(record)


def show_logs(rank: int) -> None:
    """Shows what this package logs: everything on rank 0, warnings of the others. Other packages stay as set."""
    package = logging.getLogger("asd_hf")
    package.setLevel(logging.INFO if rank == 0 and not is_quiet() else logging.WARNING)
    if not package.handlers:
        package.addHandler(_AboveBars())
