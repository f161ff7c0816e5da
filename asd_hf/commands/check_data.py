from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ..config import parse_overrides
from ..data import NOTES, REMEDIES, DataConfig, Fault, Report, Source, check_source, open_source, open_unlabelled
from ..errors import UserError
from ..progress import show_logs

EXAMPLES = 3  # of each kind, shown
MOST_CLASSES = 20  # shown


def main(argv: list[str]) -> int:
    """Reads and decodes every row as training does, lists what is wrong, and exits with 1 if it would stop a run."""
    parser = argparse.ArgumentParser(prog="asd-hf check-data", description=main.__doc__)
    parser.add_argument("source", metavar="SOURCE", help="as data.source of a configuration")
    parser.add_argument(
        "--split", action="append", metavar="NAME", help="may be given several times (default: train and val)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="threads that decode (default: one a CPU, at most 8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all that is found to this file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="data.key=value",
        help="of the data section: data.box_format=xywh; data.unlabelled=DIR is checked as well",
    )
    args = parser.parse_intermixed_args(argv)
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers is {args.workers}: at least 1 is needed")
    show_logs(rank=0)
    config = parse_overrides(DataConfig, {"source": args.source}, "data", args.overrides)
    splits = args.split or [name for name in (config.train_split, config.eval_split) if name is not None]
    openers = {split: partial(open_source, config.source, split, config, keep_bad=True) for split in splits}
    if config.unlabelled is not None:
        openers[f"unlabelled, {config.unlabelled}"] = partial(open_unlabelled, config.unlabelled, keep_bad=True)
    found = {
        name: _check(opener, None if name == config.eval_split else config.max_boxes, args.workers)
        for name, opener in openers.items()
    }
    for name, report in found.items():
        print(f"{name}: {report if isinstance(report, str) else format_report(report)}")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        contents = {name: {"error": r} if isinstance(r, str) else asdict(r) for name, r in found.items()}
        args.json.write_text(json.dumps(contents, indent=1) + "\n")
    return int(any(isinstance(report, str) or report.faults for report in found.values()))


def _check(opener: Callable[[], Source], max_boxes: int | None, workers: int | None) -> Report | str:
    """The report, or why there can be none."""
    try:
        return check_source(opener(), max_boxes, fresh=True, workers=workers)
    except UserError as error:
        return str(error)


def format_report(report: Report) -> str:
    """A table for the terminal: how many of each kind, the first of them, what to do."""
    faults, notes = Counter(fault.kind for fault in report.faults), report.notes
    lines = [f"{len(report.faults):,} of {report.num_rows:,} rows are bad", *_objects(report)]
    rows = [(kind, count, "bad", report.faults, REMEDIES) for kind, count in faults.items()]
    rows += [(kind, count, "note", report.examples, NOTES) for kind, count in notes.items()]
    for kind, count, verdict, examples, texts in rows:
        lines.append(f"  {verdict:<4}  {count:>7,}  {kind:<16}  -> {texts[kind]}")
        shown = [example for example in examples if example.kind == kind][:EXAMPLES]
        lines += [f"{'':17}  {_describe(example)}" for example in shown]
    return "\n".join(lines)


def _objects(report: Report) -> list[str]:
    """How many there are of each class, the most frequent first; nothing of images without labels."""
    if not report.objects:
        return []
    frequent = Counter(report.objects).most_common()
    shown = [f"{name} {count:,}" for name, count in frequent[:MOST_CLASSES]]
    if len(frequent) > MOST_CLASSES:
        shown.append(f"{len(frequent) - MOST_CLASSES} classes with fewer")
    return [f"  {sum(report.objects.values()):,} objects: {', '.join(shown)}"]


def _describe(example: Fault) -> str:
    if example.kind in REMEDIES:
        return example.why
    return f"image {example.image_id} ({example.file or 'no file name'})"
