from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from ..benchmark.sidebyside import format_table
from ..config import build_config, override
from ..data import DataConfig, resize_options
from ..detectors.base import DetectorAdapter
from ..errors import UserError
from ..export import Canvas
from ..files import write_whole
from ..loading import load_teacher
from ..predict import choose_device
from ..shrink import SIZES, Candidate, choose, shrink
from .export import size

HEADER = """\
# A student of {teacher} that takes {ms:.1f} ms an image of {height} x {width} pixels on {device} ({parameters:.1f}M
# parameters, {copied:.0%} of them begin with the teacher's weights). Made by asd-hf shrink --target-ms {target:g}.
"""


def main(argv: list[str]) -> int:
    """Proposes students of a teacher that meet a latency, and writes the configuration that trains the largest."""
    parser = argparse.ArgumentParser(prog="asd-hf shrink", description=main.__doc__)
    parser.add_argument("teacher", metavar="TEACHER", help="Hub id or folder, as model.teacher of a configuration")
    parser.add_argument(
        "--target-ms", type=float, required=True, metavar="MS", help="most milliseconds an image, one at a time"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where it must (default: cpu)")
    parser.add_argument(
        "--size", type=size, metavar="H,W", help="stretch every image to this; default: as the teacher sees them"
    )
    parser.add_argument(
        "--data", metavar="SOURCE", help="as data.source (default: data/coco, from train2017 to val2017)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: TEACHER's name, -student.yaml")
    parser.add_argument(
        "--rounds", type=int, default=10, metavar="N", help="forward passes of each candidate (default: 10)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="other values of the configuration")
    args = parser.parse_intermixed_args(argv)
    if args.target_ms <= 0 or args.rounds < 1:
        raise UserError("--target-ms must be more than 0 and --rounds 1 or more")
    choose_device(args.device)  # a missing one is said before anything is loaded
    teacher = load_teacher(args.teacher)
    if teacher.open_vocabulary:
        raise UserError(f"a {teacher.spec.family} can only be a teacher: no student has its form")
    canvas = Canvas.of(teacher, args.size)
    processor = canvas.processor(teacher.processor)
    output = args.output or Path(f"{Path(args.teacher).name}-student.yaml")
    sections = _sections(args, teacher, processor, output)
    build_config(sections, str(output))  # mistakes show before anything is measured
    image = canvas.height, canvas.width
    found, refused = shrink(teacher, dict(processor.size), image, args.target_ms, args.device, args.rounds)
    chosen = choose(found, args.target_ms)
    print(_table(found, chosen, args.target_ms))
    for backbone, reason in refused.items():
        print(f"{backbone}: {reason}")
    if chosen is None:
        fastest = min(found, key=lambda candidate: candidate.milliseconds)
        print(
            f"no student meets {args.target_ms:g} ms: the fastest, {fastest.name}, takes "
            f"{fastest.milliseconds:.1f} ms; a smaller --size or a larger --target-ms may do",
            file=sys.stderr,
        )
        return 1
    head = HEADER.format(
        teacher=args.teacher,
        ms=chosen.milliseconds,
        height=canvas.height,
        width=canvas.width,
        device=args.device,
        parameters=chosen.parameters / 1e6,
        copied=chosen.copied / chosen.parameters,
        target=args.target_ms,
    )
    sections["model"]["student"] = _student(chosen) | sections["model"].get("student", {})
    write_whole(output, head + yaml.safe_dump(sections, sort_keys=False, width=110))
    print(f"\n{output}: asd-hf doctor --config {output}")
    return 0


def _table(found: list[Candidate], chosen: Candidate | None, target_ms: float) -> str:
    rows = []
    for candidate in found:
        share = candidate.copied / candidate.parameters
        numbers = f"{candidate.parameters / 1e6:.2f}M", f"{share:.0%}", f"{candidate.milliseconds:.1f}"
        meets = "chosen" if candidate is chosen else "yes" if candidate.milliseconds <= target_ms else "no"
        rows.append([candidate.name, *numbers, meets])
    header = ["as the teacher, but", "parameters", "begin with its weights", "ms an image", f"meets {target_ms:g} ms"]
    return format_table(header, rows)


def _student(chosen: Candidate) -> dict[str, str | int | bool]:
    """The `model.student` of a configuration."""
    sizes = {key: value for key in SIZES if (value := getattr(chosen.student, key)) is not None}
    pretrained = {"pretrained_backbone": True} if "backbone" in sizes else {}
    return {"base": "teacher"} | sizes | pretrained | {"copy_weights": True}


def _sections(args: argparse.Namespace, teacher: DetectorAdapter, processor, output: Path) -> dict[str, dict]:
    """Of the configuration, but for the student: the data as the teacher sees them, and the method to begin with."""
    data = {"source": args.data}
    if args.data is None:
        data = {"source": "data/coco", "train_split": "train2017", "eval_split": "val2017"}
    data |= resize_options(processor.size)
    if data["resize"] == "multiscale":
        usual = DataConfig()
        data["train_sizes"] = [round(side * data["eval_size"] / usual.eval_size) for side in usual.train_sizes]
    sections = {
        "model": {"teacher": args.teacher},
        "data": data,
        # Without a decoder to ask there is one layer to distil, by a method that asks nothing
        "method": {"name": "balanced_pairs"}
        if "decode" in teacher.spec.capabilities
        else {"name": "asd", "layers": 1},
        "training": {
            "output_dir": f"outputs/{output.stem}",
            "num_train_epochs": 12,
            "per_device_train_batch_size": 8,
            "ema_decay": 0.9998,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
        },
    }
    for item in args.overrides:
        override(sections, item)
    return sections
