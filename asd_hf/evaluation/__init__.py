from .coco import STATS, CocoEvaluator, CocoMetric, format_table
from .evaluate import evaluate_detector
from .latency import milliseconds_per_image
from .predict import TOP_K, Predictor, postprocess

__all__ = [
    "STATS",
    "TOP_K",
    "CocoEvaluator",
    "CocoMetric",
    "Predictor",
    "evaluate_detector",
    "format_table",
    "milliseconds_per_image",
    "postprocess",
]
