"""One question to all ranks, answered without waiting."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist


class Vote:
    """Whether any rank was told to stop, answered alike on all ranks.

    With several ranks the answer is that to the call before: a reduction of one number on the CPU, which runs while
    the step is computed, so that neither the device nor another rank is waited for.

    Args:
        timeout: after which a call raises RuntimeError, if a rank does not answer.
    """

    def __init__(self, world_size: int, timeout: timedelta | None = None) -> None:
        self.group = dist.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None
        self.work = self.flag = None

    def __call__(self, told: bool) -> bool:
        if self.group is None:
            return told
        answer = False
        if self.work is not None:
            self.work.wait()
            answer = bool(self.flag)
        self.flag = torch.tensor(int(told))
        self.work = dist.all_reduce(self.flag, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        return answer
