"""Matching-free knowledge distillation for the detection transformers of Hugging Face Transformers."""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {"use_fast_criterion": "fast_criterion"}  # name -> module, imported when the name is asked for


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
