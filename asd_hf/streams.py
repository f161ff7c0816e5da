"""Work that a GPU may do beside other work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """A CUDA stream beside the current one, on which work gives the same numbers; on a CPU it is done in turn.

    No tensor needs `record_stream`. What the current stream lends it takes back after `join`; what was made here is
    overwritten in the next `running` at the earliest, which begins by waiting for all that has been queued to read it.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Queues the work of the block here, behind what is queued on the current stream by now."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Lets the current stream wait for all that is queued here; the host does not."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
