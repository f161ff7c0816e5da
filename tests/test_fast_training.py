"""Options that make steps faster: the same losses, and checkpoints as without them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection

from asd_hf.matrices import MatrixRecorder
from asd_hf.phases import Stopwatch, phase
from asd_hf.streams import SideStream
from tests.test_trainer import assert_equal, logged, make_trainer, shapes, weights

__all__ = ["shapes"]  # a fixture


def assert_same_training(trainer, usual):
    ours, theirs = logged(trainer), logged(usual)
    assert len(ours) == len(theirs) > 1
    for row, other in zip(ours, theirs, strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-4)


def assert_same_files(folder, other):
    """Names and shapes of the checkpoint, which loads as ever."""
    tensors, others = (load_file(f / "model.safetensors") for f in (folder, other))
    assert {name: x.shape for name, x in tensors.items()} == {name: x.shape for name, x in others.items()}
    _, report = AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_compiled_it_trains_the_same(shapes, tmp_path):
    options = {"max_steps": 2, "logging_steps": 1, "save_steps": 2}
    usual = make_trainer(shapes, tmp_path / "a", **options)
    usual.train()
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = make_trainer(shapes, tmp_path / "b", torch_compile_backend="eager", **options)
    compiled.train()
    # Backbone, encoder layer and decoder layer of each of the two; more where a layer's graph breaks.
    assert counters["stats"]["unique_graphs"] >= 6 and len(counters["graph_break"]) <= 1  # for one reason
    assert_same_training(compiled, usual)
    assert_same_files(tmp_path / "b" / "checkpoint-2", tmp_path / "a" / "checkpoint-2")
    trainer = make_trainer(shapes, tmp_path / "c", seed=9, **options)  # resumed without being compiled
    trainer._load_from_checkpoint(str(tmp_path / "b" / "checkpoint-2"))
    assert_equal(weights(trainer), weights(compiled))


def test_channels_last_it_trains_and_resumes_the_same(shapes, tmp_path):
    options = {"max_steps": 4, "logging_steps": 1, "save_steps": 2, "ema_decay": 0.9}
    usual = make_trainer(shapes, tmp_path / "a", **options)
    usual.train()
    trainer = make_trainer(shapes, tmp_path / "b", channels_last=True, **options)
    kernels = [p for a in (trainer.adapter, trainer.teacher) for p in a.backbone.parameters() if p.dim() == 4]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    maps = trainer.adapter.backbone(torch.rand(1, 3, 64, 96)).feature_maps
    assert all(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() for x in maps)
    trainer.train()
    assert_same_training(trainer, usual)
    assert_same_files(tmp_path / "b" / "checkpoint-4", tmp_path / "a" / "checkpoint-4")
    resumed = make_trainer(shapes, tmp_path / "b", seed=9, channels_last=True, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert_equal(weights(resumed), weights(trainer))


class FakeStream:
    """Writes down what it is told to wait for."""

    def __init__(self, name, log):
        self.name, self.log, self.device = name, log, torch.device("cuda", 0)

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def streams(monkeypatch):
    """The order of what CUDA is told, where there is none."""
    log = []
    current = [FakeStream("main", log)]

    @contextmanager
    def entered(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream("side", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", entered)
    return log, current


def test_the_teacher_waits_for_its_images_and_the_method_for_the_teacher(shapes, tmp_path, streams):
    log, current = streams
    trainer = make_trainer(shapes, tmp_path, max_steps=1, save_strategy="no", logging_steps=1)
    trainer.remove_callback(MatrixRecorder)  # it asks both models outside the steps
    trainer._beside = SideStream(torch.device("cuda"))
    for name, part in {"teacher": trainer.teacher, "student": trainer.adapter, "method": trainer.method}.items():
        forward = part.forward
        part.forward = lambda *given, name=name, forward=forward: (
            log.append(f"{name} on {current[-1].name}"),
            forward(*given),
        )[1]
    trainer.train()
    step = ["side waits for main", "teacher on side", "student on main", "main waits for side", "method on main"]
    assert log == step
    log.clear()
    with Stopwatch(torch.device("cpu")):
        trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert "teacher on main" in log and "side waits for main" not in log


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_teacher_beside_the_student_gives_the_same_numbers(shapes, tmp_path):
    options = {"use_cpu": False, "logging_steps": 1}
    beside, before = (make_trainer(shapes, tmp_path / str(on), teacher_stream=on, **options) for on in (True, False))
    assert beside._beside._stream is not None and before._beside._stream is None
    for trainer in (beside, before):
        trainer.train()
    assert_same_training(beside, before)


class FakeEvent:
    """A moment on a device that lags behind and comes to event n at n * n seconds."""

    count = reached = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        FakeEvent.count += 1
        self.number = FakeEvent.count

    def query(self):
        return FakeEvent.reached >= self.number

    def synchronize(self):
        FakeEvent.reached = max(FakeEvent.reached, self.number)

    def elapsed_time(self, end):
        assert end.query()
        return 1e3 * (end.number**2 - self.number**2)


def test_a_gpu_times_phases_without_being_waited_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("waited for the device"))
    watch = Stopwatch(torch.device("cuda"))
    with watch:
        for _ in range(2):  # events 1 to 4, 5 to 8
            with phase("outer"), phase("inner"):
                pass
        assert FakeEvent.reached == 0
        FakeEvent.reached = 3
    assert FakeEvent.reached == 3 and len(watch._laps) == 4  # of six, two are known
    assert watch.seconds == {"outer": (4 - 1) + (16 - 9) + (36 - 25) + (64 - 49), "outer/inner": (9 - 4) + (49 - 36)}
    assert not watch._laps


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_s_phases_have_the_time_of_their_kernels():
    x = torch.rand(4096, 4096, device="cuda")
    with Stopwatch(x.device) as watch:
        for name, count in (("warm", 1), ("short", 2), ("long", 20)):
            with phase(name):
                for _ in range(count):
                    x @ x
    assert watch.seconds["long"] > 4 * watch.seconds["short"] > 0
