from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

import torch

from ..build import Parts
from ..compare.plan import Plan, choose_variants, make_plans, read_variants
from ..compare.records import holds_records, load_runs
from ..compare.render import render
from ..compare.schedule import Schedule, open_plans
from ..config import NO_METHOD, build_config
from ..doctor import REFUSED, check
from ..errors import UserError
from ..registry import nearest
from ..stopping import advise


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
    budget.add_argument("--steps", type=int, metavar="N", help="of each run, unless its variant says otherwise")
    budget.add_argument(
        "--minutes", type=float, metavar="M", help="of training for each run: as many steps as fit, measured first"
    )
    parser.add_argument("--setting", metavar="NAME", help="name of the comparison (default: the file's)")
    parser.add_argument("--baseline", metavar="NAME", help="what all are compared with (default: none)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/compare"), metavar="DIR", help="of records, tables and pictures"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="of models and checkpoints (default: OUTPUT_runs)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one a GPU; one without a GPU)")
    parser.add_argument("--render", type=Path, metavar="DIR", help="train nothing, show the records in DIR")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of --config")
    args = parser.parse_intermixed_args(argv)
    baseline = NO_METHOD if args.baseline is None else args.baseline
    if args.render is not None:
        _show(args.render, baseline)
        return
    if args.config is None or args.variants is args.methods is None:
        raise UserError("compare needs --config and --variants or --methods; or --render")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("compare starts its runs by itself: start it without a launcher, with --jobs")
    jobs = max(1, torch.cuda.device_count()) if args.jobs is None else args.jobs
    for name, value in (("--jobs", jobs), ("--steps", args.steps), ("--minutes", args.minutes)):
        if value is not None and not value > 0:
            raise UserError(f"{name} must be above 0, not {value}")
    known = {} if args.variants is None else read_variants(args.variants)
    variants = choose_variants(known, args.methods and [name.strip() for name in args.methods.split(",")])
    overrides = args.overrides + ([f"training.max_steps={args.steps}"] if args.steps else [])
    plans = make_plans(args.config, variants, _seeds(args.seeds), overrides, args.setting, args.minutes)
    output = args.output.resolve()
    work = output.with_name(f"{output.name}_runs") if args.work is None else args.work.resolve()
    if work.is_relative_to(output):
        raise UserError(f"--work {args.work} lies in --output, where every JSON file is a record: name another folder")
    records = load_runs(output).get(plans[0].setting, []) if holds_records(output) else []
    compared = {*known, *variants, *(run["method"] for run in records)}
    if args.baseline is not None and baseline not in compared:
        raise UserError(f"--baseline: {baseline!r} is not compared: {nearest(baseline, compared)}")
    missing = open_plans(plans, output, work)
    failures = []
    if done := len(plans) - len(missing):
        print(f"{done} of {len(plans)} runs have their records in {args.output}")
    if missing:
        _check(missing)
        print(f"the trained students will lie in {work}")
        with advise(lambda: "started again, the command goes on where each run was"):
            failures = Schedule(missing, output, work, jobs).run()
    if holds_records(output):
        _show(output, baseline)
    if failures:
        raise UserError(f"{len(failures)} of {len(missing)} runs failed: {'; '.join(failures)}")


def _show(folder: Path, baseline: str) -> None:
    print(render(folder, baseline=baseline))
    print(f"\ntables and pictures are in {folder}\nnext: asd-hf report --compare {shlex.quote(str(folder))}")


def _check(plans: list[Plan]) -> None:
    """Refuses, before anything is trained, what `asd-hf doctor` would refuse."""
    for plan in {plan.variant: plan for plan in plans}.values():
        for finding in check(Parts(build_config(plan.sections, plan.variant))):
            if finding.verdict == REFUSED:
                remedy = f": {finding.remedy}" if finding.remedy else ""
                raise UserError(f"variant {plan.variant!r}: {finding.topic}: {finding.text}{remedy}")


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text!r}: whole numbers, separated by commas") from None
    return list(dict.fromkeys(seeds))
