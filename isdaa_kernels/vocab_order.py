"""An order of the vocabulary in which rows whose logits move together share a block: the routed backward then finds each token's
probability in fewer blocks.

V vocabulary, D hidden size, N hidden states.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_POWER_STEPS = 8


@dataclass(frozen=True)
class VocabOrder:
    """A permutation of the vocabulary: block b holds the rows `rows[b * block : (b + 1) * block]` of the head, which itself keeps its
    order. Made by `make_vocab_order`; `save` and `load` keep it in a file, written whole or not at all.

    Raises ValueError for rows that are no permutation.
    """

    rows: Tensor  # int64 [V]

    def __post_init__(self) -> None:
        if self.rows.dim() != 1 or self.rows.dtype != torch.int64:
            raise ValueError(f"rows: expected an int64 tensor [V], got {self.rows.dtype} {list(self.rows.shape)}")
        if not torch.equal(self.rows.sort().values, torch.arange(len(self.rows), device=self.rows.device)):
            raise ValueError(f"rows: expected each of 0 to {len(self.rows) - 1} once")
        object.__setattr__(self, "rows", self.rows.contiguous())  # kernels read them as they lie

    def to(self, device: torch.device | str) -> "VocabOrder":
        return VocabOrder(self.rows.to(device))

    def save(self, path: str | Path) -> None:
        path = Path(path)
        part = path.with_name(path.name + ".part")
        torch.save({"rows": self.rows.cpu()}, part)
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "VocabOrder":
        found = torch.load(path, weights_only=True)
        if not isinstance(found, dict) or set(found) != {"rows"}:
            raise ValueError(f"path: expected a file that VocabOrder.save wrote, got {path}")
        return cls(found["rows"])


def make_vocab_order(weight: Tensor, hidden_sample: Tensor, block: int = 128, *, seed: int = 0) -> VocabOrder:
    """Split the vocabulary in halves along the first principal component of `weight @ sqrt(hidden' hidden / N)`, again and again, down
    to blocks. In that geometry two rows are as near as their logits are on the sample: a few hundred hidden states of any text are
    enough. The same inputs and seed give the same order.

    weight [V, D], hidden_sample [..., D]; neither is changed or kept, one fp32 copy of weight is made on the way. Blocks are those that
    `Routed(block=...)` names; an order made for small blocks serves larger ones too.
    """
    if weight.dim() != 2 or hidden_sample.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden_sample: expected [..., {weight.shape[-1]}] to fit weight {list(weight.shape)}, got {list(hidden_sample.shape)}"
        )
    hidden_ND = hidden_sample.detach().reshape(-1, weight.shape[1]).float()
    if len(hidden_ND) == 0 or not hidden_ND.isfinite().all():
        raise ValueError(
            f"hidden_sample: expected finite hidden states, got {list(hidden_sample.shape)} with others or none"
        )
    values_D, vectors_DD = torch.linalg.eigh(hidden_ND.T @ hidden_ND / len(hidden_ND))
    points_VD = weight.detach().float() @ (vectors_DD * values_D.clamp_min(0).sqrt())
    random = torch.Generator().manual_seed(seed)
    leaves, pending = [], [torch.arange(len(points_VD), device=weight.device)]
    while pending:
        rows = pending.pop()
        if len(rows) <= block:
            leaves.append(rows)
            continue
        rows = rows[_along_first_component(points_VD[rows], random).argsort(stable=True)]
        blocks = -(-len(rows) // block)
        half = blocks // 2 * block
        pending += [rows[half:], rows[:half]]  # the first half is taken next
    return VocabOrder(torch.cat(leaves))


def _along_first_component(points: Tensor, random: torch.Generator) -> Tensor:
    centred = points - points.mean(0)
    axis_D = torch.randn(points.shape[1], generator=random).to(points.device)
    for _ in range(_POWER_STEPS):
        axis_D = centred.T @ (centred @ axis_D)
        axis_D = axis_D / axis_D.norm().clamp_min(1e-30)
    return centred @ axis_D
