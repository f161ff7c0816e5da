"""A finished run as the files of a repository on the Hub, and how they get there: in one commit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard

from .card import eval_results, evaluate_command, model_card
from .config import NO_METHOD, build_methods, read_sections
from .detectors.base import DetectorAdapter
from .errors import UserError
from .hub import call_hub, is_hub_id, public_config, secret_of, without_folders
from .licenses import GAVE_WEIGHTS, TAUGHT, Origin, check_licenses, choose_license, read_license
from .loading import SELF_TAUGHT, load_teacher
from .methods import get_method
from .trainer import EMA_FOLDER, METRICS, MODELS, RUN_CONFIG

ONNX = "onnx"
Files = dict[str, Path | bytes]  # by their paths in the repository

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ONNX_SUFFIXES = (".onnx", ".data", ".json")
# What an earlier push may have left behind, and would now belong to another student.
_OURS = re.compile(rf"model(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?|(?:{EMA_FOLDER}|{ONNX})/.*")


@dataclass(frozen=True)
class FinishedRun:
    """What `asd-hf train` left in its output folder.

    Attributes:
        sections: the resolved configuration.
        metrics: the contents of `metrics.json`.
        student: loaded from the folder.
        origins: the models that it came from.
    """

    folder: Path
    sections: dict[str, Any]
    metrics: dict[str, Any]
    student: DetectorAdapter
    origins: list[Origin]

    @property
    def protocol(self) -> dict[str, Any]:
        return self.metrics["protocol"]

    @property
    def config_yaml(self) -> str:
        return (self.folder / RUN_CONFIG).read_text(encoding="utf-8")

    @property
    def name(self) -> str:
        """On the Hub, unless another is wanted."""
        return self.sections["training"].get("hub_model_id") or self.folder.absolute().name

    @property
    def teacher(self) -> str | None:
        """A pretrained one, if there was one."""
        teacher = self.sections["model"]["teacher"]
        return None if teacher == SELF_TAUGHT else teacher

    def data_id(self, dataset: str | None = None) -> str | None:
        """The Hub's id of the data set, which `dataset` gives for data that lies in a folder."""
        source = self.sections["data"]["source"]
        return dataset or (source if is_hub_id(source) else None)

    def evaluate_command(self, model: str, dataset: str | None = None) -> str:
        source = self.data_id(dataset) or without_folders(self.protocol["source"])
        return evaluate_command(model, source, self.protocol, self.sections["data"], self.sections["training"])


def read_run(folder: Path) -> FinishedRun:
    """Reads a finished run and loads its student.

    Raises:
        UserError: it is none, the line says what is missing; its configuration holds a secret; the student cannot be
            loaded.
    """
    if not folder.is_dir():
        raise UserError(f"run folder {folder} does not exist")
    for name in (RUN_CONFIG, METRICS, "config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no finished run: it has no {name}, which `asd-hf train` writes at its end")
    sections = read_sections(folder / RUN_CONFIG)
    if key := secret_of(sections, ""):
        raise UserError(f"{folder / RUN_CONFIG}: {key[1:]} holds a token or password: remove it")
    try:
        metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        complete = "AP" in metrics["student"] and {"source", "split", "fingerprint"} <= metrics["protocol"].keys()
        complete = complete and {"model", "data", "method", "training"} <= sections.keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise UserError(f"{folder} is no finished run: {METRICS} or {RUN_CONFIG} is not as `asd-hf train` writes it")
    student = load_teacher(str(folder), "run folder")
    return FinishedRun(folder, sections, metrics, student, origins(sections["model"]))


def origins(model: Mapping[str, Any]) -> list[Origin]:
    """All models that a student came from, with their licences, by the `model` section of its run."""
    roles: dict[str, list[str]] = {}
    if model["teacher"] not in (None, SELF_TAUGHT):
        roles[model["teacher"]] = [TAUGHT]
    student = model["student"]
    student = {"checkpoint": student} if isinstance(student, str) else student
    sources = {
        "checkpoint": student.get("checkpoint"),
        "copy_weights": model["teacher"],
        "pretrained_backbone": student.get("backbone"),
    }
    for key, name in sources.items():
        if student.get(key) and name is not None:
            roles.setdefault(name, []).append(GAVE_WEIGHTS)
    return [Origin(name, tuple(dict.fromkeys(own)), read_license(name)) for name, own in roles.items()]


class Package(NamedTuple):
    """Files for a repository, and what is to be said before they are shared."""

    files: Files
    remarks: list[str]


def package(
    run: FinishedRun,
    model_id: str,
    *,
    license: str | None = None,
    allowed: Collection[str] = (),
    dataset: str | None = None,
    gain: str | None = None,
) -> Package:
    """All that is shared of a run: student, processor, card, numbers, configuration and, if it was exported, ONNX.

    Args:
        license: of the student; by default what the run says, else that of its first weights.
        allowed: licences of teachers and first weights that are no obstacle, see `licenses.check_licenses`.
        dataset: the Hub's id of the data set that the run has in a folder.
        gain: for the card, see `compare.gain`.

    Raises:
        UserError: a licence stands against it.
    """
    remarks = check_licenses(run.origins, allowed)
    files: Files = _model_files(run.folder, "")
    more = []
    if (run.folder / EMA_FOLDER / "config.json").is_file():
        files |= _model_files(run.folder / EMA_FOLDER, f"{EMA_FOLDER}/")
        more.append("ema")
    exported = _onnx_files(run.folder, remarks)
    files |= exported
    more += [ONNX] * bool(exported)
    card = make_card(run, model_id, license=license, dataset=dataset, gain=gain, more_files=tuple(more))
    if card.data.license is None:
        remarks.append("the card states no licence, which gives nobody a right to use the student: see --license")
    files["README.md"] = str(card).encode()
    files[RUN_CONFIG] = public_config(run.config_yaml).encode()
    files[METRICS] = (json.dumps(without_folders(run.metrics), indent=2) + "\n").encode()
    if data := run.data_id(dataset):
        text = eval_results(model_id, data, run.metrics, run.protocol)
        files[f".eval_results/{data.split('/')[-1]}.yaml"] = text.encode()
    return Package(dict(sorted(files.items())), remarks)


def make_card(
    run: FinishedRun, model_id: str, *, license: str | None = None, dataset: str | None = None, **more
) -> ModelCard:
    """The card of a run; `more` is passed on to `card.model_card`, the others are as `package` has them."""
    sections, source, training = run.sections, run.sections["data"]["source"], run.metrics.get("training")
    methods = build_methods(sections["method"], str(run.folder / RUN_CONFIG))
    chosen, license_text = choose_license(license or sections["training"].get("hub_license"), run.origins)
    return model_card(
        model_id=model_id,
        student_info={
            "architecture": type(run.student.model).__name__,
            "weights_from": [origin.model for origin in run.origins if GAVE_WEIGHTS in origin.roles],
            "classes": list(run.student.spec.class_names),
            "size": dict(run.student.processor.size),
        },
        teacher_info=run.teacher and {"id": run.teacher, "cache": training and training["teacher_predictions"]},
        methods={name: get_method(name).paper for name in methods},
        metrics={name: run.metrics[name] for name in MODELS if name in run.metrics},
        protocol=run.protocol,
        dataset={
            "name": Path(source).name,
            "id": run.data_id(dataset),
            "train_split": sections["data"].get("train_split"),
        },
        config_yaml=run.config_yaml,
        evaluate=run.evaluate_command(model_id, dataset),
        training=training and training | {"device": run.metrics["environment"]["device"]},
        license={} if chosen is None else chosen.metadata,
        license_text=license_text,
        **more,
    )


def _model_files(folder: Path, prefix: str) -> Files:
    """What `from_pretrained` reads of a folder."""
    names = ["config.json", *(name for name in _PROCESSORS if (folder / name).is_file())]
    if (folder / _WEIGHTS).is_file():
        names.append(_WEIGHTS)
    else:
        shards = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        names += [_INDEX, *sorted(set(shards))]
    return {f"{prefix}{name}": folder / name for name in names}


def _onnx_files(folder: Path, remarks: list[str]) -> Files:
    """The student for ONNX Runtime, if it was exported since it was last written and its outputs were compared."""
    model = folder / ONNX / "model.onnx"
    if not model.is_file():
        return {}
    if not (folder / ONNX / "parity.json").is_file():
        remarks.append(f"{model} is left out: no parity.json says how near its outputs are; `asd-hf export` writes it")
        return {}
    weights = folder / (_WEIGHTS if (folder / _WEIGHTS).is_file() else _INDEX)
    if model.stat().st_mtime_ns < weights.stat().st_mtime_ns:
        remarks.append(f"{model} is left out: it is older than the student; `asd-hf export` makes it anew")
        return {}
    return {f"{ONNX}/{file.name}": file for file in model.parent.iterdir() if file.suffix in _ONNX_SUFFIXES}


def write_files(files: Files, folder: Path) -> None:
    """Writes into a new folder what a push would send.

    Raises:
        UserError: the folder holds something, or cannot be written.
    """
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: name a new folder")
        for name, content in files.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                file.write_bytes(content)
            else:
                shutil.copyfile(content, file)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {' '.join(str(error).split())}") from error


def create_repository(name: str, private: bool | None, advice: str, **kind) -> str:
    """Makes sure that a repository is there and returns its whole name; `kind` as `create_repo` has it.

    Raises:
        UserError: by `call_hub`; or it is to be private, and is there and public.
    """
    api = HfApi()
    url = call_hub(lambda: api.create_repo(name, private=private, exist_ok=True, **kind), advice)
    if private:
        info = call_hub(lambda: api.repo_info(url.repo_id, repo_type=kind.get("repo_type")), advice)
        if not info.private:
            raise UserError(f"{url.repo_id} is there already, and public: make it private at {url}/settings")
    return url.repo_id


class Pushed(NamedTuple):
    """Where files are now.

    Attributes:
        commit: of the branch.
        changed: whether this push made it.
    """

    repo_id: str
    url: str
    commit: str
    changed: bool

    def __str__(self) -> str:
        if self.changed:
            return f"pushed: {self.url} (commit {self.commit[:7]})"
        return f"nothing has changed: {self.url} is at commit {self.commit[:7]}"


def push_files(files: Files, repo_id: str, message: str, advice: str, repo_type: str = "model") -> Pushed:
    """Commits files to a repository, all at once, together with the removal of what an earlier push left behind.

    Files that are there as they are cost nothing; where all are, there is no commit. An attempt whose answer was lost
    is found to be done when it is repeated.

    Raises:
        UserError: by `call_hub`.
    """
    api, first = HfApi(), []

    def commit():
        head = api.repo_info(repo_id, repo_type=repo_type)
        first.append(head.sha)
        there = {file.rfilename for file in head.siblings}
        stale = [name for name in sorted(there - files.keys()) if repo_type == "model" and _OURS.fullmatch(name)]
        add = [CommitOperationAdd(name, file) for name, file in files.items()]
        delete = [CommitOperationDelete(name) for name in stale]
        return api.create_commit(
            repo_id, [*add, *delete], commit_message=message, repo_type=repo_type, parent_commit=head.sha
        )

    done = call_hub(commit, advice)
    kind = "" if repo_type == "model" else f"{repo_type}s/"
    return Pushed(repo_id, f"{api.endpoint}/{kind}{repo_id}", done.oid, done.oid != first[0])


def push_run(run: FinishedRun, name: str, private: bool | None = None, **options) -> tuple[Package, Pushed]:
    """Pushes a run; `options` as `package` has them.

    Raises:
        UserError: a licence stands against it, then nothing was sent; or by `call_hub`.
    """
    shared = package(run, name, **options)
    advice = f"the student is complete in {run.folder}: `asd-hf push {run.folder}` pushes it"
    repo_id = create_repository(name, private, advice)
    if repo_id != name:  # the card has the whole name
        shared = package(run, repo_id, **options)
    return shared, push_files(shared.files, repo_id, f"Student of {_described(run)}", advice)


def _described(run: FinishedRun) -> str:
    methods = "+".join(build_methods(run.sections["method"], RUN_CONFIG)) or NO_METHOD
    return f"{methods}, AP {100 * run.metrics['student']['AP']:.1f}"
