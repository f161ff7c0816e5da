"""The model card, and patience with the Hub. Uploading itself is Trainer's own `push_to_hub`."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from . import models
from .errors import UserError
from .evaluation.coco import STATS, table_rows
from .student import PACKAGED

T = TypeVar("T")

CARD = """\
---
{metadata}
---

# {name}

{summary}

It is an ordinary Transformers checkpoint; {needs}

```python
{imports}from transformers import pipeline

detect = pipeline("object-detection", model={model_id})
for found in detect("http://images.cocodataset.org/val2017/000000039769.jpg", threshold=0.3):
    print(found["label"], round(found["score"], 2), found["box"])
```

## Results

{results}
## Training

The resolved configuration repeats the run; local paths are given by their last part.

{config}
{citation}"""


def write_model_card(
    folder: str | Path,
    *,
    model_id: str,
    student_info: dict,
    teacher_info: dict | None,
    method_papers: list[dict[str, str]],
    metrics: dict[str, dict[str, float]],
    protocol: dict | None,
    dataset: dict[str, str | None],
    config_yaml: str,
    license: str | None = None,
) -> ModelCard:
    """Writes `README.md` in `folder`, with the metadata that the Hub reads.

    Args:
        folder: where the student was saved.
        model_id: its name on the Hub.
        student_info: "architecture", the Transformers class; "weights_from", the Hub ids or folders of the models that
            gave it its first weights, the teacher among them if it gave any. They become `base_model`, as a fine-tune:
            the Hub has no relation for distillation, and a teacher that gave no weights is not what was tuned.
        teacher_info: "id", the teacher's Hub id, folder or name among `student.PACKAGED`; "cache", of what kind its
            predictions were, if they came from disk. None for training without a teacher.
        method_papers: title, id and bibtex of each method, as `DistillationMethod.paper` has them; empty ones are
            left out.
        metrics: by model name, as for `format_table`; "student" is the model of this card.
        protocol: what `CocoEvaluator.protocol` gave for these numbers. None before the first evaluation.
        dataset: "name", and "id" if the data set is on the Hub; one that `is_hub_id` denies is left out.
        config_yaml: the resolved configuration; the card has it without local paths.
        license: an identifier of the Hub's list.
    """
    numbers = {key: value for key, value in metrics.get("student", {}).items() if key in STATS and value >= 0}
    base_models = [name for name in student_info["weights_from"] if is_hub_id(name)]
    dataset_id = dataset.get("id") if is_hub_id(dataset.get("id") or "") else None
    metadata = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="object-detection",
        tags=["object-detection", "asd_hf", *(["knowledge-distillation"] if teacher_info else [])],
        base_model=base_models or None,
        base_model_relation="finetune" if base_models else None,
        datasets=[dataset_id] if dataset_id else None,
        metrics=["mean_average_precision"],
        model_name=model_id.split("/")[-1],
        eval_results=[
            EvalResult(
                task_type="object-detection",
                dataset_type=dataset_id or dataset["name"],
                dataset_name=dataset["name"],
                dataset_split=protocol["split"],
                metric_type="mean_average_precision" if key.startswith("AP") else "mean_average_recall",
                metric_name=key,
                metric_value=value,
            )
            for key, value in numbers.items()
        ]
        or None,
    )
    summary = f"`{student_info['architecture']}`, trained on {_literal(dataset['name'])}"
    if teacher_info:
        summary += f" under {_teacher(teacher_info['id'])}"
        if teacher_info.get("cache"):
            summary += f", whose predictions came from disk ({teacher_info['cache']}),"
    papers = [paper for paper in method_papers if paper]
    if papers:
        titles = " and of ".join(f"*{paper['title']}* ({paper['id']})" for paper in papers)
        summary += f" with the method of {titles}"
    needs, imports = "asd_hf is not needed to use it.", ""
    if student_info["architecture"] in models.__all__:
        needs = "its architecture comes with asd_hf, whose import makes it known to Transformers."
        imports = "import asd_hf.models\n"
    bibtex = "\n\n".join(paper["bibtex"].strip() for paper in papers)
    card = ModelCard(
        CARD.format(
            metadata=metadata.to_yaml(),
            name=_literal(metadata.model_name),
            summary=summary + ".",
            needs=needs,
            imports=imports,
            model_id=json.dumps(model_id),
            results=_results(metrics, protocol),
            config=_fenced(public_config(config_yaml).strip()),
            citation=f"\n## Citation\n\n```bibtex\n{bibtex}\n```\n" if papers else "",
        )
    )
    card.save(Path(folder) / "README.md")
    return card


def call_hub(call: Callable[[], T], advice: str, attempts: int = 4, wait: float = 2.0) -> T:
    """Calls `call`, again after a pause when the Hub is down, busy or out of reach.

    huggingface_hub repeats the upload of files by itself, but neither the creation of a repository nor the commit: a
    finished training must not end on one lost answer.

    Args:
        call: Trainer's `push_to_hub`, for example.
        advice: what the user can do when it failed for good; the end of the message.
        attempts: how often to call at most.
        wait: seconds before the second call, doubled each time.

    Raises:
        UserError: refused by the Hub, or failed at the last attempt.
    """
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except UserError:
            raise
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            status = _status(error)
            if attempt == attempts or (status < 500 and status != 429):
                reason = " ".join(str(error).split())
                raise UserError(f"the Hub: {reason}; {advice}") from error
            time.sleep(wait * 2 ** (attempt - 1))


def _status(error: BaseException) -> int:
    """As HTTP has it: that of the answer behind `error`, or 503 where there was none."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code
    if error.__cause__ is not None:  # the upload of a large file wraps what went wrong
        return _status(error.__cause__)
    return 400 if isinstance(error, ValueError) else 503


def is_hub_id(name: str) -> bool:
    """Whether `name` is an `owner/name` of the Hub: no existing folder, and nothing that the Hub would refuse."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).is_dir()


def is_at_hand(name: str) -> bool:
    """Whether the weights of a model are on this machine: packaged, in a folder, or fetched from the Hub before."""
    files = ("model.safetensors", "model.safetensors.index.json")
    fetched = is_hub_id(name) and any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
    return fetched or name in PACKAGED or Path(name).is_dir()


def public_config(config_yaml: str) -> str:
    """The configuration with the last part of each local path in its place: the author's folders are private.

    A path is a string that begins with `/`, `~` or `.`, or names what exists.
    """
    return yaml.safe_dump(without_folders(yaml.safe_load(config_yaml)), sort_keys=False, width=110)


def without_folders(value: Any) -> Any:
    """`value` with the last part of each local path in its place."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~", ".")) or os.path.exists(value)):
        return Path(value).name or value  # `/` and `.` have no name, and tell nothing
    return value


def _teacher(name: str) -> str:
    if name in PACKAGED:
        return f"the packaged teacher `{name}`"
    if is_hub_id(name):
        return f"the teacher [{name}](https://huggingface.co/{name})"
    return f"the teacher {_literal(without_folders(name))}"


def _results(metrics: dict[str, dict[str, float]], protocol: dict | None) -> str:
    if protocol is None:
        return "Not evaluated yet.\n"
    header, *rows = table_rows(metrics)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    terms = yaml.safe_dump(protocol | {"source": without_folders(protocol["source"])}, sort_keys=False)
    return f"{table}\n\nAP in per cent, by COCO's rules, under this protocol:\n\n{_fenced(terms.strip())}\n"


def _literal(name: str) -> str:
    """A name as text of Markdown, whatever it holds: names of folders and data sets are not the card's author's."""
    return re.sub(r"([\\`*_\[\]<>|#!&])", r"\\\1", " ".join(name.split()))


def _fenced(text: str) -> str:
    """A block of YAML that nothing in it can end."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text) or [""]))
    return f"{fence}yaml\n{text}\n{fence}"
