import json

import pytest
import torch

from asd_hf.build import Parts
from asd_hf.commands import run
from asd_hf.config import build_config
from asd_hf.errors import UserError
from tests.families import FAMILIES
from tests.tiny_run import configuration, write_places


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return write_places(tmp_path_factory.mktemp("build"))


def parts(places, *args, output_dir="unused", **kwargs):
    torch.manual_seed(0)
    return Parts(build_config(configuration(places, *args, output_dir=str(output_dir), logging_steps=1, **kwargs)))


def test_images_without_labels_alone_train_from_the_teacher(places, tmp_path):
    data = {"train_split": None, "unlabelled": str(places / "more")}
    method = {"ramp_steps": 0}
    all_of_it = parts(places, data=data, method=method, output_dir=tmp_path, max_steps=2)
    assert all_of_it.class_names == ("cat", "dog", "owl") and all_of_it.category_ids == [3, 7, 18]
    before = {name: p.clone() for name, p in all_of_it.student.model.named_parameters()}
    trainer = all_of_it.trainer()
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss/loss_ce" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["loss/loss_ce"] == row["loss/loss_bbox"] == row["loss/loss_giou"] == 0 < row["loss/asd_box"]
    assert any(not torch.equal(p, before[name]) for name, p in all_of_it.student.model.named_parameters())
    with pytest.raises(UserError, match="data.unlabelled has no use without a teacher: set model.teacher"):
        _ = parts(places, None, data=data).student


def test_the_teacher_is_asked_at_its_own_resolution(places, tmp_path):
    both = parts(places, data={"teacher_size": 96, "augmentation": "none"}, output_dir=tmp_path)
    trainer = both.trainer()
    batch = next(iter(trainer.get_train_dataloader()))
    assert max(batch["pixel_values"].shape[2:]) <= 112 < max(batch["teacher_pixel_values"].shape[2:]) <= 134
    answer = trainer.ask_teacher(batch)
    with torch.no_grad():
        high = both.teacher(batch["teacher_pixel_values"], batch["teacher_pixel_mask"])
    assert torch.equal(answer.boxes, high.boxes)
    assert torch.equal(answer.logits, high.logits[..., [3, 2, 1]])  # bus, owl, dog, cat
    views = [next(iter(trainer.get_eval_dataloader(both.evaluation_stream(teacher=t)))) for t in (False, True)]
    sides = [min(int(view["pixel_mask"][0].sum(d).max()) for d in (0, 1)) for view in views]
    assert sides == [80, 96]
    assert all("teacher_pixel_values" not in view for view in views)


def test_the_evaluation_of_a_teacher_knows_its_names(places, tmp_path):
    """`model.class_map` serves distillation and evaluation alike."""
    one = parts(places, "rt_detr", output_dir=tmp_path)
    assert one.classes.names == ("cat",)
    values = configuration(places, "rt_detr", output_dir=str(tmp_path))
    values["model"]["class_map"] = {"owl": "yak"}
    two = Parts(build_config(values))
    assert two.classes.names == ("cat", "owl")
    trainer = two.trainer()
    _, evaluator = trainer.evaluate_adapter(
        two.teacher, trainer.get_eval_dataloader(two.evaluation_stream(teacher=True))
    )
    assert {int(row[5]) for image in evaluator.images.values() for row in image.predictions} == {0, 2}


def test_a_prompted_detector_is_evaluated_by_the_names_it_is_told(places, tmp_path, capsys):
    model, processor = FAMILIES["grounding_dino"]()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    arguments = [
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(places / "coco"),
        "--output",
        str(tmp_path / "m.json"),
    ]
    found = tmp_path / "found.json"
    names = ["--class-map", "owl=kite", "--class-map", "dog=pizza"]
    assert run("evaluate", [*arguments, *names, "--predictions", str(found)]) == 0
    assert list(json.loads((tmp_path / "m.json").read_text())["per_class"]) == ["cat", "dog", "owl"]
    assert {row["category_id"] for row in json.loads(found.read_text())} == {3, 7, 18}
    assert run("evaluate", [*arguments, "--class-map", "owl=cat"]) == 2  # two classes by one name
    assert "stands more than once" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("evaluate", [*arguments, "--class-map", "owl"])
    assert "'owl' is not of the form DATA=MODEL" in capsys.readouterr().err


def test_parts_under_other_methods_have_the_same_models(places, tmp_path):
    whole = parts(places, output_dir=tmp_path, data={"teacher_size": 96})
    other = whole.under({}, whole.run.model.teacher)
    assert other.student is whole.student and other.teacher is whole.teacher
    assert other.train_source is whole.train_source and whole.run.methods and not other.run.methods
    plain = whole.under({}, None).trainer()
    assert plain.teacher is None is plain.method and plain.train_dataset.source is whole.train_source
