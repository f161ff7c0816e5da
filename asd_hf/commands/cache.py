from __future__ import annotations

import argparse
import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub import HfApi
from transformers import set_seed

from ..benchmark.step import SETTLED
from ..build import Parts
from ..classes import SharedClasses
from ..config import RunConfig, load_config
from ..data import build_loader
from ..detectors.base import DetectorOutput
from ..errors import UserError
from ..hub import call_hub
from ..methods import CombinedMethod, DistillationMethod
from ..stopping import advise
from ..teacher_cache import CacheWriter, Contents, TeacherCache
from .train import report_progress


def main(argv: list[str]) -> None:
    """Writes what the teacher predicts on the training images; started again, it goes on."""
    parser = argparse.ArgumentParser(prog="asd-hf cache", description=main.__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of a training, see configs/")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the predictions")
    parser.add_argument(
        "--views", type=int, metavar="K", help="drawn views of each image, for augmentations that draw without end"
    )
    parser.add_argument(
        "--canonical", action="store_true", help="one prediction an image, carried to its views: approximate"
    )
    parser.add_argument("--top-queries", type=int, metavar="N", help="keep the best queries (default: all)")
    parser.add_argument("--top-classes", type=int, metavar="M", help="keep each query's best classes (default: all)")
    parser.add_argument("--push", metavar="REPO", help="push the finished folder to this data set of the Hub")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
    args = parser.parse_intermixed_args(argv)
    run = load_config(args.config, args.overrides)
    run.model.teacher_cache = None  # what is to be built
    report_progress(run.training.process_index)
    set_seed(run.training.seed)
    with advise(lambda: f"what is finished is kept in {args.output}, the same command goes on"):
        _cache(run, args)


def _cache(run: RunConfig, args: argparse.Namespace) -> None:
    parts, state, training = Parts(run), PartialState(), run.training
    if parts.teacher is None or parts.method is None:
        raise UserError("only what a pretrained teacher tells a method can be kept: set model.teacher and method.name")
    parts.teacher.model.to(training.device)
    contents = Contents.of(
        parts.method.teacher_reads,
        parts.method.teacher_layers,
        replace(parts.teacher.spec, class_names=parts.classes.names),
        args.top_queries,
        args.top_classes,
    )
    precision = "bf16" if training.bf16 else "fp16" if training.fp16 else "no"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}[precision]
    writer = CacheWriter(
        parts.teacher,
        run.model.teacher,
        parts.train_source,
        run.data,
        parts.data_seed,
        contents,
        parts.class_names,
        run.model.class_map,
        views=args.views,
        canonical=args.canonical,
        batch_size=training.per_device_eval_batch_size,
        num_workers=training.dataloader_num_workers,
        precision=precision,
        autocast=lambda: torch.autocast(training.device.type, dtype, enabled=dtype is not None),
    )
    first = state.is_main_process
    if first:
        print(_plan(writer, state.num_processes))
        writer.prepare(args.output)
    state.wait_for_everyone()
    writer.write(args.output, state.process_index, state.num_processes, progress=first)
    state.wait_for_everyone()
    if first:
        manifest = writer.finish(args.output)
        size = sum(shard["bytes"] for shard in manifest.shards)
        print(f"{manifest.num_shards} shards, {_megabytes(size)}: train with model.teacher_cache={args.output}")
    state.wait_for_everyone()
    table = _loss_table(parts, args.output)  # on every rank: a method may average over them
    if first:
        print(table)
        if args.push is not None:
            push(args.output, args.push, training.hub_private_repo)
    state.wait_for_everyone()


def _plan(writer: CacheWriter, num_ranks: int) -> str:
    manifest = writer.manifest
    contents = manifest.contents
    kept = f"{', '.join(contents.fields)} of {len(contents.layers)} decoder layers"
    size = f"{_megabytes(writer.total_bytes)} in {manifest.num_shards} shards"
    minutes = writer.seconds * manifest.num_images * manifest.views / num_ranks / 60
    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
    return (
        f"{manifest.num_images} images, {manifest.kind}\n"
        f"{kept}, {manifest.spec['num_queries']} queries: {size}, about {minutes:.1f} minutes on {ranks}"
    )


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def _loss_table(parts: Parts, folder: Path) -> str:
    """Each loss of the method on the first training batch, under the teacher and under its predictions on disk."""
    cache, stream, classes = TeacherCache(str(folder)), parts.training_stream(), parts.classes
    stream.transform.predictions = cache
    kept = SharedClasses(parts.student.spec, cache.spec, parts.run.model.class_map).to(parts.run.training.device)
    with tempfile.TemporaryDirectory() as nowhere:
        parts.run.training.leave_no_trace(nowhere)
        trainer = parts.trainer()
        batch = trainer._prepare_inputs(next(iter(build_loader(stream))))
        parts.student.model.eval()
        with torch.no_grad(), trainer.accelerator.autocast():
            student = classes.student(parts.student(batch["pixel_values"], batch["pixel_mask"]))
            answers = trainer.ask_teacher(batch), kept.teacher(cache(batch["teacher"]))
            losses = [_losses(parts.method, student, answer, classes.labels(batch["labels"])) for answer in answers]
    rows = [["loss of the first batch", "teacher", "on disk", "difference"]]
    for name, live in losses[0].items():
        kept = losses[1][name]
        difference = f"{100 * (kept - live) / abs(live):+.3f} %" if live else f"{kept:+.3g}"
        rows.append([name, f"{live:.6g}", f"{kept:.6g}", difference])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def _losses(
    method: DistillationMethod | CombinedMethod, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]
) -> dict[str, float]:
    """As they are at the end of all schedules. The method is a copy: some keep running means."""
    method = copy.deepcopy(method)
    method.step = SETTLED
    with torch.random.fork_rng():
        return {name: loss.item() for name, loss in method(student, teacher, labels).items()}


def push(folder: Path, name: str, private: bool | None) -> None:
    """Uploads finished predictions as a data set of the Hub."""
    hub, advice = HfApi(), f"the predictions are complete in {folder}"
    call_hub(lambda: hub.create_repo(name, repo_type="dataset", private=private, exist_ok=True), advice)
    files = ["README.md", "*.json", "*.safetensors"]
    where = {"repo_id": name, "repo_type": "dataset"}
    call_hub(lambda: hub.upload_folder(folder_path=folder, allow_patterns=files, **where), advice)
    print(f"pushed: train anywhere with model.teacher_cache={name}")
