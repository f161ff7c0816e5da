"""Whether the tests notice small errors: `python -m tests.mutants --number 60` plants them one at a time.

A mutant is a file of `TESTS` with one operator, comparison, number or condition changed. It dies if the tests of its
file fail. Each runs in a fork of this process, which has imported the packages that take long; no file is touched.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.util import spec_from_loader
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
LOSS = ["tests/test_criterion.py", "tests/test_fast_criterion.py"]
TESTS = {  # module -> what must notice
    "asd_hf.ops": ["tests/test_detectors.py", "tests/test_distances.py", "tests/test_mgd.py"],
    "asd_hf.criterion": LOSS,
    "asd_hf.fast_criterion": LOSS,
    "asd_hf.losses": LOSS,
    "asd_hf.methods.asd": ["tests/test_asd.py"],
    "asd_hf.evaluation.coco": ["tests/test_evaluation.py"],
}
SLOW = "imports_no_torch or transformers_trainer or ranks_are_one or latency"  # what starts processes or waits
SECONDS = 300  # after which a mutant counts as noticed: it hangs
HEAVY = ("torch", "torchvision", "transformers.trainer", "datasets", "evaluate", "hotcoco", "pycocotools.cocoeval")
SWAPS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.RShift: ast.LShift,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Pow: ast.Mult,
}
DROPPED = ("abs", "clamp", "detach", "sqrt", "exp", "log", "sigmoid", "mean", "sum", "full")  # f(x), x.f() -> x


def file_of(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def sites(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Each place that can be changed, and how. Annotations and what only checks or hurries are none."""
    skipped = set()
    for node in ast.walk(tree):
        parts = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        parts += [node.value] if isinstance(node, ast.keyword) and node.arg in ("strict", "non_blocking") else []
        skipped |= {id(inner) for part in parts if part is not None for inner in ast.walk(part)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        operator = getattr(node, "op", None) or (node.ops[0] if isinstance(node, ast.Compare) else None)
        if type(operator) in SWAPS:
            yield node, "swap"
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
            yield node, "drop"
        if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            yield node, "constant"
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in DROPPED:
            yield node, "drop"


def changed(node: ast.AST, how: str) -> ast.AST:
    """What stands in the place of `node`."""
    if how == "constant":
        value = node.value
        if isinstance(value, bool):
            return ast.Constant(not value)
        return ast.Constant(value + 1 if isinstance(value, int) else value * 1.1 or 1.0)
    if how == "drop":
        if isinstance(node, ast.UnaryOp):
            return node.operand
        return node.func.value if isinstance(node.func, ast.Attribute) else node.args[0]
    node = copy.copy(node)
    if isinstance(node, ast.Compare):
        node.ops = [SWAPS[type(node.ops[0])](), *node.ops[1:]]
    else:
        node.op = SWAPS[type(node.op)]()
    return node


class Replace(ast.NodeTransformer):
    """Puts `new` in the place of one node."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return ast.copy_location(self.new, node) if node is self.old else self.generic_visit(node)


def mutants(module: str) -> list[tuple[str, str]]:
    """The source of each mutant, and in words where it differs."""
    file = file_of(module)
    source, found = file.read_text(), []
    for number in range(len(list(sites(ast.parse(source))))):
        tree = ast.parse(source)
        node, how = list(sites(tree))[number]
        new = changed(node, how)
        before, after = ast.unparse(node), ast.unparse(new)
        mutated = ast.unparse(ast.fix_missing_locations(Replace(node, new).visit(tree)))
        found.append((mutated, f"{file.relative_to(ROOT)}:{node.lineno}: {before} -> {after}"))
    return found


class Planted(MetaPathFinder):
    """Gives one module another source."""

    def __init__(self, module: str, source: str) -> None:
        self.module, self.source = module, source

    def find_spec(self, name: str, path=None, target=None):
        return spec_from_loader(name, self) if name == self.module else None

    def create_module(self, spec):
        return None

    def exec_module(self, module) -> None:
        module.__file__ = str(file_of(self.module))
        exec(compile(self.source, module.__file__, "exec"), module.__dict__)


def survives(module: str, source: str) -> bool:
    """Whether the tests of `module` pass with this source."""
    child = os.fork()
    if child == 0:
        os.setsid()
        nothing = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nothing, stream)
        import pytest

        sys.meta_path.insert(0, Planted(module, source))
        code = 1
        with contextlib.suppress(BaseException):
            code = pytest.main(["-qx", "-p", "no:cacheprovider", "-k", f"not ({SLOW})", *TESTS[module]])
        os._exit(code)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=60, help="mutants in all, drawn evenly over the files (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    parser.add_argument("--module", choices=TESTS, action="append", help="only this file; may be given several times")
    args = parser.parse_args()
    os.chdir(ROOT)
    for name in HEAVY:
        importlib.import_module(name)
    modules = args.module or list(TESTS)
    for module in modules:
        if not survives(module, file_of(module).read_text()):
            sys.exit(f"the tests of {module} fail without a mutant")
    drawn = []
    for module in modules:
        found = mutants(module)
        rng = random.Random(f"{args.seed} {module}")  # alone or with others, a file gets the same mutants
        drawn += [(module, *mutant) for mutant in rng.sample(found, min(len(found), args.number // len(modules)))]
    left = []
    for module, source, where in tqdm(drawn, desc="mutants", unit="mutant"):
        if survives(module, source):
            left.append(where)
            tqdm.write(f"survives: {where}")
    tqdm.write(f"{len(drawn) - len(left)} of {len(drawn)} mutants were noticed")
    sys.exit(bool(left))


if __name__ == "__main__":
    main()
