from __future__ import annotations

import argparse
from functools import partial
from itertools import islice
from pathlib import Path

from ..data import DataConfig, DetectionStream, RowTransform, Source, build_loader, open_source
from ..errors import UserError
from ..evaluation import evaluate_detector
from ..export import DTYPES, Canvas, CanvasDetector, export_detector
from ..loading import load_teacher
from ..progress import show_logs
from .evaluate import data_config

COMPARED = 16  # images on which outputs are compared
GENERATED = f"shapes?num_train=1&num_val={COMPARED}"  # images where no data are given


def main(argv: list[str]) -> None:
    """Writes a model as ONNX and shows that it answers as in PyTorch."""
    parser = argparse.ArgumentParser(prog="asd-hf export", description=main.__doc__)
    parser.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="a checkpoint with its processor")
    parser.add_argument("--format", choices=["onnx"], default="onnx", help="default: onnx")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: onnx in the model's folder")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of weights and computation; inputs stay fp32 (default: fp32)"
    )
    parser.add_argument(
        "--batch", type=_batch, default=1, metavar="N|dynamic", help="images at once, or any number (default: 1)"
    )
    parser.add_argument(
        "--size",
        type=size,
        metavar="H,W",
        help="stretch every image to this; default: as the image processor says, images that keep their aspect "
        "padded to a square",
    )
    parser.add_argument(
        "--data", metavar="SOURCE", help="compare AP on this as well, as data.source of a configuration"
    )
    parser.add_argument("--split", default="val", metavar="NAME", help="of the data (default: val)")
    parser.add_argument("--limit", type=_count, metavar="N", help="only the first N images of the split")
    parser.add_argument("overrides", nargs="*", metavar="data.key=value", help="other keys of the data section")
    export(parser.parse_intermixed_args(argv))


def export(args: argparse.Namespace) -> dict:
    """Exports as `args` says and returns `parity.json`'s contents."""
    if args.output is None and not Path(args.model).is_dir():
        raise UserError(f"--output must be given: {args.model} is no folder that could hold the file")
    if args.data is None and (args.limit is not None or args.overrides):
        raise UserError("--limit and data.key=value say something of --data, which is not given")
    show_logs(0)
    adapter = load_teacher(args.model, "--model")
    canvas = Canvas.of(adapter, args.size, args.batch)
    data, split = (args.data, args.split) if args.data else (GENERATED, "val")
    config = data_config(canvas.processor(adapter.processor), data, split, args.overrides)
    if args.limit is not None:
        config.num_eval_images = args.limit
    source = open_source(data, split, config)
    batch_size = canvas.batch or 8

    def batches():
        return islice(_loader(source, config, batch_size), max(1, COMPARED // batch_size))

    output = args.output or Path(args.model) / "onnx"
    score = partial(_score, source, config, batch_size) if args.data else None
    parity = export_detector(adapter, canvas, output, batches, args.dtype, score)
    differences = parity["largest_difference"]
    print(f"{output / 'model.onnx'}: {parity['family']}, {args.dtype}, opset {parity['opset']}")
    for name, shape in (parity["inputs"] | parity["outputs"]).items():
        print(f"  {name:<12} {' x '.join(map(str, shape))}")
    print(
        f"  on {parity['images']} images: logits differ from PyTorch's by {differences['logits']:.1e} at most, boxes "
        f"by {differences['pred_boxes']:.1e} of the image; {parity['queries_lost']:.1%} of the queries have no like"
    )
    if (ap := parity["AP"]) is not None:
        print(f"  AP {100 * ap['onnxruntime']:.2f} in ONNX Runtime, {100 * ap['pytorch']:.2f} in PyTorch")
    return parity


def _loader(source: Source, config: DataConfig, batch_size: int):
    transform = RowTransform(config, training=False)
    rows = config.num_eval_images
    stream = DetectionStream(source, transform, batch_size, shuffle=False, drop_last=False, num_rows=rows)
    return build_loader(stream, 0, pin_memory=False)


def _score(source: Source, config: DataConfig, batch_size: int, detector: CanvasDetector) -> float:
    loader = _loader(source, config, batch_size)
    return evaluate_detector(detector, loader, source.class_names, source.category_ids)[0]["AP"]


def size(text: str) -> tuple[int, int]:
    """Two numbers of pixels, "H,W"."""
    numbers = text.split(",")
    if len(numbers) != 2 or not all(number.isdecimal() and int(number) for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form H,W")
    return int(numbers[0]), int(numbers[1])


def _batch(text: str) -> int | None:
    return None if text == "dynamic" else _count(text)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 upwards")
    return int(text)
