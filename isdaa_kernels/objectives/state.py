"""What a loss needs beyond its own batch, kept outside it: running means, and numbers of the other ranks."""

import torch
from torch import Tensor, nn

from isdaa_kernels.objectives.batch import CompletionLogprob, PairLogprob


class BatchState(nn.Module):
    """Numbers that an objective takes as options, made from the batch at hand and those before it.

    Called with a batch before the loss is computed, it returns the options, detached, on the batch's device. A module, so that
    `state_dict` and `load_state_dict` save it with a checkpoint and `eval()` keeps an evaluation from moving it. `process_group`: over
    whose ranks the batch is reduced; None: the default group where torch.distributed is initialised, else this process alone. Every rank
    must make the call, an empty batch included.
    """

    def __init__(self, process_group: object | None = None) -> None:
        super().__init__()
        self.process_group = process_group

    def forward(self, batch: PairLogprob | CompletionLogprob) -> dict[str, Tensor]:
        raise NotImplementedError

    def reduce_sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks, detached."""
        value = value.detach().clone()
        if _distributed():
            torch.distributed.all_reduce(value, group=self.process_group)
        return value


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
