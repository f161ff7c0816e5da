"""The files of a Space: what the Hub reads of them, and that `python app.py` serves the page."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from asd_hf import __version__
from asd_hf.loading import PACKAGED
from asd_hf.space import space_files

ROOT = Path(__file__).parents[1]


def read(files: dict[str, bytes]) -> tuple[dict, str, str]:
    """Metadata and text of the page, and what `app.py` ends with."""
    _, metadata, text = files["README.md"].decode().split("---\n")
    return yaml.safe_load(metadata), text, ast.unparse(ast.parse(files["app.py"]).body[-1])


def test_the_files_of_a_space():
    files = space_files("user/small")
    assert files.keys() == {"README.md", "app.py", "requirements.txt"}
    assert files["requirements.txt"].decode() == f"asd-hf[demo]=={__version__}\n"
    metadata, text, call = read(files)
    assert metadata["sdk"] == "gradio" and metadata["app_file"] == "app.py" and metadata["models"] == ["user/small"]
    assert f"gradio=={metadata['sdk_version']}\n" in (ROOT / "constraints.txt").read_text()
    (accepted,) = re.findall("python_requires = (.*)", (ROOT / "setup.cfg").read_text())
    assert metadata["python_version"] in SpecifierSet(accepted) and isinstance(metadata["python_version"], str)
    assert "license" not in metadata and "teacher" not in text and call == "launch(build_app('user/small'))"

    both = space_files("user/small", "user/large", {"license": "mit"}, "./asd_hf.whl")
    metadata, text, call = read(both)
    assert metadata["models"] == ["user/small", "user/large"] and metadata["license"] == "mit"
    assert "its teacher [user/large]" in text and call == "launch(build_app('user/small', teacher='user/large'))"
    assert both["requirements.txt"] == b"./asd_hf.whl\n"


def test_the_app_serves_the_page(tmp_path):
    pytest.importorskip("gradio", reason="the extra `demo`")
    shutil.copytree(PACKAGED["shapes"], tmp_path / "user" / "small")  # as the Hub would give it
    for name, content in space_files("user/small").items():
        (tmp_path / name).write_bytes(content)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address = f"http://127.0.0.1:{port}/config"
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    app = subprocess.Popen(
        [sys.executable, "app.py"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        while app.poll() is None:
            try:
                page = json.load(urlopen(address, timeout=60))
                break
            except OSError:
                time.sleep(0.1)
        assert app.poll() is None, app.stderr.read()
    finally:
        app.kill()
        app.communicate()
    (facts,) = [part["props"]["value"] for part in page["components"] if part["props"].get("elem_id") == "model-facts"]
    assert facts == "### Model\n`small` · 1.4\xa0M\xa0parameters" and "#asd-examples" in page["css"]
