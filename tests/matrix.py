"""Every family teaches every family: `python -m tests.matrix docs/detectors.md` writes the table.

Each pair trains two steps with `DistillationTrainer` on a COCO folder, with tiny random models: unequal class lists in
another order, another number of queries, another resolution for the teacher, images of unequal sizes and without
labels among them; then the student is saved and loaded again.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForObjectDetection

from asd_hf.classes import SharedClasses
from asd_hf.config import TrainingConfig
from asd_hf.data import DataConfig, DetectionStream, RowTransform, open_training_source
from asd_hf.detectors import get_adapter
from asd_hf.detectors.base import DetectorAdapter
from asd_hf.freezing import freeze_backbone
from asd_hf.methods.asd import ASD, ASDConfig
from asd_hf.trainer import DistillationTrainer
from tests import tiny
from tests.families import FAMILIES, STUDENTS
from tests.tiny_data import NAMES, tiny_rows, write_coco, write_images

PAGE = """# Detectors

Made by `python -m tests.matrix docs/detectors.md` with transformers {version}.

## What each family gives

Every adapter gives logits, boxes and hidden states of all decoder layers, and the feature maps that they read.
Every student's loss is that of Transformers, computed by asd_hf ([detection_loss.md](detection_loss.md)). *Padding*:
whether the model itself knows the valid image, or is asked in the frame of the padded canvas and its boxes are brought
back. *Other questions*: whether a method may ask the decoder other queries than the model's own (`decode`).

{families}

YOLOS shows its last layer alone, because its heads are trained on no other: use `method.layers: 1`. Grounding DINO is
told the names of the data's classes, or those of `model.class_map`; a class's probability is the mean of its tokens'.
AdaMixer is not of Transformers but of `asd_hf.models`, its loss that of the original: [adamixer.md](adamixer.md).

## Which teaches which

Rows are teachers, columns students. Every pair trained two steps with active sampling distillation on tiny random
models: class lists of unequal size and order, unequal numbers of queries, a resolution of its own for the teacher,
images of unequal sizes, some of them without labels. Losses were finite, more than half of the student's tensors
changed, the teacher had no gradient and did not change, and the saved student, loaded by plain Transformers, answered
the same to the last bit. A cell is the mean detection loss + distillation loss. {working} of {pairs} pairs work.

{matrix}
"""

TEACHER_CLASSES = ("kite", "dog", "pizza", "cat")  # of the data's cat, dog and owl it lacks the last
STEPS = 2


def make_data(root: Path) -> DataConfig:
    """A COCO folder of twelve images and four without labels."""
    write_coco(root / "coco", "train", tiny_rows(12))
    write_images(root / "more", tiny_rows(4, first_id=900))
    return DataConfig(
        source=str(root / "coco"),
        unlabelled=str(root / "more"),
        train_sizes=[64, 80],
        eval_size=80,
        max_size=112,
        teacher_size=96,
        augmentation="flip",
    )


def make_teacher(name: str) -> DetectorAdapter:
    teacher = get_adapter(*FAMILIES[name](classes=TEACHER_CLASSES, num_queries=9, seed=1))
    if teacher.open_vocabulary:
        teacher.prompt(TEACHER_CLASSES)
    return teacher


def train_pair(teacher_name: str, student_name: str, data: DataConfig, folder: Path) -> dict[str, float]:
    """Mean losses of the two steps.

    Raises:
        AssertionError: what `docs/detectors.md` promises of a pair does not hold.
    """
    teacher = make_teacher(teacher_name)
    student = get_adapter(*FAMILIES[student_name](classes=tuple(NAMES)))
    freeze_backbone(student, -1)  # Transformers freezes all of an HF ResNet
    shared = SharedClasses(student.spec, teacher.spec)
    assert shared.names == ("cat", "dog") and shared.student_only == ("owl",)
    layers = min(2, student.spec.num_layers, teacher.spec.num_layers)
    config = ASDConfig(layers=layers, hidden_dim=16, key_dim=16, ramp_steps=0)
    method = ASD(config, *shared.specs(student.spec, teacher.spec))
    args = TrainingConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    source = open_training_source(data)
    stream = DetectionStream(source, RowTransform(data, training=True), batch_size=4)
    before = {
        role: {name: p.detach().clone() for name, p in adapter.model.named_parameters()}
        for role, adapter in (("student", student), ("teacher", teacher))
    }
    trainer = DistillationTrainer(student, teacher, method, args, train_dataset=stream)
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss/asd_box" in row]
    assert len(history) == STEPS
    losses = {name: value for row in history for name, value in row.items() if "loss" in name}
    assert all(torch.tensor(value).isfinite() for value in losses.values()), losses

    for name, parameter in teacher.model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before["teacher"][name]), name
    changed = [n for n, p in student.model.named_parameters() if not torch.equal(p, before["student"][n])]
    assert len(changed) > len(before["student"]) / 2, changed

    trainer.save_model(str(folder))
    loaded = get_adapter(AutoModelForObjectDetection.from_pretrained(folder).eval(), student.processor)
    student.model.eval()
    batch = tiny.batch(2)
    with torch.no_grad():
        ours, theirs = (a(batch["pixel_values"], batch["pixel_mask"]) for a in (student, loaded))
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.boxes, theirs.boxes)
    return {name: sum(row.get(name, 0.0) for row in history) / STEPS for name in losses}


def _families() -> Iterator[str]:
    yield "| family | classes | padding | sides are multiples of | other questions | role |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name in FAMILIES:
        adapter = make_teacher(name)
        spec, student = adapter.spec, name in STUDENTS
        cells = [
            name,
            spec.activation,
            "canvas" if adapter.sees_padding else "valid image",
            str(adapter.size_divisor) if adapter.size_divisor > 1 else "any",
            "yes" if "decode" in spec.capabilities else "no",
            "teacher, student" if student else "teacher",
        ]
        yield f"| {' | '.join(cells)} |"


def write_table(file: Path) -> None:
    rows, failed = {}, []
    with tempfile.TemporaryDirectory() as root:
        data = make_data(Path(root))
        for teacher in tqdm(FAMILIES, desc="teachers", unit="teacher"):
            for student in STUDENTS:
                try:
                    losses = train_pair(teacher, student, data, Path(root) / teacher / student)
                    ours = sum(losses[f"loss/asd_{term}"] for term in ("sampling", "box", "class"))
                    rows[teacher, student] = f"{losses['loss'] - ours:.1f} + {ours:.1f}"
                except Exception as error:  # the table shows every pair, also those that fail
                    rows[teacher, student] = "**failed**"
                    failed.append(f"{teacher} -> {student}: {' '.join(str(error).split())[:200]}")
    header = f"| teacher \\ student | {' | '.join(STUDENTS)} |\n{'| --- ' * (len(STUDENTS) + 1)}|"
    matrix = "\n".join(f"| {t} | " + " | ".join(rows[t, s] for s in STUDENTS) + " |" for t in FAMILIES)
    file.write_text(
        PAGE.format(
            version=transformers.__version__,
            families="\n".join(_families()),
            working=len(rows) - len(failed),
            pairs=len(rows),
            matrix=f"{header}\n{matrix}",
        )
    )
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    write_table(Path(sys.argv[1]))
