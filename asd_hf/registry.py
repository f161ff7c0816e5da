"""Names to classes. An entry is "module:Class", imported only when it is asked for."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from importlib import import_module

from .errors import UserError

MOST_SHOWN = 20  # choices in an error line


def nearest(name: str, valid: Collection[str]) -> str:
    """The end of an error line about an unknown `name`: the nearest valid one, or all of them when none is near."""
    if not valid:
        return "there are none here"
    if close := get_close_matches(name, valid, n=1):
        return f"did you mean {close[0]!r}?"
    shown = sorted(valid)[:MOST_SHOWN]
    return f"choose one of {', '.join(shown)}" + (f", ... ({len(valid)} in all)" if len(shown) < len(valid) else "")


def resolve(name: str, table: dict[str, str], kind: str) -> type:
    """Looks `name` up in `table`. A "module:Class" string is taken as it is, so a user's own class needs no entry.

    Raises:
        UserError: `name` is neither a key of `table` nor an importable "module:Class". `kind` names it in the message.
    """
    path = table.get(name, name)
    module, separator, attribute = path.partition(":")
    if not separator:
        raise UserError(f"unknown {kind} {name!r}: {nearest(name, table)} (or give 'module:Class')")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{kind} {name!r} cannot be imported: {error}") from error
