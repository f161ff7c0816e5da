"""A page of sections, as one HTML file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .. import __version__
from ..errors import UserError
from .blocks import Section

MOST_BYTES = 10_000_000


def render_page(title: str, subtitle: str, sections: Sequence[Section], notes: Sequence[str] = ()) -> str:
    """The page. It fetches nothing, and a browser runs none but its own script: its policy says so.

    Args:
        notes: what the reader must know first: what is missing and why.

    Raises:
        UserError: it has more than 10 MB.
    """
    environment = Environment(
        loader=PackageLoader("asd_hf.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    style, script = (environment.loader.get_source(environment, name)[0] for name in ("page.css", "page.js"))
    text = environment.get_template("page.html").render(
        title=title,
        subtitle=subtitle,
        sections=[section for section in sections if section.blocks],
        notes=notes,
        version=__version__,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    if (size := len(text.encode())) > MOST_BYTES:
        raise UserError(f"the report would have {size / 1e6:.0f} MB: show fewer pictures (--pictures)")
    return text
