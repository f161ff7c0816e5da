from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch
from accelerate import PartialState

from ..config import parse_overrides
from ..data import DataConfig, DetectionStream, RowTransform, build_loader, open_source, resize_options, resize_spec
from ..errors import UserError
from ..evaluation import TOP_K, evaluate_detector, format_table, milliseconds_per_image
from ..loading import load_teacher, prompt_teacher
from ..progress import show_logs

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """COCO's numbers of a model on a data set."""
    parser = argparse.ArgumentParser(prog="asd-hf evaluate", description=main.__doc__)
    parser.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="a checkpoint with its processor")
    parser.add_argument("--data", required=True, metavar="SOURCE", help="as data.source of a configuration")
    parser.add_argument("--split", default="val", metavar="NAME", help="default: val")
    parser.add_argument("--output", type=Path, default=Path("metrics.json"), help="default: metrics.json")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="also write COCO results to this file")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="loader workers (default: 0)")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument(
        "--class-map",
        action="append",
        default=[],
        type=class_pair,
        metavar="DATA=MODEL",
        help="what the model calls a class of the data, where the names differ; may be given several times",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="data.key=value",
        help="other keys of the data section (data.box_format=xywh)",
    )
    evaluate(parser.parse_intermixed_args(argv))


def class_pair(text: str) -> tuple[str, str]:
    """The two names of `DATA=MODEL`."""
    data, equals, model = text.partition("=")
    if not (data and equals and model):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form DATA=MODEL")
    return data, model


def evaluate(args: argparse.Namespace) -> dict:
    """Evaluates as `args` says and returns what it writes to `args.output`."""
    state = PartialState()
    show_logs(state.process_index)
    config = parse_overrides(DataConfig, {}, "data", args.overrides)
    if config.bad_rows != "raise":
        raise UserError("data.bad_rows has no use here: evaluation leaves no image out")
    source = open_source(args.data, args.split, config)
    adapter = load_teacher(args.model, "--model")
    class_map = dict(args.class_map)
    prompt_teacher(adapter, source.class_names, class_map)
    adapter.model.to(state.device)
    # The resolution is the model's own: it is what its processor says.
    config = data_config(adapter.processor, args.data, args.split, args.overrides)
    stream = DetectionStream(
        source,
        RowTransform(config, training=False),
        batch_size=args.batch_size,
        rank=state.process_index,
        world_size=state.num_processes,
        num_workers=args.workers,
        shuffle=False,
        drop_last=False,
        num_rows=config.num_eval_images,
    )
    loader = build_loader(stream, args.workers, pin_memory=state.device.type == "cuda")
    with torch.autocast(state.device.type, torch.bfloat16, enabled=args.bf16):
        numbers, evaluator = evaluate_detector(
            adapter,
            loader,
            source.class_names,
            source.category_ids,
            class_map,
            device=state.device,
            progress=state.is_main_process,
        )
    if state.is_main_process:
        with torch.autocast(state.device.type, torch.bfloat16, enabled=args.bf16):
            batch = next(iter(loader))
            pixels, mask = batch["pixel_values"].to(state.device), batch["pixel_mask"].to(state.device)
            latency = milliseconds_per_image(adapter, pixels, mask)
        parameters = sum(p.numel() for p in adapter.model.parameters())
        numbers = {"parameters": parameters, "ms_per_image": latency} | numbers
        numbers["protocol"] = evaluator.protocol(
            resolution=resize_spec(config), top_k=TOP_K, source=args.data, split=args.split
        )
        print(format_table({args.model: numbers}))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(numbers, indent=2) + "\n")
        logger.info("all numbers, those of each class too, are in %s", args.output)
        if args.predictions is not None:
            args.predictions.parent.mkdir(parents=True, exist_ok=True)
            args.predictions.write_text(json.dumps(evaluator.predictions()))
    return numbers


def data_config(processor, source: str, split: str, overrides: list[str]) -> DataConfig:
    """The data section that resizes as the model's processor does, then `overrides`."""
    values = {"source": source, "eval_split": split} | resize_options(processor.size)
    return parse_overrides(DataConfig, values, "data", overrides)
