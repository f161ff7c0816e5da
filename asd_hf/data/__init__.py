"""From a data set, wherever it lies, to padded batches."""

from .check import Report, check_source, require_agreement, require_same, require_whole, summary, write_left_out
from .collate import collate
from .config import DataConfig, teacher_view
from .faults import NOTES, REMEDIES, Fault
from .shapes import make_shapes
from .shard import shard_dataset
from .sources import Source, open_source, open_training_source, open_unlabelled
from .stream import DetectionStream, build_loader
from .transforms import RowTransform, resize_options, resize_spec

__all__ = [
    "NOTES",
    "REMEDIES",
    "DataConfig",
    "DetectionStream",
    "Fault",
    "Report",
    "RowTransform",
    "Source",
    "build_loader",
    "check_source",
    "collate",
    "make_shapes",
    "open_source",
    "open_training_source",
    "open_unlabelled",
    "require_agreement",
    "require_same",
    "require_whole",
    "resize_options",
    "resize_spec",
    "shard_dataset",
    "summary",
    "teacher_view",
    "write_left_out",
]
