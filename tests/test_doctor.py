import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from asd_hf.build import Parts
from asd_hf.commands import run
from asd_hf.config import build_config, load_config
from asd_hf.data import make_shapes
from asd_hf.doctor import ADAPTED, CHECK, OK, REFUSED, Finding, check, format_findings, report
from asd_hf.errors import UserError
from asd_hf.loading import load_teacher
from tests.tiny_data import tiny_rows, write_coco
from tests.tiny_run import configuration, write_places

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return write_places(tmp_path_factory.mktemp("doctor"))


def findings_of(places, *args, **kwargs):
    torch.manual_seed(0)
    return {f.topic: f for f in check(Parts(build_config(configuration(places, *args, **kwargs))))}


def test_what_differs_is_adapted_and_said(places):
    found = findings_of(places, data={"teacher_size": 96, "unlabelled": str(places / "more")})
    assert found["classes"].verdict == ADAPTED
    assert found["classes"].text == "all 3 found by name, 1 more of the teacher are left out"
    assert (found["queries"].verdict, found["queries"].text) == (
        ADAPTED,
        "teacher 9, student 12: the numbers may differ, unless the method says otherwise",
    )
    assert (found["layers"].verdict, found["layers"].text[:20]) == (ADAPTED, "teacher 3, student 2")
    assert found["head"].verdict == found["data"].verdict == found["method"].verdict == OK
    assert "16 images to train on (those of" in found["data"].text and "4 to evaluate on" in found["data"].text
    assert found["input sizes"].verdict == CHECK  # it is used to 80
    assert "student shorter side 80, longer at most 112, teacher shorter side 96" in found["input sizes"].text


def test_heads_of_two_kinds(places):
    found = findings_of(places, "detr")
    assert (
        found["head"].verdict == ADAPTED
        and "softmax probabilities are compared in the sigmoid form" in found["head"].text
    )
    assert found["classes"].verdict == OK


def test_a_teacher_that_lacks_classes(places):
    found = findings_of(places, "rt_detr")
    assert found["classes"].verdict == ADAPTED
    assert "1 of 3 are shared; the teacher lacks dog, owl: masked from the class terms" in found["classes"].text
    assert found["normalisation"].verdict == ADAPTED  # the student is of an architecture of its own
    assert "padding mask" in found["input sizes"].text


def test_without_a_teacher(places):
    found = findings_of(places, None)
    assert set(found) == {"data", "teacher", "student", "loss", "input sizes", "schedule"}
    assert all(finding.verdict == OK for finding in found.values())


def refused(places, *args, **kwargs):
    found = findings_of(places, *args, **kwargs)
    (wrong,) = [f for f in found.values() if f.verdict == REFUSED]
    return wrong


def test_what_cannot_be_is_refused_under_its_topic(places):
    assert refused(places, data={"eval_split": "test"}).topic == "data"
    assert refused(places, "nothing").topic == "teacher"
    found = refused(places, student={"backbone": "resnet1", "config": {}})
    assert found.topic == "student" and "timm has no 'resnet1'" in found.text
    found = refused(places, method={"layers": 3})
    assert found.topic == "method" and "the student has 2 decoder layers" in found.text
    real_time = {"base": str(places / "rt_detr"), "config": {}, "encoder_layers": None, "d_model": None}
    found = refused(places, student=real_time)
    assert found.topic == "input sizes" and "multiples of 32" in found.text and "data.resize: fixed" in found.remedy
    with pytest.raises(UserError, match="multiples of 32.*set data.resize: fixed"):
        report([found])


def test_every_mistake_of_a_configuration_is_told_at_once(places):
    found = findings_of(places, "nothing", data={"eval_split": "test"}, student={"backbone": "resnet1", "config": {}})
    wrong = [f.topic for f in found.values() if f.verdict == REFUSED]
    assert wrong == ["data", "teacher"]  # without a teacher nothing can be said of the student


@pytest.mark.parametrize(
    ("options", "topic", "message"),
    [
        ({"teacher": None, "data": {"teacher_size": 96}}, "teacher", "data.teacher_size has no use without a teacher"),
        ({"teacher": None, "data": {"unlabelled": "more"}}, "teacher", "data.unlabelled has no use without a teacher"),
        ({"method": {"name": "none"}}, "method", "set method.name, or model.teacher=null"),
        ({"per_device_train_batch_size": 50}, "schedule", "12 rows are less than one batch of 50"),
    ],
)
def test_what_would_fail_later_is_refused_now(places, options, topic, message):
    if "unlabelled" in options.get("data", {}):
        options = options | {"data": {"unlabelled": str(places / "more")}}
    values = configuration(places, **options)
    if values["method"].get("name") == "none":
        values["method"] = {"name": "none"}
    (wrong,) = [f for f in check(Parts(build_config(values))) if f.verdict == REFUSED]
    assert wrong.topic == topic and message in wrong.text


def test_an_evaluation_split_with_a_class_of_its_own_is_refused(places, tmp_path):
    write_coco(tmp_path / "coco", "train", tiny_rows(8))
    write_coco(tmp_path / "coco", "val", tiny_rows(4))
    file = tmp_path / "coco/annotations/instances_val.json"
    contents = json.loads(file.read_text())
    contents["categories"].append({"id": 50, "name": "zebra"})
    file.write_text(json.dumps(contents))
    found = refused(places, data={"source": str(tmp_path / "coco")})
    assert found.topic == "schedule" and "lacks 1 of the 4 classes of split 'val': zebra" in found.text


def test_the_weight_of_a_loss_that_is_not_ours_is_refused(places):
    values = configuration(places, student={"base": str(places / "rt_detr"), "config": {}})
    values["model"]["student"] = str(places / "rt_detr")
    values["data"] |= {"resize": "fixed", "fixed_size": [64, 64]}
    values["training"]["class_loss_weight"] = 2.0
    (wrong,) = [f for f in check(Parts(build_config(values))) if f.verdict == REFUSED]
    assert wrong.topic == "loss" and "training.class_loss_weight does not apply to rt_detr" in wrong.text


def test_a_family_whose_image_processor_makes_multiples_takes_any_size(places):
    vit = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "image_size": [64, 64]}
    yolos = {"base": "yolos", "config": vit, "encoder_layers": None, "decoder_layers": None}
    found = findings_of(places, "detr", student=yolos, method={"layers": 1})
    assert found["input sizes"].verdict == ADAPTED
    assert found["input sizes"].text == "sides are padded to multiples of 16, where the image processor cuts them"
    found = refused(
        places, "detr", student=yolos, data={"resize": "fixed", "fixed_size": [64, 72]}, method={"layers": 1}
    )
    assert found.topic == "input sizes" and "multiples of 16" in found.text


def test_a_method_that_sets_in_after_the_end_is_to_be_checked(places):
    found = findings_of(places)["schedule"]
    assert (
        found.verdict == CHECK
        and "4 steps of 2 images, and the method has its full weight from step 1000" in found.text
    )
    assert findings_of(places, method={"ramp_steps": 3})["schedule"].verdict == OK


def test_a_teacher_at_an_unusual_resolution_is_to_be_checked(places):
    found = findings_of(places, data={"teacher_size": [64, 64]})["input sizes"]
    assert found.verdict == CHECK and found.remedy == "data.teacher_size, if that is not meant"
    assert "image processor makes shorter side 80, longer at most 112, and it will see 64x64" in found.text


def test_a_part_that_cannot_be_built_is_tried_once(places, monkeypatch):
    tried = []
    monkeypatch.setattr("asd_hf.build.load_teacher", lambda name: tried.append(name) or load_teacher(name))
    assert refused(places, "nothing").topic == "teacher" and len(tried) == 1


def test_more_queries_than_cells_are_refused(places):
    student = {"base": str(places / "rt_detr"), "config": {}, "encoder_layers": None, "d_model": None}
    student |= {"num_queries": 100}
    found = refused(places, student=student, data={"resize": "fixed", "fixed_size": [64, 64]})
    assert found.topic == "input sizes"
    assert (
        "the student's 100 queries are chosen among the cells of its feature maps, and 64x64 pixels have 84"
        in found.text
    )


def test_no_class_in_common_is_refused(places, tmp_path):
    write_coco(tmp_path / "coco", "train", tiny_rows(4))
    file = tmp_path / "coco/annotations/instances_train.json"
    contents = json.loads(file.read_text())
    for category in contents["categories"]:
        category["name"] += " (toy)"
    file.write_text(json.dumps(contents))
    found = refused(places, data={"source": str(tmp_path / "coco"), "eval_split": "train"})
    assert found.topic == "classes" and "share no class" in found.text and "model.class_map" in found.text


def test_the_command_measures_teacher_steps_and_gradients(places, tmp_path, capsys):
    make_shapes(tmp_path / "shapes", num_train=40, num_val=20, image_size=64, seed=3)
    values = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    values["data"]["source"] = str(tmp_path / "shapes")
    values["method"] = {"name": "asd"}
    values["training"] |= {"output_dir": str(tmp_path / "never"), "use_cpu": True, "dataloader_num_workers": 0}
    values["training"] |= {"per_device_train_batch_size": 4}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    assert run("doctor", ["--config", str(file), "--images", "20", "--steps", "2"]) == 0
    out = capsys.readouterr().out
    table = {line.split("  ")[0]: line for line in out.splitlines() if line}
    assert 50 < float(table["teacher's AP"].split()[3]) < 80
    assert "ms a step of 4 images a rank on cpu; 2000 steps: " in table["time"] and "GiB" in table["memory"]
    ratio, weight, wanted = (float(x.split("=")[-1]) for x in table["asd_box"].split()[1:])
    assert weight == 5 and ratio > 0 and wanted == pytest.approx(weight / ratio, rel=0.02)
    assert table["asd_sampling"].split()[1] == "0"  # it trains the sampler alone
    assert not (tmp_path / "never").exists()


def test_the_command_takes_short_epochs_and_checkpointing_and_pushes_nothing(places, tmp_path, capsys):
    values = configuration(places, output_dir=str(tmp_path / "never"), per_device_train_batch_size=8, max_steps=-1)
    values["training"] |= {"num_train_epochs": 3, "activation_checkpointing": True, "push_to_hub": True}
    values["training"] |= {"eval_strategy": "epoch", "early_stopping_patience": 2}
    values["training"] |= {"load_best_model_at_end": True, "save_strategy": "epoch"}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    assert run("doctor", ["--config", str(file), "--steps", "3", "data.shuffle_buffer=8", "--images", "0"]) == 0
    out = capsys.readouterr().out
    assert "schedule       CHECK    3 steps of 8 images" in out  # one batch an epoch
    assert re.search(r"; 3 steps: \d+\.\d min, evaluations not counted", out)
    assert not (tmp_path / "never").exists()
    with pytest.raises(SystemExit):
        run("doctor", ["--config", str(file), "--steps", "-1"])
    assert "'-1' is no number from 0 upwards" in capsys.readouterr().err


def test_terms_of_several_methods_have_their_own_knobs(places, tmp_path, capsys):
    values = configuration(places, output_dir=str(tmp_path / "never"))
    values["method"] = ["qskd", {"name": "asd", "weight": 0.5}, "detrdistill", {"name": "balanced_pairs", "trust": 0}]
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    assert run("doctor", ["--config", str(file), "--steps", "1", "--images", "0"]) == 0
    out = capsys.readouterr().out
    table = {line.split("  ")[0]: line.split() for line in out.splitlines() if line}
    assert "qskd+asd+detrdistill+balanced_pairs needs attention, decode, features;" in out
    assert "attention of the teacher is computed step by step" in out
    for term, knob in (
        ("qskd_giou", "method.qskd.giou_weight=2"),
        ("asd_box", "method.asd.box_weight=5"),
        ("balanced_pairs_box", "method.balanced_pairs.pair_weight=1"),
        ("balanced_pairs_asked_box", "method.balanced_pairs.asked_weight=1"),
    ):
        assert table[term][2] == knob and float(table[term][3]) > 0
    knobs = [row[2] for row in table.values() if len(row) > 3 and row[2].startswith("method.")]
    assert len(knobs) > 10 and load_config(file, knobs).methods == load_config(file).methods
    assert table["distillation"][2:] == ["-", "-"]


def test_findings_are_folded_to_the_terminal(monkeypatch):
    finding = Finding("input sizes", CHECK, "pixels " * 30, "another size, " * 6)
    monkeypatch.setenv("COLUMNS", "80")
    assert len(format_findings([finding]).splitlines()) == 2  # into a file
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    lines = format_findings([finding]).splitlines()
    assert len(lines) > 4 and max(map(len, lines)) <= 80 and all(line[20:].strip() for line in lines)
    assert [line[:20].strip() for line in lines[1:]] == [""] * (len(lines) - 1)
    assert " ".join(line[22:].strip() for line in lines) == f"{finding.text.strip()} -> {finding.remedy.strip()}"


def test_batches_without_labels_have_no_gradient_ratio(places, tmp_path, capsys):
    values = configuration(places, data={"train_split": None, "unlabelled": str(places / "more")})
    values["training"] |= {"output_dir": str(tmp_path / "never")}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    assert run("doctor", ["--config", str(file), "--steps", "2", "--images", "0"]) == 0
    out = capsys.readouterr().out
    assert "gradient ratio" not in out and "no batch had labels" in out


def test_a_teacher_that_finds_nothing_is_refused(places, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(configuration(places, output_dir=str(tmp_path / "never"))))
    assert run("doctor", ["--config", str(file), "--images", "4", "--steps", "0"]) == 2
    captured = capsys.readouterr()
    assert "REFUSED  0." in captured.out and "a student can learn nothing from it" in captured.out
    assert captured.err.strip().splitlines()[-1] == "error: 1 of 13 points are refused: see the table"


def test_train_checks_before_it_trains(places, tmp_path):
    values = configuration(places, data={"eval_split": "test"}, output_dir=str(tmp_path / "out"))
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    done = subprocess.run(
        [sys.executable, "-m", "asd_hf.commands", "train", "--config", str(file)], capture_output=True, text=True
    )
    assert done.returncode == 2 and re.search("data +REFUSED", done.stderr) and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "instances_test.json" in done.stderr
