"""The costs of methods, measured on a small run."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from asd_hf.commands import run
from asd_hf.methods.asd import ASD
from asd_hf.phases import Stopwatch, phase
from asd_hf.trainer import DistillationTrainer
from tests.tiny_run import configuration, write_places


def test_inner_phases_are_not_counted_twice(monkeypatch):
    clock = iter([0, 1, 3, 6, 10, 15])  # at each begin and end
    monkeypatch.setattr("asd_hf.phases.perf_counter", lambda: next(clock))
    with Stopwatch(torch.device("cpu")) as watch, phase("outer"):
        for _ in range(2):
            with phase("inner"):
                pass
    assert watch.seconds == {"outer": 1 + 3 + 5, "outer/inner": 2 + 4}
    with phase("outer"):  # nobody measures
        pass


def test_what_is_measured_is_the_settled_step_and_nothing_is_pushed(tmp_path, monkeypatch):
    values = configuration(write_places(tmp_path / "places"), push_to_hub=True, hub_model_id="me/student")
    file, steps = tmp_path / "run.yaml", []
    file.write_text(yaml.safe_dump(values))
    compare = ASD.compare

    def spy(self, student, teacher, labels):
        losses = compare(self, student, teacher, labels)
        steps.append((self.step >= self.settled_at, bool(losses["asd_box"] > 0)))
        return losses

    monkeypatch.setattr(ASD, "compare", spy)
    monkeypatch.setattr(DistillationTrainer, "init_hf_repo", lambda *_, **__: pytest.fail("a repository was made"))
    assert run("benchmark", ["step", "--config", str(file), "--methods", "asd", "--rounds", "2"]) == 0
    assert steps == [(True, True)] * 3


def test_a_step_under_each_method_is_measured_and_what_cannot_be_is_named(tmp_path, capsys):
    places = write_places(tmp_path / "places")
    file = tmp_path / "run.yaml"
    values = configuration(places, data={"teacher_size": 96, "unlabelled": str(places / "more")})
    file.write_text(yaml.safe_dump(values))
    methods = "asd,index_pairing,od_detr,kd_detr,d3etr"
    arguments = [
        "step",
        "--config",
        str(file),
        "--methods",
        methods,
        "--rounds",
        "2",
        "--json",
        str(tmp_path / "a.json"),
    ]
    assert run("benchmark", arguments) == 0
    shown = capsys.readouterr().out
    rows = {row["method"]: row for row in json.loads((tmp_path / "a.json").read_text())}
    assert list(rows) == ["none", "asd", "od_detr", "kd_detr", "d3etr", "index_pairing"]
    assert "and the teacher 9" in rows["index_pairing"]["refused"] and "index_pairing: refused:" in shown
    cost = {name: row["milliseconds"] for name, row in rows.items()}
    assert cost["none"]["teacher"] == cost["none"]["extra decoding"] == cost["asd"]["matching"] == 0
    assert rows["none"]["ratio"] == 1 != rows["kd_detr"]["ratio"]
    assert cost["asd"]["teacher"] > 0 < cost["kd_detr"]["extra decoding"] and cost["d3etr"]["matching"] > 0
    assert rows["asd"]["parameters"] > 0 == rows["od_detr"]["parameters"]
    for name in set(rows) - {"index_pairing"}:
        assert cost[name]["student"] > 0 < cost[name]["backward"]
        assert sum(cost[name].values()) - cost[name]["step"] == pytest.approx(cost[name]["step"], rel=0.5)
        assert f"| {name} " in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "asdd"], "--methods: unknown method 'asdd': did you mean 'asd'?"),
        (["--json", "nowhere/a.json"], "--json: folder nowhere does not exist"),
        (["--rounds", "0"], "--rounds must be 1 or more, not 0"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert run("benchmark", ["step", "--config", "configs/quickstart.yaml", *arguments]) == 2
    assert message in capsys.readouterr().err
