from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from transformers import set_seed

from ..benchmark import format_costs, measure_steps
from ..build import Parts
from ..config import load_config
from ..errors import UserError
from ..methods import METHODS
from ..registry import nearest
from .train import report_progress


def main(argv: list[str]) -> None:
    """Measures a training step under each method, phase by phase, side by side with plain training."""
    parser = argparse.ArgumentParser(prog="asd-hf benchmark", description=main.__doc__)
    parser.add_argument("what", choices=["step"], help="step: of training, with one method after the other")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see configs/")
    parser.add_argument(
        "--methods", default=",".join(METHODS), metavar="A,B", help="of these methods (default: of all)"
    )
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="steps of each method (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
    args = parser.parse_intermixed_args(argv)
    methods = [name.strip() for name in args.methods.split(",")]
    for name in methods:
        if name not in METHODS and ":" not in name:
            raise UserError(f"--methods: unknown method {name!r}: {nearest(name, METHODS)}")
    if args.rounds < 1:
        raise UserError(f"--rounds must be 1 or more, not {args.rounds}")
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json: folder {args.json.parent} does not exist")
    run = load_config(args.config, args.overrides)
    report_progress(run.training.process_index)
    set_seed(run.training.seed)
    with tempfile.TemporaryDirectory() as folder:
        run.training.leave_no_trace(folder)
        costs = measure_steps(Parts(run), methods, args.rounds)
    print(format_costs(costs))
    if args.json is not None:
        rows = [asdict(cost) | {"device": str(run.training.device)} for cost in costs]
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
