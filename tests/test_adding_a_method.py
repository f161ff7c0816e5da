"""The example of docs/adding_a_method.md works as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from asd_hf.build import Parts
from asd_hf.commands import run
from asd_hf.config import build_config
from asd_hf.detectors import get_adapter
from asd_hf.errors import UserError
from asd_hf.methods import get_method
from tests import tiny
from tests.tiny_run import configuration, write_places

PAGE = Path(__file__).parents[1] / "docs" / "adding_a_method.md"
NAME = "channel_wise:ChannelWise"


@pytest.fixture
def example(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(code.splitlines()) < 60
    (tmp_path / "channel_wise.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield get_method(NAME)
    del sys.modules["channel_wise"]


def test_the_example_trains(example, tmp_path):
    values = configuration(
        write_places(tmp_path / "places"), method={"name": NAME}, output_dir=str(tmp_path / "run"), logging_steps=1
    )
    del values["method"]["hidden_dim"], values["method"]["key_dim"]
    trainer = Parts(build_config(values)).trainer()
    trainer.train()
    losses = [row["loss/channel_wise_map"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 4 and all(0 < loss < 100 for loss in losses)
    values["method"]["temprature"] = 2
    with pytest.raises(UserError, match="method.temprature is unknown: did you mean 'temperature'?"):
        build_config(values)


def test_the_example_is_equation_3_and_4(example):
    student, teacher = (get_adapter(tiny.deformable_detr(seed), tiny.processor()) for seed in (0, 1))
    method = example(example.config_class(), student.spec, teacher.spec)
    batch = tiny.batch(2, sizes=((64, 64),))
    ours, theirs = (adapter(batch["pixel_values"], batch["pixel_mask"]) for adapter in (student, teacher))
    levels = []
    for s, t in zip(ours.features, theirs.features, strict=True):
        phi_s, phi_t = ((x.double().flatten(2) / 4).softmax(-1) for x in (s, t))
        cells = phi_t * (phi_t / phi_s).log()
        levels.append(16 / s.shape[1] * cells.sum((1, 2)).mean())
    expected = 3 * torch.stack(levels).mean()
    loss = method(ours, theirs, batch["labels"])["channel_wise_map"]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-8)
    assert method(ours, ours, batch["labels"])["channel_wise_map"] == 0


def test_doctor_finds_the_weight_of_its_term(example, tmp_path, capsys):
    values = configuration(write_places(tmp_path / "places"), output_dir=str(tmp_path / "run"))
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values | {"method": {"name": NAME}}))
    assert run("doctor", ["--config", str(file), "--steps", "1", "--images", "0"]) == 0
    assert re.search(r"channel_wise_map +\S+ +method.map_weight=3 ", capsys.readouterr().out)
