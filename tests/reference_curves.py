"""Loss curves of short seeded trainings, to be compared: `python -m tests.reference_curves --renew` writes them anew.

Every family learns under `asd`, and a Deformable DETR under every method: four steps on a CPU, from a configuration
through `Parts` and the trainer. All terms of the loss and the norm of the student's gradient are kept, step by step.
Without `--renew` the curves are compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import set_seed

from asd_hf.build import Parts
from asd_hf.config import build_config
from asd_hf.detectors import get_adapter
from asd_hf.methods import METHODS
from tests.families import FAMILIES, STUDENTS
from tests.tiny_data import NAMES, jpeg, tiny_rows, write_coco

FILE = Path(__file__).parent / "golden" / "curves.json"
STEPS = 4
# Processors round differently. The same steps without oneDNN and with ATen's kernels for processors without a vector
# unit (ATEN_CPU_CAPABILITY=default) differ by 0.03 % at most in a term of the loss and by 0.1 % in the norm.
TERM_TOLERANCE, NORM_TOLERANCE = 1e-3, 5e-3
CASES = [f"student {name}" for name in STUDENTS]  # under asd
CASES += [f"method {name}" for name in ("none", *METHODS) if name != "asd"]
# At which nothing is resized: processors differ in how they round pixels.
SIZES = {"mixed": [(64, 96), (96, 64), (64, 64), (80, 64)], "square": [(64, 64)]}
METHOD_OPTIONS = {  # small samplers, and no ramp
    "asd": {"hidden_dim": 16, "key_dim": 16, "ramp_steps": 0},
    "balanced_pairs": {"hidden_dim": 16, "key_dim": 16, "trust": 0.0},
    "od_detr": {"ramp_steps": 0},
}

Curves = dict[str, list[float]]  # name of a number -> its value at each step


def write_places(root: Path) -> Path:
    """A COCO folder, a teacher, and a student of each family."""
    for folder, sizes in SIZES.items():
        for split, count in (("train", 12), ("val", 4)):
            write_coco(root / folder, split, sized_rows(count, sizes))
    for name in STUDENTS:
        save(root / name, name, tuple(NAMES))
    save(root / "teacher", "deformable_detr", ("bus", *reversed(NAMES)), seed=1)
    return root


def sized_rows(count: int, sizes: list[tuple[int, int]]) -> list[dict]:
    """`tiny_rows` in these sizes (width, height), in turn."""
    rows = tiny_rows(count)
    for number, row in enumerate(rows):
        width, height = sizes[number % len(sizes)]
        x, y = width / row["width"], height / row["height"]
        row["bbox"] = [[left * x, top * y, w * x, h * y] for left, top, w, h in row["bbox"]]
        row["area"] = [w * h for *_, w, h in row["bbox"]]
        row |= {"width": width, "height": height, "jpeg": jpeg(width, height, number)}
    return rows


def save(folder: Path, family: str, classes: tuple[str, ...], seed: int = 0) -> None:
    model, processor = FAMILIES[family](classes=classes, seed=seed)
    if family in ("d_fine", "deimv2"):  # as they start, signals of 1e-10 leave their backbone
        for module in get_adapter(model, processor).backbone.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    if family == "deformable_detr":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "sampling_offsets" in name or "attention_weights" in name:  # fresh ones are the same in every model
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def configuration(places: Path, case: str) -> dict:
    """The sections of a case's configuration."""
    kind, name = case.split()
    student, method = (name, "asd") if kind == "student" else ("deformable_detr", name)
    square = "height" in FAMILIES[student]()[1].size  # sides that are multiples, or none that is asked for
    sizes = {"resize": "fixed", "fixed_size": [64, 64]} if square else {"train_sizes": [64], "max_size": 96}
    training = {
        "output_dir": str(places / "out"),
        "max_steps": STEPS,
        "per_device_train_batch_size": 3,
        "learning_rate": 3e-4,
        # Some gradients are nothing but rounding errors, which Adam would blow up to full steps.
        "adam_epsilon": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
    }
    if method == "od_detr":
        training["ema_decay"] = 0.9
    return {
        "model": {
            "teacher": {"none": None, "od_detr": "ema"}.get(method, str(places / "teacher")),
            "student": str(places / student),
        },
        "data": {"source": str(places / ("square" if square else "mixed")), "augmentation": "flip", "eval_size": 64}
        | sizes,
        "method": {"name": method}
        | METHOD_OPTIONS.get(method, {})
        | ({"layers": 1} if student == "yolos" else {}),  # it shows no more
        "training": training,
    }


def curves(sections: dict) -> Curves:
    """Trains as `sections` say."""
    run = build_config(sections)
    set_seed(run.training.seed)
    trainer = Parts(run).trainer()
    trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    kept = [name for name in steps[0] if name.startswith("loss/") or name == "grad_norm"]
    return {name: [float(f"{row[name]:.6g}") for row in steps] for name in kept}


def differences(found: Curves, expected: Curves) -> Iterator[str]:
    """What is not within the tolerance of each number's own size, or of 2e-4 where that is more."""
    if found.keys() != expected.keys():
        yield f"other terms: {sorted(found.keys() ^ expected.keys())}"
        return
    for name, values in expected.items():
        tolerance = NORM_TOLERANCE if name == "grad_norm" else TERM_TOLERANCE
        for step, (ours, theirs) in enumerate(zip(found[name], values, strict=True)):
            if abs(ours - theirs) > tolerance * max(abs(theirs), 2e-4):
                yield f"{name} at step {step + 1}: {ours}, was {theirs}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.reference_curves", description=__doc__.splitlines()[0])
    parser.add_argument("--renew", action="store_true", help="write the curves instead of comparing them")
    renew, known = parser.parse_args().renew, json.loads(FILE.read_text())
    with tempfile.TemporaryDirectory() as root:
        places = write_places(Path(root))
        found = {case: curves(configuration(places, case)) for case in tqdm(CASES, desc="curves", unit="case")}
    if renew:
        FILE.write_text(written(found))
        return
    lines = [f"{case}: {line}" for case in CASES for line in differences(found[case], known.get(case, {}))]
    if lines:
        sys.exit("\n".join(lines))


def written(found: dict[str, Curves]) -> str:
    """As JSON, a curve a line."""
    cases = []
    for case, numbers in found.items():
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in numbers.items())
        cases.append(f"{json.dumps(case)}: {{\n{lines}\n}}")
    return "{\n" + ",\n".join(cases) + "\n}\n"


if __name__ == "__main__":
    main()
