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
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import save_file
from transformers import DeformableDetrImageProcessor

from asd_hf.config import build_config
from asd_hf.errors import UserError, without_secrets
from asd_hf.hub import call_hub, is_hub_id, public_config, secret_of
from tests.hub_server import TOKEN, HubServer
from tests.test_card import card
from tests.tiny import deformable_detr


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def test_hub_id_is_an_owner_and_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("owner/name", "SenseTime/deformable-detr", "a_b/c.d-2"):
        assert is_hub_id(name), name
    for name in ("", "name", "a/b/c", "owner/", "/name", "./name", "../name", "~/name", "~me/name", "a/b c", "a/b?c"):
        assert not is_hub_id(name), name
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_hub_id("owner/name")


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


SECRETS = {
    "https://me:word@host/data?x=1": "https://***@host/data?x=1",
    "s3://word@bucket": "s3://***@bucket",
    "https://host/data?a=1&api_token=word&b=2": "https://host/data?a=1&api_token=***&b=2",
    "https://host/data?sv=1&sig=word": "https://host/data?sv=1&sig=***",
    "https://host/data#access_token=word": "https://host/data#access_token=***",
    f"see hf_{'word' * 9}!": "see ***!",
}


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_neither_shown_nor_kept(text):
    assert without_secrets(text) == SECRETS[text]
    assert secret_of({"a": [1, {"b": text}]}, "data") == "data.a[1].b"
    with pytest.raises(UserError, match="data.source holds a token or password") as caught:
        build_config({"data": {"source": text}})
    assert "word@" not in str(caught.value) and "=word" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "shapes?num_train=64&seed=1",
        "data/coco#unlabelled",
        "https://host/?design=1",
        "me@host",
        "hf_short",
        "https://host/a:b/c@d",
        "a://b",
    ],
)
def test_what_is_no_secret_stays(text):
    assert secret_of(text, "data") is None and without_secrets(text) == text


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
