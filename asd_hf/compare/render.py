"""Shows the records of a comparison: a Markdown file and pictures for each setting."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from ..config import NO_METHOD
from ..progress import terminal_width
from .pictures import DPI, PICTURES, make_scene
from .records import load_runs
from .table import AFTER, DIFFERENCE, IMAGES_ALONE, VERDICT, fitted, table, to_markdown
from .verdict import (
    BETTER,
    CONFIDENCE,
    GROWTHS,
    MARGIN,
    MOST_SEEDS,
    NOT_BETTER,
    UNDECIDED,
    WORSE,
)


def render(folder: Path, out: Path | None = None, baseline: str = NO_METHOD) -> str:
    """Writes a Markdown file and pictures of every setting whose records are below `folder`.

    Args:
        out: where to, `folder` itself by default: `<setting>.md` and `<setting>_<picture>.png` for each of `PICTURES`
            that has something to show.
        baseline: the method that the others are compared with.

    Returns:
        the tables, for the terminal.

    Raises:
        UserError: the records cannot be read, see `load_runs`.
    """
    out = folder if out is None else out
    settings = load_runs(folder)
    tables = {setting: table(runs, baseline) for setting, runs in settings.items()}
    out.mkdir(parents=True, exist_ok=True)
    for setting, runs in settings.items():
        scene = make_scene(setting, runs, baseline)
        links = []
        for what, draw in PICTURES.items():
            if (figure := draw(scene)) is not None:
                file = out / f"{setting}_{what}.png"
                figure.savefig(file, dpi=DPI)
                links.append(f"![{what}]({quote(file.name)})")
        lines = [
            f"# {setting}",
            _what(runs),
            to_markdown(tables[setting]),
            *links,
            _how_to_read(baseline, os.path.relpath(folder, out)),
        ]
        (out / f"{setting}.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return "\n\n".join(f"{setting}\n\n{fitted(rows, terminal_width())}" for setting, rows in tables.items())


def _what(runs: Sequence[dict]) -> str:
    images, devices = sorted({run["num_images"] for run in runs}), sorted({run["device"] for run in runs})
    return (
        "COCO AP of students at the end of training, in points (0 to 100): mean and sample standard deviation over "
        f"seeds, on {' or '.join(f'{count:,}' for count in images)} images; trained on {'; '.join(devices)}."
    )


def _how_to_read(baseline: str, records: str) -> str:
    place = "beside this file" if records == "." else f"in `{records}`"
    return f"""## How to read it

{columns_explained(baseline)}

The records lie {place}: a JSON file a run, with its configuration, curves and bootstrap."""


def columns_explained(baseline: str) -> str:
    """What the columns of the table mean, a Markdown list: a name in bold and a colon begin each item."""
    level, points, growth = f"{100 * CONFIDENCE:.0f} %", f"{100 * MARGIN:.0f} point", f"{GROWTHS[-1]:.0f} times"
    return f"""\
- **{DIFFERENCE}**: a method's AP minus that of `{baseline}` with the same seed, trained from the same student: the
  mean over these seeds, and in brackets its {level} interval. It allows for other seeds and for other evaluation
  images; with one seed there is none.
- **{IMAGES_ALONE}**: the paired bootstrap interval over images. It allows for other evaluation images with these very
  students, and says nothing about other seeds.
- **{VERDICT}**: `{BETTER}`, the interval of the difference lies above 0; `{WORSE}`, below 0; `{NOT_BETTER}`, below
  {points}; else `{UNDECIDED}`, followed by what would decide, in all, if the mean and the spreads stayed as they are:
  seeds; or evaluation images, if {MOST_SEEDS} seeds are too few; or both. Nothing follows if {MOST_SEEDS} seeds on
  {growth} the images are too few. Each verdict stands for itself: of twenty methods that change nothing, one is
  called better or worse by chance, on average; and seeds that are added until a verdict comes make it too easy.
- **{AFTER}**: the share of the baseline's training time after which a method's mean curve reaches the baseline's end.
- **s/run**, **ms/step**: of training alone, without evaluations. **memory**: the peak."""
