"""The page, in a real browser."""

from __future__ import annotations

import logging
import re
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from asd_hf.commands import run
from asd_hf.data import make_shapes
from asd_hf.data.collate import pad
from asd_hf.data.shapes import CLASS_NAMES
from asd_hf.demo import build_app, launch
from asd_hf.evaluation import Predictor
from asd_hf.predict import preprocessing
from tests.families import FAMILIES

CHROMIUM = shutil.which("chromium")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    package = logging.getLogger("asd_hf")
    monkeypatch.setattr(package, "handlers", package.handlers[:])
    monkeypatch.setattr(package, "level", package.level)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny Grounding DINO, which looks for the student's classes."""
    folder = tmp_path_factory.mktemp("teacher")
    model, processor = FAMILIES["grounding_dino"](classes=CLASS_NAMES, num_queries=9)
    processor.image_processor.size = {"shortest_edge": 128, "longest_edge": 192}
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def page(tmp_path):
    """Opens a page of the given width; at the end nothing may have gone wrong in it, or been asked from elsewhere."""
    pytest.importorskip("gradio", reason="the extra `demo`")
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright drives the browser")
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    problems, apps = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def open_page(app, width: int):
            with socket.socket() as found:
                found.bind(("127.0.0.1", 0))
                port = found.getsockname()[1]
            apps.append(app)
            launch(app, port=port, block=False)
            page, address = browser.new_page(viewport={"width": width, "height": 800}), f"http://127.0.0.1:{port}"
            page.on("console", lambda message: message.type == "error" and problems.append(message.text))
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("request", lambda request: request.url.startswith("http") and requested.append(request.url))
            requested: list[str] = []
            page.goto(address)
            page.wait_for_selector("text=Least score")
            page.requested = lambda: [url for url in requested if not url.startswith(address)]
            return page

        yield open_page
        browser.close()
    for app in apps:
        app.close(verbose=False)
    assert not problems


def facts(page, side: str, objects: str = r"\d+") -> int:
    """How many objects the line above a picture counts, once it is so many."""
    arguments = [f"#{side}-facts", rf"· {objects}\sobject"]
    page.wait_for_function(
        "([side, text]) => new RegExp(text).test(document.querySelector(side).innerText)",
        arg=arguments,
        timeout=60_000,
    )
    return int(re.search(r"(\d+)\sobject", page.inner_text(f"#{side}-facts")).group(1))


def test_an_image_in_a_browser(page, teacher, tmp_path, monkeypatch):
    runs = []
    call = Predictor.__call__
    monkeypatch.setattr(Predictor, "__call__", lambda self, *inputs: runs.append(self) or call(self, *inputs))
    make_shapes(tmp_path / "shapes", num_train=1, num_val=3, progress=False)
    image = tmp_path / "shapes/val/000000.jpg"
    view = page(build_app("shapes", str(teacher), examples=tmp_path / "shapes/val", device="cpu"), width=1300)
    runs.clear()
    view.set_input_files("input[type=file]", image)
    found = facts(view, "student"), facts(view, "teacher")
    assert len(runs) == 2
    assert re.search(r"shapes · 1\.4\sM\sparameters · [\d,]+\sms · \d+\sobjects?$", view.inner_text("#student-facts"))
    assert teacher.name in view.inner_text("#teacher-facts") and str(teacher.parent) not in view.content()
    rows = runs[0](*pad([preprocessing(runs[0].adapter.processor)(pixels(image))]), torch.ones(1, 2))[0]
    assert found[0] == (rows[:, 4] >= 0.5).sum() > 0

    def shown(side: str) -> dict:
        view.wait_for_selector(f"#{side}-picture img")
        return view.locator(f"#{side}-picture img").bounding_box()

    student, other = shown("student"), shown("teacher")
    assert student["y"] == other["y"] and student["x"] + student["width"] <= other["x"]
    runs.clear()
    before = view.get_attribute("#student-picture img", "src")
    view.focus("#threshold input[type=range]")
    view.keyboard.press("End")
    assert facts(view, "student", "0") == facts(view, "teacher", "0") == 0
    view.wait_for_function("src => document.querySelector('#student-picture img').src != src", arg=before)
    view.keyboard.press("Home")
    assert facts(view, "student", str(len(rows))) > found[0]
    view.click("#classes input")
    view.keyboard.type("circle")
    view.keyboard.press("Enter")
    circles = int((rows[:, 5] == CLASS_NAMES.index("circle")).sum())
    assert facts(view, "student", str(circles)) == circles > 0
    assert not runs  # nothing has been looked at again

    view.set_viewport_size({"width": 390, "height": 800})
    student, other = shown("student"), shown("teacher")
    assert student["y"] + student["height"] <= other["y"] and student["width"] > 300
    assert view.evaluate("document.documentElement.scrollWidth") <= 390
    view.click("button[aria-label='Remove Image']")
    view.wait_for_function("!/object/.test(document.querySelector('#student-facts').innerText)")
    assert not view.requested()


def pixels(image: Path) -> torch.Tensor:
    return torch.tensor(np.array(Image.open(image))).permute(2, 0, 1)


def test_mistakes_are_one_line(teacher, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gradio", reason="the extra `demo`")

    def error(*arguments) -> str:
        assert run("demo", [*map(str, arguments)]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    assert "--port is 70000" in error("--model", "shapes", "--port", 70000)
    assert "--examples: there are no images in" in error("--model", "shapes", "--examples", tmp_path)
    assert "it can be shown as the teacher of another model" in error("--model", teacher)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"port {port} is taken" in error("--model", "shapes", "--port", port)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert error("--model", "shapes") == "error: the demo needs Gradio: pip install 'asd-hf[demo]'"
