"""Reports of a small run and of records, as files and in a browser."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from asd_hf.commands import report as command
from asd_hf.commands.train import train
from asd_hf.config import build_config
from asd_hf.errors import UserError
from asd_hf.evaluation.matches import image_ap, match
from asd_hf.report import report_comparison, report_run
from asd_hf.report.blocks import Section, Text
from asd_hf.report.charts import MOST_POINTS, Series, lines, number, scatter, thinned, ticks
from asd_hf.report.heat import heat_maps
from asd_hf.report.page import MOST_BYTES, render_page
from asd_hf.report.papers import paper_link
from asd_hf.report.run_files import read_run
from tests import tiny
from tests.test_render import study, write
from tests.tiny_data import tiny_rows, write_coco
from tests.tiny_run import configuration

BROWSER = Path("/usr/bin/chromium")
WILD = ("<script>alert(1)</script>", '"o\'wl" & <b>', "dog")
PHONE, DESK = {"width": 375, "height": 700}, {"width": 1280, "height": 900}


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """A data set whose classes have names that no page may take as its own, and a teacher of it."""
    root = tmp_path_factory.mktemp("report")
    for split, count in (("train", 8), ("val", 5)):
        contents = write_coco(root / "coco", split, tiny_rows(count))
        for category, name in zip(contents["categories"], WILD, strict=True):
            category["name"] = name
        (root / "coco/annotations" / f"instances_{split}.json").write_text(json.dumps(contents))
    tiny.deformable_detr(1, classes=WILD, num_queries=9).save_pretrained(root / "deformable_detr")
    tiny.processor(size={"shortest_edge": 80, "longest_edge": 112}).save_pretrained(root / "deformable_detr")
    return root


@pytest.fixture(scope="session")
def runs(places):
    """The folders of a run with a teacher and of one without."""
    options = {
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "log_phases": True,
    }
    options |= {"disable_tqdm": True, "report_to": "none", "seed": 0, "learning_rate": 1e-2}
    folders = []
    for name, teacher in (("taught", "deformable_detr"), ("alone", None)):
        sections = configuration(places, teacher, output_dir=str(places / name), **options)
        train(build_config(sections))
        folders.append(places / name)
    return folders


@pytest.fixture(scope="session")
def page(runs):
    notes = report_run(runs[0], runs[0] / "report.html", reference=runs[1], num_pictures=2)
    assert not notes
    return runs[0] / "report.html"


@pytest.fixture(scope="session")
def alone(runs):
    """The report of the run without a teacher, which shows its best and its worst images."""
    report_run(runs[1], runs[1] / "report.html", num_pictures=2)
    return runs[1] / "report.html"


@pytest.fixture(scope="session")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    records = study({"none": 0.3, "asd": 0.36, "<img src=x onerror=alert(1)>": 0.2}, logged=["asd/w_ii"])
    for run in records:
        run["per_class"] = {WILD[0]: run["metrics"]["AP"], WILD[1]: 0.1}
        run["config"] = {"method": {"name": "asd" if run["method"] != "none" else "none"}}
    for index, run in enumerate(records):
        (folder / f"{index}.json").write_text(json.dumps(run))
    report_comparison(folder, folder / "report.html")
    return folder / "report.html"


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def sections_of(text: str) -> list[str]:
    return re.findall(r'<section id="([^"]*)"', text)


def test_a_run_leaves_its_log_its_environment_and_its_matrices(runs):
    files = read_run(runs[0])
    assert files.steps == files.max_steps == 4
    assert [step for step, _ in files.curve("eval_AP")] == [2, 4] and len(files.curve("loss")) == 4
    assert files.metrics["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert files.seconds > 0 and str(runs[0].parent) not in (runs[0] / "trainer_state.json").read_text()
    found = files.matrices()
    assert list(found) == [0, 2, 4]
    for matrices in found.values():
        assert matrices["asd/teacher"].shape == (9, 9) and matrices["asd/student"].shape == (9, 12)
        assert torch.allclose(matrices["asd/student"].float().sum(1), torch.ones(9), atol=0.01)
        assert (matrices["scores"].diff() <= 0).all()
    assert not torch.equal(found[0]["asd/student"], found[4]["asd/student"])
    assert not read_run(runs[1]).matrices()  # nothing is sampled without a teacher
    assert [len(heat.maps) for heat in heat_maps(files)] == [3, 3]


def test_the_report_of_a_run_shows_all_its_parts(page, alone, runs):
    text = page.read_text()
    assert sections_of(text) == [
        *("summary", "curves", "objects", "pictures", "errors", "precision", "confusion", "sampling", "speed", "next"),
    ]
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    assert f"AP50 {100 * metrics['student']['AP50']:.1f}" in text
    for word in (
        "grad",
        "Learning rate",
        "asd_sampling",
        "Phases of a step",
        "backward",
        "hYAPU5qrwY",
        "localisation",
    ):
        assert word in text, word
    assert "asd-hf compare --config" in text and "On no image does the student differ" in text  # all have AP 0
    text = alone.read_text()
    assert sections_of(text) == [
        *("summary", "curves", "objects", "pictures", "errors", "precision", "confusion", "speed", "next"),
    ]
    assert "Best images" in text and "Worst images" in text and text.count("data:image/webp;base64,") == 4


def test_names_of_the_data_are_text(page, alone, comparison):
    for file in (page, alone, comparison):
        text = file.read_text()
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "alert(1)</script>" not in text
        tags = Tags(text).found
        assert [tag for tag, _ in tags].count("script") == 1 and not [a for _, a in tags if "onerror" in a]
        assert not [attributes for tag, attributes in tags if tag == "b" and attributes]


def test_nothing_is_fetched(page, alone, comparison):
    for file in (page, alone, comparison):
        for tag, attributes in Tags(file.read_text()).found:
            for key in ("src", "href", "xlink:href"):
                value = attributes.get(key, "#")
                allowed = ("#", "data:", *(["https://"] if tag == "a" else []))
                assert value.startswith(allowed), (tag, value)
        assert "url(" not in file.read_text() and "@import" not in file.read_text()


def test_the_pictures_are_the_images_of_the_greatest_differences(page, runs):
    from asd_hf.report.models import evaluate_models
    from asd_hf.report.pictures import galleries

    notes = []
    evaluation = evaluate_models(read_run(runs[0]), read_run(runs[1]), None, None, notes)
    assert not notes and set(evaluation.seen) == {"student", "teacher", "reference"}
    for model in evaluation.models.values():  # numbers that are known are those of these predictions
        stated = json.loads((runs[model.name == "reference"] / "metrics.json").read_text())
        assert model.numbers["AP"] == stated["teacher" if model.name == "teacher" else "student"]["AP"]
    student, reference = evaluation.models["student"], evaluation.models["reference"]
    boxes = [image.ground_truth for image in student.images.values()]
    for index, (image_id, image) in enumerate(student.images.items()):  # one is perfect, one is lost
        truth = boxes[index][boxes[index][:, 5] == 0]
        perfect = np.column_stack([truth[:, :4], np.ones(len(truth)), truth[:, 6]])
        student.images[image_id] = image._replace(predictions=perfect if index == 0 else perfect[:0])
        reference.images[image_id] = image._replace(predictions=perfect if index == 1 else perfect[:0])
    for model in (student, reference):
        model.matches = {image_id: match(image) for image_id, image in model.images.items()}
    first, second, *_ = student.images
    up, down = galleries(evaluation, 1)
    assert up.pictures[0].ident == f"image-{first}" and down.pictures[0].ident == f"image-{second}"
    assert "improved" in up.title and "worsened" in down.title
    assert image_ap(student.matches[first]) == pytest.approx(1)
    views = {view.title: view for view in up.pictures[0].views}
    assert list(views) == ["ground truth", "teacher", "reference", "student"]
    count = len(student.matches[first].objects)
    assert [box.css for box in views["ground truth"].boxes] == ["truth"] * count
    assert {box.css for box in views["student"].boxes} == {"right"} and not views["reference"].boxes


def test_a_run_whose_data_has_moved_is_shown_without_pictures(runs, tmp_path):
    notes = report_run(runs[0], tmp_path / "r.html", overrides=[f"data.source={tmp_path / 'gone'}"])
    assert len(notes) == 1 and "not at hand" in notes[0] and "gone" in notes[0]
    text = (tmp_path / "r.html").read_text()
    assert {"summary", "curves", "objects", "sampling"} <= set(sections_of(text))
    assert not {"pictures", "errors"} & set(sections_of(text)) and "not at hand" in text


def test_a_teacher_that_is_gone_is_a_note(runs, tmp_path):
    notes = report_run(runs[0], tmp_path / "r.html", num_images=2, overrides=[f"model.teacher={tmp_path / 'gone'}"])
    assert len(notes) == 1 and "teacher could not be asked" in notes[0]
    assert "pictures" in sections_of((tmp_path / "r.html").read_text())


def test_mistakes_are_one_line(runs, tmp_path):
    with pytest.raises(UserError, match="holds no run of asd-hf train"):
        report_run(tmp_path, tmp_path / "r.html")
    with pytest.raises(UserError, match="needs the folder of a run, or --compare"):
        command.main([])
    with pytest.raises(UserError, match="does not exist"):
        command.main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="reference has no use with --compare"):
        command.main(["--compare", str(tmp_path), "--reference", str(runs[0])])
    with pytest.raises(UserError, match="--images must be 1 or more"):
        command.main([str(runs[0]), "--images", "0"])
    other = shutil.copytree(runs[1], tmp_path / "other")
    metrics = json.loads((other / "metrics.json").read_text())
    metrics["protocol"]["fingerprint"] = "another"
    (other / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(UserError, match="not scored on the same images"):
        report_run(runs[0], tmp_path / "r.html", reference=other)
    with pytest.raises(UserError, match="would have 1. MB"):
        render_page("a", "b", [Section("x", "y", [Text("z" * (MOST_BYTES + 1))])])


def test_the_comparison_has_the_table_and_the_verdicts(comparison, tmp_path):
    text = comparison.read_text()
    assert sections_of(text)[:3] == ["table-0", "curves-0", "cost-0"] and sections_of(text)[-1] == "read"
    assert "+6.0 [" in text and "better" in text and "worse" in text and "https://openreview.net/forum?id=" in text
    folder = write(tmp_path, study({"none": 0.3}) + study({"none": 0.2}, setting="hard"))
    command.main(["--compare", str(folder)])
    text = (folder / "report.html").read_text()
    assert {"easy: Results", "hard: Results"} <= set(re.findall(r"<h2>([^<]*)</h2>", text))


def test_charts():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1] and ticks(3, 3)[0] < 3 < ticks(3, 3)[-1]
    assert [number(v) for v in (0, 0.012345, 1.5, 12.34, 1234.5, 1e-5, -2.0)] == [
        *("0", "0.0123", "1.5", "12.3", "1,234", "1e-5", "-2"),
    ]
    points = [(float(i), float(i % 7)) for i in range(10 * MOST_POINTS)]
    assert len(thinned(points)) == MOST_POINTS and thinned(points[:5]) == points[:5]
    svg = lines([Series("<a>", [(0, 1), (1, float("nan")), (2, 3)])], "x", "y")
    assert "<a>" not in svg and "nan" not in svg and svg.count("<polyline") == 1
    named = scatter([(f"method {i}", i, 100 + 0.01 * i, 30 + 0.01 * i, 0, 0) for i in range(9)], "ms", "AP")
    places = re.findall(r'class="halo" x="([\d.]+)" y="([\d.]+)"', named)
    assert len(places) == len(set(places)) == 9
    assert paper_link("arXiv 2211.10156") == "https://arxiv.org/abs/2211.10156" and paper_link("a book") is None


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not BROWSER.is_file():
        pytest.skip(f"there is no browser at {BROWSER}")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=str(BROWSER), args=["--no-sandbox"])
        yield chromium
        chromium.close()


def open_page(browser, file, size=DESK, scheme="light"):
    """The page, and what it said or asked for."""
    context = browser.new_context(viewport=size, color_scheme=scheme)
    shown, said = context.new_page(), []
    shown.on("console", lambda message: said.append(message.text))
    shown.on("pageerror", lambda error: said.append(str(error)))
    shown.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    shown.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
    shown.goto(file.as_uri())
    return shown, said


@pytest.mark.parametrize("name", ["page", "alone", "comparison"])
def test_in_a_browser(browser, name, request):
    file, grounds = request.getfixturevalue(name), []
    for size in (DESK, PHONE):
        for scheme in ("light", "dark"):
            shown, said = open_page(browser, file, size, scheme)
            assert not said
            assert shown.evaluate("document.documentElement.scrollWidth") <= size["width"]
            colours = shown.evaluate("['backgroundColor', 'color'].map(k => getComputedStyle(document.body)[k])")
            grounds.append(tuple(colours))
            assert shown.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            assert shown.evaluate("[...document.querySelectorAll('svg.chart')].every(s => s.clientWidth > 100)")
            shown.context.close()
    assert len(set(grounds)) == 2


def test_a_table_is_sorted_by_a_click(browser, comparison):
    shown, said = open_page(browser, comparison)
    table = shown.locator("#table-0 table")

    def column(number):
        return [row.locator("th, td").nth(number).inner_text() for row in table.locator("tbody tr").all()]

    ap = table.locator("thead button").nth(2)
    ap.click()
    assert column(2) == ["40.0", "37.0 ± 1.0", "31.0 ± 1.0", "21.0 ± 1.0"]
    assert table.locator("thead th").nth(2).get_attribute("aria-sort") == "descending"
    ap.click()
    assert column(2)[0] == "21.0 ± 1.0" and column(2)[-1] == "40.0"
    table.locator("thead button").nth(7).click()  # differences: what has none goes last
    assert column(7)[0].startswith("+6.0") and column(7)[-1] == "-"
    table.locator("thead button").nth(0).click()
    assert column(0) == sorted(column(0))
    assert not said
    shown.context.close()
