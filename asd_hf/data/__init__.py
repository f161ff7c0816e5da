"""From a data set, wherever it lies, to padded batches."""

from .collate import collate
from .config import DataConfig, teacher_view
from .shapes import make_shapes
from .shard import shard_dataset
from .sources import Source, open_source, open_training_source
from .stream import DetectionStream, build_loader
from .transforms import RowTransform, resize_spec

__all__ = [
    "DataConfig",
    "DetectionStream",
    "RowTransform",
    "Source",
    "build_loader",
    "collate",
    "make_shapes",
    "open_source",
    "open_training_source",
    "resize_spec",
    "shard_dataset",
    "teacher_view",
]
