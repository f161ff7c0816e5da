"""A detector as an ONNX file: a graph from pixels to logits and boxes, checked against PyTorch."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .detectors.base import DetectorAdapter, DetectorOutput
from .errors import UserError
from .progress import tqdm

logger = logging.getLogger(__name__)

PACKAGES = ("asd-hf", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")
DTYPES = ("fp32", "fp16")
EXTRA = "pip install 'asd-hf[export]'"
NEAR = 0.01  # a query answers alike if no box side moves by more of the image and no class by more probability
MOST_LOST = 0.02  # of the queries may answer otherwise: two stages choose theirs by scores, and nearly equal ones swap
MOST_AP = 0.1  # points of AP that an exported detector may differ from PyTorch
_INT64 = 7  # TensorProto.INT64

Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # pixels (B, 3, H, W), mask (B, H, W) -> logits, boxes


@dataclass(frozen=True)
class Canvas:
    """What a graph takes.

    Attributes:
        height, width: of every image.
        masked: the images keep their aspect and are padded, so that the graph also takes their mask.
        batch: images at once; None for any number.
    """

    height: int
    width: int
    masked: bool
    batch: int | None = 1

    @classmethod
    def of(cls, adapter: DetectorAdapter, size: tuple[int, int] | None = None, batch: int | None = 1) -> Canvas:
        """As the image processor makes images: of its fixed size, or in a square that holds its longest side.

        Args:
            size: (height, width) to which every image is stretched instead.

        Raises:
            UserError: the model takes no images of this size, or the processor names none.
        """
        usual, divisor = dict(adapter.processor.size), adapter.size_divisor
        masked = size is None and "height" not in usual
        if masked and divisor > 1 and not adapter.sees_padding:
            raise UserError(f"a {adapter.spec.family} counts whole cells of padded images: give --size H,W")
        if masked and usual.get("longest_edge") is None:
            raise UserError(f"the image processor bounds no side ({usual}): give --size H,W")
        if masked:
            side = -(-usual["longest_edge"] // divisor) * divisor
            return cls(side, side, masked, batch)
        height, width = size or (usual["height"], usual["width"])
        image = torch.zeros(1, 3, height, width, dtype=torch.uint8)
        needed = adapter.prepare(image, image[:, 0] == 0)[0].shape[2:]
        if needed != (height, width):
            raise UserError(
                f"a {adapter.spec.family} cannot take {height},{width}: give --size {needed[0]},{needed[1]}"
            )
        return cls(height, width, masked, batch)

    def processor(self, usual) -> Any:
        """An image processor whose images fill the canvas, made of the `usual` one."""
        processor, size = copy.deepcopy(usual), {"height": self.height, "width": self.width}
        if self.masked:
            processor.do_pad, processor.pad_size = True, size
        else:
            processor.size = size
        return processor


class Graph(nn.Module):
    """What is exported: the last layer's logits (B, Q, C), and boxes (B, Q, 4) in [0, 1] of the valid image."""

    def __init__(self, adapter: DetectorAdapter, canvas: Canvas) -> None:
        super().__init__()
        self.model, self.canvas = adapter.model, canvas
        self.scaled = canvas.masked and adapter.sees_padding
        self.asks_mask = not adapter.sees_padding and "pixel_mask" in inspect.signature(self.model.forward).parameters

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if pixel_mask is None:
            pixel_mask = torch.ones_like(pixel_values[:, 0])
        pixel_mask = pixel_mask.bool()
        outputs = self.model(pixel_values, **({"pixel_mask": pixel_mask} if self.asks_mask else {}))
        boxes = outputs.pred_boxes
        if self.scaled:
            valid = torch.stack([pixel_mask[:, 0].sum(1), pixel_mask[:, :, 0].sum(1)] * 2, 1)
            boxes = boxes * (boxes.new_tensor([self.canvas.width, self.canvas.height] * 2) / valid)[:, None]
        return outputs.logits, boxes

    def example(self) -> tuple[Tensor, ...]:
        """Inputs; two images for a graph of any number, because torch.export makes constants of ones."""
        pixels = torch.zeros(self.canvas.batch or 2, 3, self.canvas.height, self.canvas.width)
        mask = torch.ones(pixels[:, 0].shape, dtype=torch.int64)
        return (pixels, mask) if self.canvas.masked else (pixels,)


class CanvasDetector(DetectorAdapter):
    """A detector whose images lie on a canvas, to evaluate what `run` makes of them."""

    def __init__(self, adapter: DetectorAdapter, canvas: Canvas, run: Run) -> None:
        super().__init__(adapter.model, adapter.processor)
        self.spec, self.adapter, self.canvas, self.run = adapter.spec, adapter, canvas, run

    def prepare(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        pixels, mask = self.adapter.prepare(pixel_values, pixel_mask)
        missing = (0, self.canvas.width - mask.shape[2], 0, self.canvas.height - mask.shape[1])
        return nn.functional.pad(pixels, missing), nn.functional.pad(mask, missing)

    def forward(self, pixels: Tensor, mask: Tensor, labels: list[dict] | None) -> DetectorOutput:
        logits, boxes = self.run(pixels, mask)
        return DetectorOutput(logits[None], boxes[None], None)


def write_graph(adapter: DetectorAdapter, canvas: Canvas, file: Path) -> None:
    """Writes the fp32 graph of a detector, which is put into eval mode and onto the CPU.

    Raises:
        UserError: the family cannot be exported, or the packages for it are missing.
    """
    family = adapter.spec.family
    if adapter.open_vocabulary:
        raise UserError(
            f"a {family} is told its classes as text, and a graph has those that it was made with: not exported"
        )
    _, optimizer = require("onnx", "onnxscript.optimizer")
    adapter.model.cpu().eval()
    graph = Graph(adapter, canvas)
    names, shapes = ["pixel_values", "pixel_mask"][: 1 + canvas.masked], None
    if canvas.batch is None:
        shapes = tuple({0: torch.export.Dim("batch")} for _ in names)
    attention = adapter.model.config._attn_implementation
    adapter.model.set_attn_implementation({"": "eager"})  # fused attention is no operator of ONNX
    try:
        with torch.no_grad(), warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph,
                graph.example(),
                input_names=names,
                output_names=["logits", "pred_boxes"],
                dynamic_shapes=shapes,
                custom_translation_table={torch.ops.aten._is_all_true.default: _all_true()},
                optimize=False,  # its rewriting gives two clamps of one tensor bounds of one name
                dynamo=True,
                verbose=False,
            )
            for simplify in (optimizer.inline, optimizer.fold_constants, optimizer.remove_unused_nodes):
                simplify(program.model)
            program.save(file, external_data=False)
    except Exception as error:  # whatever the exporter meets: it is one of its limits, and the user's model is whole
        raise UserError(f"a {family} cannot be exported to ONNX: {_reason(error)}") from error
    finally:
        adapter.model.set_attn_implementation({"": attention})


def halve_graph(file: Path) -> None:
    """Turns weights and computation of a written graph to fp16, but for what ONNX Runtime has in fp32 alone.

    Inputs and outputs stay fp32.
    """
    onnx, float16 = require("onnx", "onnxruntime.transformers.float16")
    onnx.save(float16.convert_float_to_float16(onnx.load(file), keep_io_types=True), file)


def open_graph(file: Path, device: str = "cpu") -> Run:
    """A written graph in ONNX Runtime, on as many threads as PyTorch has.

    Raises:
        UserError: ONNX Runtime cannot run on `device`, or cannot load the file.
    """
    (onnxruntime,) = require("onnxruntime")
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    if provider not in onnxruntime.get_available_providers():
        raise UserError(f"onnxruntime has no {provider} here: pip install onnxruntime-gpu, or run it on the CPU")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=[provider])
    except Exception as error:  # its own exceptions have no common class
        raise UserError(f"ONNX Runtime cannot run {file.name}: {_reason(error)}") from error
    taken = [entry.name for entry in session.get_inputs()]
    batch = session.get_inputs()[0].shape[0]

    def run(pixels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        count = len(pixels)
        if isinstance(batch, int) and count < batch:  # the last images of a data set may be too few
            rows = torch.arange(batch).clamp(max=count - 1)
            pixels, mask = pixels[rows], mask[rows]
        given = {"pixel_values": pixels.float().cpu().numpy(), "pixel_mask": mask.long().cpu().numpy()}
        answers = session.run(["logits", "pred_boxes"], {name: given[name] for name in taken})
        return tuple(torch.from_numpy(answer)[:count] for answer in answers)

    return run


def eager(adapter: DetectorAdapter, canvas: Canvas, compiled: bool = False) -> Run:
    """The same graph in PyTorch, as it is or `compiled`, on the model's device."""
    graph = Graph(adapter, canvas)
    graph = torch.compile(graph) if compiled else graph

    @torch.no_grad()
    def run(pixels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return graph(pixels, mask.long()) if canvas.masked else graph(pixels)

    return run


@dataclass
class Difference:
    """Between two answers to the same images.

    Attributes:
        logits, pred_boxes: the largest of any query, compared with the query of the same number.
        lost: share of the queries to which no query of the other answer is near, see `NEAR`.
        images: how many were compared.
    """

    logits: float = 0.0
    pred_boxes: float = 0.0
    lost: float = 0.0
    images: int = 0


def compare(batches: Iterable[dict], ours: CanvasDetector, reference: CanvasDetector) -> Difference:
    """Runs both on all batches of uint8 images; `reference` gives the scores' form."""
    found, lost, queries = Difference(), 0, 0
    softmax = reference.spec.activation == "softmax"
    for batch in tqdm(batches, desc="compare", unit="batch", leave=False):
        a, b = (side(batch["pixel_values"], batch["pixel_mask"]) for side in (ours, reference))
        found.logits = max(found.logits, _largest(a.logits - b.logits))
        found.pred_boxes = max(found.pred_boxes, _largest(a.boxes - b.boxes))
        rows = []
        for output, none in ((a, float("inf")), (b, -float("inf"))):
            logits = output.logits[0]
            row = torch.cat([output.boxes[0], logits.softmax(-1) if softmax else logits.sigmoid()], -1)
            rows.append(row.nan_to_num(nan=none))  # cdist passes over what is no number
        far = torch.cdist(*rows, p=float("inf")) > NEAR  # (B, Q, Q)
        lost += sum(far.all(dim).sum().item() for dim in (1, 2))
        queries += 2 * far.shape[0] * far.shape[1]
        found.images += far.shape[0]
    found.lost = lost / queries
    return found


def _largest(differences: Tensor) -> float:
    """Infinite where one is no number, which `max` would pass over."""
    return differences.abs().nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()


def _all_true() -> Callable:
    """ONNX's form of PyTorch's `_is_all_true`, by which Transformers' checks enter a graph; PyTorch has none."""
    op = require("onnxscript")[0].opset18

    def all_true(x):
        return op.Equal(op.ReduceMin(op.Cast(x, to=_INT64), keepdims=0), op.Constant(value_int=1))

    return all_true


def export_detector(
    adapter: DetectorAdapter,
    canvas: Canvas,
    folder: Path,
    batches: Callable[[], Iterable[dict]],
    dtype: str = "fp32",
    score: Callable[[CanvasDetector], float] | None = None,
) -> dict:
    """Writes `model.onnx`, the configuration, the image processor's and `parity.json`, or nothing.

    Args:
        batches: gives batches of uint8 images, `canvas.batch` at once or fewer, to compare the outputs on.
        dtype: of weights and computation, one of `DTYPES`.
        score: gives the AP (0 to 1) of a detector; without it the outputs alone decide.

    Returns:
        The contents of `parity.json`.

    Raises:
        UserError: the family cannot be exported, or what came out does not answer as PyTorch does.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
        beside = Path(name)
        file = beside / "model.onnx"
        logger.info("exporting the %s, %d x %d pixels", adapter.spec.family, canvas.height, canvas.width)
        write_graph(adapter, canvas, file)
        if dtype == "fp16":
            halve_graph(file)
        ours = CanvasDetector(adapter, canvas, open_graph(file))
        reference = CanvasDetector(adapter, canvas, eager(adapter, canvas))
        difference = compare(batches(), ours, reference)
        ap = None if score is None else {"pytorch": score(reference), "onnxruntime": score(ours)}
        _judge(difference, ap, dtype)
        parity = _parity(adapter, canvas, file, dtype, difference, ap)
        (beside / "parity.json").write_text(json.dumps(parity, indent=2) + "\n", encoding="utf-8")
        adapter.model.config.save_pretrained(beside)  # names of the classes
        canvas.processor(adapter.processor).save_pretrained(beside)
        folder.mkdir(exist_ok=True)
        for written in beside.iterdir():
            written.replace(folder / written.name)
    return parity


def _judge(difference: Difference, ap: dict[str, float] | None, dtype: str) -> None:
    advice = "nothing was written" + ("; --dtype fp32 keeps more digits" if dtype == "fp16" else "")
    if ap is None and difference.lost > MOST_LOST:
        raise UserError(
            f"{difference.lost:.1%} of the queries answer otherwise than in PyTorch (boxes by up to "
            f"{difference.pred_boxes:.2g} of the image): {advice}; with --data, AP decides"
        )
    if ap is not None and 100 * abs(ap["onnxruntime"] - ap["pytorch"]) > MOST_AP:
        raise UserError(
            f"AP {100 * ap['onnxruntime']:.2f} in ONNX Runtime and {100 * ap['pytorch']:.2f} in PyTorch are more than "
            f"{MOST_AP} apart: {advice}"
        )


def _parity(
    adapter: DetectorAdapter, canvas: Canvas, file: Path, dtype: str, difference: Difference, ap: dict | None
) -> dict:
    (onnx,) = require("onnx")
    model = onnx.load(file, load_external_data=False)

    def shapes(values) -> dict[str, list[int | str]]:
        dimensions = {value.name: value.type.tensor_type.shape.dim for value in values}
        return {name: [d.dim_param or d.dim_value for d in shape] for name, shape in dimensions.items()}

    return {
        "family": adapter.spec.family,
        "dtype": dtype,
        "opset": next(entry.version for entry in model.opset_import if not entry.domain),
        "inputs": shapes(model.graph.input),
        "outputs": shapes(model.graph.output),
        "largest_difference": {"logits": difference.logits, "pred_boxes": difference.pred_boxes},
        "queries_lost": difference.lost,
        "images": difference.images,
        "AP": ap,
        "versions": {name: version(name) for name in PACKAGES},
    }


def require(*names: str) -> list:
    """Modules of the optional packages.

    Raises:
        UserError: one is not installed.
    """
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: {EXTRA}") from error


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Keeps these packages' loggers from speaking during the block, but for errors."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: Exception) -> str:
    """The cause that an exporter's long message ends with, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200]
