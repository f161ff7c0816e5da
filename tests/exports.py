"""What can be exported: `python -m tests.exports docs/export.md` tries every family and writes the table anew."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from asd_hf.detectors import get_adapter
from asd_hf.errors import UserError
from asd_hf.export import Canvas, CanvasDetector, Difference, compare, eager, halve_graph, open_graph, write_graph
from tests import tiny
from tests.families import FAMILIES

HEADER = "| family | fp32, one image | fp32, any batch | fp16, one image | fp16, any batch |\n" + "| --- " * 5 + "|\n"
SIZES = ((64, 96), (48, 80), (64, 64))  # height, width of the images, where the canvas has room for them


def make_adapter(name: str):
    adapter = get_adapter(*FAMILIES[name]())
    if adapter.open_vocabulary:
        adapter.prompt(tiny.CLASSES)
    return adapter


def difference(adapter, canvas: Canvas, file: Path) -> Difference:
    """Of a written graph from PyTorch, on three images; a graph of any batch answers to one and to two of them."""
    sizes = SIZES if canvas.masked else ((canvas.height, canvas.width),)
    images = tiny.batch(3, sizes=sizes)
    cuts = [(0, 1), (1, 2), (2, 3)] if canvas.batch else [(0, 1), (1, 3)]
    batches = [{key: images[key][a:b] for key in ("pixel_values", "pixel_mask")} for a, b in cuts]
    ours = CanvasDetector(adapter, canvas, open_graph(file))
    return compare(batches, ours, CanvasDetector(adapter, canvas, eager(adapter, canvas)))


def try_family(name: str, folder: Path) -> dict[tuple[str, int | None], Difference | str]:
    """By precision and batch: the difference, or why it does not work."""
    adapter, found = make_adapter(name), {}
    for batch in (1, None):
        file = folder / "fp32.onnx"
        try:
            canvas = Canvas.of(adapter, batch=batch)
            write_graph(adapter, canvas, file)
        except UserError as error:
            found["fp32", batch] = found["fp16", batch] = str(error)
            continue
        for dtype in ("fp32", "fp16"):
            try:
                if dtype == "fp16":
                    file = Path(shutil.copy(file, folder / "fp16.onnx"))
                    halve_graph(file)
                found[dtype, batch] = difference(adapter, canvas, file)
            except Exception as error:  # the table shows what fails, whatever it is
                found[dtype, batch] = " ".join(f"{type(error).__name__}: {error}".split())
    return found


def write_table(page: Path) -> None:
    rows, reasons = [], []
    for name in tqdm(FAMILIES, desc="families", unit="family"):
        with tempfile.TemporaryDirectory() as folder:
            found = try_family(name, Path(folder))
        cells = [name]
        for key in (("fp32", 1), ("fp32", None), ("fp16", 1), ("fp16", None)):
            if isinstance(found[key], str):
                cells.append("no")
                reasons.append(f"- {name}, {key[0]}, {'one image' if key[1] else 'any batch'}: {found[key]}")
            else:
                lost = f", {found[key].lost:.0%} of the queries" if found[key].lost else ""
                cells.append(f"{found[key].logits:.0e}, {found[key].pred_boxes:.0e}{lost}")
        rows.append(f"| {' | '.join(cells)} |\n")
    text = page.read_text(encoding="utf-8")
    page.write_text(re.sub(r"\| family \|.*?\n\n", lambda _: HEADER + "".join(rows) + "\n", text, flags=re.DOTALL))
    if reasons:
        sys.exit("\n".join(reasons))


if __name__ == "__main__":
    write_table(Path(sys.argv[1]))
