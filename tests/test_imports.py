"""Imports point one way, and siblings in detectors/ and methods/ know nothing of each other."""

import ast
from pathlib import Path

import asd_hf

ROOT = Path(asd_hf.__file__).parent
LAYERS = [
    {"errors", "registry", "ops", "deformable_attention", "distances", "phases", "progress", "streams", "environment"},
    {"files", "checkpoints", "stopping", "vote", "ranks", "norms", "randomness"},
    {"detectors"},
    {"criterion", "fast_criterion", "features", "losses", "matching", "questions", "sampling", "targets", "trust"},
    {"models", "methods"},
    {"classes", "distiller", "ema", "pace", "student", "data", "evaluation", "bad_steps", "teacher_cache"}
    | {"hub", "licenses", "card", "space", "matrices"}
    | {"model_config", "loading", "architecture", "copying", "freezing"},
    {"config", "resumable", "trainer", "build", "doctor", "benchmark", "compare", "selftest", "replay", "sharing"}
    | {"export", "shrink", "report"},
    {"predict"},
    {"demo"},
    {"commands"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imports(path):
    """Modules of this package that a file imports at its top, as tuples of names below asd_hf."""
    here = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            module = (*here[: len(here) - node.level], *(node.module or "").split("."))
            yield tuple(part for part in module if part)
        elif isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "asd_hf":
            yield tuple(node.module.split(".")[1:])


FILES = [p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts != ("__init__.py",)]


def test_every_module_has_its_layer():
    assert {p.relative_to(ROOT).with_suffix("").parts[0] for p in FILES} == set(RANK)


def test_imports_point_down():
    wrong = []
    for path in FILES:
        own = path.relative_to(ROOT).with_suffix("").parts[0]
        wrong += [(str(path), m) for m in imports(path) if m and RANK[m[0]] > RANK[own]]
    assert not wrong


def test_no_circles():
    graph = {}
    for path in FILES:
        own = path.relative_to(ROOT).with_suffix("").parts[0]
        graph.setdefault(own, set()).update(m[0] for m in imports(path) if m and m[0] != own)
    done: set[str] = set()
    while graph.keys() - done:
        free = [name for name in graph if name not in done and graph[name] <= done]
        assert free, f"a circle among {sorted(graph.keys() - done)}"
        done.update(free)


PARENTS = {  # families of detectors that are another family with changes
    "table_transformer": "detr",
    "conditional_detr": "detr",
    "dab_detr": "conditional_detr",
    "rt_detr_v2": "rt_detr",
    "d_fine": "rt_detr_v2",
    "deimv2": "d_fine",
    "rf_detr": "lw_detr",
    "mm_grounding_dino": "grounding_dino",
}


def test_siblings_do_not_import_each_other():
    for folder in ("detectors", "methods"):
        for path in (ROOT / folder).glob("*.py"):
            if path.stem != "__init__":
                allowed = ("base", "attention", "together", PARENTS.get(path.stem))
                assert all(m[0] != folder or m[1:2] in [(name,) for name in allowed] for m in imports(path)), path
