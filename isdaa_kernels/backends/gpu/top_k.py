"""The k largest probabilities of each token: a pass over chunks of logits, merged by torch.topk. No gradient.

A pass of its own, with a product of its own (one unit), because the k largest of a row do not live in one tile's registers.
R tokens of a piece, C vocabulary rows of a chunk, V vocabulary, D hidden size, S statistics asked for.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from isdaa_kernels.backends.gpu.library import product
from isdaa_kernels.backends.gpu.slabs import Head, LiveTokens
from isdaa_kernels.stats import StatsRequest

ROWS, COLUMNS = 1024, 8192  # of a chunk: 32 MiB
NAMES = ("top_k_mass", "top_k_entropy")


def library_logits(hidden_TD: Tensor, weight_VD: Tensor, C: int) -> Iterator[tuple[int, Tensor]]:
    """(first vocabulary row, fp32 product [T, <= C]) of each chunk, in one buffer."""
    buffer = torch.empty(len(hidden_TD) * min(C, len(weight_VD)), dtype=torch.float32, device=hidden_TD.device)
    for begin in range(0, len(weight_VD), C):
        weight_CD = weight_VD[begin : begin + C].to(hidden_TD.dtype)
        logits_TC = buffer[: len(hidden_TD) * len(weight_CD)].view(len(hidden_TD), len(weight_CD))
        yield begin, product(hidden_TD, weight_CD.T, out=logits_TC)


class TopK:
    """The top-k statistics of the live tokens, gathered piece by piece and then brought into token order."""

    def __init__(self, stats: StatsRequest, live: LiveTokens, head: Head):
        self.stats, self.live, self.head = stats, live, head
        self.values_2M = torch.empty(2, live.capacity, dtype=torch.float32, device=live.rows_M.device)

    def add(self, start: int, chunks: Iterable[tuple[int, Tensor]], inverse_R: Tensor, lse_N: Tensor) -> None:
        """Tokens start..start + R of the live ones, from chunks of fp32 products [R, C], which are overwritten."""
        k, best_RK = self.stats.top_k, None
        for begin, x_RC in chunks:
            z_RC = _final_logits(x_RC, begin, self.head, inverse_R)
            largest_RK = z_RC.topk(min(k, z_RC.shape[1]), dim=1).values
            merged_RK = largest_RK if best_RK is None else torch.cat([best_RK, largest_RK], 1)
            best_RK = merged_RK.topk(min(k, merged_RK.shape[1]), dim=1).values
        stop = start + len(best_RK)
        log_p_RK = best_RK.double() - lse_N.index_select(0, self.live.rows_M[start:stop])[:, None]
        p_RK = log_p_RK.exp()
        self.values_2M[0, start:stop] = p_RK.sum(1)
        self.values_2M[1, start:stop] = -torch.where(p_RK > 0, p_RK * log_p_RK, p_RK).sum(1)

    def write(self, stats_SN: Tensor) -> None:
        for s, name in enumerate(self.stats.names):
            if name in NAMES:
                stats_SN[s] = self.live.spread(self.values_2M[NAMES.index(name)], stats_SN[s])


def add_products(
    top_k: TopK, hidden_TD: Tensor, weight_VD: Tensor, inverse_T: Tensor, first: int, lse_N: Tensor
) -> None:
    """A slab of tokens, in pieces of ROWS, from products made here."""
    count = min(len(hidden_TD), top_k.live.capacity - first)
    for a in range(0, count, ROWS):
        b = min(a + ROWS, count)
        top_k.add(first + a, library_logits(hidden_TD[a:b], weight_VD, COLUMNS), inverse_T[a:b], lse_N)


def _final_logits(x_RC: Tensor, begin: int, head: Head, inverse_R: Tensor) -> Tensor:
    if head.bias_V is not None:
        x_RC += head.bias_V[begin : begin + x_RC.shape[1]]
    x_RC *= head.transform.logit_scale
    if head.transform.softcap is not None:
        x_RC.div_(head.transform.softcap).tanh_().mul_(head.transform.softcap)
    return x_RC.mul_(inverse_R[:, None])
