from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from transformers import set_seed

from ..build import Parts
from ..config import load_config
from ..doctor import REFUSED, Finding, check, format_findings, measure_gradients, measure_steps, measure_teacher
from ..errors import UserError
from ..files import write_whole
from ..progress import show_logs


def main(argv: list[str]) -> None:
    """Says before any training what fits, what is adapted and what is refused, with reason and remedy."""
    parser = argparse.ArgumentParser(prog="asd-hf doctor", description=main.__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see configs/")
    parser.add_argument(
        "--images",
        type=_count,
        default=100,
        metavar="N",
        help="measure the teacher's AP on these (default: 100; 0: not)",
    )
    parser.add_argument(
        "--steps", type=_count, default=5, metavar="N", help="measure time, memory and gradients in these (default: 5)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found to this file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
    args = parser.parse_intermixed_args(argv)
    run = load_config(args.config, args.overrides)
    show_logs(run.training.process_index)
    set_seed(run.training.seed)
    parts = Parts(run)
    findings, gradients = check(parts), []
    if not _refused(findings):
        with tempfile.TemporaryDirectory() as folder:
            try:
                gradients = _measure(parts, args, folder, findings)
            except UserError as error:
                findings.append(Finding("training", REFUSED, str(error)))
    if run.training.process_index == 0:
        print(format_findings(findings))
        if args.json is not None:
            write_whole(args.json, json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
        if len(gradients) > 1:
            widths = [max(map(len, column)) for column in zip(*gradients, strict=True)]
            print()
            for row in gradients:
                print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
            print("(at the first steps; a term of ratio 0 trains only the method's own parameters)")
        elif gradients:
            print("\nno batch had labels: there is no detection loss to compare the method's gradient with")
    if count := _refused(findings):
        raise UserError(f"{count} of {len(findings)} points are refused: see the table")


def _measure(parts: Parts, args: argparse.Namespace, folder: str, findings: list[Finding]) -> list[list[str]]:
    """Adds what only running the models tells to `findings`, and returns the table of gradients."""
    parts.run.training.leave_no_trace(folder)
    trainer = parts.trainer()
    if parts.teacher is not None and args.images:
        findings.append(measure_teacher(parts, trainer, args.images))
    if not args.steps:
        return []
    findings += measure_steps(parts, trainer, args.steps)
    return [] if parts.method is None else measure_gradients(parts, trainer, args.steps)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 upwards")
    return int(text)


def _refused(findings: list[Finding]) -> int:
    return sum(finding.verdict == REFUSED for finding in findings)
