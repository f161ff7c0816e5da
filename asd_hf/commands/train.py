from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from huggingface_hub import create_repo
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

from ..config import RunConfig, describe_config, load_config
from ..data import DetectionStream, RowTransform, open_source, resize_spec
from ..detectors import get_adapter
from ..detectors.base import DetectorAdapter
from ..errors import UserError
from ..evaluation import TOP_K, format_table, milliseconds_per_image
from ..hub import call_hub, is_hub_id
from ..student import StudentConfig, align_classes, build_student, find_classes, load_teacher
from ..trainer import DistillationTrainer

logger = logging.getLogger(__name__)


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
    args = parser.parse_args(argv)
    train(load_config(args.config, args.overrides))


def train(run: RunConfig) -> dict:
    """Runs a configuration from data to metrics.

    Returns:
        `metrics.json`'s contents: "teacher" (if any) and "student", and "ema" if there is one; on rank 0 also
        the time of an image and the evaluation's "protocol".
    """
    args = run.training
    checkpoint = _checkpoint(run)
    report_progress(args.process_index)
    set_seed(args.seed)

    sources = {
        split: open_source(run.data.source, split, run.data) for split in (run.data.train_split, run.data.eval_split)
    }
    train_source, eval_source = sources[run.data.train_split], sources[run.data.eval_split]
    names = train_source.class_names
    teacher_model = teacher_processor = teacher = None
    if run.model.teacher is not None:
        teacher_model, teacher_processor = load_teacher(run.model.teacher)
        teacher = get_adapter(teacher_model, teacher_processor)
        align_classes(names, teacher.spec.class_names, "the data")  # an error here costs nothing yet
    size = resize_spec(run.data)
    student = get_adapter(*build_student(run.model.student, teacher_model, teacher_processor, tuple(names), size))
    method = None
    if run.method_class is not None:
        if teacher is None:
            raise UserError(f"method.name is {run.method_name!r}, which needs a teacher: set model.teacher")
        method = run.method_class(run.method, student.spec, teacher.spec)

    seed = args.seed if args.data_seed is None else args.data_seed

    def stream(split: str, training: bool) -> DetectionStream:
        source = sources[split]
        columns = align_classes(source.class_names, names, f"split {split!r}", "the training data").tolist()
        return DetectionStream(
            source,
            RowTransform(run.data, training=training, seed=seed, label_map=columns),
            batch_size=args.per_device_train_batch_size if training else args.per_device_eval_batch_size,
            rank=args.process_index,
            world_size=args.world_size,
            num_workers=args.dataloader_num_workers,
            seed=seed,
            shuffle=training,
            shuffle_buffer=run.data.shuffle_buffer,
            drop_last=training,
            num_rows=None if training else run.data.num_eval_images,
        )

    if args.push_to_hub and args.process_index == 0:
        # Trainer creates the repository as well, but tries only once.
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        call_hub(lambda: create_repo(name, private=args.hub_private_repo, exist_ok=True), "training has not begun")
    # The evaluation split may lack classes; their ids are the training split's.
    rows = find_classes(names, eval_source.class_names)
    own_ids, eval_ids = train_source.category_ids, eval_source.category_ids
    trainer = DistillationTrainer(
        student,
        teacher,
        method,
        args,
        train_dataset=stream(run.data.train_split, training=True),
        eval_dataset=stream(run.data.eval_split, training=False),
        category_ids=[own if row is None else eval_ids[row] for own, row in zip(own_ids, rows, strict=True)],
        run_config=run.to_yaml(),
    )
    _report_setup(student, teacher, trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(_internal_call=True)
    metrics = _final_metrics(trainer, student, teacher, run, size)
    if trainer.is_world_process_zero():
        names = [name for name in ("teacher", "student", "ema") if name in metrics]
        print("\n" + format_table({name: metrics[name] for name in names}) + "\n")
        (Path(args.output_dir) / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        trainer.card = _card(run, trainer, student, metrics)
        trainer.create_model_card()
        print(f"student, metrics.json, model card and configuration are in {args.output_dir}")
    if args.push_to_hub:
        call_hub(trainer.push_to_hub, f"the student is complete in {args.output_dir}")
    return metrics


def report_progress(rank: int) -> None:
    """Shows what this package logs: everything on rank 0, warnings of the others. Other packages stay as set."""
    package = logging.getLogger("asd_hf")
    package.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if not package.handlers:
        package.addHandler(logging.StreamHandler())
    disable_progress_bar()  # Transformers' own, of every checkpoint written; Trainer's and ours stay


def _checkpoint(run: RunConfig) -> str | None:
    """The checkpoint to go on from, if any; refuses to mix a new run with the checkpoints of an old one."""
    wanted, folder = run.training.resume_from_checkpoint, Path(run.training.output_dir)
    newest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if wanted is None or wanted is False:
        if newest is not None:
            raise UserError(
                f"{folder} holds checkpoints of an earlier run: set training.resume_from_checkpoint=true to go on, "
                "or another training.output_dir"
            )
        return None
    if wanted is True:
        return newest
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise UserError(f"training.resume_from_checkpoint: {wanted} is not a checkpoint folder")
    return wanted


def _report_setup(student: DetectorAdapter, teacher: DetectorAdapter | None, trainer: DistillationTrainer) -> None:
    for role, adapter in (("teacher", teacher), ("student", student)):
        if adapter is not None:
            spec, count = adapter.spec, _parameters(adapter)
            trained = sum(p.numel() for p in adapter.model.parameters() if p.requires_grad)
            logger.info(
                f"{role}: {spec.family}, {count / 1e6:.2f}M parameters ({trained / 1e6:.2f}M trainable), "
                f"{spec.num_layers} decoder layers, {spec.num_queries} queries, {len(spec.class_names)} classes"
            )


def _parameters(adapter: DetectorAdapter) -> int:
    return sum(p.numel() for p in adapter.model.parameters())


def _final_metrics(
    trainer: DistillationTrainer, student: DetectorAdapter, teacher: DetectorAdapter | None, run: RunConfig, size: dict
) -> dict:
    adapters = {"teacher": teacher, "student": student}
    if trainer.ema is not None:
        adapters["ema"] = get_adapter(trainer.ema.model, student.processor)
    metrics = {}
    batch = next(iter(trainer.get_eval_dataloader())) if trainer.is_world_process_zero() else None
    device = trainer.args.device
    for name, adapter in adapters.items():
        if adapter is None:
            continue
        numbers, evaluator = trainer.evaluate_adapter(adapter)
        metrics[name] = {"parameters": _parameters(adapter)} | numbers
        if batch is not None:
            with trainer.accelerator.autocast():
                pixels, mask = batch["pixel_values"].to(device), batch["pixel_mask"].to(device)
                metrics[name]["ms_per_image"] = milliseconds_per_image(adapter, pixels, mask)
    if batch is not None:
        metrics["protocol"] = evaluator.protocol(
            resolution=size, top_k=TOP_K, source=run.data.source, split=run.data.eval_split
        )
    return metrics


def _card(run: RunConfig, trainer: DistillationTrainer, student: DetectorAdapter, metrics: dict) -> dict:
    """What `write_model_card` wants to know."""
    chosen, source = run.model.student, run.data.source
    chosen = StudentConfig(checkpoint=chosen) if isinstance(chosen, str) else chosen
    weights_from = [chosen.checkpoint, run.model.teacher if chosen.copy_weights else None]
    return {
        "model_id": trainer.hub_model_id or run.training.hub_model_id or Path(run.training.output_dir).name,
        "student_info": {
            "architecture": type(student.model).__name__,
            "weights_from": [w for w in weights_from if w is not None],
        },
        "teacher_info": None if run.model.teacher is None else {"id": run.model.teacher},
        "method_paper": {} if run.method_class is None else run.method_class.paper,
        "metrics": {k: v for k, v in metrics.items() if k != "protocol"},
        "protocol": metrics["protocol"],
        "dataset": {"name": Path(source).name, "id": source if is_hub_id(source) else None},
        "config_yaml": run.to_yaml(),
    }
