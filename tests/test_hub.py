from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors.torch import save_file
from transformers import DeformableDetrImageProcessor

from asd_hf.config import build_config
from asd_hf.errors import UserError
from asd_hf.hub import call_hub, is_hub_id, public_config, write_model_card
from tests.hub_server import TOKEN, HubServer
from tests.tiny import deformable_detr

PAPER = {"title": "A Method", "id": "arXiv:0000.00000", "bibtex": "@article{method, title={A Method}}"}
STUDENT = {"parameters": 4.1e6, "AP": 0.3125, "AP50": 0.5, "APs": -1.0, "AR100": 0.4, "ms_per_image": 12.3}


def card(folder: Path, **changes) -> ModelCard:
    protocol = {"source": str(folder), "split": "val2017", "num_images": 5000, "resolution": {"height": 64}}
    arguments = {
        "model_id": "user/student",
        "student_info": {
            "architecture": "DeformableDetrForObjectDetection",
            "weights_from": ["org/start", str(folder)],
        },
        "teacher_info": {"id": "org/teacher"},
        "method_papers": [PAPER],
        "metrics": {"teacher": {"parameters": 4e7, "AP": 0.4567}, "student": STUDENT},
        "protocol": protocol,
        "dataset": {"id": "org/coco", "name": "COCO: 2017"},
        "config_yaml": "method:\n  name: asd {kept}\n",
        "license": "apache-2.0",
    }
    write_model_card(folder, **arguments | changes)
    return ModelCard.load(folder / "README.md")


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def test_a_card_cites_every_method(tmp_path):
    other = {"title": "Another", "id": "arXiv:1111.11111", "bibtex": "@article{another, title={Another}}"}
    text = card(tmp_path, method_papers=[PAPER, {}, other]).text
    assert "with the method of *A Method* (arXiv:0000.00000) and of *Another* (arXiv:1111.11111)" in text
    assert f"{PAPER['bibtex']}\n\n{other['bibtex']}\n```" in text


def test_names_are_text_and_end_no_block(tmp_path):
    name = "a_b <script>x</script> [c](javascript:d) | `e`\n# f"
    config = yaml.safe_dump({"model": {"class_map": {"g": "h ``` i " * 20}}}, width=110)
    text = card(
        tmp_path,
        model_id='user/"); exit(',
        dataset={"name": name},
        teacher_info={"id": f"./{name}"},
        config_yaml=config,
    ).text
    body = text.split("## Results")[0]
    assert "a\\_b \\<script\\>x\\</script\\> \\[c\\](javascript:d) \\| \\`e\\` \\# f" in body
    assert "<script>" not in body and "\n# f" not in body
    assert 'model="user/\\"); exit("' in body
    block = text.split("````yaml\n")[1].split("\n````")[0]
    assert yaml.safe_load(block) == yaml.safe_load(config)


def test_a_card_says_whether_the_model_needs_this_package(tmp_path):
    assert "asd_hf is not needed" in card(tmp_path).text and "import asd_hf" not in card(tmp_path).text
    own = {"architecture": "AdaMixerForObjectDetection", "weights_from": []}
    text = card(tmp_path, student_info=own).text
    assert "asd_hf is not needed" not in text and "```python\nimport asd_hf.models\nfrom transformers" in text


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
        method_papers=[{}],
        metrics={},
        protocol=None,
        student_info={"architecture": "DetrForObjectDetection", "weights_from": []},
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
    assert "under the teacher big with" in text and str(tmp_path) not in text


@pytest.mark.parametrize("folder", [False, True], ids=["elsewhere", "beside a folder of that name"])
def test_packaged_teacher_is_no_model_of_the_hub(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    if folder:
        (tmp_path / "shapes").mkdir()
    info = {"architecture": "DeformableDetrForObjectDetection", "weights_from": ["shapes"]}
    written = card(tmp_path, teacher_info={"id": "shapes"}, student_info=info)
    assert "under the packaged teacher `shapes` with" in written.text
    assert "huggingface.co" not in written.text and written.data.base_model is None


@pytest.mark.parametrize("name", ["shapes", "gone", "./gone", "../gone", "/gone/r50", "~/gone", "a/b/c", "org/here"])
def test_what_is_no_hub_id_is_neither_linked_nor_in_the_metadata(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    info = {"architecture": "DeformableDetrForObjectDetection", "weights_from": [name, "org/start"]}
    written = card(tmp_path, teacher_info={"id": name}, student_info=info, dataset={"name": "COCO", "id": name})
    assert {result.dataset_type for result in written.data.eval_results} == {"COCO"}
    assert "huggingface.co" not in written.text
    assert written.data.base_model == ["org/start"] and written.data.datasets is None


def test_hub_id_is_an_owner_and_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("owner/name", "SenseTime/deformable-detr", "a_b/c.d-2"):
        assert is_hub_id(name), name
    for name in ("", "name", "a/b/c", "owner/", "/name", "./name", "../name", "~/name", "~me/name", "a/b c", "a/b?c"):
        assert not is_hub_id(name), name
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_hub_id("owner/name")


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


@pytest.mark.parametrize("value", ["/", ".", "~", "..", "x" * 5000, "a\0b", "1e-4", "true", ""])
def test_odd_strings_of_a_configuration_stay(value):
    assert yaml.safe_load(public_config(yaml.safe_dump({"key": value}))) == {"key": value}


CHILD = """
import json, sys
import torch
from huggingface_hub import HfApi
from PIL import Image
from transformers import AutoModelForObjectDetection, DeformableDetrImageProcessor

folder, image, name = sys.argv[1:]
HfApi().create_repo(name, exist_ok=True)
HfApi().upload_folder(repo_id=name, folder_path=folder, ignore_patterns=["_*", "checkpoint-*"])
model = AutoModelForObjectDetection.from_pretrained(name)
processor = DeformableDetrImageProcessor.from_pretrained(name)
with torch.no_grad():
    logits = model(**processor(Image.open(image), return_tensors="pt")).logits
card = open(folder + "/README.md").read()
snippet = card.split("```python")[1].split("```")[0]
address = snippet.split('detect("')[1].split('"')[0]
exec(snippet.replace(address, image).replace("threshold=0.3", "threshold=0.0"))
assert isinstance(found["label"], str), found
print(json.dumps(logits.tolist()))
"""


def test_push_and_load_again(hub, tmp_path):
    folder = tmp_path / "student"
    model = deformable_detr().eval()
    processor = DeformableDetrImageProcessor(size={"height": 64, "width": 96})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    card(folder)
    save_file({"weight": torch.zeros(1)}, folder / "_method.safetensors")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "optimizer.pt").write_bytes(b"large")
    image = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 72, 3), dtype=np.uint8)).save(image)

    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(image), "user/student"],
        env=os.environ | hub.env | {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    with torch.no_grad():
        expected = model(**processor(Image.open(image), return_tensors="pt")).logits
    torch.testing.assert_close(torch.tensor(json.loads(child.stdout.splitlines()[-1])), expected)

    repository = hub.repositories["user/student"]
    files = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert set(repository.files) == files and repository.lfs == {"model.safetensors"}
    assert len(repository.commits) == 1
    assert TOKEN not in child.stdout + child.stderr


def upload(hub: HubServer, folder: Path, token: str = TOKEN):
    api = HfApi(endpoint=hub.endpoint, token=token)
    api.create_repo("user/student", exist_ok=True)
    return api.upload_folder(repo_id="user/student", folder_path=folder)


def test_a_busy_hub_is_asked_again(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    card(tmp_path)
    hub.failures += [("/commit/", 503), ("/repos/create", 502)]
    call_hub(lambda: upload(hub, tmp_path), "", wait=0.01)
    assert set(hub.repositories["user/student"].files) == {"README.md"}
    assert not hub.failures


def test_a_refusal_is_one_line_and_not_repeated(hub, tmp_path):
    card(tmp_path)
    with pytest.raises(UserError) as caught:
        call_hub(lambda: upload(hub, tmp_path, token="hf_wrong"), "log in with `hf auth login`", wait=0.01)
    message = str(caught.value)
    assert "401" in message and message.endswith("log in with `hf auth login`")
    assert "\n" not in message and "hf_wrong" not in message
    assert sum("repos/create" in request for request in hub.requests) == 1


def test_a_large_file_that_is_refused_is_one_line(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the variable is read at import
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    hub.failures += [(f"/objects/{digest}", 403)]
    with pytest.raises(UserError, match="Error while uploading 'model.safetensors'.*the student is in"):
        call_hub(lambda: upload(hub, tmp_path), "the student is in here", wait=0.01)
    assert not hub.failures


def test_a_dead_hub_is_one_line(tmp_path):
    card(tmp_path)
    with HubServer() as gone:
        pass
    calls = []
    with pytest.raises(UserError, match="the student is in"):
        call_hub(lambda: (calls.append(1), upload(gone, tmp_path)), "the student is in here", attempts=3, wait=0.01)
    assert len(calls) == 3


def test_the_stand_in_refuses_a_relation_that_the_hub_does_not_know(hub, tmp_path):
    text = card(tmp_path).content.replace("base_model_relation: finetune", "base_model_relation: distill")
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match="base_model_relation"):
        upload(hub, tmp_path)
