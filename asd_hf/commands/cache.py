from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from accelerate import PartialState
from huggingface_hub import HfApi
from transformers import set_seed

from ..benchmark.cache import difference, first_losses
from ..build import Parts
from ..config import RunConfig, load_config
from ..hub import call_hub
from ..progress import show_logs
from ..stopping import advise
from ..teacher_cache import CacheWriter, TeacherCache


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
    show_logs(run.training.process_index)
    set_seed(run.training.seed)
    with advise(lambda: f"what is finished is kept in {args.output}, the same command goes on"):
        _cache(run, args)


def _cache(run: RunConfig, args: argparse.Namespace) -> None:
    parts, state = Parts(run), PartialState()
    writer = parts.cache_writer(args.views, args.canonical, args.top_queries, args.top_classes)
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
            push(args.output, args.push, run.training.hub_private_repo)
    state.wait_for_everyone()


def _plan(writer: CacheWriter, num_ranks: int) -> str:
    manifest = writer.manifest
    size = f"{_megabytes(writer.total_bytes)} in {manifest.num_shards} shards"
    minutes = writer.seconds * manifest.num_images * manifest.views / num_ranks / 60
    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
    return (
        f"{manifest.num_images} images, {manifest.kind}\n"
        f"{manifest.contents.summary}, {manifest.spec['num_queries']} queries: {size}, about {minutes:.1f} minutes on "
        f"{ranks}"
    )


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def _loss_table(parts: Parts, folder: Path) -> str:
    """Each loss of the method on the first training batch, under the teacher and under its predictions on disk."""
    with tempfile.TemporaryDirectory() as nowhere:
        parts.run.training.leave_no_trace(nowhere)
        live, kept = first_losses(parts, [parts.trainer(), parts.from_disk(TeacherCache(str(folder))).trainer()])
    rows = [["loss of the first batch", "teacher", "on disk", "difference"]]
    rows += [[name, f"{live[name]:.6g}", f"{kept[name]:.6g}", difference(live[name], kept[name])] for name in live]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def push(folder: Path, name: str, private: bool | None) -> None:
    """Uploads finished predictions as a data set of the Hub."""
    hub, advice = HfApi(), f"the predictions are complete in {folder}"
    call_hub(lambda: hub.create_repo(name, repo_type="dataset", private=private, exist_ok=True), advice)
    files = ["README.md", "*.json", "*.safetensors"]
    where = {"repo_id": name, "repo_type": "dataset"}
    call_hub(lambda: hub.upload_folder(folder_path=folder, allow_patterns=files, **where), advice)
    print(f"pushed: train anywhere with model.teacher_cache={name}")
