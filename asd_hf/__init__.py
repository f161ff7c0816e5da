"""Matching-free knowledge distillation for the detection transformers of Hugging Face Transformers."""

__version__ = "0.1.0"
