"""Exported graphs answer as PyTorch does, or are not kept. `python -m tests.exports` tries every family."""

from __future__ import annotations

import json
import re
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image

from asd_hf import export
from asd_hf.commands import run
from asd_hf.data import make_shapes
from asd_hf.errors import UserError
from asd_hf.export import MOST_LOST, Canvas, CanvasDetector, compare, eager, open_graph
from asd_hf.loading import PACKAGED, load_teacher
from tests import exports, tiny
from tests.families import FAMILIES, OPEN_VOCABULARY

for package in export.PACKAGES[3:]:
    pytest.importorskip(package, reason="needs the extra: pip install 'asd-hf[export]'")

PAGE = Path(__file__).parents[1] / "docs" / "export.md"


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """The packaged teacher, scored on generated images, by the command as a user gives it; and what it printed."""
    root = tmp_path_factory.mktemp("export")
    make_shapes(root / "shapes", num_train=2, num_val=16, progress=False)
    shutil.copytree(PACKAGED["shapes"], root / "model")
    arguments = ["--model", str(root / "model"), "--data", str(root / "shapes")]
    assert run("export", arguments) == 0
    return root


@pytest.mark.parametrize("name", ["yolos", "rt_detr_v2", "rf_detr"])
def test_a_family_answers_as_in_pytorch(name, tmp_path):
    """One image, or any number of them, padded or not, in fp32 and in fp16."""
    adapter = exports.make_adapter(name)
    batch = None if name == "yolos" else 1
    canvas = Canvas.of(adapter, batch=batch)
    file, attention = tmp_path / "model.onnx", adapter.model.config._attn_implementation
    adapter.model.train()
    export.write_graph(adapter, canvas, file)
    assert adapter.model.config._attn_implementation == attention and not adapter.model.training
    single = exports.difference(adapter, canvas, file)
    assert single.images == 3 and max(single.logits, single.pred_boxes) < 1e-4 and single.lost == 0
    export.halve_graph(file)
    half = exports.difference(adapter, canvas, file)
    assert single.logits < half.logits and half.lost <= MOST_LOST
    assert half.logits < 0.05 or name == "rt_detr_v2"  # two of its proposals have nearly one score and swap


def test_boxes_are_of_the_valid_image_where_the_model_knows_no_padding():
    adapter, images = exports.make_adapter("yolos"), tiny.batch(2, sizes=((64, 96), (48, 64)))
    canvas = Canvas.of(adapter)
    assert (canvas.height, canvas.width, canvas.masked) == (96, 96, True)
    found = CanvasDetector(adapter, canvas, eager(adapter, canvas))(images["pixel_values"], images["pixel_mask"])
    pixels = torch.zeros(2, 3, 96, 96, dtype=torch.uint8)
    mask = torch.zeros(2, 96, 96, dtype=torch.bool)
    pixels[:, :, :64], mask[:, :64] = images["pixel_values"], images["pixel_mask"]
    with torch.no_grad():
        wanted = adapter(pixels, mask)
    torch.testing.assert_close(found.boxes, wanted.boxes[-1:])
    torch.testing.assert_close(found.logits, wanted.logits[-1:])


def test_queries_are_compared_whatever_their_order():
    adapter, canvas = exports.make_adapter("yolos"), Canvas.of(exports.make_adapter("yolos"))
    logits, boxes = torch.randn(2, 50, 6), torch.rand(2, 50, 4)
    order = torch.randperm(50)

    def side(logits, boxes):
        return CanvasDetector(adapter, canvas, lambda pixels, mask: (logits, boxes))

    reference, images = side(logits, boxes), [tiny.batch(2)]
    same = compare(images, side(logits[:, order], boxes[:, order]), reference)
    assert same.lost == 0 < same.pred_boxes and same.images == 2
    moved = boxes.clone()
    moved[0, :5, 0] += 2
    found = compare(images, side(logits, moved), reference)
    assert found.lost == pytest.approx(5 / 100) and found.logits == 0
    assert found.pred_boxes == pytest.approx(2)
    moved[0, :5], logits = float("nan"), logits.clone()
    logits[1, :10, 2] = float("inf")
    broken = compare(images, side(logits, moved), reference)
    assert broken.lost == pytest.approx(15 / 100) and broken.logits == broken.pred_boxes == float("inf")
    assert compare(images, side(logits, moved), side(logits, moved)).lost == pytest.approx(15 / 100)  # PyTorch's too


@pytest.mark.parametrize(
    ("name", "size", "canvas"),
    [
        ("yolos", None, Canvas(96, 96, masked=True)),
        ("yolos", (48, 80), Canvas(48, 80, masked=False)),
        ("rt_detr", None, Canvas(64, 64, masked=False)),
        ("rt_detr", (32, 96), Canvas(32, 96, masked=False)),
        ("longest 100", None, Canvas(128, 128, masked=True)),
    ],
)
def test_images_fill_the_canvas(name, size, canvas):
    adapter = exports.make_adapter("rt_detr" if name == "longest 100" else name)
    if name == "longest 100":  # a side that the RT-DETR cannot take
        adapter.processor.size = {"shortest_edge": 64, "longest_edge": 100}
    assert Canvas.of(adapter, size) == canvas
    usual = dict(adapter.processor.size)
    inputs = canvas.processor(adapter.processor)(Image.new("RGB", (100, 80)), return_tensors="np")
    assert inputs["pixel_values"].shape == (1, 3, canvas.height, canvas.width)
    assert not canvas.masked or 0 < inputs["pixel_mask"].mean() < 1
    assert dict(adapter.processor.size) == usual


@pytest.mark.parametrize(
    ("lost", "ap", "refused"),
    [
        (0.02, None, None),
        (0.021, None, "2.1% of the queries answer otherwise"),
        (0.5, (0.5, 0.5009), None),  # where AP is known, it alone decides
        (0.0, (0.5, 0.5011), "AP 50.11 in ONNX Runtime and 50.00 in PyTorch"),
        (0.0, (0.5, 0.4989), "AP 49.89 in ONNX Runtime and 50.00 in PyTorch"),
    ],
)
def test_how_much_a_graph_may_differ(lost, ap, refused):
    ap = ap and dict(zip(("pytorch", "onnxruntime"), ap, strict=True))
    with pytest.raises(UserError, match=refused) if refused else nullcontext():
        export._judge(export.Difference(lost=lost), ap, "fp32")


@pytest.mark.parametrize(("limit", "images"), [([], [3] * 5), (["--limit", "5"], [3, 2])])
def test_the_command_passes_on_what_it_is_told(exported, limit, images, tmp_path, monkeypatch):
    seen = []

    def look(adapter, canvas, folder, batches, dtype, score):
        seen.append((canvas, dtype, [len(batch["pixel_values"]) for batch in batches()]))
        raise UserError("that is enough")

    monkeypatch.setattr("asd_hf.commands.export.export_detector", look)
    arguments = ["--model", "shapes", "--data", str(exported / "shapes"), "--output", str(tmp_path / "onnx")]
    assert run("export", [*arguments, "--size", "64,96", "--batch", "3", "--dtype", "fp16", *limit]) == 2
    assert seen == [(Canvas(64, 96, masked=False, batch=3), "fp16", images)]


def test_the_command_writes_all_that_a_runtime_needs(exported):
    folder = exported / "model" / "onnx"
    assert {file.name for file in folder.iterdir()} == {
        *("model.onnx", "parity.json", "config.json", "preprocessor_config.json")
    }
    parity = json.loads((folder / "parity.json").read_text())
    assert parity["inputs"] == {"pixel_values": [1, 3, 64, 64]}
    assert parity["outputs"] == {"logits": [1, 20, 5], "pred_boxes": [1, 20, 4]}
    assert parity["images"] == 16 and parity["dtype"] == "fp32" and parity["opset"] >= 18
    assert 0 < parity["largest_difference"]["logits"] < 1e-3 and parity["queries_lost"] == 0
    assert parity["AP"]["pytorch"] > 0.4 and abs(parity["AP"]["pytorch"] - parity["AP"]["onnxruntime"]) < 1e-3
    assert parity["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_the_example_of_the_documentation_finds_what_pytorch_finds(exported, capsys, monkeypatch):
    (text,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    file = sorted((exported / "shapes" / "val").glob("*"))[0]
    text = text.replace("outputs/r18/onnx", str(exported / "model" / "onnx")).replace("street.jpg", str(file))
    exec(compile(text, str(PAGE), "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    teacher, image = load_teacher("shapes"), Image.open(file).convert("RGB")
    inputs = teacher.processor(image, return_tensors="pt")
    with torch.no_grad():
        outputs = teacher.model(**inputs)
    sizes = [(image.height, image.width)]
    (found,) = teacher.processor.post_process_object_detection(outputs, threshold=0.3, target_sizes=sizes)
    assert len(lines) == len(found["scores"]) > 0
    for line, score, label in zip(lines, found["scores"], found["labels"], strict=True):
        assert line.startswith(f"{teacher.spec.class_names[label]} {score:.2f} at [")


def shifted(open_graph):
    """Graphs whose boxes lie a fifth of the image to the right."""

    def open_other(file, device="cpu"):
        run = open_graph(file, device)

        def moved(pixels, mask):
            logits, boxes = run(pixels, mask)
            return logits, boxes + torch.tensor([0.2, 0, 0, 0])

        return moved

    return open_other


@pytest.mark.parametrize("data", [True, False])
def test_a_graph_that_answers_otherwise_is_not_kept(exported, data, tmp_path, monkeypatch, capsys):
    model = exported / "model"
    monkeypatch.setattr(export, "write_graph", lambda _, __, file: shutil.copy(model / "onnx" / "model.onnx", file))
    arguments = ["--model", str(model), "--output", str(tmp_path / "onnx")]
    arguments += ["--data", str(exported / "shapes")] if data else []
    assert run("export", arguments) == 0
    shutil.rmtree(tmp_path / "onnx")
    monkeypatch.setattr(export, "open_graph", shifted(open_graph))
    assert run("export", arguments) == 2
    assert not list(tmp_path.iterdir())
    message = capsys.readouterr().err.splitlines()[-1]
    assert ("AP " in message and "more than 0.1 apart" in message) if data else "answer otherwise" in message


@pytest.mark.parametrize("name", OPEN_VOCABULARY)
def test_teachers_of_open_vocabulary_are_refused(name, tmp_path, capsys):
    model, processor = FAMILIES[name]()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert run("export", ["--model", str(tmp_path)]) == 2
    assert "is told its classes as text" in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "shapes"], "--output must be given: shapes is no folder"),
        (["--model", "shapes", "--output", "x", "--size", "64"], "'64' is not of the form H,W"),
        (["--model", "shapes", "--output", "x", "--batch", "0"], "'0' is no number from 1 upwards"),
        (["--model", "shapes", "--output", "x", "--limit", "5"], "--limit and data.key=value say something of --data"),
        (["--model", "{rt_detr}", "--size", "64,70"], "a rt_detr cannot take 64,70: give --size 64,96"),
        (["--model", "{lw_detr}"], "a lw_detr counts whole cells of padded images: give --size H,W"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, capsys):
    for name in ("rt_detr", "lw_detr"):
        if f"{{{name}}}" in arguments:
            model, processor = FAMILIES[name]()
            if name == "lw_detr":
                processor.size = {"shortest_edge": 64, "longest_edge": 96}
            model.save_pretrained(tmp_path)
            processor.save_pretrained(tmp_path)
    arguments = [str(tmp_path) if argument.startswith("{") else argument for argument in arguments]
    try:
        assert run("export", arguments) == 2
    except SystemExit as stopped:  # argparse
        assert stopped.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert run("export", ["--model", "shapes", "--output", str(tmp_path / "onnx")]) == 2
    assert "onnx is not installed: pip install 'asd-hf[export]'" in capsys.readouterr().err


def test_what_the_exporter_cannot_do_is_one_line(tmp_path, monkeypatch, capsys):
    """A check that hangs on numbers in the pixels, as a model may have, is no graph."""
    forward = export.Graph.forward

    def choosy(self, pixel_values, pixel_mask=None):
        return forward(self, pixel_values if pixel_values.sum() > 0 else -pixel_values, pixel_mask)

    monkeypatch.setattr(export.Graph, "forward", choosy)
    assert run("export", ["--model", "shapes", "--output", str(tmp_path / "onnx")]) == 2
    assert "a deformable_detr cannot be exported to ONNX: " in capsys.readouterr().err


def test_latency_is_measured_in_turn(exported, tmp_path, capsys, monkeypatch):
    def copied(_, canvas, file):
        assert (canvas.height, canvas.width, canvas.batch) == (64, 64, 1)
        shutil.copy(exported / "model" / "onnx" / "model.onnx", file)

    def opened(file, device):
        graph = open_graph(file, device)
        return lambda pixels, mask: runs.append(file.name) or graph(pixels, mask)

    runs: list[str] = []
    monkeypatch.setattr("asd_hf.benchmark.latency.write_graph", copied)
    monkeypatch.setattr("asd_hf.benchmark.latency.open_graph", opened)
    model, file = str(exported / "model"), tmp_path / "a.json"
    arguments = ["latency", "--model", model, "--rounds", "3", "--json", str(file)]
    assert run("benchmark", [*arguments, "--model", "shapes"]) == 0
    rows = json.loads(file.read_text())
    assert runs == ["0.onnx", "1.onnx"] * (3 + 3)  # of each model, in turn, in the rounds to warm up and in those told
    names = [f"{name}, {runtime}" for name in (model, "shapes") for runtime in ("eager", "onnx")]
    assert [row["name"] for row in rows] == names
    assert rows[0]["ratio"] == 1 and all(row["reference_ms"] == rows[0]["ours_ms"] > 0 for row in rows)
    assert {row["parameters"] for row in rows} == {sum(p.numel() for p in load_teacher("shapes").model.parameters())}
    assert {row["device"] for row in rows} == {"cpu"} and "times as fast" in capsys.readouterr().out


def test_latency_of_a_batch_is_told_by_the_image_too(tmp_path, capsys, monkeypatch):
    """In PyTorch as it is and compiled; compiling itself takes minutes."""
    seen, compiled, forward = set(), [], export.Graph.forward

    def look(self, pixel_values, pixel_mask=None):
        seen.add((tuple(pixel_values.shape), pixel_mask, self.model.training))
        return forward(self, pixel_values, pixel_mask)

    monkeypatch.setattr(export.Graph, "forward", look)
    monkeypatch.setattr(torch, "compile", lambda graph: compiled.append(graph) or graph)
    arguments = ["latency", "--model", "shapes", "--runtimes", "eager,compile", "--batch", "3", "--size", "64,96"]
    assert run("benchmark", [*arguments, "--rounds", "2", "--json", str(tmp_path / "a.json")]) == 0
    assert seen == {((3, 3, 64, 96), None, False)} and len(compiled) == 1
    rows = json.loads((tmp_path / "a.json").read_text())
    printed = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| shapes")]
    assert [cells[1].strip() for cells in printed] == ["shapes, eager", "shapes, compile"]
    for row, (*_, batch_ms, _, image_ms, speed, _) in zip(rows, printed, strict=True):
        assert row["batch"] == 3 and float(batch_ms) == pytest.approx(row["ours_ms"], abs=0.051)
        assert float(image_ms) == pytest.approx(row["ours_ms"] / 3, abs=0.051)
        assert speed.strip() == f"{1 / row['ratio']:.2f} x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runtimes", "eager,onyx"], "--runtimes: 'onyx': did you mean 'onnx'?"),
        (["--model", "shapes"], "--model: the same one is given twice"),
        (["--device", "cuda"], "--device cuda: PyTorch sees no such device here, only cpu"),
    ],
)
def test_mistakes_of_a_latency_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert run("benchmark", ["latency", "--model", "shapes", *arguments]) == 2
    assert message in capsys.readouterr().err
