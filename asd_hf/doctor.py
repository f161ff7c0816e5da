"""Will this pair train, and how? The questions to ask before any GPU hour."""

from __future__ import annotations

import logging
import math
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from tqdm.auto import tqdm

from .build import Parts
from .classes import short_list
from .data import resize_spec, teacher_view
from .detectors.base import DetectorAdapter
from .errors import UserError
from .trainer import DistillationTrainer

logger = logging.getLogger(__name__)

OK, ADAPTED, REFUSED = "OK", "ADAPTED", "REFUSED"
POOR_TEACHER = 0.01  # an AP below this is no teacher's, but that of weights, classes or pixels gone wrong


@dataclass(frozen=True)
class Finding:
    """One answer. ADAPTED: the two differ, and it is taken care of as the text says."""

    topic: str
    verdict: str
    text: str
    remedy: str = ""


def check(parts: Parts) -> list[Finding]:
    """All that can be told without running a model, as far as the parts can be built."""
    findings: list[Finding] = []
    try:
        for finding in _findings(parts):
            findings.append(finding)
    except UserError as error:
        findings.append(Finding(_TOPICS[len(findings)], REFUSED, str(error)))
    return findings


_TOPICS = (
    "data",
    "teacher",
    "student",
    "loss",
    "input sizes",
    "normalisation",
    "classes",
    "head",
    "queries",
    "layers",
)
_TOPICS += ("method",)


def _findings(parts: Parts) -> Iterator[Finding]:
    """In the order of `_TOPICS`, so that a part that cannot be built is told from the others."""
    data, train, evaluation = parts.run.data, parts.train_source, parts.eval_source
    rows = "rows of unknown number" if train.num_rows is None else f"{train.num_rows} images"
    mixed = f", those of {data.unlabelled} without labels" if data.unlabelled else ""
    yield Finding(
        "data",
        OK,
        f"{rows} to train on{mixed}, {evaluation.num_rows} to evaluate on, {len(parts.class_names)} classes",
    )
    teacher, student = parts.teacher, None
    yield Finding("teacher", OK, "none: labels alone" if teacher is None else _describe(teacher))
    student = parts.student
    trained = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
    frozen = sum(not p.requires_grad for p in student.backbone.parameters())
    if not trained:
        raise UserError("no parameter of the student is trained: lower model.student.frozen_stages")
    yield Finding(
        "student", OK, f"{_describe(student)}, {trained / 1e6:.2f}M trained, {frozen} backbone tensors frozen"
    )
    own = "Transformers' own" if student.own_loss else "asd_hf's, equal to Transformers'"
    yield Finding("loss", OK, f"{own} loss of {student.spec.family}")
    yield _sizes(parts)
    if teacher is None:
        return
    same = (student.spec.pixel_mean, student.spec.pixel_std) == (teacher.spec.pixel_mean, teacher.spec.pixel_std)
    yield Finding(
        "normalisation",
        OK if same else ADAPTED,
        "the same pixel statistics" if same else "each model gets pixels by its own statistics",
    )
    yield _classes(parts)
    heads = teacher.spec.activation, student.spec.activation
    yield Finding(
        "head",
        OK if heads[0] == heads[1] else ADAPTED,
        f"both {heads[0]}"
        if heads[0] == heads[1]
        else f"the teacher's {heads[0]} probabilities are compared in the {heads[1]} form of the student",
    )
    for topic, ours, theirs in (
        ("queries", student.spec.num_queries, teacher.spec.num_queries),
        ("layers", student.spec.num_layers, teacher.spec.num_layers),
    ):
        how = {"queries": "no matching is needed", "layers": "aligned from the last one"}[topic]
        yield Finding(
            topic,
            OK if ours == theirs else ADAPTED,
            f"both {ours}" if ours == theirs else f"teacher {theirs}, student {ours}: {how}",
        )
    method = parts.method
    needs = ", ".join(sorted(method.requires)) or "boxes and classes alone"
    own = sum(p.numel() for p in method.parameters())
    yield Finding("method", OK, f"{parts.run.method_name} needs {needs}; {own / 1e6:.2f}M parameters of its own")


def _describe(adapter: DetectorAdapter) -> str:
    spec, count = adapter.spec, sum(p.numel() for p in adapter.model.parameters())
    return (
        f"{spec.family}, {count / 1e6:.2f}M parameters, {spec.num_layers} decoder layers, {spec.num_queries} queries, "
        f"{len(spec.class_names)} classes"
    )


def _sizes(parts: Parts) -> Finding:
    student, teacher = parts.student, parts.teacher
    ours, theirs = resize_spec(parts.run.data), resize_spec(teacher_view(parts.run.data))
    if _pads(student, ours):
        divisor = student.size_divisor
        side = -(-640 // divisor) * divisor
        return Finding(
            "input sizes",
            REFUSED,
            f"{student.spec.family} needs one size whose sides are multiples of {divisor}, and the saved student must "
            f"run on what its image processor makes: {_size(ours)}",
            f"data.resize: fixed, data.fixed_size: [{side}, {side}]",
        )
    smallest = min(parts.run.data.train_sizes) if "shortest_edge" in ours else 0
    for role, adapter, size in (("student", student, ours), ("teacher", teacher, theirs)):
        if adapter is not None and adapter.two_stage:
            # The teacher without a size of its own sees what the student sees.
            sides = (size["height"], size["width"]) if "height" in size else (smallest or size["shortest_edge"],) * 2
            cells = sum(math.prod(-(-side // stride) for side in sides) for stride in adapter.spec.strides)
            if cells < adapter.spec.num_queries:
                return Finding(
                    "input sizes",
                    REFUSED,
                    f"the {role}'s {adapter.spec.num_queries} queries are chosen among the cells of its feature maps, "
                    f"and {sides[0]}x{sides[1]} pixels have {cells}",
                    "larger images, or fewer model.student.num_queries" if role == "student" else "data.teacher_size",
                )
    if teacher is None:
        return Finding("input sizes", OK, _size(ours))
    notes = [] if ours == theirs else [f"student {_size(ours)}, teacher {_size(theirs)}, of one augmented image"]
    if _pads(teacher, theirs):
        notes.append(f"the teacher's images are padded to multiples of {teacher.size_divisor}")
    if teacher.sees_padding and "shortest_edge" in theirs:
        notes.append("the teacher knows no padding mask: its boxes are brought into the frame of the image")
    return Finding("input sizes", ADAPTED if notes else OK, "; ".join(notes) or f"both {_size(ours)}")


def _pads(adapter: DetectorAdapter, size: dict[str, int]) -> bool:
    """Whether the model cannot take images of this size as they are."""
    if "height" not in size:
        return adapter.size_divisor > 1
    image = torch.zeros(1, 3, size["height"], size["width"], dtype=torch.uint8)
    return adapter.prepare(image, image[:, 0] == 0)[0].shape != image.shape


def _size(size: dict[str, int]) -> str:
    if "height" in size:
        return f"{size['height']}x{size['width']}"
    return f"shorter side {size['shortest_edge']}, longer at most {size['longest_edge']}"


def _classes(parts: Parts) -> Finding:
    classes, teacher, student = parts.classes, parts.teacher.spec, parts.student.spec
    if classes.student_only:
        return Finding(
            "classes",
            ADAPTED,
            f"{len(classes.names)} of {len(student.class_names)} are shared; the teacher lacks "
            f"{short_list(classes.student_only)}: masked from the class terms, boxes are compared as ever",
            "model.class_map, if the teacher has another name for them",
        )
    if teacher.class_names == student.class_names:
        return Finding("classes", OK, f"the same {len(student.class_names)} in the same order")
    more = f", {len(classes.teacher_only)} more of the teacher are left out" if classes.teacher_only else ""
    return Finding("classes", ADAPTED, f"all {len(classes.names)} found by name{more}")


def report(findings: list[Finding]) -> None:
    """Logs the findings as a table.

    Raises:
        UserError: something is refused.
    """
    logger.info("\n%s\n", format_findings(findings))
    if refused := [finding for finding in findings if finding.verdict == REFUSED]:
        raise UserError("; ".join(f"{f.text}" + (f" (set {f.remedy})" if f.remedy else "") for f in refused))


def format_findings(findings: list[Finding]) -> str:
    """A table for the terminal."""
    width = max(len(finding.topic) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.topic:<{width}}  {finding.verdict:<7}  {finding.text}")
        if finding.remedy:
            lines.append(f"{'':<{width}}  {'':<7}  -> {finding.remedy}")
    return "\n".join(lines)


def measure_teacher(parts: Parts, trainer: DistillationTrainer, num_images: int) -> Finding:
    """The teacher's AP on the first images of the evaluation data, at its own resolution."""
    loader = trainer.get_eval_dataloader(parts.evaluation_stream(teacher=True, num_images=num_images))
    numbers, evaluator = trainer.evaluate_adapter(parts.teacher, loader)
    text = f"AP {100 * numbers['AP']:.1f}, AP50 {100 * numbers['AP50']:.1f} on {evaluator.num_images} images"
    if numbers["AP"] < POOR_TEACHER:
        return Finding(
            "teacher's AP",
            REFUSED,
            f"{text}: a student can learn nothing from it",
            "the right weights, class names (model.class_map), pixel statistics and data.teacher_size",
        )
    return Finding("teacher's AP", OK, text)


def measure_steps(parts: Parts, trainer: DistillationTrainer, num_steps: int) -> tuple[list[Finding], list[list[str]]]:
    """Time and memory of real training steps, and what each term of the method weighs beside the detection loss.

    The student takes these steps: it is not to be trained on afterwards.

    Returns:
        The findings, and a table: each term, the ratio of its gradient's norm to that of the detection loss at the
        student's predictions (as the weights are at the end of all schedules), its weight in the configuration, and
        the weight that would make the ratio 1.
    """
    args, device = trainer.args, trainer.args.device
    trainer.create_optimizer()
    model = trainer.accelerator.prepare_model(trainer.model.train())
    batches = iter(trainer.get_train_dataloader())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times, norms = [], []
    for _ in tqdm(range(num_steps), desc="steps", unit="step", leave=False):
        batch = trainer._prepare_inputs(next(batches))
        start = perf_counter()
        trainer.accelerator.backward(trainer.compute_loss(model, batch))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(perf_counter() - start)
        if parts.method is not None:
            parts.method.step = 10**9  # the end of all schedules
            views = {key: batch[key] for key in ("pixel_values", "pixel_mask", "labels")}
            output = model(**views, teacher=trainer.ask_teacher(batch), measure_gradients=True)
            norms.append({name: norm.item() for name, norm in output.gradient_norms.items()})
    seconds = median(times)
    per_epoch = trainer.train_dataset.batches_per_epoch
    steps = args.max_steps
    if steps <= 0 and per_epoch is not None:
        steps = int(args.num_train_epochs * per_epoch / args.gradient_accumulation_steps)
    whole = (
        f"; {steps} steps: {steps * args.gradient_accumulation_steps * seconds / 3600:.1f} h, evaluation not counted"
    )
    if device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of the GPU"
    else:
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB of main memory, this process"
    findings = [
        Finding(
            "time",
            OK,
            f"{1e3 * seconds:.0f} ms for a batch of {args.per_device_train_batch_size} on {device.type}{whole}",
        ),
        Finding("memory", OK, f"at most {memory}"),
    ]
    return findings, _gradient_table(parts, norms)


def _gradient_table(parts: Parts, norms: list[dict[str, float]]) -> list[list[str]]:
    rows = [["term", "gradient ratio", "weight", "weight for ratio 1"]]
    for term in norms[0] if norms else ():
        if term == "detection":
            continue
        ratio = median(n[term] / max(n["detection"], 1e-12) for n in norms)
        knob = f"{term.removeprefix(parts.run.method_name + '_')}_weight"
        weight = getattr(parts.run.method, knob, None)
        known = weight is not None
        rows.append(
            [
                term,
                f"{ratio:.3g}",
                f"method.{knob}={weight:g}" if known else "-",
                f"{weight / ratio:.3g}" if known and ratio else "-",
            ]
        )
    return rows
