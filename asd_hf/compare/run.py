"""One run of a comparison, in a process of its own: trains as the configuration says and writes the record.

`python -m asd_hf.compare.run FOLDER RECORD` trains the run whose `plan.yaml` is in FOLDER; `schedule` calls it.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import torch
import yaml
from filelock import FileLock
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed

from ..build import Parts
from ..checkpoints import newest_checkpoint, writing
from ..config import build_config
from ..environment import device_name, versions
from ..errors import UserError
from ..evaluation import STATS, TOP_K
from ..evaluation.bootstrap import bootstrap_ap
from ..files import write_whole
from ..teacher_cache import weights_sha256
from ..trainer import DistillationTrainer
from .plan import Plan

PLAN, BUDGET = "plan.yaml", "steps.json"
STEP_LINE = "@step"  # begins a line of standard output that tells how far the training is
REPLICATES = 500
BOOTSTRAP_SEED = 0
TRIAL_STEPS, WARM_UP_STEPS = 40, 10  # of the measurement that turns minutes into steps


def write_plan(plan: Plan, folder: Path) -> None:
    write_whole(folder / PLAN, yaml.safe_dump(asdict(plan), sort_keys=False))


def read_plan(folder: Path) -> Plan | None:
    """Of the run that trained in `folder`, if one did."""
    file = folder / PLAN
    return Plan(**yaml.safe_load(file.read_text(encoding="utf-8"))) if file.is_file() else None


def train_and_record(plan: Plan, folder: Path) -> dict:
    """Trains, going on from the newest checkpoint in `folder` if there is one; returns the record.

    All variants of one seed start from the same student, which the record's "student_sha256" proves, and see the same
    images in the same order.
    """
    run = build_config(plan.sections, plan.name)
    args = run.training
    args.output_dir, args.report_to, args.disable_tqdm = str(folder), [], True
    if plan.minutes is not None:
        args.max_steps = _steps_in_budget(plan, folder)
    parts = Parts(run)
    student = _fresh_student(parts, args.seed)
    digest = weights_sha256(student)
    trainer = parts.trainer()
    trainer.remove_callback(PrinterCallback)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train(resume_from_checkpoint=newest_checkpoint(folder))
    costs = _costs(trainer, clock)
    trainer.watch_attention(False)
    with writing(folder):
        trainer.save_model(_internal_call=True)
    numbers = _numbers(trainer, parts)
    return {
        "setting": plan.setting,
        "method": plan.variant,
        "seed": plan.seed,
        "minutes": plan.minutes,
        **numbers,
        "student_sha256": digest,
        "parameters": sum(p.numel() for p in student.parameters()),
        **costs,
        "curves": _curves(trainer.state.log_history, costs, numbers["metrics"]),
        "config": plan.config(),
        "versions": versions(),
    }


def _fresh_student(parts: Parts, seed: int) -> PreTrainedModel:
    """The student of a seed, whatever teacher was loaded before it."""
    parts.teacher_spec  # noqa: B018  loading the teacher may draw random numbers
    set_seed(seed)
    return parts.student.model


class Clock(TrainerCallback):
    """Adds "seconds" to every entry of the log: of training so far, without evaluations and checkpoints.

    They are counted on over interruptions: from the last entry before the checkpoint.
    """

    seconds = 0.0  # of a run that is complete already, for which nothing begins

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        before = [entry["seconds"] for entry in state.log_history if entry["step"] <= state.global_step]
        self.seconds, self.mark = max(before, default=0.0), perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._count()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if any(key.startswith("eval_") for key in logs):
            self.mark = perf_counter()
        else:
            self._count()  # on a GPU the steps so far end here, where their losses are read
        state.log_history[-1]["seconds"] = round(self.seconds, 3)
        print(STEP_LINE, state.global_step, state.max_steps, flush=True)  # noqa: T201

    def _count(self) -> None:
        now = perf_counter()
        self.seconds, self.mark = self.seconds + now - self.mark, now

    def _skip(self, args, state, control, **kwargs) -> None:
        self.mark = perf_counter()

    on_evaluate = on_save = _skip


def _steps_in_budget(plan: Plan, folder: Path) -> int:
    """As many steps as fit into the plan's minutes, by a short training that is thrown away; measured once a run."""
    file = folder / BUDGET
    if not file.is_file():
        run = build_config(plan.sections, plan.name)
        run.training.leave_no_trace(str(folder))
        run.training.max_steps, run.training.disable_tqdm = TRIAL_STEPS, True
        trainer = Parts(run).trainer()
        trainer.remove_callback(PrinterCallback)
        laps = _Laps()
        trainer.add_callback(laps)
        trainer.train()
        step = (laps.times[-1] - laps.times[WARM_UP_STEPS]) / (TRIAL_STEPS - 1 - WARM_UP_STEPS)
        write_whole(
            file, json.dumps({"max_steps": max(1, round(60 * plan.minutes / step)), "ms_per_step": 1e3 * step})
        )
    return json.loads(file.read_text())["max_steps"]


class _Laps(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.times.append(perf_counter())


def _numbers(trainer: DistillationTrainer, parts: Parts) -> dict:
    """COCO's numbers of the student, of the bootstrap's resamples of the images, and of the teacher.

    Where a moving average is kept, it is the student that is judged: it is what one would deploy.
    """
    judged = trainer.adapter if trainer.ema is None else trainer.ema_adapter
    metrics, evaluator = trainer.evaluate_adapter(judged)
    data = parts.run.data
    protocol = evaluator.protocol(
        resolution=parts.size, top_k=TOP_K, source=Path(data.source).name, split=data.eval_split
    )
    teacher = None
    if parts.teacher is not None:
        loader = trainer.get_eval_dataloader(parts.evaluation_stream(teacher=True))
        result, _ = trainer.evaluate_adapter(parts.teacher, loader)
        teacher = {name: result[name] for name in STATS}
    replicates = bootstrap_ap(evaluator.images, len(evaluator.class_names), REPLICATES, BOOTSTRAP_SEED)
    return {
        "metrics": {name: metrics[name] for name in STATS},
        "per_class": metrics["per_class"],
        "bootstrap": {"seed": BOOTSTRAP_SEED, "AP": [round(value, 6) for value in replicates.tolist()]},
        "num_images": evaluator.num_images,
        "data_fingerprint": protocol["fingerprint"],
        "teacher": teacher,
        "teacher_sha256": _teacher_sha256(parts),
        "judged": "student" if trainer.ema is None else "ema",
        "protocol": protocol,
    }


def _teacher_sha256(parts: Parts) -> str | None:
    if parts.cache is not None:
        return parts.cache.manifest.teacher_sha256
    return None if parts.teacher is None else weights_sha256(parts.teacher.model)


def _costs(trainer: DistillationTrainer, clock: Clock) -> dict:
    """Of training; of a run that was complete when it began, the memory is that of loading it."""
    state, device = trainer.state, trainer.args.device
    seconds = max((entry["seconds"] for entry in state.log_history), default=clock.seconds)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "steps": state.global_step,
        "seconds": seconds,
        "ms_per_step": round(1e3 * seconds / state.global_step, 2),
        "peak_memory_mib": round(peak / 2**20, 1),
        "device": device_name(device),
    }


def _curves(history: list[dict], costs: dict, metrics: dict) -> dict[str, list[dict]]:
    """What was logged, in two lists: while training, and at evaluations, the last of them at the end of training.

    The times of single phases are left out: records of the same run shall be the same.
    """
    train = [{k: v for k, v in entry.items() if not k.endswith("_runtime")} for entry in history if "loss" in entry]
    prefix = "eval_ema_" if any("eval_ema_AP" in entry for entry in history) else "eval_"
    names = {f"{prefix}{stat}": stat for stat in STATS}
    evaluations = [
        {"step": entry["step"], "seconds": entry["seconds"]} | {names[k]: v for k, v in entry.items() if k in names}
        for entry in history
        if f"{prefix}AP" in entry and entry["step"] < costs["steps"]
    ]
    evaluations.append({"step": costs["steps"], "seconds": costs["seconds"]} | metrics)
    return {"train": [_short(entry) for entry in train], "eval": [_short(entry) for entry in evaluations]}


def _short(entry: dict) -> dict:
    """Numbers at five digits: records are kept in repositories."""
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in entry.items()}


def main(folder: Path, record: Path) -> int:
    # An earlier comparison that was killed may not know it yet, and another one may want the same run.
    with FileLock(folder / "lock"):
        if record.is_file():
            return 0
        plan = read_plan(folder)
        try:
            write_whole(record, json.dumps(train_and_record(plan, folder), indent=1) + "\n")
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
            return 2
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), Path(sys.argv[2])))
