"""Data parallelism between processes, with one exchange a step.

On a busy two-core machine two processes of one thread each learn faster than one
process of two threads: threads meet after every matrix product, these once a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as distributed


class Group:
    """The processes of one run; a group of one exchanges nothing."""

    def __init__(self, rank: int, size: int, address: str) -> None:
        self.rank = rank
        self.size = size
        if size > 1:
            distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=size)

    def average(
        self, parameters: Sequence[torch.nn.Parameter], numbers: Sequence[float]
    ) -> list[float]:
        """Average the gradients in place, and `numbers`, which it returns.

        Numbers travel with the gradients: the clock among them must be the same
        everywhere, or the processes would disagree about the length of a batch.
        """
        if self.size == 1:
            return list(numbers)
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten().cpu() for g in gradients] + [torch.tensor(numbers)])
        distributed.all_reduce(flat)
        flat /= self.size
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()
        return flat[offset:].tolist()

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1:
            distributed.destroy_process_group()
