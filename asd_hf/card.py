"""The model card: what the Hub reads of a student, and what people should know before they use it."""

from __future__ import annotations

import json
import re
import shlex
from datetime import timedelta
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from . import __version__, models
from .classes import short_list
from .evaluation.coco import STATS, table_rows
from .hub import is_hub_id, public_config, without_folders
from .loading import PACKAGED

CARD = """\
---
{metadata}
---

# {name}

{summary}

## Use

It is an ordinary Transformers checkpoint; {needs}

```python
{imports}from transformers import pipeline

detect = pipeline("object-detection", model={model_id})
for found in detect("photo.jpg", threshold=0.3):
    print(found["label"], round(found["score"], 2), found["box"])
```
{more_files}
## Results

{results}{gain}
## Limits

{limits}

## Training

{training}The resolved configuration repeats the run; local paths are given by their last part.

{config}

## Licence

{license_text}
{citation}"""
MOST_CLASSES = 100  # are named
MORE_FILES = {
    "ema": '\n`ema/` has the moving average of the weights: `subfolder="ema"` of Transformers\' `from_pretrained`.\n',
    "onnx": "\n`onnx/model.onnx` is the model for ONNX Runtime; `onnx/parity.json` says how near its outputs are.\n",
}


def model_card(
    *,
    model_id: str,
    student_info: dict,
    teacher_info: dict | None,
    methods: dict[str, dict[str, str]],
    metrics: dict[str, dict[str, float]],
    protocol: dict | None,
    dataset: dict[str, str | None],
    config_yaml: str,
    evaluate: str | None = None,
    training: dict | None = None,
    license: dict[str, str] | None = None,
    license_text: str = "No licence is stated for these weights.",
    gain: str | None = None,
    more_files: tuple[str, ...] = (),
) -> ModelCard:
    """The card of a student, with the metadata that the Hub reads.

    Args:
        model_id: its name on the Hub.
        student_info: "architecture", the Transformers class; "weights_from", the Hub ids or folders of the models that
            gave it its first weights, the teacher among them if it gave any. They become `base_model`, as a fine-tune:
            the Hub has no relation for distillation, and a teacher that gave no weights is not what was tuned.
            "classes", their names; "size", of images, as the image processor has it.
        teacher_info: "id", the teacher's Hub id, folder or name among `loading.PACKAGED`; "cache", of what kind its
            predictions were, if they came from disk. None for training without a teacher.
        methods: title, id and bibtex of each method by its name, as `DistillationMethod.paper` has them; empty for one
            of asd_hf's own.
        metrics: by model name, as for `format_table`; "student" is the model of this card.
        protocol: what `CocoEvaluator.protocol` gave for these numbers. None before the first evaluation.
        dataset: "name", and "id" if the data set is on the Hub; one that `is_hub_id` denies is left out.
            "train_split", if it is known.
        config_yaml: the resolved configuration; the card has it without local paths.
        evaluate: the command that repeats the numbers.
        training: "device", "ranks", "steps", "images", "train_images" and "train_runtime" in seconds, as
            `metrics.json` has them. None if they are not known.
        license: the metadata of the licence.
        license_text: what is to be said of it.
        gain: what `compare.gain` says that the method is worth.
        more_files: keys of `MORE_FILES`, of what lies beside the model.
    """
    dataset_id = dataset.get("id") if is_hub_id(dataset.get("id") or "") else None
    base_models = [name for name in student_info["weights_from"] if is_hub_id(name)]
    metadata = ModelCardData(
        **license or {},
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
            for key, value in _known_numbers(metrics).items()
        ]
        or None,
    )
    papers = [paper for paper in methods.values() if paper]
    needs, imports = "asd_hf is not needed to use it.", ""
    if student_info["architecture"] in models.__all__:
        needs = "its architecture comes with asd_hf, whose import makes it known to Transformers."
        imports = "import asd_hf\n"
    bibtex = "\n\n".join(paper["bibtex"].strip() for paper in papers)
    return ModelCard(
        CARD.format(
            metadata=metadata.to_yaml(),
            name=_literal(metadata.model_name),
            summary=_summary(student_info, teacher_info, methods, _literal(dataset["name"])),
            needs=needs,
            imports=imports,
            model_id=json.dumps(model_id),
            more_files="".join(MORE_FILES[name] for name in more_files),
            results=_results(metrics, protocol, evaluate),
            gain=f"\n### Gain over no distillation\n\n{gain}\n" if gain else "",
            limits=_limits(student_info, dataset, protocol),
            training="" if training is None else f"{_costs(training)}\n\n",
            config=_fenced(public_config(config_yaml)),
            license_text=license_text,
            citation=f"\n## Citation\n\n```bibtex\n{bibtex}\n```\n" if papers else "",
        )
    )


def eval_results(model_id: str, dataset_id: str, metrics: dict[str, dict[str, float]], protocol: dict) -> str:
    """The Hub's `.eval_results/*.yaml`: the student's numbers in per cent, each the task of its name ("AP").

    The date is that of the commit.

    Args:
        model_id: the student's name on the Hub, whose `metrics.json` is named as the source.
        dataset_id: Hub id of the data set.
    """
    size = ", ".join(f"{name} {side}" for name, side in protocol["resolution"].items())
    notes = (
        f"split {protocol['split']}, {protocol['num_images']} images, {size}, at most {protocol['max_detections']} "
        f"detections an image, {protocol['backend']}, asd_hf {__version__}"
    )
    entries = [
        EvalResultEntry(
            dataset_id=dataset_id,
            task_id=name,
            value=round(100 * value, 2),
            source_url=f"https://huggingface.co/{model_id}/blob/main/metrics.json",
            source_name="metrics.json",
            notes=notes,
        )
        for name, value in _known_numbers(metrics).items()
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, width=110)


def evaluate_command(model: str, source: str, protocol: dict, data: dict[str, Any], training: dict[str, Any]) -> str:
    """The `asd-hf evaluate` that repeats the student's numbers.

    Args:
        model, source: what to evaluate on what.
        data, training: these sections of the resolved configuration.
    """
    parts = ["asd-hf", "evaluate", "--model", model, "--data", source, "--split", protocol["split"]]
    parts += ["--batch-size", str(training.get("per_device_eval_batch_size", 8))]
    parts += ["--bf16"] * bool(training.get("bf16"))
    parts += [f"data.{key}={data[key]}" for key in ("box_format", "num_eval_images") if data.get(key) is not None]
    return shlex.join(parts)


def _known_numbers(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    """Those of COCO's twelve that the student has: -1 stands for "no such object"."""
    return {key: value for key, value in metrics.get("student", {}).items() if key in STATS and value >= 0}


def _summary(student_info: dict, teacher_info: dict | None, methods: dict[str, dict[str, str]], data: str) -> str:
    text = f"`{student_info['architecture']}`, trained on {data}"
    if teacher_info:
        text += f" under {_teacher(teacher_info['id'])}"
        if teacher_info.get("cache"):
            text += f", whose predictions came from disk ({teacher_info['cache']}),"
    shown = [f"`{name}`, " + (_cited(paper) if paper else "asd_hf's own") for name, paper in methods.items()]
    if shown:
        text += f" by the method{'s' * (len(shown) > 1)} {' and '.join(shown)}"
    return text + "."


def _cited(paper: dict[str, str]) -> str:
    return f"*{paper['title']}* ({paper['id']})"


def _teacher(name: str) -> str:
    if name in PACKAGED:
        return f"the packaged teacher `{name}`"
    if is_hub_id(name):
        return f"the teacher [{name}](https://huggingface.co/{name})"
    return f"the teacher {_literal(without_folders(name))}"


def _results(metrics: dict[str, dict[str, float]], protocol: dict | None, evaluate: str | None) -> str:
    if protocol is None:
        return "Not evaluated yet.\n"
    header, *rows = table_rows(metrics)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    terms = yaml.safe_dump(protocol | {"source": without_folders(protocol["source"])}, sort_keys=False)
    text = f"{table}\n\nAP in per cent, by COCO's rules, under this protocol:\n\n{_fenced(terms)}\n"
    return text + (f"\nThis repeats the student's numbers:\n\n```bash\n{evaluate}\n```\n" if evaluate else "")


def _limits(student_info: dict, dataset: dict[str, str | None], protocol: dict | None) -> str:
    classes, size = [_literal(name) for name in student_info["classes"]], student_info["size"]
    data = _literal(dataset["name"])
    if "height" in size:
        sides = f"to {size['height']} x {size['width']} (height x width)"
    else:
        sides = f"to a shorter side of {size['shortest_edge']}, at most {size.get('longest_edge')} on the longer one"
    names = ", ".join(classes) if len(classes) <= MOST_CLASSES else short_list(classes)
    where = f"on the split `{protocol['split']}` of {data} alone" if protocol else "nowhere"
    split = f"on the split `{dataset['train_split']}` of " if dataset.get("train_split") else "on "
    return "\n".join(
        [
            f"- It was trained {split}{data} and finds what belongs to its classes alone: {names}.",
            f"- Images are resized {sides} pixels: the processor does it. Other sizes were not evaluated.",
            f"- It was evaluated {where}: not on other cameras, places, weather or styles, not for robustness, bias "
            "or the calibration of its scores, and for no use in which a missed object does harm.",
        ]
    )


def _costs(training: dict) -> str:
    ranks = f"{training['ranks']} x " if training["ranks"] > 1 else ""
    text = f"{training['steps']:,} steps, {training['images']:,} images in all"
    if training["train_images"]:
        text += (
            f" ({training['images'] / training['train_images']:.1f} times the {training['train_images']:,} there are)"
        )
    text += f" on {ranks}{training['device']}"
    if training["train_runtime"]:
        text += f", which took {timedelta(seconds=round(training['train_runtime']))} (h:mm:ss) without evaluations"
    return text + "."


def _literal(name: str) -> str:
    """A name as text of Markdown, whatever it holds: names of folders, data sets and classes are not its author's."""
    return re.sub(r"([\\`*_\[\]<>|#!&])", r"\\\1", " ".join(name.split()))


def _fenced(text: str) -> str:
    """A block of YAML that nothing in it can end."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text) or [""]))
    return f"{fence}yaml\n{text.strip()}\n{fence}"
