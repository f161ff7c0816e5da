from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..compare.plan import choose_variants, make_plans, read_variants
from ..compare.render import render
from ..compare.schedule import Schedule, open_plans
from ..errors import UserError


def main(argv: list[str]) -> None:
    """Trains methods with several seeds on the same loop, data and initial students, and says which is better."""
    parser = argparse.ArgumentParser(prog="asd-hf compare", description=main.__doc__)
    parser.add_argument("--config", type=Path, metavar="FILE", help="the configuration that all runs share")
    parser.add_argument(
        "--variants",
        type=Path,
        metavar="FILE",
        help="YAML of named variants: what each has in place of the shared one",
    )
    parser.add_argument(
        "--methods", metavar="A,B", help="of the variants, or methods with their defaults (default: all variants)"
    )
    parser.add_argument("--seeds", default="0,1,2", metavar="N,N", help="default: 0,1,2")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, metavar="N", help="of each run (default: as configured)")
    budget.add_argument(
        "--minutes", type=float, metavar="M", help="of training for each run: as many steps as fit, measured first"
    )
    parser.add_argument("--setting", metavar="NAME", help="name of the comparison (default: the file's)")
    parser.add_argument("--baseline", default="none", metavar="NAME", help="compare with this one (default: none)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/compare"), metavar="DIR", help="of records, tables and pictures"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="of models and checkpoints (default: OUTPUT_runs)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one a GPU; one without a GPU)")
    parser.add_argument("--render", type=Path, metavar="DIR", help="train nothing, show the records in DIR")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value in all runs")
    args = parser.parse_intermixed_args(argv)
    if args.render is not None:
        print(render(args.render, baseline=args.baseline))
        return
    if args.config is None or args.variants is args.methods is None:
        raise UserError("compare needs --config and --variants or --methods; or --render")
    jobs = max(1, torch.cuda.device_count()) if args.jobs is None else args.jobs
    for name, value in (("--jobs", jobs), ("--steps", args.steps), ("--minutes", args.minutes)):
        if value is not None and not value > 0:
            raise UserError(f"{name} must be above 0, not {value}")
    known = {} if args.variants is None else read_variants(args.variants)
    variants = choose_variants(known, args.methods and [name.strip() for name in args.methods.split(",")])
    overrides = args.overrides + ([f"training.max_steps={args.steps}"] if args.steps else [])
    plans = make_plans(args.config, variants, _seeds(args.seeds), overrides, args.setting, args.minutes)
    missing = open_plans(plans, args.output)
    if done := len(plans) - len(missing):
        print(f"{done} of {len(plans)} runs have their records in {args.output}")
    if missing:
        Schedule(missing, args.output, args.work or args.output.with_name(f"{args.output.name}_runs"), jobs).run()
    print(render(args.output, baseline=args.baseline))


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text!r}: whole numbers, separated by commas") from None
    return list(dict.fromkeys(seeds))
