"""The training loop on tiny models and a generated COCO folder."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoImageProcessor, AutoModelForObjectDetection, ProgressCallback, pipeline

from asd_hf.config import TrainingConfig
from asd_hf.criterion import DetectionCriterion
from asd_hf.data import DataConfig, DetectionStream, RowTransform, make_shapes, open_source
from asd_hf.data.rows import read_rows, stream_of
from asd_hf.data.shapes import CLASS_NAMES
from asd_hf.detectors import get_adapter
from asd_hf.distiller import Distiller
from asd_hf.errors import UserError
from asd_hf.freezing import freeze_backbone
from asd_hf.methods.asd import ASD, ASDConfig
from asd_hf.progress import TrainingBar
from asd_hf.trainer import METHOD_WEIGHTS, DistillationTrainer
from tests import tiny

SIZE = {"shortest_edge": 96, "longest_edge": 128}


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    make_shapes(root, num_train=24, num_val=9, image_size=96, progress=False)
    return root


def stream(root, split="train", batch_size=4, training=True, **options):
    config = DataConfig(
        source=str(root), resize="multiscale", train_sizes=[80, 96], eval_size=96, max_size=128, augmentation="flip"
    )
    transform = RowTransform(config, training=training, seed=0)
    return DetectionStream(
        open_source(str(root), split, config),
        transform,
        batch_size,
        shuffle=training,
        drop_last=training,
        shuffle_buffer=16,
        **options,
    )


def make_trainer(
    root, output_dir, *, distil=True, seed=0, teacher_seed=1, teacher_options=None, callbacks=None, **options
):
    student = get_adapter(tiny.deformable_detr(seed, classes=CLASS_NAMES), tiny.processor(size=SIZE))
    freeze_backbone(student, -1)  # Transformers would freeze all of it
    teacher = method = None
    if distil:
        model = tiny.deformable_detr(
            teacher_seed, **{"classes": CLASS_NAMES, "num_queries": 15} | (teacher_options or {})
        )
        teacher = get_adapter(model, tiny.processor())
        torch.manual_seed(seed)
        method = ASD(ASDConfig(hidden_dim=16, key_dim=16, ramp_steps=0), student.spec, teacher.spec)
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 3,
        "save_steps": 3,
        "save_total_limit": 10,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    args = TrainingConfig(output_dir=str(output_dir), **arguments | options)
    return DistillationTrainer(
        student,
        teacher,
        method,
        args,
        train_dataset=stream(
            root, batch_size=args.per_device_train_batch_size, num_workers=args.dataloader_num_workers
        ),
        eval_dataset=stream(root, "val", training=False),
        run_config="model: {}\n",
        callbacks=callbacks,
    )


def weights(trainer):
    return {k: v.detach().clone() for k, v in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, different


def logged(trainer):
    skip = ("runtime", "per_second", "train_loss", "flos")
    return [{k: v for k, v in row.items() if not any(s in k for s in skip)} for row in trainer.state.log_history]


def test_training_moves_the_student_and_the_sampler_and_not_the_teacher(shapes, tmp_path):
    trainer = make_trainer(shapes, tmp_path)
    before, teacher = weights(trainer), {k: v.clone() for k, v in trainer.teacher.model.state_dict().items()}
    trainer.train()
    after = weights(trainer)
    moved = [k for k in before if not torch.equal(before[k], after[k])]
    assert any(k.startswith("student.") for k in moved)
    assert any(k.startswith("method.") for k in moved)
    assert_equal(teacher, dict(trainer.teacher.model.state_dict()))
    assert not trainer.teacher.model.training


def test_every_term_is_logged_and_the_terms_sum_to_the_loss(shapes, tmp_path):
    trainer = make_trainer(shapes, tmp_path)
    trainer.train()
    row = next(r for r in trainer.state.log_history if "loss" in r)
    terms = {k: v for k, v in row.items() if k.startswith("loss/")}
    assert set(terms) == {
        *("loss/loss_ce", "loss/loss_bbox", "loss/loss_giou"),
        *("loss/asd_sampling", "loss/asd_box", "loss/asd_class"),
    }
    assert sum(terms.values()) == pytest.approx(row["loss"], rel=1e-5)
    assert {"asd/w_ii", "asd/w_ii_foreground", "asd/w_ii_background", "asd/queries_per_point"} <= row.keys()
    assert 0 < row["distillation_gradient_share"] < 1 and -1 < row["distillation_gradient_cosine"] < 1


def test_a_source_of_unknown_length_needs_a_number_of_steps(shapes, tmp_path):
    trainer = make_trainer(shapes, tmp_path, max_steps=-1)
    trainer.train_dataset.source.shard_lengths = None
    with pytest.raises(UserError, match="set training.max_steps"):
        trainer.train()


def test_gradient_norms_are_those_at_the_predictions():
    student = get_adapter(tiny.deformable_detr(0), tiny.processor())
    teacher = get_adapter(tiny.deformable_detr(1).eval(), tiny.processor())
    method = ASD(ASDConfig(ramp_steps=0), student.spec, teacher.spec)
    criterion = DetectionCriterion.from_config(student.model.config)
    batch = tiny.batch()
    with torch.no_grad():
        answer = teacher(batch["pixel_values"], batch["pixel_mask"])
    out = Distiller(student, criterion, method)(**batch, teacher=answer, measure_gradients="terms")
    output = student(batch["pixel_values"], batch["pixel_mask"])
    gradients = []
    for losses in (method(output, answer, batch["labels"]), criterion(output, batch["labels"])):
        grads = torch.autograd.grad(sum(losses.values()), (output.logits, output.boxes), retain_graph=True)
        gradients.append(torch.cat([g.flatten() for g in grads]))
    expected = {"distillation": gradients[0].norm().item(), "detection": gradients[1].norm().item()}
    cosine = gradients[0] @ gradients[1] / (gradients[0].norm() * gradients[1].norm())
    assert out.gradient_cosine.item() == pytest.approx(cosine.item(), abs=1e-5) and abs(cosine) > 1e-3
    assert {name: out.gradient_norms[name].item() for name in expected} == pytest.approx(expected, rel=1e-4)
    assert out.gradient_norms["asd_sampling"] == 0 < out.gradient_norms["asd_box"]


def test_the_table_takes_the_place_of_trainer_s_bar_and_of_no_other(shapes, tmp_path):
    class Own(ProgressCallback):
        pass

    trainer = make_trainer(shapes, tmp_path, callbacks=[Own()], disable_tqdm=False)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert [kinds.count(kind) for kind in (Own, TrainingBar, ProgressCallback)] == [1, 1, 0]


def test_the_terminal_shows_the_log_as_a_table(shapes, tmp_path, capsys):
    steps = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": False}
    trainer = make_trainer(shapes, tmp_path, ema_decay=0.5, eval_strategy="steps", eval_steps=2, **steps)
    trainer.train()
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    (header,) = [line for line in lines if "distillation" in line]
    shown = [line.split() for line in lines if re.match(r" +\d+ +\d+\.\d\d ", line)]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [row[0] for row in shown] == ["1", "2", "3"] and len(header) <= 80
    for row, entry in zip(shown, logged, strict=True):
        cells = dict(zip(header.split(), row, strict=True))
        assert float(cells["loss"]) == pytest.approx(entry["loss"], abs=1e-3)
        asd = sum(value for name, value in entry.items() if name.startswith("loss/asd_"))
        assert float(cells["distillation"]) == pytest.approx(asd, abs=1e-3) and asd > 0
        assert float(cells["detection"]) == pytest.approx(entry["loss"] - asd, abs=2e-3)
        assert cells["share"] == f"{entry['distillation_gradient_share']:.0%}"
        assert float(cells["rate"]) == pytest.approx(entry["learning_rate"], rel=0.1)
    evaluated = next(entry for entry in trainer.state.log_history if "eval_AP" in entry)
    text = "\n".join(lines)
    for name, key in (("student", "eval_AP"), ("moving average", "eval_ema_AP")):
        numbers = f"     2  {name}: AP {100 * evaluated[key]:.1f}, AP50 {100 * evaluated[key + '50']:.1f}, "
        assert numbers in text


def test_the_log_says_where_the_time_of_a_step_goes(shapes, tmp_path, caplog):
    trainer = make_trainer(shapes, tmp_path / "a")
    trainer.train()
    row = next(r for r in trainer.state.log_history if "loss" in r)
    assert {name for name in row if name.endswith("_runtime")} == {"step_runtime", "data_runtime"}
    assert 0 < row["data_runtime"] < row["step_runtime"] < 60
    trainer = make_trainer(shapes, tmp_path / "b", log_phases=True, max_steps=2, logging_steps=1, save_strategy="no")
    forward = trainer.teacher.forward
    trainer.teacher.forward = lambda *inputs: (time.sleep(3), forward(*inputs))[1]
    with caplog.at_level("INFO", logger="asd_hf"):
        trainer.train()
    rows = [r for r in trainer.state.log_history if "loss" in r]
    for row in rows:
        phases = {name: value for name, value in row.items() if name.endswith("_runtime")}
        step = phases.pop("step_runtime")
        assert {"data", "teacher", "student", "detection_loss", "detection_loss_matching", "method"} < {
            name.removesuffix("_runtime") for name in phases
        }
        assert {"backward_runtime", "optimizer_runtime", "rest_runtime"} < phases.keys()
        assert all(value > 0 for value in phases.values()) and sum(phases.values()) == pytest.approx(step)
        assert phases["teacher_runtime"] > 3
    assert caplog.text.count("teacher most of all: teacher 3") == len(rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_mid_epoch_is_bit_equal(shapes, tmp_path, workers, caplog):
    options = {
        "ema_decay": 0.9,
        "max_steps": 10,
        "save_steps": 4,
        "logging_steps": 2,
        "dataloader_num_workers": workers,
    }
    unbroken = make_trainer(shapes, tmp_path / "a", **options)
    unbroken.train()  # an epoch has 6 steps: step 4 lies within the first, step 8 within the second
    for step in (4, 8):
        folder = tmp_path / f"b{step}"
        shutil.copytree(tmp_path / "a" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        resumed = make_trainer(shapes, folder, seed=9, **options)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert_equal(weights(unbroken), weights(resumed))
        assert_equal(unbroken.ema.model.state_dict(), resumed.ema.model.state_dict())
        assert logged(resumed) == logged(unbroken)
    finished = make_trainer(shapes, tmp_path / "c", seed=9, **options)
    with pytest.raises(UserError, match="holds no checkpoint"):
        finished.train(resume_from_checkpoint=True)
    shutil.copytree(tmp_path / "a" / "checkpoint-10", tmp_path / "c" / "checkpoint-10")
    finished.train(resume_from_checkpoint=True)
    assert_equal(weights(unbroken), weights(finished))
    assert "nothing was trained" not in caplog.text
    make_trainer(shapes, tmp_path / "c", **options | {"max_steps": 6}).train(resume_from_checkpoint=True)
    assert "checkpoint-10 has 10 steps, more than the 6 of this run: nothing was trained" in caplog.text


def test_each_epoch_has_every_image_once_in_another_order(shapes, tmp_path):
    trainer, seen = make_trainer(shapes, tmp_path, max_steps=12), []
    compute_loss = trainer.compute_loss

    def record(model, inputs, **kwargs):
        seen.extend(int(label["image_id"]) for label in inputs["labels"])
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = record
    trainer.train()
    assert sorted(seen[:24]) == sorted(seen[24:]) == list(range(1, 25))
    assert seen[:24] != seen[24:]


def test_accumulated_batches_equal_one_large_batch(shapes, tmp_path):
    """On images with the same number of boxes: the detection loss divides by the boxes of a micro-batch."""
    sample = tiny.batch(8, sizes=[(96, 96)])
    for label in sample["labels"]:
        label["boxes"], label["class_labels"] = torch.tensor([[0.5, 0.5, 0.3, 0.3]]), torch.tensor([1])
    results = []
    for size, steps in ((8, 1), (1, 8)):
        trainer = make_trainer(shapes, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = steps
        for start in range(0, 8, size):
            part = {k: v[start : start + size] for k, v in sample.items()}
            trainer.training_step(trainer.model, part)
        results.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-3, atol=1e-4)  # of a norm of 100


class Loaded:
    """Rows in memory, in shards of the given lengths."""

    def __init__(self, rows, lengths):
        self.rows, self.lengths = rows, lengths

    def __call__(self, shard):
        first = sum(self.lengths[:shard])
        yield from self.rows[first : first + self.lengths[shard]]


def test_a_training_from_files_is_one_from_memory_to_the_last_bit(shapes, tmp_path):
    streamed, loaded = (make_trainer(shapes, tmp_path / name, max_steps=8, save_strategy="no") for name in "ab")
    source = loaded.train_dataset.source
    rows = list(read_rows(source.stream))
    assert len(rows) == 24 and all(row["image"]["bytes"] is None for row in rows)
    for row in rows:
        row["image"] = row["image"] | {"bytes": Path(row["image"]["path"]).read_bytes()}
    reader = Loaded(rows, source.shard_lengths)
    loaded.train_dataset.source = replace(source, stream=stream_of(reader, len(source.shard_lengths)))
    for trainer in (streamed, loaded):
        trainer.train()
    assert_equal(weights(streamed), weights(loaded))
    assert logged(streamed) == logged(loaded)


def test_two_workers_read_for_evaluation_what_none_reads(shapes, tmp_path):
    """To the last bit, image by image: in larger batches an image has other padding beside other images."""
    found = []
    for workers in (0, 2):
        options = {"dataloader_num_workers": workers, "per_device_eval_batch_size": 1}
        trainer = make_trainer(shapes, tmp_path, **options)
        trainer.eval_dataset = stream(shapes, "val", batch_size=1, training=False, num_workers=workers)
        _, evaluator = trainer.evaluate_adapter(trainer.adapter)
        found.append(evaluator.images)
    assert found[0].keys() == found[1].keys() and len(found[0]) == 9
    for image_id, result in found[0].items():
        assert all(np.array_equal(a, b) for a, b in zip(result, found[1][image_id], strict=True))


def test_parameter_groups(shapes, tmp_path):
    trainer = make_trainer(
        shapes, tmp_path, backbone_lr_scale=0.5, sampling_lr_scale=0.25, method_learning_rate=7e-3, weight_decay=0.1
    )
    trainer.create_optimizer()
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in trainer.optimizer.param_groups for p in g["params"]}
    names = {id(p): n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert settings.keys() == names.keys()
    kinds = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.BatchNorm2d)
    norms = {f"{n}.weight" for n, m in trainer.model.named_modules() if isinstance(m, kinds)}
    for key, name in names.items():
        rate = 1e-3
        if name.startswith("method."):
            rate = 7e-3
        elif ".backbone." in name:
            rate = 5e-4
        elif "sampling_offsets" in name or "reference_points" in name:
            rate = 2.5e-4
        plain = name.startswith("method.") or name.endswith("bias") or name in norms
        assert settings[key] == (rate, 0.0 if plain else 0.1), name
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3  # the one that Trainer logs
    assert len(trainer.optimizer.param_groups) <= 8


def test_student_and_method_are_clipped_apart(shapes, tmp_path):
    trainer = make_trainer(shapes, tmp_path, max_grad_norm=0.5, method_max_grad_norm=0.25)
    for p in trainer.model.parameters():
        p.grad = torch.full_like(p, 3.0)
    before = trainer._clip_grad_norm(trainer.model)
    norm = lambda m: torch.cat([p.grad.flatten() for p in m.parameters()]).norm().item()  # noqa: E731
    assert norm(trainer.model.student) == pytest.approx(0.5, rel=1e-4)
    assert norm(trainer.model.method) == pytest.approx(0.25, rel=1e-4)
    count = sum(p.numel() for p in trainer.model.student.parameters())
    assert before.item() == pytest.approx(3 * count**0.5, rel=1e-4)


def test_bf16_trains_and_boxes_stay_in_fp32(shapes, tmp_path):
    trainer = make_trainer(shapes, tmp_path, bf16=True)
    seen = {}
    forward = trainer.method.forward
    trainer.method.forward = lambda s, t, y: seen.update(student=s, teacher=t) or forward(s, t, y)
    trainer.train()
    assert seen["student"].boxes.dtype == seen["teacher"].boxes.dtype == torch.float32
    losses = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    assert all(torch.isfinite(torch.tensor(losses)))


def test_gradient_checkpointing_gives_the_same_weights(shapes, tmp_path):
    plain, frugal = (
        make_trainer(shapes, tmp_path / "a"),
        make_trainer(shapes, tmp_path / "b", activation_checkpointing=True),
    )
    plain.train()
    frugal.train()
    assert frugal.model.student.is_activation_checkpointing
    a, b = weights(plain), weights(frugal)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_moving_average(shapes, tmp_path):
    trainer = make_trainer(shapes, tmp_path, ema_decay=0.6, max_steps=3)
    path = [weights(trainer)]
    inner = trainer.callback_handler.on_optimizer_step

    def record(*args):
        path.append(weights(trainer))
        return inner(*args)

    trainer.callback_handler.on_optimizer_step = record
    trainer.train()
    name = "student.class_embed.0.weight"
    expected = path[0][name].double()
    for step, now in enumerate(path[1:]):
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * now[name].double()
    got = trainer.ema.model.state_dict()["class_embed.0.weight"].double()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    metrics = trainer.evaluate()
    assert {"eval_AP", "eval_ema_AP"} <= metrics.keys()


def test_best_checkpoint_is_loaded_at_the_end(shapes, tmp_path):
    trainer = make_trainer(
        shapes, tmp_path, eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True
    )
    scores = iter([0.1, 0.9, 0.5])
    evaluate = trainer.evaluation_loop

    def scripted(*args, **kwargs):
        output = evaluate(*args, **kwargs)
        output.metrics["eval_AP"] = next(scores)
        return output

    trainer.evaluation_loop = scripted
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best = AutoModelForObjectDetection.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    assert_equal(best, dict(trainer.model.student.state_dict()))
    assert_equal(load_file(tmp_path / "checkpoint-4" / METHOD_WEIGHTS), dict(trainer.model.method.state_dict()))
    again = make_trainer(
        shapes, tmp_path, seed=9, eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_equal(best, dict(again.model.student.state_dict()))


def test_early_stopping(shapes, tmp_path):
    trainer = make_trainer(
        shapes, tmp_path, max_steps=12, eval_strategy="steps", eval_steps=1, save_steps=1, early_stopping_patience=2
    )
    trainer.train()  # AP stays 0 for a tiny model that has seen ten images
    assert trainer.state.global_step < 12


def test_saved_student_is_an_ordinary_checkpoint(shapes, tmp_path):
    trainer = make_trainer(shapes, tmp_path / "run", ema_decay=0.9)
    trainer.train()
    trainer.save_model()
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "run").eval()
    student = trainer.model.student.eval()
    pixels = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, student(pixels).logits)
    assert list(model.config.id2label.values()) == list(CLASS_NAMES)
    assert AutoImageProcessor.from_pretrained(tmp_path / "run").size == SIZE
    image = next((Path(shapes) / "val").glob("*.jpg"))
    found = pipeline("object-detection", model=str(tmp_path / "run"), threshold=0.0)(str(image))
    assert found and found[0]["label"] in CLASS_NAMES
    assert (tmp_path / "run" / "ema" / "model.safetensors").is_file()
    assert not list((tmp_path / "run").rglob("*.bin"))  # nothing that needs unpickling beside the student
    assert (tmp_path / "run" / "asd_hf.yaml").read_text() == "model: {}\n"


def test_evaluation_counts_each_image_once_and_knows_its_ground_truth(shapes, tmp_path):
    trainer = make_trainer(shapes, tmp_path)
    _, evaluator = trainer.evaluate_adapter(trainer.adapter)
    truth = json.loads((shapes / "annotations/instances_val.json").read_text())
    assert sorted(evaluator.images) == [image["id"] for image in truth["images"]]
    assert trainer.predict(trainer.eval_dataset).metrics["test_AP"] == trainer.evaluate()["eval_AP"]
    boxes = sum(len(result.ground_truth) for result in evaluator.images.values())
    assert boxes == len(truth["annotations"])


def test_teacher_classes_are_reordered_by_name(shapes, tmp_path):
    order = [3, 0, 4, 1, 2]
    plain = make_trainer(shapes, tmp_path / "a")
    shuffled = make_trainer(shapes, tmp_path / "b", teacher_options={"classes": tuple(CLASS_NAMES[i] for i in order)})
    source, target = plain.teacher.model, shuffled.teacher.model
    target.load_state_dict(source.state_dict())
    with torch.no_grad():
        for ours, theirs in zip(target.class_embed, source.class_embed, strict=True):
            ours.weight.copy_(theirs.weight[order])
            ours.bias.copy_(theirs.bias[order])
    batch = tiny.batch()
    torch.testing.assert_close(shuffled.ask_teacher(batch).logits, plain.ask_teacher(batch).logits)


def test_tensorboard_gets_every_scalar(shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    make_trainer(shapes, tmp_path, report_to=["tensorboard"]).train()
    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events.*")).parent)).Reload()
    assert {"train/loss", "train/loss/asd_box", "train/asd/w_ii"} <= set(events.Tags()["scalars"])


def test_mistakes(shapes, tmp_path):
    with pytest.raises(UserError, match="share no class"):
        make_trainer(shapes, tmp_path, teacher_options={"classes": ("dog", "cat")})
    student = get_adapter(tiny.deformable_detr(0), tiny.processor())
    with pytest.raises(UserError, match="a teacher needs a method"):
        DistillationTrainer(student, student, None, TrainingConfig(output_dir=str(tmp_path), use_cpu=True))
    trainer = make_trainer(shapes, tmp_path, distil=False)
    with pytest.raises(UserError, match="does not exist"):
        trainer._load_from_checkpoint(str(tmp_path / "nowhere"))
    trainer.save_model(str(tmp_path / "plain"))
    other = make_trainer(shapes, tmp_path, distil=False)
    other.model.student.model.query_position_embeddings = torch.nn.Embedding(9, 64)
    with pytest.raises(UserError, match="is a checkpoint of another student"):
        other._load_from_checkpoint(str(tmp_path / "plain"))
    permuted = make_trainer(shapes, tmp_path, distil=False)
    permuted.model.student.config.id2label = dict(enumerate(reversed(CLASS_NAMES)))
    with pytest.raises(UserError, match="a student with other classes, or in another order"):
        permuted._load_from_checkpoint(str(tmp_path / "plain"))
    trainer = make_trainer(shapes, tmp_path)
    trainer.save_model(str(tmp_path / "distilled"))
    trainer.model.method.samplers[0].query[0] = torch.nn.Linear(3, 16)
    with pytest.raises(UserError, match="trained with other options of the method, or another teacher's classes"):
        trainer._load_from_checkpoint(str(tmp_path / "distilled"))
    other.train_dataset.rank, other.train_dataset.world_size = 1, 2
    with pytest.raises(UserError, match="made for rank 1 of 2, this is rank 0 of 1"):
        other.get_train_dataloader()
    other.train_dataset.batch_size = 3
    with pytest.raises(UserError, match="makes batches of 3"):
        other.get_train_dataloader()
    with pytest.raises(UserError, match="holds no weights of the method"):
        make_trainer(shapes, tmp_path)._load_from_checkpoint(str(tmp_path / "plain"))
