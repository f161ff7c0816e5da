"""Small data sets for the tests, written in every layout that a source may have."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

SHARED = Path(__file__).parents[1].parent / "shared/data"
NAMES, IDS = ["cat", "dog", "owl"], [3, 7, 18]


def jpeg(width: int, height: int, seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((width, height)).save(buffer, "JPEG")
    return buffer.getvalue()


def tiny_rows(count: int, first_id: int = 100) -> list[dict]:
    """Plain rows: every fifth image is empty, every seventh box is a crowd; boxes as (x, y, w, h)."""
    rng, rows, total = np.random.default_rng(count), [], 0
    for index in range(count):
        width, height = int(rng.integers(40, 90)), int(rng.integers(40, 90))
        boxes, categories, crowds = [], [], []
        for _ in range(0 if index % 5 == 4 else int(rng.integers(1, 5))):
            w, h = rng.uniform(4, width / 2), rng.uniform(4, height / 2)
            boxes.append([float(rng.uniform(0, width - w)), float(rng.uniform(0, height - h)), float(w), float(h)])
            categories.append(int(rng.integers(len(NAMES))))
            total += 1
            crowds.append(int(total % 7 == 0))
        rows.append(
            {
                "image_id": first_id + 3 * index,
                "width": width,
                "height": height,
                "jpeg": jpeg(width, height, index),
                "bbox": boxes,
                "category": categories,
                "area": [0.5 * w * h for _, _, w, h in boxes],
                "iscrowd": crowds,
            }
        )
    return rows


def write_images(folder: Path, rows: list[dict]) -> Path:
    """Writes the images of rows into a folder, by the names that they have in a COCO folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        (folder / f"{row['image_id']:06d}.jpg").write_bytes(row["jpeg"])
    return folder


def write_coco(root: Path, split: str, rows: list[dict], images: str | None = None) -> dict:
    """Writes rows as a COCO folder; returns the contents of its annotation file."""
    write_images(root / (images or split), rows)
    (root / "annotations").mkdir(exist_ok=True)
    contents = {"images": [], "annotations": [], "categories": []}
    contents["categories"] = [{"id": i, "name": n} for i, n in zip(reversed(IDS), reversed(NAMES), strict=True)]
    for row in rows:
        name = f"{row['image_id']:06d}.jpg"
        contents["images"].append(
            {"id": row["image_id"], "file_name": name, "width": row["width"], "height": row["height"]}
        )
        for box, category, area, crowd in zip(row["bbox"], row["category"], row["area"], row["iscrowd"], strict=True):
            contents["annotations"].append(
                {
                    "id": len(contents["annotations"]) + 1,
                    "image_id": row["image_id"],
                    "category_id": IDS[category],
                    "bbox": box,
                    "area": area,
                    "iscrowd": crowd,
                }
            )
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(contents))
    return contents
