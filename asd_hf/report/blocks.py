"""What a page is made of. Texts are plain: the template escapes them; only `Markup` made by this package is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from markupsafe import Markup

from .charts import Series


class Cell(NamedTuple):
    """Of a table: what it shows, what it is sorted by, and how it is marked ("up", "down", "num", "long")."""

    text: str
    value: float | None = None
    mark: str = ""  # classes of the style sheet
    link: str | None = None
    shade: float | None = None  # 0 to 1


class Legend(NamedTuple):
    name: str
    css: str
    dashes: str
    note: str = ""


def legend(series: Sequence[Series], notes: Sequence[str] = ()) -> list[Legend]:
    notes = notes or [""] * len(series)
    return [Legend(s.name, s.css, s.dashes, note) for s, note in zip(series, notes, strict=True)]


@dataclass
class Chart:
    title: str
    svg: Markup
    legend: list[Legend] = field(default_factory=list)
    note: str = ""
    wide: bool = False
    kind: str = "chart"


@dataclass
class Table:
    """Sortable by every column."""

    header: list[str]
    rows: list[list[Cell]]
    title: str = ""
    note: str = ""
    matrix: bool = False  # of counts, with a name on each side: not sortable
    kind: str = "table"


@dataclass
class Facts:
    """Names and what they are, with a link where there is one."""

    rows: list[tuple[str, str, str | None]]
    kind: str = "facts"


@dataclass
class Tiles:
    """The numbers that count: (what, number, remark)."""

    rows: list[tuple[str, str, str]]
    kind: str = "tiles"


@dataclass
class Text:
    text: str
    kind: str = "text"


@dataclass
class Commands:
    """(what for, the command)."""

    rows: list[tuple[str, str]]
    kind: str = "commands"


class Box(NamedTuple):
    """x, y, w, h in pixels of the image as it is embedded; `css` says whether it is right."""

    x: float
    y: float
    w: float
    h: float
    name: str
    css: str
    tag: tuple[float, float] | None = None  # where its name stands: left and bottom


class View(NamedTuple):
    """An image with the boxes of one model, or those of the ground truth."""

    title: str
    boxes: list[Box]


@dataclass
class Picture:
    """One image, embedded once and shown once a view."""

    ident: str
    title: str
    uri: str
    width: int
    height: int
    views: list[View]


@dataclass
class Gallery:
    """`tag`: height of the names at boxes, in widths of an image."""

    title: str
    pictures: list[Picture]
    tag: float
    note: str = ""
    kind: str = "gallery"


@dataclass
class Heat:
    """Matrices as images: (caption, data URI, rows, columns)."""

    title: str
    maps: list[tuple[str, str, int, int]]
    note: str = ""
    kind: str = "heat"


@dataclass
class Section:
    """`listed`: what the list of sections at the top calls it, None for one that is not there."""

    ident: str
    title: str
    blocks: list
    intro: str = ""
    listed: str | None = None
