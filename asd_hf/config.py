"""The configuration of a run: one YAML section is one dataclass, `section.key=value` replaces a value of the file.

Sections: `model` (asd_hf.model_config.ModelConfig), `data` (asd_hf.data.DataConfig), `method` (`name`, then the config
class of that method; or a list of names or such mappings) and `training` (TrainingConfig, which is
transformers.TrainingArguments and a few fields).
"""

from __future__ import annotations

import re
import types
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import HubStrategy, IntervalStrategy

from .data import DataConfig
from .errors import UserError
from .evaluation import STATS
from .hub import secret_of
from .methods import METHODS, MethodConfig, get_method
from .model_config import ModelConfig
from .registry import nearest

SECTIONS = ("model", "data", "method", "training")
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)  # ValueError: bytes that are not UTF-8, a date like 2026-13-01
COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
PACKAGES = {"azure_ml": "azureml-core", "flyte": "flytekit"}  # of trackers, by name
NO_METHOD = "none"  # plain training, without a teacher
SHARDED = {
    "fsdp": "FSDP",
    "deepspeed": "DeepSpeed",
    "megatron_lm": "Megatron-LM",
    "parallelism_config": "N-d parallelism",
}


def _own(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class TrainingConfig(TrainingArguments):
    """Transformers' TrainingArguments under their own names; below, other defaults and the fields that are ours."""

    output_dir: str | None = _own("outputs/run", "Folder of checkpoints, the final student, metrics and configuration")
    # The recipe of Deformable DETR.
    learning_rate: float = _own(2e-4, "Peak learning rate of the student")
    weight_decay: float = _own(1e-4, "Weight decay; biases and norms have none")
    max_grad_norm: float = _own(0.1, "Largest norm of the student's gradient")
    # What a detector needs of Trainer: rows keep their columns, a NaN shows, the best checkpoint has the best AP.
    remove_unused_columns: bool = _own(False, "Must stay false: the rows of a detection data set are nested")
    logging_nan_inf_filter: bool = _own(False, "Hide NaN losses from the log")
    logging_steps: float = _own(50, "Log every so many steps")
    metric_for_best_model: str | None = _own("AP", "Evaluation metric that chooses the best checkpoint")
    save_total_limit: int | None = _own(2, "Keep at most so many checkpoints, the best one among them")
    hub_strategy: str = _own("end", "When to push to the Hub, with training.push_to_hub")
    resume_from_checkpoint: str | bool | None = _own(
        None, "A checkpoint folder; or true: the newest one of training.output_dir, if there is one"
    )
    # Ours.
    hub_license: str | None = _own(
        None, "Licence of the student, an identifier of the Hub's list; default: that of the weights it began with"
    )
    backbone_lr_scale: float = _own(0.1, "Learning rate of the backbone, relative to training.learning_rate")
    sampling_lr_scale: float = _own(
        0.1, "Learning rate of sampling offsets and reference points, relative to training.learning_rate"
    )
    method_learning_rate: float | None = _own(
        None, "Learning rate of the method's own parameters; default: the student's"
    )
    method_max_grad_norm: float | None = _own(
        None, "Largest gradient norm of the method's own parameters; default: training.max_grad_norm"
    )
    class_loss_weight: float | None = _own(
        None, "Weight of the classification loss; default: that of the student's family (Deformable DETR: 2)"
    )
    fast_criterion: bool = _own(
        True, "Compute the detection loss in one pass over all layers and images; false: by Transformers' own code"
    )
    ema_decay: float = _own(0.0, "Decay of a moving average of the student, evaluated and saved in ema/; 0: none")
    log_phases: bool = _own(
        False, "Log how long each phase of a step takes, and the longest; the teacher is then not beside the student"
    )
    channels_last: bool = _own(
        False, "Keep the backbones' weights and maps with channels last in memory, which some devices are faster with"
    )
    teacher_stream: bool = _own(
        False, "On a GPU, run the teacher beside the student's forward pass, in more memory; not measured on a GPU yet"
    )
    max_bad_steps: int = _own(
        10, "Stop after so many steps whose loss or gradient is not finite; each is left out and logged"
    )
    early_stopping_patience: int = _own(0, "Stop after so many evaluations without a better AP; 0: never")

    def __post_init__(self) -> None:
        for key, name in SHARDED.items():  # `accelerate launch` asks for them by the environment
            if getattr(self, key, None) or parse_flag_from_env(f"ACCELERATE_USE_{key.upper()}"):
                raise UserError(
                    f"{name} is not supported (every rank holds the whole student, which is small): start with "
                    "distributed_type: MULTI_GPU, as configs/accelerate/eight_gpus.yaml does"
                )
        if self.use_cpu:  # Transformers gives this timeout to GPUs alone, but takes a process group that is there
            PartialState(cpu=True, backend=self.ddp_backend, timeout=timedelta(seconds=self.ddp_timeout))
        super().__post_init__()
        if self.save_on_each_node:
            raise UserError("training.save_on_each_node must be false: all machines share training.output_dir")
        if self.hub_token is not None:
            raise UserError("training.hub_token would be written into files: use `hf auth login` or HF_TOKEN instead")
        if self.hub_strategy != HubStrategy.END:
            raise UserError(
                "training.hub_strategy must be 'end': the others upload pickled files with each checkpoint"
            )
        if self.remove_unused_columns:
            raise UserError(
                "training.remove_unused_columns must be false: the rows of a detection data set are nested"
            )
        if self.early_stopping_patience and self.eval_strategy == IntervalStrategy.NO:
            raise UserError("training.early_stopping_patience needs evaluations: set training.eval_strategy")
        for name in ("max_bad_steps", *COUNTS):
            if getattr(self, name) < 1:
                raise UserError(f"training.{name} must be 1 or more, not {getattr(self, name)}")
        if not self.learning_rate >= 0:
            raise UserError(f"training.learning_rate must be 0 or more, not {self.learning_rate}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"training.seed must be in [0, 2^32), not {self.seed}")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"training.ema_decay must be in [0, 1), not {self.ema_decay}")
        if self.metric_for_best_model is not None:
            metrics = [*STATS, *(f"ema_{name}" for name in STATS if self.ema_decay)]
            if (name := self.metric_for_best_model.removeprefix("eval_")) not in metrics:
                raise UserError(f"training.metric_for_best_model {name!r} is unknown: {nearest(name, metrics)}")
        for name in self.report_to:
            if name not in INTEGRATION_TO_CALLBACK:
                raise UserError(
                    f"training.report_to {name!r} is unknown: {nearest(str(name), INTEGRATION_TO_CALLBACK)}"
                )
            if name not in get_available_reporting_integrations():
                package = PACKAGES.get(name, name.replace("_", "-"))
                raise UserError(f"training.report_to is {name}, which is not installed: pip install {package}")
        for name in ("use_liger_kernel", "auto_find_batch_size", "label_smoothing_factor", "neftune_noise_alpha"):
            if getattr(self, name):
                raise UserError(f"training.{name} does not apply to detection: remove it")

    def leave_no_trace(self, folder: str) -> None:
        """For runs that are only measured: no checkpoint, evaluation, report or push; what must be, in `folder`."""
        self.output_dir, self.push_to_hub, self.report_to = folder, False, []
        self.save_strategy = self.eval_strategy = "no"
        self.load_best_model_at_end, self.early_stopping_patience = False, 0


@dataclass
class RunConfig:
    """All that a run is made of."""

    model: ModelConfig
    data: DataConfig
    methods: dict[str, MethodConfig]  # by name; without any the run trains on the labels alone
    training: TrainingConfig
    training_given: dict[str, Any]  # what the file and the command line set of it

    @property
    def method_name(self) -> str:
        """Of all methods: `asd`, `asd+fgd`, or `none`."""
        return "+".join(self.methods) or NO_METHOD

    def to_yaml(self) -> str:
        """A file that runs this again: all of `model`, `data` and `method`; of `training` what was given.

        TrainingArguments rewrites many of its fields by the machine and by each other, so their values now are not
        those that make the same run elsewhere. Where to resume concerns one start only and is left out.
        """
        training = {key: value for key, value in self.training_given.items() if key != "resume_from_checkpoint"}
        methods = [{"name": name} | _plain(asdict(config)) for name, config in self.methods.items()]
        sections = {
            "model": _plain(asdict(self.model)),
            "data": _plain(asdict(self.data)),
            "method": methods[0] if len(methods) == 1 else methods or {"name": NO_METHOD},
            "training": _plain(training),
        }
        return yaml.safe_dump(sections, sort_keys=False, width=110)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads a YAML file and replaces values by `section.key=value` strings.

    Raises:
        UserError: the file is missing or no YAML mapping, a section or key is unknown, or a value has the wrong type.
    """
    raw = read_sections(path)
    for item in overrides or []:
        override(raw, item)
    return build_config(raw, where=str(path))


def read_sections(path: str | Path, what: str = f"sections ({', '.join(SECTIONS)}), each with its keys") -> dict:
    """A YAML file of mappings; `method` may be anything.

    Raises:
        UserError: the file is missing or does not hold `what`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"configuration file {path} does not exist")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except NOT_YAML as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict) or not all(isinstance(v, dict) for k, v in raw.items() if k != "method"):
        raise UserError(f"{path} must hold {what}")
    return raw


def build_config(raw: dict[str, dict], where: str = "configuration") -> RunConfig:
    """Typed sections from nested dictionaries; `where` begins each error line."""
    for section in raw:
        if section not in SECTIONS:
            raise UserError(f"{where}: unknown section {section!r}: {nearest(section, SECTIONS)}")
        if key := secret_of(raw[section], section):
            raise UserError(
                f"{where}: {key} holds a token or password, which would be written into files: use `hf auth login`, "
                "HF_TOKEN, or what the storage has for it"
            )
    return RunConfig(
        model=_fill(ModelConfig, raw.get("model", {}), f"{where}: model"),
        data=_fill(DataConfig, raw.get("data", {}), f"{where}: data"),
        methods=build_methods(raw.get("method", {}), where),
        training=_fill(TrainingConfig, raw.get("training", {}), f"{where}: training"),
        training_given=_typed(TrainingConfig, raw.get("training", {}), f"{where}: training"),
    )


def parse_overrides(cls: type, values: dict, section: str, overrides: list[str]):
    """An instance of section dataclass `cls` with `values`, then the `section.key=value` strings of a command line."""
    raw = {section: dict(values)}
    for item in overrides:
        override(raw, item)
    for other in raw.keys() - {section}:
        raise UserError(f"{other}: only {section}.key=value applies here")
    return _fill(cls, raw[section], section)


def describe_config() -> str:
    """Every key with its default and meaning, for `--help`."""
    methods = {f"method (name: {name})": get_method(name).config_class for name in METHODS}
    names = " | ".join((NO_METHOD, *METHODS))
    lines = [
        f"method.name (default: {NO_METHOD})\n      How the student imitates: {names}, or module:Class of your own; "
        "several as a list, `method: [asd, fgd]`, then method.<name>.<key>"
    ]
    for title, cls in {"model": ModelConfig, "data": DataConfig, **methods, "training": TrainingConfig}.items():
        lines.append(f"{title}:")
        lines += _describe(cls, title.split()[0])
    return "\n".join(lines)


def build_methods(section: Any, where: str) -> dict[str, MethodConfig]:
    """The `method` section: a method, or a list of them, each as its name or as a mapping of `name` and its keys."""
    methods = {}
    for entry in section if isinstance(section, list) else [section]:
        values = dict(entry) if isinstance(entry, dict) else {"name": entry}
        name = values.pop("name", NO_METHOD)
        if not isinstance(name, str):
            raise UserError(f"{where}: method.name must be a name, not {name!r}")
        here = f"{where}: method" + (f".{name}" if isinstance(section, list) else "")
        if name != NO_METHOD:
            if name in methods:
                raise UserError(f"{where}: method {name!r} stands twice in the list")
            if name not in METHODS and ":" not in name:
                names = (NO_METHOD, *METHODS)
                raise UserError(f"{here}: unknown method {name!r}: {nearest(name, names)} (or give 'module:Class')")
            try:
                methods[name] = _fill(get_method(name).config_class, values, here)
            except UserError as error:  # a method's own checks do not know that it is one of several
                raise UserError(re.sub(r"^method\.", f"{here.rpartition(': ')[2]}.", str(error))) from error
        elif isinstance(section, list):
            raise UserError(f"{where}: {NO_METHOD!r} cannot stand in a list of methods: remove it")
        elif values:
            raise UserError(f"{here}.{next(iter(values))} has no meaning without a method: set method.name")
    return methods


def override(raw: dict, item: str) -> None:
    """Sets one `section.key=value` of the sections `raw`, the value read as YAML.

    Raises:
        UserError: `item` has another form, or names a key within a value.
    """
    name, equals, text = item.partition("=")
    *parents, key = name.split(".")
    if not equals or not (parents or key == "method"):
        raise UserError(f"{item!r} is not of the form section.key=value")
    target = raw
    if parents and isinstance(raw.get("method"), str):
        raw["method"] = {"name": raw["method"]}
    for parent in parents:
        target = _listed(target, parent, item) if isinstance(target, list) else target.setdefault(parent, {})
        if not isinstance(target, dict | list):
            raise UserError(f"{item!r}: {parent} is a value, not a group of keys")
    if isinstance(target, list):
        raise UserError(f"{item!r}: there are several methods: give method.<name>.{key}")
    try:
        target[key] = yaml.safe_load(text)
    except NOT_YAML as error:
        raise UserError(f"{item!r}: the value is not YAML") from error


def _listed(methods: list, name: str, item: str) -> dict:
    """The mapping of one method of a list of them."""
    for i, entry in enumerate(methods):
        methods[i] = entry = entry if isinstance(entry, dict) else {"name": entry}
        if entry.get("name") == name:
            return entry
    names = [str(entry.get("name")) for entry in methods]
    raise UserError(f"{item!r}: there is no method {name!r} in the list: {nearest(name, names)}")


def _typed(cls: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """`values` with the types of the fields of dataclass `cls`; unknown keys and values of another type are errors."""
    hints = get_type_hints(cls)
    valid = {f.name for f in fields(cls) if f.init}
    for key in values:
        if key not in valid:
            homes = (("model", ModelConfig), ("data", DataConfig), ("training", TrainingConfig))
            elsewhere = [name for name, section in homes if key in {f.name for f in fields(section)}]
            hint = f"did you mean {elsewhere[0]}.{key}?" if elsewhere else nearest(str(key), valid)
            raise UserError(f"{where}.{key} is unknown: {hint}")
    return {key: _convert(value, hints[key], f"{where}.{key}") for key, value in values.items()}


def _fill(cls: type, values: dict[str, Any], where: str):
    """An instance of dataclass `cls` with `values`; its own errors are the user's as well."""
    try:
        return cls(**_typed(cls, values, where))
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        hint = " (without a GPU set training.bf16=false)" if "bf16" in str(error) else ""
        raise UserError(f"{where}: {' '.join(str(error).split())}{hint}") from error


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as YAML read it, as the type that the field asks for: YAML reads 1e-4 as a string."""
    if get_origin(hint) in (Union, types.UnionType):
        # The type that the value has already wins over one that it could be turned into.
        if own := [option for option in get_args(hint) if _is(value, option)]:
            return _convert(value, own[0], where)
        for option in get_args(hint):
            try:
                return _convert(value, option, where)
            except UserError:
                continue
    elif hint is Any or _is(value, hint):
        if get_origin(hint) is dict and Any not in get_args(hint):
            key_type, value_type = get_args(hint)
            return {
                _convert(k, key_type, f"{where}: key {k!r}"): _convert(v, value_type, f"{where}.{k}")
                for k, v in value.items()
            }
        if get_origin(hint) is list:
            item_type = get_args(hint)[0]
            return [_convert(v, item_type, f"{where}[{i}]") for i, v in enumerate(value)]
        return _fill(hint, value, where) if is_dataclass(hint) else value
    elif hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(hint, type) and issubclass(hint, Enum):
        try:
            return hint("no" if value is False else value)  # YAML reads a bare `no` as false
        except ValueError:
            pass
    raise UserError(f"{where} must be {_type_name(hint)}, not {value!r}")


def _is(value: Any, hint: Any) -> bool:
    if hint is type(None):
        return value is None
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if is_dataclass(hint):
        return isinstance(value, dict)
    kind = get_origin(hint) or hint
    return isinstance(kind, type) and isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)


def _type_name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type_name(o) for o in get_args(hint)))
    if hint is type(None):
        return "null"
    if is_dataclass(hint):
        return "a group of keys"
    return getattr(hint, "__name__", str(hint))


def _default(spec) -> Any:
    return spec.default if spec.default is not MISSING else spec.default_factory()


def _plain(value: Any) -> Any:
    """Enums as their values, tuples as lists: what YAML can hold."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _describe(cls: type, prefix: str) -> list[str]:
    lines = []
    hints = get_type_hints(cls)
    for spec in fields(cls):
        if not spec.init:
            continue
        required = spec.default is MISSING and spec.default_factory is MISSING
        default = "required" if required else f"default: {_plain(_default(spec))}"
        if not required and is_dataclass(_default(spec)):
            default = "a group of keys"
        text = " ".join(spec.metadata.get("help", "").split()).replace("%%", "%")
        choices = spec.metadata.get("choices")
        text += f" [{' | '.join(choices)}]" if choices else ""
        lines.append(f"  {prefix}.{spec.name} ({default})\n      {text}")
        for option in (hints[spec.name], *get_args(hints[spec.name])):
            if is_dataclass(option):
                lines += _describe(option, f"{prefix}.{spec.name}")
    return lines
