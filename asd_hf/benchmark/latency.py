"""How long detectors take for a batch: PyTorch as it is, compiled, and ONNX Runtime, side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..detectors.base import DetectorAdapter
from ..export import Canvas, eager, open_graph, write_graph
from .sidebyside import Row, seconds, take_turns

RUNTIMES = ("eager", "compile", "onnx")
WARM_UP = 3  # rounds: kernels are chosen and compiled in the first ones


@dataclass(frozen=True, kw_only=True)
class LatencyRow(Row):
    """Of a batch of `batch` images, against the first row's; with the number of the model's parameters."""

    parameters: int
    batch: int


def measure_latency(
    adapters: Mapping[str, DetectorAdapter],
    canvases: Mapping[str, Canvas],
    runtimes: Sequence[str],
    rounds: int,
    device: str,
) -> list[LatencyRow]:
    """A row for every model in every one of `runtimes`; the first is the reference of all.

    Inputs lie on the device beforehand. ONNX Runtime has as many threads as PyTorch.

    Args:
        canvases: of each model, what it is measured on; `batch` must be a number.
        runtimes: of `RUNTIMES`.

    Raises:
        UserError: a family cannot be exported, or ONNX Runtime not be used.
    """
    alternatives, models = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, adapter) in enumerate(adapters.items()):
            canvas, file = canvases[name], Path(folder) / f"{number}.onnx"
            if "onnx" in runtimes:
                write_graph(adapter, canvas, file)
            adapter.model.to(device).eval()
            for runtime in runtimes:
                row = f"{name}, {runtime}"
                alternatives[row] = _run(adapter, canvas, runtime, device, file)
                models[row] = adapter, canvas
        times = take_turns({name: lambda run=run: seconds(run) for name, run in alternatives.items()}, rounds, WARM_UP)
    reference = next(iter(times.values()))
    return [
        LatencyRow.of(
            row,
            times[row],
            reference,
            device,
            parameters=sum(p.numel() for p in adapter.model.parameters()),
            batch=canvas.batch,
        )
        for row, (adapter, canvas) in models.items()
    ]


def _run(adapter: DetectorAdapter, canvas: Canvas, runtime: str, device: str, file: Path) -> Callable[[], object]:
    image = torch.randint(0, 256, (canvas.batch, 3, canvas.height, canvas.width), dtype=torch.uint8)
    pixels, mask = adapter.prepare(image, torch.ones_like(image[:, 0], dtype=torch.bool))
    if runtime == "onnx":
        run = open_graph(file, device)
        return lambda: run(pixels, mask)
    pixels, mask = pixels.to(device), mask.to(device)
    run = eager(adapter, canvas, compiled=runtime == "compile")

    def wait() -> None:
        run(pixels, mask)
        if device == "cuda":
            torch.cuda.synchronize()

    return wait
