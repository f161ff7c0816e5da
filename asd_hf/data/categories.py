"""Which classes the stored rows have."""

from __future__ import annotations

import logging
from typing import Any

import datasets

from ..errors import UserError
from .columns import CATEGORY_FIELDS, MISUNDERSTOOD, NAME_FIELDS, OBJECT_COLUMNS, find, flat, leaf
from .stored import Raw, read_all

logger = logging.getLogger(__name__)


def find_classes(raw: Raw) -> tuple[list[str], list[int], dict[int | str, int]]:
    """Class names, category ids, and the class index of each category as it is stored."""
    if raw.manifest:
        names = raw.manifest["class_names"]
        return names, raw.manifest.get("category_ids", list(range(len(names)))), {i: i for i in range(len(names))}
    features = raw.stream.features or {}
    objects = leaf(find({**features, **(features.get("json") or {})}, OBJECT_COLUMNS)) or {}
    label = leaf(find(objects, CATEGORY_FIELDS))
    if isinstance(label, datasets.ClassLabel):
        names = label.names
        return names, list(range(len(names))), {i: i for i in range(len(names))}
    found = _scan_names(raw)
    numbers = all(isinstance(category, int) for category in found)
    if not numbers and any(isinstance(category, int) for category in found):
        raise UserError(f"{raw.name}: some categories are numbers and others names: {', '.join(map(repr, found))}")
    names = [found[category] for category in sorted(found)]
    if len(set(names)) < len(names):
        raise UserError(f"{raw.name}: two categories have the same name among {', '.join(names)}")
    ids = sorted(found) if numbers else list(range(len(found)))
    return names, ids, {category: index for index, category in enumerate(sorted(found))}


def _scan_names(raw: Raw) -> dict[int | str, str]:
    """The name of every category, from the names that stand beside the numbers or instead of them."""
    found: dict[int | str, str] = {}
    if raw.annotations is not None:
        logger.info("%s: reading all annotations once for the names of the classes", raw.name)
        for stored in read_all(raw, raw.annotations):
            for category, name in _named_categories(stored):
                if found.setdefault(category, name) != name:
                    raise UserError(f"{raw.name}: category {category!r} is named {found[category]!r} and {name!r}")
    if not found:
        raise UserError(
            f"{raw.name}: its categories are numbers without names: store them as ClassLabel, or put "
            'manifest_<split>.json with {"class_names": [...]} into the folder of the shards'
        )
    return found


def _named_categories(stored: dict[str, Any]) -> list[tuple[int | str, str]]:
    """(category, name) of the objects of a row; none of a bad row, which the reader reports."""
    pairs = []
    try:
        objects = find(flat(stored), OBJECT_COLUMNS)
        for item in objects if isinstance(objects, list) else [objects]:
            categories, names = find(item, CATEGORY_FIELDS), find(item, NAME_FIELDS)
            names = categories if names is None else names
            categories = names if categories is None else categories
            if not isinstance(categories, list):
                categories, names = [categories], [names]
            pairs += zip(categories or (), names or (), strict=True)
    except MISUNDERSTOOD:
        return []
    return [(category, name) for category, name in pairs if isinstance(category, int | str) and isinstance(name, str)]
