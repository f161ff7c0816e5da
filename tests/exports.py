"""What can be exported: `python -m tests.exports docs/export.md` tries every family and writes the table there.

Names of families behind the page try those alone.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from asd_hf.detectors import get_adapter
from asd_hf.detectors.base import DetectorAdapter
from asd_hf.errors import UserError
from asd_hf.export import (
    MOST_LOST,
    Canvas,
    CanvasDetector,
    Difference,
    compare,
    eager,
    halve_graph,
    open_graph,
    write_graph,
)
from tests import tiny
from tests.families import FAMILIES

HEADER = """\
| family | fp32, one image | fp32, any batch | fp16, one image | fp16, any batch |
| --- | --- | --- | --- | --- |
"""
SIZES = ((64, 96), (48, 80), (64, 64))  # height, width of the images, where the canvas has room for them

# With the statistics that a model begins with all its places look alike: these choose their queries by scores that
# differ by less than fp16's rounding.
TIED = ("rt_detr", "rt_detr_v2")


def make_adapter(name: str) -> DetectorAdapter:
    adapter = get_adapter(*FAMILIES[name]())
    if adapter.open_vocabulary:
        adapter.prompt(tiny.CLASSES)
    if name in TIED:
        _calibrate(adapter)
    return adapter


def _calibrate(adapter: DetectorAdapter) -> None:
    """Gives the batch norms the statistics of images, as a training does."""
    for module in adapter.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all images
            module.train()
    images = tiny.batch(8, sizes=SIZES)
    with torch.no_grad():
        adapter(images["pixel_values"], images["pixel_mask"])
    adapter.model.eval()


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


def table_row(name: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        found = try_family(name, Path(folder))
    cells = [name]
    for key in (("fp32", 1), ("fp32", None), ("fp16", 1), ("fp16", None)):
        cell = found[key]
        if isinstance(cell, Difference):
            lost = f", {cell.lost:.0%} of the queries" if cell.lost else ""
            works = "" if cell.lost <= MOST_LOST else "refused: "
            cell = f"{works}{cell.logits:.0e}, {cell.pred_boxes:.0e}{lost}"
        cells.append(cell)
    return f"| {' | '.join(cells)} |\n"


def write_table(page: Path, names: Sequence[str]) -> None:
    """Writes the rows of these families anew, each as soon as it is there."""
    for name in tqdm(names, desc="families", unit="family"):
        row = table_row(name)
        text = page.read_text(encoding="utf-8")
        begin = text.index(HEADER) + len(HEADER)
        end = text.index("\n\n", begin - 1) + 1
        rows = {line.split("|")[1].strip(): line for line in text[begin:end].splitlines(keepends=True)} | {name: row}
        table = "".join(rows[family] for family in FAMILIES if family in rows)
        page.write_text(text[:begin] + table + text[end:], encoding="utf-8")


if __name__ == "__main__":
    write_table(Path(sys.argv[1]), sys.argv[2:] or list(FAMILIES))
