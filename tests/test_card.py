"""The model card: what the Hub reads of it, and what people do."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from asd_hf.card import eval_results, evaluate_command, model_card
from asd_hf.config import build_config
from asd_hf.evaluation import STATS
from asd_hf.hub import public_config

PAPER = {"title": "A Method", "id": "arXiv:0000.00000", "bibtex": "@article{method, title={A Method}}"}
STUDENT = {"parameters": 4.1e6, "AP": 0.3125, "AP50": 0.5, "APs": -1.0, "AR100": 0.4, "ms_per_image": 12.3}


def card(folder: Path, **changes) -> ModelCard:
    protocol = {"source": str(folder), "split": "val2017", "num_images": 5000, "resolution": {"height": 64}}
    arguments = {
        "model_id": "user/student",
        "student_info": {
            "architecture": "DeformableDetrForObjectDetection",
            "weights_from": ["org/start", str(folder)],
            "classes": ["cat", "traffic light"],
            "size": {"shortest_edge": 800, "longest_edge": 1333},
        },
        "teacher_info": {"id": "org/teacher"},
        "methods": {"asd": PAPER},
        "metrics": {"teacher": {"parameters": 4e7, "AP": 0.4567}, "student": STUDENT},
        "protocol": protocol,
        "dataset": {"id": "org/coco", "name": "COCO: 2017"},
        "config_yaml": "method:\n  name: asd {kept}\n",
        "license": {"license": "apache-2.0"},
    }
    model_card(**arguments | changes).save(folder / "README.md")
    return ModelCard.load(folder / "README.md")


def student(*weights_from: str, architecture: str = "DeformableDetrForObjectDetection", **changes) -> dict:
    size = {"height": 64, "width": 96}
    return {"architecture": architecture, "weights_from": weights_from, "classes": ["cat"], "size": size} | changes


def test_a_card_cites_every_method(tmp_path):
    other = {"title": "Another", "id": "arXiv:1111.11111", "bibtex": "@article{another, title={Another}}"}
    text = card(tmp_path, methods={"asd": PAPER, "own": {}, "other": other}).text
    assert "by the methods `asd`, *A Method* (arXiv:0000.00000) and `own`, asd_hf's own and `other`, *Another*" in text
    assert f"{PAPER['bibtex']}\n\n{other['bibtex']}\n```" in text


def test_a_card_says_whether_the_model_needs_this_package(tmp_path):
    assert "asd_hf is not needed" in card(tmp_path).text and "import asd_hf" not in card(tmp_path).text
    text = card(tmp_path, student_info=student(architecture="AdaMixerForObjectDetection")).text
    assert "asd_hf is not needed" not in text and "```python\nimport asd_hf\nfrom transformers" in text


def test_names_are_text_and_end_no_block(tmp_path):
    name = "a_b <script>x</script> [c](javascript:d) | `e`\n# f"
    config = yaml.safe_dump({"model": {"class_map": {"g": "h ``` i " * 20}}}, width=110)
    text = card(
        tmp_path,
        model_id='user/"); exit(',
        dataset={"name": name},
        teacher_info={"id": f"./{name}"},
        student_info=student(classes=[name]),
        config_yaml=config,
    ).text
    assert text.count("a\\_b \\<script\\>x\\</script\\> \\[c\\](javascript:d) \\| \\`e\\` \\# f") == 4
    body = text.split("\n# ", 1)[1]  # behind the metadata
    assert "<script>" not in body and "\n# f" not in body
    assert 'model="user/\\"); exit("' in text
    block = text.split("````yaml\n")[1].split("\n````")[0]
    assert yaml.safe_load(block) == yaml.safe_load(config)


def test_card_metadata(tmp_path):
    data = card(tmp_path).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "object-detection")
    assert data.base_model == ["org/start"] and data.base_model_relation == "finetune"  # the folder is no Hub id
    assert data.datasets == ["org/coco"] and "knowledge-distillation" in data.tags
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert values == {"AP": 0.3125, "AP50": 0.5, "AR100": 0.4}  # -1 is no number
    result = data.eval_results[0]
    assert (result.task_type, result.dataset_name, result.dataset_split) == (
        "object-detection",
        "COCO: 2017",
        "val2017",
    )
    assert data.model_name == "student"


def test_card_text(tmp_path):
    text = card(tmp_path).text
    assert "| student | 4.1 | 31.2 | 50.0 | - | - | - | - | 12.3 |" in text
    assert "| teacher | 40.0 | 45.7 |" in text
    assert "[org/teacher](https://huggingface.co/org/teacher)" in text and "*A Method* (arXiv:0000.00000)" in text
    assert "name: asd {kept}" in text and PAPER["bibtex"] in text and "num_images: 5000" in text
    assert str(tmp_path) not in text  # no path of the author's machine


def test_card_of_a_run_without_teacher_and_numbers(tmp_path):
    written = card(
        tmp_path,
        teacher_info=None,
        methods={},
        metrics={},
        protocol=None,
        student_info=student(),
        dataset={"name": "shapes"},
        license=None,
    )
    assert "Not evaluated yet" in written.text and "Citation" not in written.text and "teacher" not in written.text
    metadata = yaml.safe_load(written.data.to_yaml())
    assert not {"base_model", "base_model_relation", "datasets", "license", "model-index"} & set(metadata)
    assert "knowledge-distillation" not in metadata["tags"]


def test_teacher_in_a_folder_is_named_without_its_path(tmp_path):
    (tmp_path / "big").mkdir()
    text = card(tmp_path, teacher_info={"id": str(tmp_path / "big")}).text
    assert "under the teacher big by" in text and str(tmp_path) not in text


@pytest.mark.parametrize("folder", [False, True], ids=["elsewhere", "beside a folder of that name"])
def test_packaged_teacher_is_no_model_of_the_hub(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    if folder:
        (tmp_path / "shapes").mkdir()
    written = card(tmp_path, teacher_info={"id": "shapes"}, student_info=student("shapes"))
    assert "under the packaged teacher `shapes` by" in written.text
    assert "huggingface.co" not in written.text and written.data.base_model is None


@pytest.mark.parametrize("name", ["shapes", "gone", "./gone", "../gone", "/gone/r50", "~/gone", "a/b/c", "org/here"])
def test_what_is_no_hub_id_is_neither_linked_nor_in_the_metadata(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    info = {"teacher_info": {"id": name}, "student_info": student(name, "org/start")}
    written = card(tmp_path, **info, dataset={"name": "COCO", "id": name})
    assert {result.dataset_type for result in written.data.eval_results} == {"COCO"}
    assert "huggingface.co" not in written.text
    assert written.data.base_model == ["org/start"] and written.data.datasets is None


def test_card_and_configuration_tell_no_path_of_the_author(tmp_path, monkeypatch):
    work = tmp_path / "someone" / "work"
    (work / "runs" / "r50").mkdir(parents=True)
    (work / "coco").mkdir()
    monkeypatch.chdir(work)
    run = build_config(
        {
            "model": {
                "teacher": "runs/r50",  # exists: no Hub id
                "student": {"base": "org/start", "backbone": "../someone/nets/r18", "config": {"paths": ["~/me/a"]}},
            },
            "data": {"source": str(work / "coco"), "train_split": "train"},
            "method": {"name": "asd", "temperature": 2.0},
            "training": {
                "output_dir": str(tmp_path / "someone" / "out"),  # need not exist
                "learning_rate": 1e-5,
                "hub_model_id": "me/student",
                "include_for_metrics": ["/home/someone/x"],
            },
        }
    )
    resolved = run.to_yaml()
    assert "someone" in resolved and "runs/r50" in resolved and "~/me" in resolved
    public = public_config(resolved)
    text = card(work, config_yaml=resolved).content
    assert public.strip() in text
    assert not any(private in text for private in ("someone", str(tmp_path), "runs/", "~", ".."))
    expected, sections = yaml.safe_load(resolved), yaml.safe_load(public)
    expected["model"] |= {"teacher": "r50"}
    expected["model"]["student"] |= {"backbone": "r18", "config": {"paths": ["a"]}}
    expected["data"] |= {"source": "coco"}
    expected["training"] |= {"output_dir": "out", "include_for_metrics": ["x"]}
    assert sections == expected and list(sections) == list(expected)  # Hub ids, numbers and order are kept


def test_a_card_tells_limits_costs_gain_and_licence(tmp_path):
    training = {"device": "a GPU", "ranks": 2, "steps": 1500, "images": 24000, "train_images": 6000}
    text = card(
        tmp_path,
        student_info=student(classes=["cat", "traffic light"]),
        dataset={"name": "COCO", "train_split": "train2017"},
        training=training | {"train_runtime": 7325.6, "teacher_predictions": None},
        gain="**+3.4 AP**",
        evaluate="asd-hf evaluate --model user/student",
        license_text="The weights are under mit.",
        more_files=("ema", "onnx"),
    ).text
    assert "on the split `train2017` of COCO and finds what belongs to its classes alone: cat, traffic light." in text
    assert "64 x 96 (height x width)" in text and "split `val2017` of COCO alone: not on other" in text
    assert "1,500 steps, 24,000 images in all (4.0 times the 6,000 there are) on 2 x a GPU" in text
    assert "which took 2:02:06 (h:mm:ss)" in text
    assert "### Gain over no distillation\n\n**+3.4 AP**\n" in text
    assert "```bash\nasd-hf evaluate --model user/student\n```" in text
    assert "## Licence\n\nThe weights are under mit.\n" in text
    assert "`ema/` has" in text and "`onnx/model.onnx` is" in text
    plain = card(tmp_path).text
    assert "shorter side of 800, at most 1333" in plain
    assert not [word for word in ("Gain over", "`ema/`", "`onnx/", "steps of", "```bash") if word in plain]


def test_a_card_names_not_a_thousand_classes(tmp_path):
    names = [f"class {index}" for index in range(101)]
    assert "class 4, ... (101 in all)" in card(tmp_path, student_info=student(classes=names)).text
    assert "class 98, class 99." in card(tmp_path, student_info=student(classes=names[:100])).text


def test_evaluation_results_as_the_hub_has_them():
    numbers = {name: 0.0123 * index for index, name in enumerate(STATS)} | {"APs": -1.0, "ms_per_image": 3.0}
    protocol = {"split": "val", "num_images": 7, "resolution": {"height": 64, "width": 96}, "max_detections": 100}
    text = eval_results("user/student", "org/coco", {"student": numbers}, protocol | {"backend": "hotcoco 1"})
    entries = parse_eval_result_entries(yaml.safe_load(text))
    assert [entry.task_id for entry in entries] == [name for name in STATS if name != "APs"]
    assert {entry.dataset_id for entry in entries} == {"org/coco"}
    assert entries[1].value == pytest.approx(1.23) and entries[-1].value == pytest.approx(13.53)
    assert entries[0].source_url == "https://huggingface.co/user/student/blob/main/metrics.json"
    assert entries[0].notes.startswith("split val, 7 images, height 64, width 96, at most 100 detections an image, h")


def test_the_command_that_repeats_the_numbers():
    protocol, data = {"split": "val"}, {"box_format": "xywh", "num_eval_images": None}
    command = evaluate_command("user/student", "my coco", protocol, data, {"bf16": True})
    options = "--split val --batch-size 8 --bf16 data.box_format=xywh"
    assert command == f"asd-hf evaluate --model user/student --data 'my coco' {options}"
    assert evaluate_command("m", "d", protocol, {}, {"per_device_eval_batch_size": 2}).endswith("--batch-size 2")
