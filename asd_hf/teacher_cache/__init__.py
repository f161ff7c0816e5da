"""A teacher's predictions on disk: written once, then read by every training in the teacher's place."""

from .manifest import Contents, Manifest, weights_sha256
from .read import TeacherCache
from .write import CacheWriter

__all__ = ["CacheWriter", "Contents", "Manifest", "TeacherCache", "weights_sha256"]
