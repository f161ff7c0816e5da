"""The records of a comparison's runs: what each holds, and what is read from several of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from ..evaluation import STATS
from .verdict import common_seeds

# Of the training log, beside the methods' own statistics.
GRADIENTS = ("distillation_gradient_share", "distillation_gradient_cosine")
BY_SIZE, BY_CLASS = "objects by size", "objects by class"
SIZES = {"APs": "small", "APm": "medium", "APl": "large"}

POINT = {"step": int, "seconds": float}
RECORD = {  # as far as it is read here: types, objects by their keys, lists by what they hold
    "setting": str,
    "method": str,
    "seed": int,
    "metrics": dict.fromkeys(STATS, float),
    "per_class": {},  # AP by name
    "bootstrap": {"seed": int, "AP": [float]},
    "num_images": int,
    "data_fingerprint": str,
    "student_sha256": str,
    "teacher": object,  # {"AP": float}, or null
    "steps": int,
    "seconds": float,
    "ms_per_step": float,
    "peak_memory_mib": float,
    "device": str,
    "curves": {"train": [POINT], "eval": [POINT | {"AP": float}]},
}
_KINDS = {str: "text", int: "an integer", float: "a finite number", dict: "an object", list: "a list"}


def holds_records(folder: Path) -> bool:
    """Whether there is anything for `load_runs`."""
    return any(folder.rglob("*.json"))


def load_runs(folder: Path) -> dict[str, list[dict]]:
    """All records below `folder`, which are all its `*.json`, by setting.

    Raises:
        UserError: there is none; a file is no record (named with the key that is wrong); a run is there twice; a
            setting cannot be the name of a file.
    """
    settings: dict[str, list[dict]] = {}
    files: dict[tuple[str, str, int], Path] = {}
    for file in sorted(folder.rglob("*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file} is not JSON: {error}") from None
        _check(record, RECORD, "", file)
        if record["teacher"] is not None:
            _check(record["teacher"], {"AP": float}, "teacher", file)
        setting = record["setting"]
        if setting in ("", ".", "..") or re.search(r"[/\\\0]", setting):
            raise UserError(f"{file}: the setting {setting!r} cannot be the name of a file")
        first = files.setdefault((setting, record["method"], record["seed"]), file)
        if first is not file:
            raise UserError(f"{first} and {file} are records of the same setting, method and seed")
        settings.setdefault(setting, []).append(record)
    if not settings:
        raise UserError(f"{folder}: no record of a run (*.json) is there")
    return dict(sorted(settings.items()))


def _check(value: Any, shape: Any, key: str, file: Path) -> None:
    """Raises a UserError if `value`, which `file` has under `key`, is not as `shape` says."""
    kind = shape if isinstance(shape, type) else type(shape)
    fits = isinstance(value, int | float) and math.isfinite(value) if kind is float else isinstance(value, kind)
    if not fits:
        raise UserError(f"{file} is not the record of a run: {key or 'it'} is not {_KINDS[kind]}")
    for name, inner in shape.items() if kind is dict else ():
        path = f"{key}.{name}".lstrip(".")
        if name not in value:
            raise UserError(f"{file} is not the record of a run: {path} is missing")
        _check(value[name], inner, path, file)
    for index, item in enumerate(value if kind is list else ()):
        _check(item, shape[0], f"{key}[{index}]", file)


def ranked(runs: Sequence[dict], baseline: str) -> dict[str, list[dict]]:
    """The records of a setting by method: the baseline first, then by mean AP, the best first."""
    methods: dict[str, list[dict]] = {}
    for run in runs:
        methods.setdefault(run["method"], []).append(run)
    order = sorted(methods, key=lambda name: (name != baseline, -mean_ap(methods[name]), name))
    return {name: methods[name] for name in order}


def mean_ap(runs: Sequence[dict]) -> float:
    return fmean(run["metrics"]["AP"] for run in runs)


def teachers(runs: Sequence[dict]) -> dict[str, float]:
    """AP of each teacher by what to call it: "teacher" for that of most methods, "teacher of ..." for others."""
    taught: dict[float, dict[str, None]] = {}
    for run in runs:
        if run["teacher"] is not None:
            taught.setdefault(round(run["teacher"]["AP"], 4), {})[run["method"]] = None
    usual = max(taught, key=lambda ap: len(taught[ap]), default=None)
    names: dict[str, float] = {}
    for ap, (first, *others) in taught.items():
        more = f" and {len(others)} more" * bool(others)
        names["teacher" if ap == usual else f"teacher of {first}{more}"] = ap
    return names


class Curve(NamedTuple):
    """AP at the evaluations during training.

    Attributes:
        steps, seconds: (P,), means over seeds.
        ap: (seeds, P).
    """

    steps: np.ndarray
    seconds: np.ndarray
    ap: np.ndarray


def curve(runs: Sequence[dict]) -> Curve | None:
    """The evaluations of one method's runs, brought together by the share of its steps that a run has taken.

    Runs with a budget of minutes differ in their steps; their schedules go by the share. Between its evaluations a run
    is interpolated linearly. None if a run has no evaluation.
    """
    points = [run["curves"]["eval"] for run in runs]
    if not points or not all(points):
        return None
    shares = [np.array([p["step"] for p in own]) / own[-1]["step"] for own in points]
    grid = np.unique(np.concatenate(shares))
    grid = grid[grid >= max(own[0] for own in shares)]

    def along(key: str) -> np.ndarray:  # (seeds, P)
        pairs = zip(shares, points, strict=True)
        return np.array([np.interp(grid, share, [p[key] for p in own]) for share, own in pairs])

    return Curve(along("step").mean(0), along("seconds").mean(0), along("AP"))


def logged_statistics(runs: Sequence[dict]) -> dict[str, dict[int, float]]:
    """By statistic and step, the mean over seeds, at the steps that all of them have."""
    values: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        for point in run["curves"]["train"]:
            for key, value in point.items():
                if key in GRADIENTS or ("/" in key and not key.startswith("loss/")):
                    values.setdefault(key, {}).setdefault(point["step"], []).append(value)
    means = {
        key: {step: fmean(found) for step, found in sorted(own.items()) if len(found) == len(runs)}
        for key, own in values.items()
    }
    return {key: own for key, own in means.items() if own}


def gains_over(runs: Sequence[dict], baseline_runs: Sequence[dict]) -> dict[tuple[str, str], list[float]]:
    """By kind of object, how many points AP lies above the baseline's with each seed in common."""
    ours, theirs = ({run["seed"]: _by_kind(run) for run in found} for found in (runs, baseline_runs))
    seeds = common_seeds(runs, baseline_runs)
    kinds = ours[seeds[0]] if seeds else ()
    kinds = [kind for kind in kinds if all(kind in side[seed] for side in (ours, theirs) for seed in seeds)]
    return {kind: [100 * (ours[seed][kind] - theirs[seed][kind]) for seed in seeds] for kind in kinds}


def _by_kind(run: dict) -> dict[tuple[str, str], float]:
    """AP by (`BY_SIZE` or `BY_CLASS`, which); without what the evaluation images do not show."""
    found = {(BY_SIZE, size): run["metrics"][key] for key, size in SIZES.items()}
    found |= {(BY_CLASS, name): ap for name, ap in run["per_class"].items()}
    return {kind: ap for kind, ap in found.items() if ap >= 0}
