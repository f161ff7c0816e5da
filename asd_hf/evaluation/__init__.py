from .coco import STATS, CocoEvaluator, CocoMetric, format_table
from .latency import milliseconds_per_image
from .predict import postprocess

__all__ = ["STATS", "CocoEvaluator", "CocoMetric", "format_table", "milliseconds_per_image", "postprocess"]
