from .coco import STATS, CocoEvaluator
from .predict import postprocess

__all__ = ["STATS", "CocoEvaluator", "postprocess"]
