"""What a loss needs beyond its own batch, kept outside it: running means, and numbers of the other ranks."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from isdaa_kernels.objectives.batch import CompletionLogprob, PairLogprob


class BatchState(nn.Module):
    """Numbers that an objective takes as options, made from the batch at hand and those before it.

    Called with a batch before the loss is computed, it returns the options, detached, on the batch's device. A module, so that
    `state_dict` and `load_state_dict` save it with a checkpoint and `eval()` keeps an evaluation from moving it. `gives` names the options
    that it returns, which a caller cannot give then. `process_group`: over
    whose ranks the batch is reduced; None: the default group where torch.distributed is initialised, else this process alone. Every rank
    must make the call, an empty batch included.
    """

    gives: frozenset[str] = frozenset()

    def __init__(self, process_group: object | None = None) -> None:
        super().__init__()
        self.process_group = process_group

    def forward(self, batch: PairLogprob | CompletionLogprob) -> dict[str, Tensor]:
        raise NotImplementedError

    def _apply(self, fn, recurse=True):
        """Moves with a model, and keeps its numbers in their dtype when the model changes its own."""
        for name, buffer in self._buffers.items():
            self._buffers[name] = buffer.to(fn(buffer).device)
        return self

    def reduce_sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks, detached."""
        value = value.detach().clone()
        if self.n_ranks() > 1:
            torch.distributed.all_reduce(value, group=self.process_group)
        return value

    def n_ranks(self) -> int:
        """1 where torch.distributed is not initialised."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return 1
        return torch.distributed.get_world_size(self.process_group)


class GatheringState(BatchState):
    """A state that looks at every pair of all ranks. `pairs_per_rank`: the most pairs that a rank ever has; None: the ranks tell each
    other how many they have, and the host waits for that, once a batch. One rank alone never waits."""

    def __init__(self, pairs_per_rank: int | None = None, process_group: object | None = None) -> None:
        super().__init__(process_group)
        if pairs_per_rank is not None and (type(pairs_per_rank) is not int or pairs_per_rank < 1):
            raise ValueError(
                f"{type(self).__name__}: pairs_per_rank: expected a whole number of at least 1, or None, got {pairs_per_rank!r}"
            )
        self.pairs_per_rank = pairs_per_rank

    def gather(self, columns_CP: Tensor) -> tuple[Tensor, int]:
        """(the columns of all ranks one after the other, each rank's filled up with zeros; where this rank's begin)."""
        ranks = self.n_ranks()
        if ranks == 1:
            return columns_CP, 0
        P = columns_CP.shape[1]
        most = self._most_pairs(P, columns_CP.device) if self.pairs_per_rank is None else self.pairs_per_rank
        padded = pad(columns_CP[:, :most], (0, max(most - P, 0))).contiguous()
        gathered = [torch.empty_like(padded) for _ in range(ranks)]
        torch.distributed.all_gather(gathered, padded, group=self.process_group)
        if most < P:  # after the exchange, in which the others would wait for ever
            raise ValueError(
                f"{type(self).__name__}: pairs_per_rank: expected at least the {P} pairs of this rank, got {most}"
            )
        return torch.cat(gathered, 1), most * torch.distributed.get_rank(self.process_group)

    def _most_pairs(self, P: int, device: torch.device) -> int:
        most = torch.full((), P, device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=self.process_group)
        return int(most)
