"""The configuration of a small run, with all that it names on disk."""

from __future__ import annotations

from pathlib import Path

from tests import tiny
from tests.families import FAMILIES
from tests.tiny_data import NAMES, tiny_rows, write_coco, write_images

# Teachers that know the data's cat, dog and owl in another order and more; in the same order; and one of them only.
TEACHERS = {"deformable_detr": ("bus", *reversed(NAMES)), "detr": tuple(NAMES), "rt_detr": ("cat", "yak")}


def write_places(root: Path) -> Path:
    """A COCO folder, images without labels, and teachers of some families."""
    write_coco(root / "coco", "train", tiny_rows(12))
    write_coco(root / "coco", "val", tiny_rows(4))
    write_images(root / "more", tiny_rows(4, first_id=900))
    for family, classes in TEACHERS.items():
        model, processor = FAMILIES[family](classes=classes, num_queries=9)
        processor.size = {"shortest_edge": 80, "longest_edge": 112}
        model.save_pretrained(root / family)
        processor.save_pretrained(root / family)
    return root


def configuration(places, teacher="deformable_detr", student=None, data=None, method=None, **training):
    small = {"base": "deformable_detr", "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 12}
    small["config"] = {
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "backbone_config": tiny.HF_RESNET,
    }
    sizes = {"train_sizes": [64, 80], "eval_size": 80, "max_size": 112}
    return {
        "model": {"teacher": teacher and str(places / teacher), "student": small | (student or {})},
        "data": {"source": str(places / "coco")} | sizes | (data or {}),
        "method": {"name": "asd", "hidden_dim": 16, "key_dim": 16} | (method or {}) if teacher else {},
        "training": {"use_cpu": True, "max_steps": 4, "per_device_train_batch_size": 2} | training,
    }
