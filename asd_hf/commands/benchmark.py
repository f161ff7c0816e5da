from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from transformers import set_seed

from ..benchmark.attention import AttentionRow, measure_attention
from ..benchmark.cache import format_cache, measure_cache
from ..benchmark.data import OURS, measure_data
from ..benchmark.evaluation import measure_evaluation
from ..benchmark.latency import RUNTIMES, measure_latency
from ..benchmark.loss import SWEEPS, LossRow, LossSize, measure_losses
from ..benchmark.method import format_methods, measure_methods
from ..benchmark.sidebyside import format_table, write_rows
from ..benchmark.step import format_costs, measure_steps
from ..build import Parts
from ..compare.plan import choose_variants, read_variants
from ..config import build_methods, load_config
from ..errors import UserError
from ..export import Canvas
from ..fast_criterion import LOSSES
from ..loading import load_teacher
from ..methods import METHODS, MethodConfig
from ..predict import choose_device
from ..progress import show_logs
from ..registry import nearest
from .export import size


def main(argv: list[str]) -> None:
    """Measures parts of the work side by side with what they are compared with."""
    what, *rest = argv or ["--help"]
    if what in ("-h", "--help"):
        print("usage: asd-hf benchmark WHAT ...; asd-hf benchmark WHAT --help tells more\n")
        print("\n".join(f"  {name:<12} {run.__doc__}" for name, run in BENCHMARKS.items()))
        return
    if what not in BENCHMARKS:
        raise UserError(f"unknown benchmark {what!r}: {nearest(what, BENCHMARKS)}")
    BENCHMARKS[what](rest)


def step(argv: list[str]) -> None:
    """a training step under each method, phase by phase, and as Transformers' example takes it"""
    _each_method(argv, "step", step.__doc__, measure_steps, format_costs, rounds=10)


def method(argv: list[str]) -> None:
    """each method's own work, forward and backward, on fixed outputs of teacher and student"""
    _each_method(argv, "method", method.__doc__, measure_methods, format_methods, rounds=30)


def _each_method(argv: list[str], what: str, description: str, measure: Callable, form: Callable, rounds: int) -> None:
    parser = _parser(what, description, rounds)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see configs/")
    parser.add_argument(
        "--variants", type=Path, metavar="FILE", help="YAML of named methods with options, as `compare` reads it"
    )
    parser.add_argument(
        "--methods",
        metavar="A,B",
        help="of the variants, or methods with their defaults (default: all variants, or all methods); the first is "
        "the measure of the others",
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the CPU's time for this process, on a machine that is busy"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
    args = _parse(parser, argv)
    run = load_config(args.config, args.overrides)
    names = args.methods and [name.strip() for name in args.methods.split(",")]
    methods = _methods(args.variants, names, run.methods)
    show_logs(run.training.process_index)
    set_seed(run.training.seed)
    with tempfile.TemporaryDirectory() as folder:
        run.training.leave_no_trace(folder)
        costs, refused = measure(Parts(run), methods, args.rounds, args.cpu_time)
    print(form(costs, refused))
    if args.json is not None:
        write_rows(
            args.json, [*map(asdict, costs), *({"name": name, "refused": why} for name, why in refused.items())]
        )


def data(argv: list[str]) -> None:
    """images a second and core, against the usual pipeline and bare decoding"""
    parser = _parser("data", data.__doc__, rounds=5)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see configs/; only `data` is read")
    parser.add_argument("--images", type=int, default=64, metavar="N", help="the first of the data (default: 64)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
    args = _parse(parser, argv, "images")
    rows = measure_data(load_config(args.config, args.overrides).data, args.images, args.rounds)
    ours = next(iter(rows.values()))
    cells = [[OURS, f"{ours.ours_ms:.2f}", f"{ours.ours_spread_ms:.2f}", f"{1e3 / ours.ours_ms:.0f}", "1.00 x"]]
    for name, row in rows.items():
        numbers = f"{row.reference_ms:.2f}", f"{row.reference_spread_ms:.2f}", f"{1e3 / row.reference_ms:.0f}"
        cells.append([name, *numbers, f"{1 / row.ratio:.2f} x"])
    print(format_table(["", "ms an image", "spread", "images/s and core", "ours, times as fast"], cells))
    if args.json is not None:
        write_rows(args.json, [asdict(row) for row in rows.values()])


def cache(argv: list[str]) -> None:
    """training from a teacher's predictions on disk, beside the teacher and plain training"""
    parser = _parser("cache", cache.__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file with a teacher and a method")
    parser.add_argument("--images", type=int, default=64, metavar="N", help="the first of the data (default: 64)")
    parser.add_argument(
        "--top-queries", type=int, default=100, metavar="N", help="of the smaller form: its queries (default: 100)"
    )
    parser.add_argument("--top-classes", type=int, default=10, metavar="M", help="classes of each (default: 10)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
    args = _parse(parser, argv, "images", "top_queries", "top_classes")
    run = load_config(args.config, args.overrides)
    run.model.teacher_cache = None
    show_logs(run.training.process_index)
    set_seed(run.training.seed)
    with tempfile.TemporaryDirectory() as folder:
        run.training.leave_no_trace(folder)
        size = args.images, args.rounds, args.top_queries, args.top_classes
        rows, forms = measure_cache(Parts(run), Path(folder) / "predictions", *size)
    print(format_cache(rows, forms))
    if args.json is not None:
        write_rows(args.json, [*map(asdict, rows), *map(asdict, forms)])


def evaluation(argv: list[str]) -> None:
    """COCO's numbers, and whether they are pycocotools'"""
    parser = _parser("eval", evaluation.__doc__, rounds=1)
    parser.add_argument("--images", type=int, default=5000, metavar="N", help="default: 5000, as val2017 has")
    parser.add_argument("--detections", type=int, default=100, metavar="N", help="of each image (default: 100)")
    args = _parse(parser, argv, "images", "detections")
    row, difference = measure_evaluation(args.images, args.detections, args.rounds)
    cells = [row.name, f"{row.ours_ms:.0f}", f"{row.reference_ms:.0f}", f"1/{1 / row.ratio:.0f}", f"{difference:g}"]
    print(format_table(["", "ours, ms", "pycocotools, ms", "of pycocotools", "largest difference"], [cells]))
    if args.json is not None:
        write_rows(args.json, [asdict(row) | {"difference": difference}])


def loss(argv: list[str]) -> None:
    """the detection loss, against Transformers' own"""
    parser = _parser("loss", loss.__doc__, rounds=15)
    parser.add_argument("--family", default="deformable_detr", metavar="NAME", help="default: deformable_detr")
    for field in fields(LossSize):
        what = "targets of each image" if field.name == "boxes" else field.name
        parser.add_argument(
            f"--{field.name}", type=int, default=field.default, metavar="N", help=f"{what} (default: {field.default})"
        )
    parser.add_argument("--sweep", choices=list(SWEEPS), help="one of these in several sizes")
    args = _parse(parser, argv, "images", "layers", "queries", "classes")
    if args.boxes < 0:
        raise UserError(f"--boxes must be 0 or more, not {args.boxes}")
    if args.family not in LOSSES:
        raise UserError(f"--family: unknown family {args.family!r}: {nearest(args.family, LOSSES)}")
    size = LossSize(**{field.name: getattr(args, field.name) for field in fields(LossSize)})
    rows = list(measure_losses(args.family, size, args.sweep, args.rounds))
    print(_against_transformers(rows))
    if args.json is not None:
        write_rows(args.json, [asdict(row) for row in rows])


def attention(argv: list[str]) -> None:
    """deformable attention on a CPU, against Transformers' own"""
    parser = _parser("attention", attention.__doc__)
    parser.add_argument("--images", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--image-size", type=int, default=800, metavar="PIXELS", help="of a side (default: 800)")
    parser.add_argument("--queries", type=int, default=300, metavar="N", help="of the decoder (default: 300)")
    args = _parse(parser, argv, "images", "image_size", "queries")
    rows = list(measure_attention(args.images, args.image_size, args.queries, args.rounds))
    print(_against_transformers(rows))
    if args.json is not None:
        write_rows(args.json, [asdict(row) for row in rows])


def latency(argv: list[str]) -> None:
    """what a batch takes a model, in PyTorch and in ONNX Runtime"""
    parser = _parser("latency", latency.__doc__, rounds=20)
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        dest="models",
        metavar="DIR_OR_HUB_ID",
        help="may be given several times; all are compared with the first",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at once (default: 1)")
    parser.add_argument(
        "--size", type=size, metavar="H,W", help="of the images; default: as each model's processor says"
    )
    parser.add_argument(
        "--runtimes",
        default="eager,onnx",
        metavar="A,B",
        help=f"of {', '.join(RUNTIMES)} (default: eager,onnx; compiling takes minutes)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    args = _parse(parser, argv, "batch")
    runtimes = args.runtimes.split(",")
    for name in runtimes:
        if name not in RUNTIMES:
            raise UserError(f"--runtimes: {name!r}: {nearest(name, RUNTIMES)}")
    if len(set(args.models)) < len(args.models):
        raise UserError("--model: the same one is given twice")
    choose_device(args.device)  # a missing one is said before anything is loaded
    adapters = {name: load_teacher(name, "--model") for name in args.models}
    canvases = {name: Canvas.of(adapter, args.size, args.batch) for name, adapter in adapters.items()}
    rows = measure_latency(adapters, canvases, runtimes, args.rounds, args.device)
    header = ["", "parameters", "ms a batch", "spread", "ms an image", "times as fast"]
    cells = []
    for row in rows:
        numbers = row.ours_ms, row.ours_spread_ms, row.ours_ms / row.batch
        speed = f"{1 / row.ratio:.2f} x"
        cells.append([row.name, f"{row.parameters / 1e6:.2f}M", *(f"{number:.1f}" for number in numbers), speed])
    print(format_table(header, cells))
    if args.json is not None:
        write_rows(args.json, [asdict(row) for row in rows])


def _against_transformers(rows: Sequence[LossRow | AttentionRow]) -> str:
    header = ["", "ours, ms", "spread", "Transformers, ms", "spread", "times faster", "largest difference"]
    cells = []
    for row in rows:
        numbers = row.ours_ms, row.ours_spread_ms, row.reference_ms, row.reference_spread_ms, 1 / row.ratio
        cells.append([row.name, *(f"{number:.1f}" for number in numbers), f"{row.difference:.0e}"])
    return format_table(header, cells)


BENCHMARKS = {
    "step": step,
    "method": method,
    "cache": cache,
    "loss": loss,
    "attention": attention,
    "data": data,
    "eval": evaluation,
    "latency": latency,
}


def _parser(what: str, description: str, rounds: int = 10) -> argparse.ArgumentParser:
    """With the arguments that all benchmarks have."""
    parser = argparse.ArgumentParser(prog=f"asd-hf benchmark {what}", description=f"Measures {description}.")
    parser.add_argument(
        "--rounds", type=int, default=rounds, metavar="N", help=f"measurements of each side (default: {rounds})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    return parser


def _parse(parser: argparse.ArgumentParser, argv: list[str], *counts: str) -> argparse.Namespace:
    args = parser.parse_intermixed_args(argv)
    for name in ("rounds", *counts):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(args, name)}")
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json: folder {args.json.parent} does not exist")
    return args


def _methods(
    file: Path | None, names: list[str] | None, configured: dict[str, MethodConfig]
) -> dict[str, dict[str, MethodConfig]]:
    """What each row trains with: variants of `file`, or methods as they are `configured` or with their defaults."""
    known = {} if file is None else read_variants(file)
    names = list(known or METHODS) if names is None else names
    own = {name: {"method": name} for name in names if ":" in name}  # module:Class
    methods = {}
    for name, sections in choose_variants(own | known, names).items():
        for section in sections.keys() - {"method"}:
            raise UserError(
                f"{file}: variant {name!r} has its own {section!r}, but methods are measured on the same models and "
                "data: leave it out with --methods"
            )
        methods[name] = build_methods(sections.get("method", {}), f"{file} under variant {name!r}")
        if name in configured and name not in known:
            methods[name] = {name: configured[name]}
    return {name: chosen for name, chosen in methods.items() if chosen}  # plain training is measured anyway
