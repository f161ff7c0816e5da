"""Sampling matrices over the training as heat maps."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from .blocks import Heat
from .run_files import RunFiles

MOST_STEPS = 6
COLOUR = (0, 114, 178)  # of Okabe and Ito; the weight is its opacity, so that it stands on any ground
TITLES = {
    "teacher": "which of the teacher's own queries a point samples",
    "student": "which of the student's queries a point samples",
}


def heat_maps(files: RunFiles) -> list[Heat]:
    """A row of maps for each matrix of each method; points from top to bottom, the teacher's best query first.

    The columns of the student's queries are in the order in which the points of the last step claim them, the same in
    all maps: Hungarian pairs would be a diagonal.
    """
    found = files.matrices()
    steps = _spread(sorted(found))
    if not steps:
        return []
    blocks = []
    for name in sorted(found[steps[-1]].keys() - {"scores"}):
        method, _, whose = name.rpartition("/")
        maps = {step: found[step][name].float().numpy() for step in steps if name in found[step]}
        order = _column_order(maps[steps[-1]])
        top = max(float(weights.max()) for weights in maps.values())
        rows, columns = maps[steps[-1]].shape
        blocks.append(
            Heat(
                f"{method}: {TITLES[whose]}",
                [(f"step {step:,}", heat_image(maps[step][:, order], top), rows, columns) for step in maps],
                f"{rows} points (rows, the teacher's best first), {columns} queries of the {whose} (columns, "
                f"in the order in which the last step's points claim them). Full colour: a weight of {top:.2f}; "
                "the shade goes with its square root. A row sums to 1: a single strong cell is one partner, an even "
                "row an average over all.",
            )
        )
    return blocks


def heat_image(weights: np.ndarray, top: float) -> str:
    """A data URI of a PNG with a pixel a weight."""
    pixels = np.empty((*weights.shape, 4), np.uint8)
    pixels[..., :3] = COLOUR
    pixels[..., 3] = np.round(255 * np.sqrt(weights / max(top, 1e-9)))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _spread(steps: list[int]) -> list[int]:
    """At most `MOST_STEPS`, the first and the last among them."""
    if len(steps) <= MOST_STEPS:
        return steps
    return [steps[round(i * (len(steps) - 1) / (MOST_STEPS - 1))] for i in range(MOST_STEPS)]


def _column_order(weights: np.ndarray) -> list[int]:
    """The columns by the first row that has its greatest weight there; those that no row has at the end."""
    claimed = list(dict.fromkeys(weights.argmax(1).tolist()))
    return claimed + [column for column in range(weights.shape[1]) if column not in set(claimed)]
