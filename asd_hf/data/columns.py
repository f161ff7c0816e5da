"""What the columns of rows are called that others have stored, and the objects in them."""

from __future__ import annotations

from typing import Any

from .faults import BadRow, is_number

# The names in use, first come first served
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
OBJECT_COLUMNS = ("objects", "annotations")
BOX_FIELDS = ("bbox", "bboxes", "boxes")
CATEGORY_FIELDS = ("category", "categories", "category_id", "class", "classes", "label", "labels")
NAME_FIELDS = ("category_name", "category_names")
AREA_FIELDS = ("area", "areas")
CROWD_FIELDS = ("iscrowd", "iscrowds")

# Raised by rows of another form than expected
MISUNDERSTOOD = (TypeError, ValueError, LookupError, AttributeError, OverflowError)


def is_sample(stored: dict[str, Any]) -> bool:
    """Whether this is a sample of a tar, as `stored` gives it."""
    return set(stored) == {"row", "fault"}


def flat(stored: dict[str, Any]) -> dict[str, Any]:
    """A WebDataset sample's JSON as columns."""
    if is_sample(stored):
        if stored["fault"] is not None:
            raise BadRow("row", stored["fault"])
        return stored["row"]
    return {**stored, **stored["json"]} if isinstance(stored.get("json"), dict) else stored


def find(mapping: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The value of the first of these names that has one."""
    return next((mapping[name] for name in names if mapping.get(name) is not None), None)


def objects_of(stored: dict[str, Any], name: str) -> dict[str, Any]:
    """bbox, category, area and iscrowd of a row as lists; the last two are None where the row has none."""
    objects = find(stored, OBJECT_COLUMNS)
    if objects == [] or (objects is None and any(column in stored for column in OBJECT_COLUMNS)):
        return {"bbox": [], "category": [], "area": None, "iscrowd": None}
    if isinstance(objects, list):  # one dictionary an object
        keys = dict.fromkeys(key for item in objects for key in item)
        objects = {key: [item.get(key) for item in objects] for key in keys}
        objects = {key: None if all(v is None for v in values) else values for key, values in objects.items()}
    if not isinstance(objects, dict):
        raise BadRow("row", f"{name} has no objects: looked for the columns {', '.join(OBJECT_COLUMNS)}")
    boxes, categories = find(objects, BOX_FIELDS), find(objects, (*CATEGORY_FIELDS, *NAME_FIELDS))
    if boxes is None or categories is None:
        raise BadRow(
            "row",
            f"{name}: its objects have {', '.join(objects)}: a field of {', '.join(BOX_FIELDS)} and one of "
            f"{', '.join(CATEGORY_FIELDS)} are needed",
        )
    return {
        "bbox": list(boxes),
        "category": list(categories),
        "area": find(objects, AREA_FIELDS),
        "iscrowd": find(objects, CROWD_FIELDS),
    }


def is_box(box: list[float | None] | None) -> bool:
    """Whether it is four finite numbers."""
    return isinstance(box, list) and len(box) == 4 and all(map(is_number, box))


def leaf(feature: Any) -> Any:
    """What a list, or a list of lists, of `datasets` is made of."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    return feature


def first_line(error: Exception) -> str:
    """Of its message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no details")
