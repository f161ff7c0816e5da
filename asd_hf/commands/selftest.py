from __future__ import annotations

import argparse
import tempfile
from copy import deepcopy
from pathlib import Path

from ..config import build_config, override, read_sections
from ..errors import UserError
from ..selftest import SECTIONS, Doing, Result, survive_kills
from .train import train


def main(argv: list[str]) -> int:
    """Shows on this machine that a training which is killed, and started again, ends as if it had not been."""
    parser = argparse.ArgumentParser(prog="asd-hf selftest", description=main.__doc__)
    parser.add_argument("what", choices=["resume"], help="resume: from checkpoints, after SIGKILL at random moments")
    parser.add_argument("--kills", type=int, default=10, metavar="N", help="default: 10")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes of a run (default: 1)")
    parser.add_argument("--config", metavar="FILE", help="YAML file of the run (default: a tiny one, on a CPU)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments (default: 0)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="keep the runs and their logs there")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
    args = parser.parse_intermixed_args(argv)
    if args.kills < 1:
        raise UserError(f"--kills must be 1 or more, not {args.kills}")
    if args.ranks < 1:
        raise UserError(f"--ranks must be 1 or more, not {args.ranks}")
    if args.output is not None and args.output.exists() and any(args.output.iterdir()):
        raise UserError(f"--output {args.output} is not empty: name another folder")
    sections = deepcopy(SECTIONS) if args.config is None else read_sections(args.config)
    for item in args.overrides:
        override(sections, item)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) if args.output is None else args.output.resolve()
        work.mkdir(parents=True, exist_ok=True)
        result = survive_kills(
            lambda sections: train(build_config(sections)), sections, args.kills, args.seed, work, args.ranks
        )
    print(format_kills(result))
    return 1 if result.differences else 0


def format_kills(result: Result) -> str:
    rows = [["killed in", "times"], *([name.name.lower(), str(result.kills[name])] for name in Doing)]
    lines = [f"{name:<11}{times:>5}" for name, times in rows]
    count = sum(result.kills.values())
    if result.alone:
        lines += ["", f"{result.alone} of {count} kills were of one rank alone: the others ended by themselves"]
    lines += ["", f"{result.half_written} of {count} kills left a half-written checkpoint", ""]
    if result.differences:
        return "\n".join([*lines, *result.differences, "", f"{count} kills: not survived"])
    return "\n".join([*lines, f"{count} kills survived: {result.runs} runs ended as the unbroken one, bit by bit"])
