"""A page in the browser that shows what a detector finds, and its teacher beside it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from .classes import class_key
from .data.collate import pad
from .data.folder import SUFFIXES, list_files
from .errors import UserError
from .evaluation import Predictor
from .hub import without_folders
from .loading import load_teacher, prompt_teacher
from .predict import choose_device, draw_boxes, preprocessing

if TYPE_CHECKING:
    from gradio import Blocks

logger = logging.getLogger(__name__)

THRESHOLD = 0.5
LONGEST = 1280  # pixels of the longer side of pictures that are shown
EMPHASIS = 1.6  # they are smaller than most, and on a phone much smaller
MOST_EXAMPLES = 12
MOST_BYTES = "30mb"  # of an image that is sent
FONTS = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]  # none that the browser would fetch from elsewhere
CSS = """
.asd-side h3 {margin: 0}
.asd-side p {margin: 0; color: var(--body-text-color-subdued)}
@media (max-width: 640px) {
  #asd-examples .gallery {flex-wrap: nowrap; overflow-x: auto}
  #asd-examples .gallery > * {flex: none}
}
"""


def build_app(
    model: str, teacher: str | None = None, examples: str | Path | None = None, device: str | None = None
) -> Blocks:
    """The page, for `launch`: an image in; boxes, time and number of parameters out.

    Threshold and choice of classes draw anew what was found: the models do not run again.

    Args:
        model: Hub id, folder, or a key of `loading.PACKAGED`.
        teacher: another one, to be shown beside it. One of open vocabulary looks for the classes of `model`.
        examples: a folder whose images can be chosen, the first 12 of them.
        device: as `predict.choose_device` takes it.

    Raises:
        UserError: Gradio is not installed, a model cannot be loaded, or there are no examples.
    """
    gradio = _import_gradio()
    files = [] if examples is None else _examples(Path(examples))
    device = choose_device(device)
    sides = [_Side("Model" if teacher is None else "Student", model, "--model", device)]
    if teacher is not None:
        sides.append(_Side("Teacher", teacher, "--teacher", device, sides[0].predictor.class_names))
    classes = _Classes([side.predictor.class_names for side in sides])

    def look(image: Image.Image | None, threshold: float, chosen: list[str]) -> list[Any]:
        found = None if image is None else _Found(_shown(image), [side.find(image) for side in sides])
        return [found, *draw(found, threshold, chosen)]

    def draw(found: _Found | None, threshold: float, chosen: list[str]) -> list[Any]:
        if found is None:
            return [part for side in sides for part in (side.about(), None)]
        parts = []
        for number, (side, (rows, seconds)) in enumerate(zip(sides, found.sides, strict=True)):
            rows = classes.choose(rows[rows[:, 4] >= threshold], number, chosen)
            rows[:, :4] *= 2 * found.image.size
            parts += [side.about(seconds, len(rows)), draw_boxes(found.image, rows, classes.names, EMPHASIS)]
        return parts

    with gradio.Blocks(title="Object detection", analytics_enabled=False, fill_width=True) as app:
        gradio.Markdown("# Object detection" + (": student and teacher" if teacher is not None else ""))
        found = gradio.State(None)
        with gradio.Row():
            with gradio.Column(scale=1, min_width=300):
                image = gradio.Image(label="Image", type="pil", sources=["upload", "clipboard", "webcam"])
                if files:
                    gradio.Examples(files, image, examples_per_page=MOST_EXAMPLES, elem_id="asd-examples")
            with gradio.Column(scale=len(sides), min_width=300):
                with gradio.Row():
                    threshold = gradio.Slider(
                        0, 1, THRESHOLD, step=0.01, label="Least score", min_width=280, elem_id="threshold"
                    )
                    chosen = gradio.Dropdown(
                        sorted(classes.names),
                        value=[],
                        multiselect=True,
                        label="Classes (none chosen: all)",
                        elem_id="classes",
                        min_width=280,
                    )
                outputs = []
                with gradio.Row():
                    for side in sides:
                        with gradio.Column(min_width=280):
                            name = side.title.lower()
                            outputs.append(
                                gradio.Markdown(side.about(), elem_id=f"{name}-facts", elem_classes="asd-side")
                            )
                            outputs.append(
                                gradio.Image(
                                    label=side.title,
                                    show_label=False,
                                    elem_id=f"{name}-picture",
                                    interactive=False,
                                    format="png",
                                    buttons=["fullscreen", "download"],
                                )
                            )
        options = {"show_progress": "minimal", "show_progress_on": outputs[1::2], "api_visibility": "private"}
        inputs = [image, threshold, chosen]
        image.change(look, inputs, [found, *outputs], **options)
        for control in (threshold, chosen):
            control.change(
                draw,
                [found, *inputs[1:]],
                outputs,
                trigger_mode="always_last",
                **options | {"show_progress": "hidden"},
            )
    return app


def launch(app: Blocks, port: int | None = None, share: bool = False, block: bool = True) -> None:
    """Serves a page, by default until the process is told to end. Nothing is reported to Gradio's makers.

    Args:
        port: by default the first free one from 7860.
        share: also under a public address, by a tunnel through Gradio's servers.
        block: False returns at once; `app.close()` ends it.

    Raises:
        UserError: the port is taken.
    """
    gradio = _import_gradio()
    theme = gradio.themes.Soft(font=FONTS, font_mono=["monospace"])
    try:
        app.launch(
            server_port=port,
            share=share,
            theme=theme,
            css=CSS,
            footer_links=[],
            max_file_size=MOST_BYTES,
            prevent_thread_lock=True,
            quiet=True,
        )
    except OSError as error:
        taken = "all ports from 7860 on are" if port is None else f"port {port} is"
        raise UserError(f"the page cannot be served: {taken} taken: give another --port") from error
    logger.info("the page is at %s", app.local_url)
    if app.share_url:
        logger.info("and, for everyone who knows the address, at %s", app.share_url)
    elif share:
        logger.warning("there is no public address: Gradio's servers did not give one")
    if block:
        try:
            app.block_thread()
        finally:
            app.close(verbose=False)


class _Side:
    """One of the models that are shown."""

    def __init__(
        self, title: str, name: str, key: str, device: torch.device, class_names: Sequence[str] | None = None
    ) -> None:
        adapter = load_teacher(name, key)
        if adapter.open_vocabulary and class_names is None:
            raise UserError(f"{key}: {name} finds what it is told to: it can be shown as the teacher of another model")
        if class_names is not None:
            prompt_teacher(adapter, class_names)
        adapter.model.to(device)
        self.title, self.name = title, without_folders(name)
        self.predictor, self.prepare = Predictor(adapter, device=device), preprocessing(adapter.processor)
        self.parameters = sum(p.numel() for p in adapter.model.parameters())
        self.find(Image.new("RGB", (640, 480)))  # the first image takes longer

    def find(self, image: Image.Image) -> tuple[np.ndarray, float]:
        """Rows as `postprocess` has them, (K, 6), boxes in shares of width and height; and the seconds it took."""
        pixels = pil_to_tensor(image.convert("RGB"))
        start = perf_counter()
        rows = self.predictor(*pad([self.prepare(pixels)]), torch.ones(1, 2))[0].double().cpu().numpy()
        return rows, perf_counter() - start

    def about(self, seconds: float | None = None, count: int | None = None) -> str:
        """The lines above a picture, in Markdown."""
        facts = [f"{self.parameters / 1e6:.1f} M parameters"]
        if seconds is not None:
            facts += [f"{1000 * seconds:,.0f} ms", f"{count} object{'s' * (count != 1)}"]
        facts = [fact.replace(" ", "\N{NO-BREAK SPACE}") for fact in facts]
        return f"### {self.title}\n`{self.name}` · {' · '.join(facts)}"


class _Found(NamedTuple):
    """What was found in an image."""

    image: Image.Image
    sides: list[tuple[np.ndarray, float]]  # as `_Side.find` gives them


class _Classes:
    """The classes of all models under one number each, so that a class has the same colour everywhere.

    Attributes:
        names: of all classes, by the first model's name of each.
    """

    def __init__(self, lists: Sequence[Sequence[str]]) -> None:
        numbers: dict[str, int] = {}
        self.names: list[str] = []
        for name in (name for names in lists for name in names):
            if numbers.setdefault(class_key(name), len(self.names)) == len(self.names):
                self.names.append(name)
        self._numbers = [np.array([numbers[class_key(name)] for name in names]) for names in lists]

    def choose(self, rows: np.ndarray, model: int, chosen: Sequence[str]) -> np.ndarray:
        """A model's rows with these numbers in their last column, of the classes `chosen`; if none are, of all."""
        labels = self._numbers[model][rows[:, 5].astype(int)]
        kept = np.isin(labels, [self.names.index(name) for name in chosen]) if chosen else np.ones(len(rows), bool)
        return np.column_stack([rows[:, :5], labels])[kept]


def _shown(image: Image.Image) -> Image.Image:
    """The image in the size in which it is shown."""
    shown = image.convert("RGB")
    shown.thumbnail((LONGEST, LONGEST))
    return shown


def _examples(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(f"--examples: {folder} is no folder")
    names = [name for name, *_ in list_files(folder, SUFFIXES)]
    if not names:
        raise UserError(f"--examples: there are no images in {folder}: looked for {', '.join(SUFFIXES)}")
    return [str(folder / name) for name in names[:MOST_EXAMPLES]]


def _import_gradio() -> ModuleType:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read at its import
    try:
        import gradio
    except ImportError as error:
        raise UserError("the demo needs Gradio: pip install 'asd-hf[demo]'") from error
    logging.getLogger("httpx").setLevel(logging.WARNING)  # by which it asks itself whether it is there
    return gradio
