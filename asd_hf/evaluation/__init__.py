from .coco import STATS, CocoEvaluator, CocoMetric, format_table
from .evaluate import TOP_K, evaluate_detector
from .latency import milliseconds_per_image
from .predict import postprocess

__all__ = [
    "STATS",
    "TOP_K",
    "CocoEvaluator",
    "CocoMetric",
    "evaluate_detector",
    "format_table",
    "milliseconds_per_image",
    "postprocess",
]
