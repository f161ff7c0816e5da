"""What a comparison found for the method of one run: which of its records are of the same setting, and their gain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ..config import NO_METHOD, TrainingConfig
from ..errors import UserError
from ..registry import nearest
from .records import load_runs
from .verdict import CONFIDENCE, paired_difference

# Keys of `training` that decide what is written and shown, how often, and with which luck; the steps are counted.
_ALIKE = (
    *("output_dir", "seed", "run_name", "report_to", "disable_tqdm", "push_to_hub", "load_best_model_at_end"),
    *("early_stopping_patience", "max_steps", "num_train_epochs", "log_phases", "use_cpu"),
)
_ALIKE_PREFIXES = (
    *("hub_", "logging_", "save_", "eval_", "dataloader_", "per_device_eval_", "metric_for_best_", "greater_is_"),
)
_DEFAULTS = {field.name: field.default for field in fields(TrainingConfig) if field.default is not MISSING}
_SHOWN = 4


def gain(folder: Path, config: dict, fingerprint: str, steps: int | None, baseline: str = NO_METHOD) -> str:
    """The sentence of a model card about the difference of AP that the method of a run makes.

    Args:
        folder: of records.
        config: the run's resolved configuration without local paths, as `hub.public_config` has it.
        fingerprint: of its evaluation images.
        steps: that it was trained; None if they are not known.
        baseline: what the method is compared with.

    Raises:
        UserError: no record is of such a run (the nearest is named, with what differs), it is the baseline itself, or
            the records cannot be compared.
    """
    settings = load_runs(folder)
    found = [
        (list(_unlike(run, config, fingerprint, steps)), setting, run["method"])
        for setting, runs in settings.items()
        for run in runs
    ]
    differing, setting, method = min(found, key=lambda entry: len(entry[0]))
    if differing:
        more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise UserError(
            f"{folder} has no record of such a run: {setting}/{method}, the nearest, has other "
            f"{', '.join(differing[:_SHOWN])}{more}"
        )
    methods = {name: [run for run in settings[setting] if run["method"] == name] for name in _names(settings[setting])}
    if baseline not in methods:
        raise UserError(
            f"{folder}: setting {setting} has no {baseline!r} to compare with: {nearest(baseline, methods)}"
        )
    if method == baseline:
        raise UserError(f"{folder}: the run is {setting}/{method}, which others are compared with: it has no gain")
    difference = paired_difference(methods[method], methods[baseline])
    what = "over seeds and images" if difference.seeds > 1 else "over images alone: there is one seed"
    low, high = difference.interval if difference.seeds > 1 else difference.image_interval
    seeds = f"{difference.seeds} seed{'s' * (difference.seeds > 1)}"
    return (
        f"`asd-hf compare` trained `{method}` and `{baseline}` alike on the setting `{setting}` ({seeds}, "
        f"{difference.num_images} images): **{100 * difference.mean:+.1f} AP**, {100 * CONFIDENCE:.0f} % interval "
        f"[{100 * low:+.1f}, {100 * high:+.1f}] {what}. Verdict: {difference.verdict()}."
    )


def _names(runs: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(run["method"] for run in runs))


def _unlike(run: dict, config: dict, fingerprint: str, steps: int | None) -> Iterator[str]:
    """Names of what makes a record one of another setting or method than that of `config`."""
    theirs = run.get("config", {})
    for section in ("model", "data", "method"):
        yield from _differing(theirs.get(section), config[section], section)
    yield from _differing(_deciding(theirs.get("training", {})), _deciding(config["training"]), "training")
    if run["data_fingerprint"] != fingerprint:
        yield "evaluation images"
    if steps not in (None, run["steps"]):
        yield "training steps"


def _deciding(training: dict[str, Any]) -> dict[str, Any]:
    """What of the training section decides which student it gives, but for defaults."""
    return {
        key: value
        for key, value in training.items()
        if key not in _ALIKE and not key.startswith(_ALIKE_PREFIXES) and value != _DEFAULTS.get(key, MISSING)
    }


def _differing(one: Any, two: Any, name: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(two, dict):
        for key in dict.fromkeys([*one, *two]):
            yield from _differing(one.get(key), two.get(key), f"{name}.{key}")
    elif one != two:
        yield name
