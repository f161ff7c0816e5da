from __future__ import annotations

import argparse
from pathlib import Path

from ..config import NO_METHOD
from ..errors import UserError
from ..progress import show_logs
from ..report import report_comparison, report_run

FILE = "report.html"


def main(argv: list[str]) -> None:
    """Shows a run, or a comparison of runs, in one HTML file."""
    parser = argparse.ArgumentParser(prog="asd-hf report", description=main.__doc__)
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN_DIR", help="the output folder of a training")
    parser.add_argument(
        "--reference", type=Path, metavar="RUN_DIR", help="another run on the same data, say one without distillation"
    )
    parser.add_argument(
        "--compare", type=Path, metavar="DIR", help="show the records of asd-hf compare in DIR instead"
    )
    parser.add_argument(
        "--baseline", metavar="NAME", help="of a comparison: what all are compared with (default: none)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"default: {FILE} in the folder")
    parser.add_argument(
        "--images", type=int, metavar="N", help="ask the models about the first N images (default: all)"
    )
    parser.add_argument(
        "--pictures", type=int, default=4, metavar="N", help="improved, and as many worsened (default: 4)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="SCORE",
        help="of boxes that are shown (default: that of each model's best F1)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the run's")
    args = parser.parse_intermixed_args(argv)
    if (args.run is None) == (args.compare is None):
        raise UserError("report needs the folder of a run, or --compare and the folder of records")
    folder = args.compare or args.run
    if not folder.is_dir():
        raise UserError(f"folder {folder} does not exist")
    output = args.output or folder / FILE
    if args.compare is not None:
        for option in ("reference", "images", "threshold", "overrides"):
            if getattr(args, option):
                raise UserError(f"{option} has no use with --compare: remove it")
        report_comparison(folder, output, NO_METHOD if args.baseline is None else args.baseline)
    else:
        if args.baseline is not None:
            raise UserError("--baseline has no use without --compare: --reference names another run")
        for name, least in (("images", 1), ("pictures", 0)):
            if (value := getattr(args, name)) is not None and value < least:
                raise UserError(f"--{name} must be {least} or more, not {value}")
        show_logs(rank=0)
        notes = report_run(folder, output, args.reference, args.threshold, args.images, args.pictures, args.overrides)
        for note in notes:
            print(note)
    print(f"the report is in {output}")
