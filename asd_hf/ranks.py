"""What the ranks of a run must have in common, and how the end of one shows on the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import torch.distributed as dist

from .checkpoints import PARTIAL, clear, writing
from .errors import UserError

_GLOO = ("gloo/transport/", "Application timeout caused pair closure")  # gloo raises RuntimeErrors that say this


@contextmanager
def heard() -> Iterator[None]:
    """Within, it is a UserError that another rank has ended, or has not answered within `training.ddp_timeout`."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(part in str(error) for part in _GLOO)
        if not (lost and dist.is_initialized()):
            raise
        reason = " ".join(str(error).split()).rpartition("] ")[2].partition(". ")[0]
        raise UserError(
            f"another rank has ended, or has not answered within training.ddp_timeout ({reason[:100]}): see what it "
            "said; a training goes on from its newest checkpoint with training.resume_from_checkpoint=true"
        ) from error


def require_shared(folder: Path) -> None:
    """Checks that `folder` can be written to and is one and the same for all ranks. Collective: all must call it.

    Raises:
        UserError: rank 0 cannot write to it; or one does not see what it writes, on every rank: checkpoints would
            lack what that one writes.
    """
    several = dist.is_available() and dist.is_initialized()
    rank, name = dist.get_rank() if several else 0, [uuid4().hex]  # a name that no file system has looked for yet
    if several:
        dist.broadcast_object_list(name)
    mark = folder / PARTIAL / name[0]
    if rank == 0:
        with writing(folder):
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
    seen = [True]
    if several:
        dist.barrier()
        seen = [None] * dist.get_world_size()
        dist.all_gather_object(seen, mark.is_file())
    if rank == 0:
        clear(mark.parent)
    if not all(seen):
        raise UserError(
            f"rank {seen.index(False)} does not see what rank 0 writes to {folder}: training.output_dir must be a "
            "folder that all machines share"
        )
