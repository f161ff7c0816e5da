from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import yaml
from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from ..build import Parts
from ..checkpoints import all_checkpoints, newest_checkpoint, read_manifest, writing
from ..config import NO_METHOD, RunConfig, build_methods, describe_config, load_config
from ..data import resize_spec, teacher_view
from ..doctor import check, report
from ..environment import device_name, versions
from ..errors import UserError
from ..evaluation import TOP_K, format_table, milliseconds_per_image
from ..files import write_whole
from ..licenses import check_licenses
from ..pace import seconds_of_steps
from ..progress import is_quiet, show_logs
from ..sharing import create_repository, make_card, origins, push_run, read_run
from ..stopping import advise
from ..trainer import METRICS, MODELS, RUN_CONFIG, DistillationTrainer


def main(argv: list[str]) -> None:
    """Trains, evaluates teacher and student, and writes both models' numbers, the student and its card."""
    parser = argparse.ArgumentParser(
        prog="asd-hf train",
        description="Train a student, with a teacher (model.teacher, method.name) or without.",
        epilog=f"Keys of a configuration:\n{describe_config()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
    args = parser.parse_intermixed_args(argv)
    run = load_config(args.config, args.overrides)
    with advise(lambda: _how_to_go_on(run)):
        train(run)


def train(run: RunConfig) -> dict:
    """Runs a configuration from data to metrics.

    Returns:
        `metrics.json`'s contents: "teacher" (if any) and "student", and "ema" if there is one; on rank 0 also
        the time of an image, the evaluation's "protocol", what the "training" took, and the "environment", device and
        versions.
    """
    args = run.training
    with writing(Path(args.output_dir)):
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    checkpoint = _checkpoint(run)
    show_logs(args.process_index)
    set_seed(args.seed)

    parts = Parts(run)
    report(check(parts))
    push, args.push_to_hub = args.push_to_hub, False  # Trainer's own would try once, and upload what is private
    if push and args.process_index == 0:
        check_licenses(origins(asdict(run.model)))
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        create_repository(name, args.hub_private_repo, "training has not begun")
    trainer = parts.trainer()
    if is_quiet():
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.watch_attention(False)  # models are timed as they will be used
    with writing(Path(args.output_dir)):
        trainer.save_model(_internal_call=True)
    metrics = _final_metrics(trainer, parts)
    if trainer.is_world_process_zero():
        print("\n" + format_table(_of_models(metrics)) + "\n")
        with writing(Path(args.output_dir)):
            write_whole(Path(args.output_dir) / METRICS, json.dumps(metrics, indent=2) + "\n")
            write_whole(Path(args.output_dir) / TRAINER_STATE_NAME, _state(trainer))
            finished = read_run(Path(args.output_dir))
            make_card(finished, finished.name).save(Path(args.output_dir) / "README.md")
        print(f"student, metrics.json, model card and configuration are in {args.output_dir}")
        folder = shlex.quote(args.output_dir)
        print(f"next: asd-hf report {folder}, or asd-hf push {folder}")
        if push:
            shared, pushed = push_run(finished, finished.name, args.hub_private_repo)
            print("\n".join([*(f"note: {remark}" for remark in shared.remarks), str(pushed)]))
    return metrics


def _checkpoint(run: RunConfig) -> Path | None:
    """The checkpoint to go on from, if any; refuses to mix a new run with the checkpoints of an old one."""
    wanted, folder = run.training.resume_from_checkpoint, Path(run.training.output_dir)
    if wanted is None or wanted is False:
        if all_checkpoints(folder):
            raise UserError(
                f"{folder} holds checkpoints of an earlier run: set training.resume_from_checkpoint=true to go on, "
                "or another training.output_dir"
            )
        return None
    checkpoint = newest_checkpoint(folder) if wanted is True else Path(wanted)
    if checkpoint is not None:
        read_manifest(checkpoint)
        _same_methods(run, checkpoint)
    return checkpoint


def _how_to_go_on(run: RunConfig) -> str:
    """After the run was stopped."""
    checkpoints = all_checkpoints(Path(run.training.output_dir))
    if not checkpoints:
        return "there was no checkpoint yet: the command begins anew"
    option = "" if run.training.resume_from_checkpoint is True else " with training.resume_from_checkpoint=true"
    return f"started again{option}, the command goes on from {checkpoints[-1]}"


def _same_methods(run: RunConfig, checkpoint: Path) -> None:
    """Refuses a checkpoint of other methods or options: what the run says of itself would not be true of its steps."""
    file = checkpoint / RUN_CONFIG
    if not file.is_file():
        return
    trained = build_methods(yaml.safe_load(file.read_text(encoding="utf-8")).get("method", {}), str(file))
    if trained == run.methods:
        return
    name = "+".join(trained) or NO_METHOD
    what = f"with method {name}, not {run.method_name}"
    if name == run.method_name:
        what = f"with other options of {name}"
    raise UserError(f"{checkpoint} was trained {what}: set another training.output_dir, or the same method as then")


def _final_metrics(trainer: DistillationTrainer, parts: Parts) -> dict:
    adapters = {"teacher": parts.teacher, "student": parts.student}
    if trainer.ema is not None:
        adapters["ema"] = trainer.ema_adapter
    metrics = {}
    for name, adapter in adapters.items():
        if adapter is None:
            continue
        loader = trainer.get_eval_dataloader(parts.evaluation_stream(teacher=name == "teacher"))
        numbers, evaluator = trainer.evaluate_adapter(adapter, loader)
        metrics[name] = {"parameters": sum(p.numel() for p in adapter.model.parameters())} | numbers
        if trainer.is_world_process_zero():
            batch, device = next(iter(loader)), trainer.args.device
            with trainer.accelerator.autocast():
                pixels, mask = batch["pixel_values"].to(device), batch["pixel_mask"].to(device)
                metrics[name]["ms_per_image"] = milliseconds_per_image(adapter, pixels, mask)
    if trainer.is_world_process_zero():
        data = parts.run.data
        metrics["protocol"] = evaluator.protocol(
            resolution=parts.size, top_k=TOP_K, source=data.source, split=data.eval_split
        )
        if data.teacher_size is not None:
            metrics["protocol"]["teacher_resolution"] = resize_spec(teacher_view(data))
        metrics["training"] = _costs(trainer, parts)
        metrics["environment"] = {"device": device_name(trainer.args.device), "versions": versions()}
    return metrics


def _of_models(metrics: dict) -> dict[str, dict]:
    return {name: metrics[name] for name in MODELS if name in metrics}


def _state(trainer: DistillationTrainer) -> str:
    """Trainer's own state with the log of the whole training, without local paths: the folder may be pushed."""
    best = trainer.state.best_model_checkpoint
    state = replace(trainer.state, best_model_checkpoint=best and Path(best).name)
    return json.dumps(asdict(state), indent=2, sort_keys=True) + "\n"


def _costs(trainer: DistillationTrainer, parts: Parts) -> dict:
    """What the training took, over all of its interruptions."""
    args, state = trainer.args, trainer.state
    images = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "ranks": args.world_size,
        "steps": state.global_step,
        "images": state.global_step * images,
        "train_images": parts.train_source.num_rows,
        "train_runtime": seconds_of_steps(state.log_history, state.global_step),
        "teacher_predictions": None if parts.cache is None else parts.cache.manifest.kind,
    }
