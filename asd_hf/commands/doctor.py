from __future__ import annotations

import argparse
import tempfile

from transformers import set_seed

from ..build import Parts
from ..config import load_config
from ..doctor import REFUSED, check, format_findings, measure_steps, measure_teacher
from ..errors import UserError
from .train import report_progress


def main(argv: list[str]) -> None:
    """Says before any training what fits, what is adapted and what is refused, with reason and remedy."""
    parser = argparse.ArgumentParser(prog="asd-hf doctor", description=main.__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see configs/")
    parser.add_argument(
        "--images", type=int, default=100, metavar="N", help="measure the teacher's AP on these (default: 100; 0: not)"
    )
    parser.add_argument(
        "--steps", type=int, default=5, metavar="N", help="measure time, memory and gradients in these (default: 5)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
    args = parser.parse_args(argv)
    run = load_config(args.config, args.overrides)
    report_progress(run.training.process_index)
    set_seed(run.training.seed)
    parts = Parts(run)
    findings = check(parts)
    gradients: list[list[str]] = []
    if not _refused(findings):
        with tempfile.TemporaryDirectory() as folder:  # trainers make their output folder
            run.training.output_dir = folder
            trainer = parts.trainer()
            if parts.teacher is not None and args.images:
                findings.append(measure_teacher(parts, trainer, args.images))
            if args.steps:
                measured, gradients = measure_steps(parts, trainer, args.steps)
                findings += measured
    print(format_findings(findings))
    if len(gradients) > 1:
        widths = [max(map(len, column)) for column in zip(*gradients, strict=True)]
        print()
        for row in gradients:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if count := _refused(findings):
        raise UserError(f"{count} of {len(findings)} points are refused: see the table")


def _refused(findings) -> int:
    return sum(finding.verdict == REFUSED for finding in findings)
