"""The runner of comparisons: what it trains, that it goes on where it was killed, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from asd_hf.commands import run
from asd_hf.compare.plan import choose_variants, make_plans, read_variants
from asd_hf.compare.records import load_runs
from asd_hf.compare.run import write_plan
from asd_hf.compare.schedule import open_plans
from asd_hf.errors import UserError
from asd_hf.evaluation import STATS
from tests.tiny_run import configuration, write_places


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A configuration in a file; the student has the teacher's architecture."""
    root = tmp_path_factory.mktemp("compare")
    steps = {"max_steps": 12, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 6, "logging_steps": 2}
    values = configuration(write_places(root / "places"), save_strategy="steps", **steps)
    values["model"]["student"] = {"decoder_layers": 2, "num_queries": 12}
    (root / "tiny.yaml").write_text(yaml.safe_dump(values))
    return root / "tiny.yaml"


def plans_of(base, variants, seeds=(0,), **options):
    return {plan.variant: plan for plan in make_plans(base, variants, seeds, **options)}


def test_a_variant_replaces_the_method_as_a_whole_and_other_keys_one_by_one(base):
    variants = {"mine": {"method": {"name": "fitnet"}, "training": {"learning_rate": 1}, "data": {"eval_size": 64}}}
    plan = plans_of(base, variants, overrides=["training.learning_rate=2", "training.warmup_steps=3"])["mine"]
    assert plan.sections["method"] == {"name": "fitnet"}
    assert plan.sections["training"]["learning_rate"] == 1 and plan.sections["training"]["warmup_steps"] == 3
    assert plan.sections["data"]["eval_size"] == 64 and plan.sections["data"]["max_size"] == 112
    assert plan.record(Path("out")) == Path("out/tiny/mine_0.json")


def test_without_a_method_there_is_no_teacher_and_the_student_is_built_alike(base):
    variants = {"none": {"method": "none"}, "own": {"method": "od_detr"}, "asd": {}}
    with pytest.raises(UserError, match="own keep a moving average .* set training.ema_decay=0.998 for all"):
        plans_of(base, variants)
    plans = plans_of(base, variants, overrides=["training.ema_decay=0.9"])
    teacher = plans["asd"].sections["model"]["teacher"]
    assert plans["asd"].sections["model"]["student"].get("base", "teacher") == "teacher"
    for name, taught_by in (("none", None), ("own", "ema")):
        model = plans[name].sections["model"]
        assert model["teacher"] == taught_by and model["student"]["base"] == teacher
    assert plans["own"].sections["training"]["ema_decay"] == 0.9


def test_all_variants_of_the_first_seed_come_first(base):
    plans = make_plans(base, {"a": {}, "b": {}}, [3, 1])
    assert [plan.name for plan in plans] == ["a_3", "b_3", "a_1", "b_1"]
    assert [plan.sections["training"]["seed"] for plan in plans] == [3, 3, 1, 1]


def test_variants_are_chosen_by_name_and_methods_stand_for_themselves(tmp_path):
    file = tmp_path / "variants.yaml"
    file.write_text("hot: {method: {name: asd, temperature: 8}}\nnone: {}\n")
    known = read_variants(file)
    assert list(choose_variants(known, None)) == ["hot", "none"]
    assert choose_variants(known, ["fgd", "hot"]) == {"fgd": {"method": {"name": "fgd"}}, "hot": known["hot"]}
    with pytest.raises(UserError, match="--methods: 'hott': did you mean 'hot'?"):
        choose_variants(known, ["hott"])


@pytest.fixture(scope="module")
def compared(base, tmp_path_factory) -> Path:
    """The records of a comparison that nothing disturbed."""
    output = tmp_path_factory.mktemp("output") / "records"
    arguments = ["--config", str(base), "--methods", "none,asd", "--seeds", "0", "--output", str(output)]
    assert run("compare", [*arguments, "--jobs", "2"]) == 0
    return output


def test_a_record_holds_the_run(base, compared):
    runs = {record["method"]: record for record in load_runs(compared)["tiny"]}
    none, asd = runs["none"], runs["asd"]
    assert none["student_sha256"] == asd["student_sha256"] and none["data_fingerprint"] == asd["data_fingerprint"]
    assert none["teacher"] is none["teacher_sha256"] is None and len(asd["teacher_sha256"]) == 16
    assert set(asd["teacher"]) == set(STATS) == set(none["metrics"])
    for record in runs.values():
        assert record["steps"] == 12 and record["num_images"] == 4
        assert len(record["bootstrap"]["AP"]) == 500
        steps, seconds = zip(*((point["step"], point["seconds"]) for point in record["curves"]["train"]), strict=True)
        assert list(steps) == [2, 4, 6, 8, 10, 12] and list(seconds) == sorted(seconds)
        assert [point["step"] for point in record["curves"]["eval"]] == [6, 12]
        assert record["curves"]["eval"][-1]["AP"] == pytest.approx(record["metrics"]["AP"], rel=1e-4)
        assert record["ms_per_step"] == pytest.approx(1e3 * record["seconds"] / 12, abs=0.01)
        assert str(base.parent) not in json.dumps(record)
    assert "loss/asd_box" in asd["curves"]["train"][0] and "loss/asd_box" not in none["curves"]["train"][0]
    assert asd["config"]["method"]["hidden_dim"] == 256 and none["config"]["method"] == {"name": "none"}


def test_a_killed_comparison_goes_on_to_the_same_record(base, compared, tmp_path):
    output, work = tmp_path / "records", tmp_path / "work"
    arguments = ["--config", str(base), "--methods", "asd", "--seeds", "0", "--output", str(output), "--work"]
    command = [sys.executable, "-m", "asd_hf.commands", "compare", *arguments, str(work)]
    process = subprocess.Popen(command, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    folder = work / "tiny" / "asd_0"
    while not list(folder.glob("checkpoint-*/trainer_state.json")) and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(output.rglob("*.json"))
    (folder / "checkpoint-999").mkdir()  # killed while it was written
    assert run("compare", [*arguments, str(work)]) == 0
    log = (folder / "log.txt").read_text()
    ours, theirs = (json.loads((x / "tiny" / "asd_0.json").read_text()) for x in (output, compared))
    assert ours["metrics"] == theirs["metrics"] and ours["bootstrap"] == theirs["bootstrap"]
    logs = [
        [{k: v for k, v in p.items() if k != "seconds" and not k.endswith("_runtime")} for p in x["curves"]["train"]]
        for x in (ours, theirs)
    ]
    assert logs[0] == logs[1]
    before = (output / "tiny" / "asd_0.json").stat().st_mtime_ns, log
    assert run("compare", [*arguments, str(work)]) == 0  # nothing is left to do
    assert ((output / "tiny" / "asd_0.json").stat().st_mtime_ns, (folder / "log.txt").read_text()) == before


def test_a_record_of_another_configuration_is_not_taken_for_ones_own(base, compared, tmp_path):
    work = tmp_path / "work"
    variants = {"asd": {"method": {"name": "asd"}}}
    assert open_plans(make_plans(base, variants, [0, 1]), compared, work) == make_plans(base, variants, [1])
    older = tmp_path / "older" / "tiny" / "asd_0.json"  # of a time before there was this option
    record = json.loads((compared / "tiny" / "asd_0.json").read_text())
    del record["config"]["model"]["teacher_cache"]
    older.parent.mkdir(parents=True)
    older.write_text(json.dumps(record))
    assert open_plans(make_plans(base, variants, [0, 1]), tmp_path / "older", work) == make_plans(base, variants, [1])
    hotter = {"asd": {"method": {"name": "asd", "temperature": 8.0}}}
    with pytest.raises(UserError, match=r"asd_0.json was made with method.temperature 4.0, not 8.0: take another"):
        open_plans(make_plans(base, hotter, [0]), compared, work)
    with pytest.raises(UserError, match=r"was made with training.max_steps 12, not 13"):
        open_plans(make_plans(base, variants, [1], ["training.max_steps=13"]), compared, work)  # another seed
    with pytest.raises(UserError, match=r"was made with compare.minutes None, not 1"):
        open_plans(make_plans(base, variants, [0], minutes=1.0), compared, work)
    [begun] = make_plans(base, variants, [2])
    write_plan(begun, begun.folder(work))
    assert open_plans([begun], compared, work) == [begun]
    with pytest.raises(
        UserError, match=r"asd_2 was trained with method.temperature 4.0, not 8.0: take another --work"
    ):
        open_plans(make_plans(base, hotter, [2]), tmp_path / "none yet", work)


def test_minutes_become_steps_and_a_failed_run_leaves_the_others(base, tmp_path, capsys):
    variants = tmp_path / "variants.yaml"
    variants.write_text("none: {method: none}\nwild: {training: {learning_rate: 1.0e+30}}\nnowhere: {}\n")
    output = tmp_path / "records"
    (tmp_path / "records_runs/tiny").mkdir(parents=True)
    (tmp_path / "records_runs/tiny/nowhere_5").write_text("where its folder should be")
    arguments = ["--config", str(base), "--variants", str(variants), "--seeds", "5", "--output", str(output)]
    assert run("compare", [*arguments, "--minutes", "0.02", "training.eval_strategy=no"]) == 2
    shown = capsys.readouterr()
    assert "2 of 3 runs failed: " in shown.err and "tiny/nowhere_5: " in shown.err and "| none " in shown.out
    assert "10 steps had a loss or gradient that is not finite" in shown.err
    record = json.loads((output / "tiny" / "none_5.json").read_text())
    assert (
        record["minutes"] == 0.02
        and record["steps"] > 1
        and [p["step"] for p in record["curves"]["eval"]] == [record["steps"]]
    )
    assert json.loads((tmp_path / "records_runs/tiny/none_5/steps.json").read_text())["max_steps"] == record["steps"]


def test_what_cannot_be_trained_is_refused_before_anything_is(base, tmp_path, capsys, monkeypatch):
    variants, output = tmp_path / "variants.yaml", tmp_path / "records"
    variants.write_text("none: {method: none}\nbroken: {data: {eval_split: nowhere}}\n")
    arguments = ["--config", str(base), "--variants", str(variants), "--output", str(output)]

    def refused(*more):
        assert run("compare", [*arguments, *more]) == 2 and not output.exists()
        return capsys.readouterr().err

    assert "variant 'broken': data: " in (error := refused()) and "nowhere" in error
    assert "--baseline: 'nnoe' is not compared: did you mean 'none'?" in refused("--baseline", "nnoe")
    assert "lies in --output" in refused("--work", str(output / "work"))
    every = ["--methods", "none", "method.temperature=8"]
    assert "'method.temperature=8': every variant has a method of its own" in refused(*every)
    variants.write_text("method: asd\n")
    assert "must hold named variants, each with its sections: 'method' is a section" in refused()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "compare starts its runs by itself" in refused()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "asd"], "compare needs --config and --variants or --methods; or --render"),
        (["--config", "x.yaml"], "compare needs --config and --variants or --methods; or --render"),
        (["--config", "nowhere.yaml", "--methods", "asd"], "configuration file nowhere.yaml does not exist"),
        (["--config", "configs/quickstart.yaml", "--methods", "asdd"], "--methods: 'asdd': did you mean 'asd'?"),
        (["--config", "configs/quickstart.yaml", "--methods", "asd", "--seeds", "a"], "--seeds 'a': whole numbers"),
        (["--config", "configs/quickstart.yaml", "--methods", "asd", "--jobs", "0"], "--jobs must be above 0, not 0"),
        (["--config", "configs/quickstart.yaml", "--methods", "asd", "--setting", "a/b"], "'a/b' cannot be the name"),
        (["--config", "configs/quickstart.yaml", "--methods", "asd", "model.teachr=x"], "did you mean 'teacher'?"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert run("compare", arguments) == 2
    assert message in capsys.readouterr().err
