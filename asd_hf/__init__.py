"""Matching-free knowledge distillation for the detection transformers of Hugging Face Transformers."""

__version__ = "0.1.0"

from . import models  # noqa: F401 (makes AdaMixer known to Transformers' Auto classes)
from .deformable_attention import use_fast_deformable_attention
from .fast_criterion import use_fast_criterion

__all__ = ["use_fast_criterion", "use_fast_deformable_attention"]
