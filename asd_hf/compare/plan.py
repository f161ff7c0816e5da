"""What a comparison trains: variants of one base configuration, each with every seed."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..config import NO_METHOD, SECTIONS, build_config, build_methods, override, read_sections
from ..errors import UserError
from ..hub import public_config
from ..loading import SELF_TAUGHT
from ..methods import METHODS, get_method
from ..registry import nearest

EMA_DECAY = 0.998  # of a student that teaches itself, where the configuration names none
_NOT_OF_A_COMPARISON = (
    *("output_dir", "resume_from_checkpoint", "push_to_hub", "load_best_model_at_end", "early_stopping_patience"),
    *("save_only_model", "report_to"),
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Plan:
    """One run of a comparison.

    Attributes:
        setting: name of the base configuration.
        variant: name of what differs from it.
        minutes: of training; the run then takes as many steps as fit, measured first. None: as configured.
        sections: its configuration, as a YAML file would have it, but for `training.output_dir`.
    """

    setting: str
    variant: str
    seed: int
    minutes: float | None
    sections: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.variant}_{self.seed}"

    def record(self, output: Path) -> Path:
        """Where its numbers are written."""
        return output / self.setting / f"{self.name}.json"

    def folder(self, work: Path) -> Path:
        """Where it trains."""
        return work / self.setting / self.name

    def described(self) -> dict:
        """What all seeds of the variant have in common, without local paths."""
        config = self.config()
        config["training"].pop("seed")
        return config | {"compare": {"minutes": self.minutes}}

    def config(self) -> dict:
        """The resolved configuration without local paths, to be stored with the numbers."""
        return yaml.safe_load(public_config(build_config(self.sections, self.name).to_yaml()))


def read_variants(file: Path) -> dict[str, dict]:
    """Named parts of a configuration: `{name: {section: {key: value}}}`.

    Raises:
        UserError: the file is missing, is no such mapping, or a name cannot be a file's.
    """
    variants = read_sections(file, what="named variants, each with its sections")
    for name, sections in variants.items():
        if name in SECTIONS:
            raise UserError(f"{file} must hold named variants, each with its sections: {name!r} is a section")
        _check_name(str(name), str(file))
        if not all(isinstance(v, dict) or key == "method" for key, v in sections.items()):
            raise UserError(f"{file}: variant {name!r} must hold sections, each with its keys")
    return {str(name): sections for name, sections in variants.items()}


def choose_variants(known: Mapping[str, dict], names: Sequence[str] | None) -> dict[str, dict]:
    """The variants called `names`: of `known`, or methods with their defaults; all of `known` by default."""
    if names is None:
        return dict(known)
    chosen = {}
    for name in names:
        if name not in known and name not in (NO_METHOD, *METHODS):
            raise UserError(f"--methods: {name!r}: {nearest(name, {*known, NO_METHOD, *METHODS})}")
        chosen[name] = known.get(name, {"method": {"name": name}})
    return chosen


def make_plans(
    config: Path,
    variants: Mapping[str, dict],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    setting: str | None = None,
    minutes: float | None = None,
) -> list[Plan]:
    """Every variant with every seed: all variants of the first seed first, so that a part of them says something.

    A variant's sections are merged into the base configuration key by key; `method` is replaced as a whole. A variant
    without a method has no teacher, and its student is built from the same architecture.

    Args:
        config: the base, a file as `asd-hf train` takes it.
        overrides: `section.key=value` of the base configuration; a variant's own values come after them.

    Raises:
        UserError: a configuration cannot be; the message names its variant.
    """
    setting = config.stem if setting is None else setting
    _check_name(setting, "--setting")
    base = read_sections(config)
    for item in overrides:
        if item.startswith("method") and all("method" in own for own in variants.values()):
            raise UserError(f"{item!r}: every variant has a method of its own: name a variant with this option")
        override(base, item)
    plans = []
    for seed in seeds:
        for variant, own in variants.items():
            sections = _merge(base, own)
            training = sections.setdefault("training", {})
            training["seed"] = seed
            # A run begins anew or goes on by what lies in its folder; it is pushed nowhere, trains its whole budget
            # and is judged as it ends.
            for key in _NOT_OF_A_COMPARISON:
                training.pop(key, None)
            where = f"{config} under variant {variant!r}"
            _set_teacher(sections, where)
            build_config(sections, where)
            plans.append(Plan(setting, variant, seed, minutes, sections))
    averaged = {plan.variant: bool(plan.sections["training"].get("ema_decay")) for plan in plans}
    if len(set(averaged.values())) > 1:
        names = ", ".join(name for name, kept in averaged.items() if kept)
        raise UserError(
            f"{names} keep a moving average of the student, which is then what is judged, and the others do not: set "
            f"training.ema_decay={EMA_DECAY} for all"
        )
    return plans


def _check_name(name: str, where: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(f"{where}: {name!r} cannot be the name of a file: use letters, digits and . _ + -")


def _merge(base: dict, own: dict) -> dict:
    """`base` with the keys of `own`, at every depth; a `method` is one thing."""
    merged = copy.deepcopy(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "method"
        merged[key] = _merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def _set_teacher(sections: dict, where: str) -> None:
    """Takes the teacher from a variant that has none, or itself, and tells its student which architecture it has."""
    model, data = sections.setdefault("model", {}), sections.setdefault("data", {})
    methods = build_methods(sections.get("method", {}), where)
    teacher, student = model.get("teacher"), model.setdefault("student", {})
    if not methods:
        model["teacher"] = None
        model.pop("teacher_cache", None)
        for section, key in ((model, "class_map"), (data, "unlabelled"), (data, "teacher_size")):
            section.pop(key, None)
    elif any(get_method(name).self_taught for name in methods):
        model["teacher"] = SELF_TAUGHT
        for key in ("class_map", "teacher_cache"):
            model.pop(key, None)
        sections["training"].setdefault("ema_decay", EMA_DECAY)
    if model.get("teacher") != teacher and isinstance(student, dict):
        if student.get("copy_weights"):
            raise UserError(
                f"{where}: model.student.copy_weights needs the teacher, which this variant has not: make the student "
                "once and name its folder as model.student"
            )
        if student.get("base", "teacher") == "teacher" and "checkpoint" not in student:
            student["base"] = teacher
