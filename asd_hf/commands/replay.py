from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from ..build import Parts
from ..config import load_config
from ..errors import UserError
from ..progress import show_logs
from ..replay import replay
from ..trainer import RUN_CONFIG


def main(argv: list[str]) -> None:
    """Repeats a step that training left out, and says which loss and which module was not finite."""
    parser = argparse.ArgumentParser(prog="asd-hf replay", description=main.__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a step in OUTPUT_DIR/_bad_steps")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the run's")
    args = parser.parse_intermixed_args(argv)
    if not (args.folder / RUN_CONFIG).is_file():
        raise UserError(f"{args.folder} holds no step that was left out: it has no {RUN_CONFIG}")
    run = load_config(args.folder / RUN_CONFIG, args.overrides)
    show_logs(run.training.process_index)
    with tempfile.TemporaryDirectory() as folder:
        run.training.leave_no_trace(folder)
        rows = replay(Parts(run), args.folder)
    rows.insert(0, ["rank/batch", "what", "value"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
