"""Every recipe is built from tiny stand-ins of the checkpoints that it names, and passes the doctor."""

import pytest
import torch
import yaml

from asd_hf.build import Parts
from asd_hf.config import load_config
from asd_hf.data.shapes import CLASS_NAMES
from asd_hf.doctor import REFUSED, check, format_findings
from tests.families import FAMILIES
from tests.test_config import CONFIGS
from tests.tiny_data import NAMES, tiny_rows, write_coco, write_images

STAND_INS = {
    "IDEA-Research/grounding-dino-base": "grounding_dino",
    "PekingU/rtdetr_r101vd": "rt_detr",
    "PekingU/rtdetr_r18vd": "rt_detr",
    "Roboflow/rf-detr-large": "rf_detr",
    "SenseTime/deformable-detr": "deformable_detr",
    "facebook/detr-resnet-101": "detr",
    "outputs/adamixer/none_r101": "adamixer",
    "outputs/adamixer/r101_300_queries_3x": "adamixer",
    "outputs/bench/bccd_teacher": "deformable_detr",
    "outputs/bench/real_size_teacher": "deformable_detr",
    "outputs/bench/shapes_hard_teacher": "deformable_detr",
    "outputs/deformable_detr/none_r101": "deformable_detr",
    "outputs/shapes/rt_detr_teacher": "rt_detr",
    "outputs/street_teacher": "rt_detr",
    "ustc-community/dfine-small-coco": "d_fine",
    "ustc-community/dfine-xlarge-coco": "d_fine",
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    root = tmp_path_factory.mktemp("stand_ins")
    for name, family in STAND_INS.items():
        model, processor = FAMILIES[family](classes=("N/A", *NAMES, "N/A", "zebra", *CLASS_NAMES))
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    write_coco(root / "coco", "train2017", tiny_rows(64))
    write_coco(root / "coco", "val2017", tiny_rows(4))
    for name in ("bccd", "street"):
        write_coco(root / name, "train", tiny_rows(64))
        write_coco(root / name, "val", tiny_rows(4))
    write_images(root / "coco" / "unlabeled2017", tiny_rows(4, first_id=500))
    return root


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_recipe_is_built(path, stand_ins, tmp_path):
    recipe = yaml.safe_load(path.read_text())
    overrides = ["training.use_cpu=true", "training.bf16=false", "training.dataloader_num_workers=0"]
    overrides.append(f"training.output_dir={tmp_path}")
    model, data = recipe["model"], recipe["data"]
    student = model.get("student", {})
    names = {"model.teacher": model.get("teacher"), "model.student": student}
    if isinstance(student, dict):
        names = {f"model.student.{key}": student.get(key) for key in ("base", "checkpoint")}
        names["model.teacher"] = model.get("teacher")
        if student.get("pretrained_backbone"):
            overrides.append("model.student.pretrained_backbone=false")  # its weights are on the Hub
    for key, name in names.items():
        if name in STAND_INS:
            overrides.append(f"{key}={stand_ins / name}")
    for key in ("source", "unlabelled"):
        if data.get(key, "").startswith("data/"):
            overrides.append(f"data.{key}={stand_ins / data[key].removeprefix('data/')}")
    if data["source"].startswith("shapes"):
        overrides.append("data.source=shapes?num_train=64&num_val=4")
    torch.manual_seed(0)
    parts = Parts(load_config(path, overrides))
    findings = check(parts)
    assert all(finding.verdict != REFUSED for finding in findings), format_findings(findings)
    assert ("method" in [finding.topic for finding in findings]) == (model.get("teacher") is not None)
    assert parts.trainer().get_train_dataloader()


def test_stand_ins_are_used():
    named = " ".join(path.read_text() for path in CONFIGS)
    assert all(name in named for name in STAND_INS)
