"""Will this pair train, and how? The questions to ask before any GPU hour."""

from __future__ import annotations

import logging
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from statistics import mean, median
from time import perf_counter

import psutil
import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from .build import Parts
from .classes import short_list
from .data import resize_spec, teacher_view
from .detectors.base import DetectorAdapter, DetectorSpec
from .errors import UserError
from .progress import terminal_width, tqdm
from .trainer import DistillationTrainer, make_criterion

logger = logging.getLogger(__name__)

OK, ADAPTED, CHECK, REFUSED = "OK", "ADAPTED", "CHECK", "REFUSED"
POOR_TEACHER = 0.01  # an AP below this is no teacher's, but that of weights, classes or pixels gone wrong


@dataclass(frozen=True)
class Finding:
    """One answer.

    ADAPTED: the two differ, and it is taken care of as the text says. CHECK: it works, and is hardly what is meant.
    """

    topic: str
    verdict: str
    text: str
    remedy: str = ""


def check(parts: Parts) -> list[Finding]:
    """All that can be told without running a model."""
    findings: list[Finding] = []
    for topic, ask in _QUESTIONS.items():
        try:
            answer = ask(parts)
        except UserError as error:
            if any(str(error) == finding.text for finding in findings):
                continue  # of a part that is missing; it was told where it was asked for first
            answer = REFUSED, str(error)
        if answer is not None:
            findings.append(Finding(topic, *answer))
    return findings


def _data(parts: Parts) -> tuple[str, ...]:
    data, train, evaluation = parts.run.data, parts.train_source, parts.eval_source
    rows = "images of unknown number" if train.num_rows is None else f"{train.num_rows} images"
    mixed = f" (those of {data.unlabelled} without labels)" if data.unlabelled else ""
    known = [count for count in (evaluation.num_rows, data.num_eval_images) if count is not None]
    held_out = f"{min(known)}" if known else "an unknown number"
    return OK, f"{rows} to train on{mixed}, {held_out} to evaluate on, {len(parts.class_names)} classes"


def _teacher(parts: Parts) -> tuple[str, ...]:
    if parts.self_taught:
        if not parts.run.training.ema_decay:
            return REFUSED, "the student's own moving average, which is not kept", "training.ema_decay, say to 0.9998"
        return OK, f"the student's own moving average, of decay {parts.run.training.ema_decay}"
    if parts.cache is not None:
        return _describe_cache(parts)
    return OK, "none: labels alone" if parts.teacher is None else _describe(parts.teacher)


def _describe_cache(parts: Parts) -> tuple[str, ...]:
    cache, spec = parts.cache, parts.cache.spec
    text = (
        f"{spec.family}, {spec.num_layers} decoder layers, {spec.num_queries} queries, {len(spec.class_names)} "
        f"classes; its predictions from {cache.location}, {cache.manifest.kind}"
    )
    if cache.manifest.canonical:
        return ADAPTED, text
    views, steps = cache.manifest.views, planned_steps(parts)
    batches = parts.training_stream().batches_per_epoch
    if cache.manifest.seed is not None and None not in (steps, batches):
        epochs = math.ceil(steps * parts.run.training.gradient_accumulation_steps / batches)
        if epochs > views:
            return CHECK, f"{text}: {epochs} epochs see each of them more than once", f"asd-hf cache --views {epochs}"
    return OK, text


def _student(parts: Parts) -> tuple[str, ...]:
    student = parts.student
    trained = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
    frozen = sum(not p.requires_grad for p in student.backbone.parameters())
    if not trained:
        return REFUSED, "no parameter of the student is trained", "a lower model.student.frozen_stages"
    return OK, f"{_describe(student)}, {trained / 1e6:.2f}M trained, {frozen} backbone tensors frozen"


def _loss(parts: Parts) -> tuple[str, ...]:
    make_criterion(parts.student, parts.run.training)
    fast = parts.run.training.fast_criterion
    kind = "asd_hf's loss, equal to Transformers'," if fast else "Transformers' own loss"
    return OK, f"{kind} of {parts.student.spec.family}"


def _sizes(parts: Parts) -> tuple[str, ...]:
    student, teacher = parts.student, parts.teacher
    ours, theirs = resize_spec(parts.run.data), resize_spec(teacher_view(parts.run.data))
    padded = _pads(student, ours)
    if padded and ("height" in ours or student.processor_multiple % student.size_divisor):
        divisor = student.size_divisor
        height, width = (-(-side // divisor) * divisor for side in (ours.get("height", 640), ours.get("width", 640)))
        return (
            REFUSED,
            f"{student.spec.family} takes only sides that are multiples of {divisor}, and its image processor would "
            f"make {_size(ours)}",
            f"data.resize: fixed, data.fixed_size: [{height}, {width}]",
        )
    for role, adapter, size in (("student", student, ours), ("teacher", teacher, theirs)):
        if adapter is None or not adapter.two_stage:
            continue
        sides = _smallest(parts, size)
        cells = sum(math.prod(-(-side // stride) for side in sides) for stride in adapter.spec.strides)
        if cells < adapter.spec.num_queries:
            return (
                REFUSED,
                f"the {role}'s {adapter.spec.num_queries} queries are chosen among the cells of its feature maps, and "
                f"{sides[0]}x{sides[1]} pixels have {cells}",
                "larger images or fewer model.student.num_queries"
                if role == "student"
                else "a larger data.teacher_size",
            )
    notes = []
    if padded:
        notes.append(f"sides are padded to multiples of {student.size_divisor}, where the image processor cuts them")
    if teacher is not None:
        if ours != theirs:
            notes.append(f"student {_size(ours)}, teacher {_size(theirs)}, of one augmented image")
        if _pads(teacher, theirs):
            notes.append(f"the teacher's images are padded to multiples of {teacher.size_divisor}")
        if teacher.sees_padding and "shortest_edge" in theirs:
            notes.append("the teacher knows no padding mask: its boxes are brought into the frame of the image")
        usual = dict(teacher.processor.size)
        if usual != theirs:
            notes.append(f"the teacher's image processor makes {_size(usual)}, and it will see {_size(theirs)}")
            return CHECK, "; ".join(notes), "data.teacher_size, if that is not meant"
    return ADAPTED if notes else OK, "; ".join(notes) or _size(ours)


def _pads(adapter: DetectorAdapter, size: dict[str, int]) -> bool:
    """Whether the model cannot take images of this size as they are."""
    if "height" not in size:
        return adapter.size_divisor > 1
    image = torch.zeros(1, 3, size["height"], size["width"], dtype=torch.uint8)
    return adapter.prepare(image, image[:, 0] == 0)[0].shape != image.shape


def _smallest(parts: Parts, size: dict[str, int]) -> tuple[int, int]:
    """(height, width) that no image is below, if its aspect is kept: of a square image at the smallest scale."""
    if "height" in size:
        return size["height"], size["width"]
    data = parts.run.data
    scales = [size["shortest_edge"], *(data.train_sizes if size == resize_spec(data) else [])]
    return min(scales), min(scales)


def _size(size: dict[str, int]) -> str:
    if "height" in size:
        return f"{size['height']}x{size['width']}"
    if size.get("longest_edge") is None:
        return f"shorter side {size['shortest_edge']}"
    return f"shorter side {size['shortest_edge']}, longer at most {size['longest_edge']}"


def _pretrained(parts: Parts) -> DetectorSpec | None:
    """Of a teacher that is not the student itself."""
    return None if parts.self_taught else parts.teacher_spec


def _normalisation(parts: Parts) -> tuple[str, ...] | None:
    student, teacher = parts.student.spec, _pretrained(parts)
    if teacher is None:
        return None
    if (student.pixel_mean, student.pixel_std) == (teacher.pixel_mean, teacher.pixel_std):
        return OK, "the same pixel statistics"
    return ADAPTED, "each model gets pixels by its own statistics"


def _classes(parts: Parts) -> tuple[str, ...] | None:
    student, teacher = parts.student.spec, _pretrained(parts)
    if teacher is None:
        return None
    classes = parts.classes
    if classes.student_only:
        return (
            ADAPTED,
            f"{len(classes.names)} of {len(student.class_names)} are shared; the teacher lacks "
            f"{short_list(classes.student_only)}: masked from the class terms, boxes are compared as ever",
            "model.class_map, if the teacher has another name for them",
        )
    if teacher.class_names == student.class_names:
        return OK, f"the same {len(student.class_names)} in the same order"
    more = f", {len(classes.teacher_only)} more of the teacher are left out" if classes.teacher_only else ""
    return ADAPTED, f"all {len(classes.names)} found by name{more}"


def _head(parts: Parts) -> tuple[str, ...] | None:
    if _pretrained(parts) is None:
        return None
    ours, theirs = parts.student.spec.activation, _pretrained(parts).activation
    if ours == theirs:
        return OK, f"both {ours}"
    return ADAPTED, f"the teacher's {theirs} probabilities are compared in the {ours} form of the student"


def _queries(parts: Parts) -> tuple[str, ...] | None:
    return _counts(parts, "num_queries", "the numbers may differ, unless the method says otherwise")


def _layers(parts: Parts) -> tuple[str, ...] | None:
    return _counts(parts, "num_layers", "aligned from the last one")


def _counts(parts: Parts, name: str, how: str) -> tuple[str, ...] | None:
    if _pretrained(parts) is None:
        return None
    ours, theirs = getattr(parts.student.spec, name), getattr(_pretrained(parts), name)
    return (OK, f"both {ours}") if ours == theirs else (ADAPTED, f"teacher {theirs}, student {ours}: {how}")


def _method(parts: Parts) -> tuple[str, ...] | None:
    if parts.method is None:
        return None
    method = parts.method
    needs = ", ".join(sorted(method.requires | method.teacher_requires)) or "boxes and classes alone"
    own = sum(p.numel() for p in method.parameters())
    text = f"{parts.run.method_name} needs {needs}; {own / 1e6:.2f}M parameters of its own"
    watched = {"both": method.requires, "the teacher": method.teacher_requires}
    if roles := [role for role, signals in watched.items() if "attention" in signals]:
        return ADAPTED, f"{text}; attention of {roles[0]} is computed step by step (eager): fused kernels hide it"
    return OK, text


def _schedule(parts: Parts) -> tuple[str, ...]:
    args, steps = parts.run.training, planned_steps(parts)
    if steps is None:
        return REFUSED, "the number of images is not known before they are read", "training.max_steps"
    parts.evaluation_stream()
    images = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if parts.method is not None and parts.method.settled_at >= steps:
        return (
            CHECK,
            f"{steps} steps of {images} images, and the method has its full weight from step "
            f"{parts.method.settled_at} on",
            "a longer training or a smaller ramp_steps of the method",
        )
    return OK, f"{steps} steps of {images} images"


def planned_steps(parts: Parts) -> int | None:
    """Optimizer steps of the whole training; None where the length of the data is not known."""
    args, batches = parts.run.training, parts.training_stream().batches_per_epoch
    if args.max_steps > 0:
        return args.max_steps
    if batches is None:
        return None
    return math.ceil(args.num_train_epochs * max(1, batches // args.gradient_accumulation_steps))


_QUESTIONS: dict[str, Callable[[Parts], tuple[str, ...] | None]] = {
    "data": _data,
    "teacher": _teacher,
    "student": _student,
    "loss": _loss,
    "input sizes": _sizes,
    "normalisation": _normalisation,
    "classes": _classes,
    "head": _head,
    "queries": _queries,
    "layers": _layers,
    "method": _method,
    "schedule": _schedule,
}


def _describe(adapter: DetectorAdapter) -> str:
    spec, count = adapter.spec, sum(p.numel() for p in adapter.model.parameters())
    return (
        f"{spec.family}, {count / 1e6:.2f}M parameters, {spec.num_layers} decoder layers, {spec.num_queries} queries, "
        f"{len(spec.class_names)} classes"
    )


def report(findings: list[Finding]) -> None:
    """Logs the findings as a table.

    Raises:
        UserError: something is refused.
    """
    logger.info("\n%s\n", format_findings(findings))
    if refused := [finding for finding in findings if finding.verdict == REFUSED]:
        raise UserError("; ".join(f.text + (f" (set {f.remedy})" if f.remedy else "") for f in refused))


def format_findings(findings: list[Finding]) -> str:
    """A table for the terminal."""
    width = max(len(finding.topic) for finding in findings)
    room = max(40, terminal_width() - width - 11)
    lines = []
    for finding in findings:
        text = textwrap.wrap(finding.text, room) or [""]
        if finding.remedy:
            text += textwrap.wrap(f"-> {finding.remedy}", room, subsequent_indent="   ")
        topic, verdict = finding.topic, finding.verdict
        for line in text:
            lines.append(f"{topic:<{width}}  {verdict:<7}  {line}")
            topic = verdict = ""
    return "\n".join(lines)


def measure_teacher(parts: Parts, trainer: DistillationTrainer, num_images: int) -> Finding:
    """The teacher's AP on the first evaluation images, at its own resolution, over the classes that it knows."""
    loader = trainer.get_eval_dataloader(parts.evaluation_stream(teacher=True, num_images=num_images))
    numbers, evaluator = trainer.evaluate_adapter(parts.teacher, loader)
    known = [numbers["per_class"][name] for name in parts.classes.names]
    known = [ap for ap in known if ap >= 0]  # -1: no such object
    images = f"the first {evaluator.num_images} images"
    if not known:
        return Finding("teacher's AP", REFUSED, f"no object that the teacher knows in {images}", "more --images")
    text = f"{100 * mean(known):.1f} on {images}"
    if len(known) < len(parts.class_names):
        text += f", over the {len(known)} classes that it knows and that occur"
    if mean(known) < POOR_TEACHER:
        return Finding(
            "teacher's AP",
            REFUSED,
            f"{text}: a student can learn nothing from it",
            "the right weights, class names (model.class_map), pixel statistics and data.teacher_size",
        )
    return Finding("teacher's AP", OK, text)


def measure_steps(parts: Parts, trainer: DistillationTrainer, num_steps: int) -> list[Finding]:
    """Time and memory of real training steps, on as many ranks as this was started on.

    The student takes these steps: it is not to be trained on afterwards.
    """
    args, device, planned = trainer.args, trainer.args.device, planned_steps(parts)
    args.max_steps = num_steps
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    clock = _Clock(num_steps, device)
    trainer.add_callback(clock)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer.train()
    seconds = median(clock.seconds)
    if device.type == "cuda":
        memory = f"at most {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of the GPU"
    else:
        memory = f"{clock.memory / 2**30:.1f} GiB of main memory, loader workers not counted"
    hours = planned * seconds / 3600
    whole = f"{planned} steps: {f'{hours:.1f} h' if hours >= 1 else f'{60 * hours:.1f} min'}, evaluations not counted"
    images = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return [
        Finding("time", OK, f"{1e3 * seconds:.0f} ms a step of {images} images a rank on {device.type}; {whole}"),
        Finding("memory", OK, memory),
    ]


class _Clock(TrainerCallback):
    """Seconds from the end of one step to that of the next, data included; the first one warms up."""

    def __init__(self, num_steps: int, device: torch.device) -> None:
        self.device, self.seconds, self.memory = device, [], 0
        self.bar = tqdm(total=num_steps, desc="steps", unit="step", leave=False)
        self.last = perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = perf_counter()
        if state.global_step > 1 or state.max_steps == 1:
            self.seconds.append(now - self.last)
        self.last = now
        self.memory = max(self.memory, psutil.Process().memory_info().rss)
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.close()


def measure_gradients(parts: Parts, trainer: DistillationTrainer, num_batches: int) -> list[list[str]]:
    """What each term of the method weighs beside the detection loss: a table, header first.

    The columns: the ratio of the norms of the two gradients where `Distiller.forward` measures them, as the weights
    are at the end of all schedules; the weight in the configuration; and the weight that would make the ratio 1.
    Batches without any label are left out.
    """
    norms = []
    for batch in islice(trainer.get_train_dataloader(), num_batches):
        batch = trainer._prepare_inputs(batch)
        parts.method.step = 10**9
        views = {key: batch[key] for key in ("pixel_values", "pixel_mask", "labels")}
        with trainer.accelerator.autocast():
            output = trainer.model.train()(**views, teacher=trainer.ask_teacher(batch), measure_gradients="terms")
        norms.append({name: norm.item() for name, norm in output.gradient_norms.items()})
    norms = [norm for norm in norms if norm["detection"] > 0]
    rows = [["term", "gradient ratio", "weight", "weight for ratio 1"]]
    for term in norms[0] if norms else ():
        if term == "detection":
            continue
        ratio = median(norm[term] / norm["detection"] for norm in norms)
        knob, weight = _knob(parts, term)
        shown = "-" if weight is None else f"{knob}={weight:g}"
        wanted = "-" if weight is None or not ratio else f"{weight / ratio:.3g}"
        rows.append([term, f"{ratio:.3g}", shown, wanted])
    return rows


def _knob(parts: Parts, term: str) -> tuple[str, float | None]:
    """Key and value of the weight of a loss, if it has one."""
    methods = parts.run.methods
    for name, config in methods.items():
        # Losses are named by the method's file, "channel_wise" of "channel_wise:ChannelWise".
        part = term.removeprefix(type(config).__module__.rpartition(".")[2] + "_")
        if part != term and config.term_weight(part) is not None:
            key = config.term_knob(part)
            value = getattr(config, key)
            value = config.term_weight(part) if value is None else value  # its default depends on another
            return f"method.{key}" if len(methods) == 1 else f"method.{name}.{key}", value
    return "", None
