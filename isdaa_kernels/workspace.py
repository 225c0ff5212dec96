"""The planner: how a call is cut into tiles, how much memory that takes, and how much matrix work it costs.

N scored tokens, D hidden size, V vocabulary. A unit is one product of 2 N V D flop.
"""

import math
from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Plan:
    """How one call will run. `bytes` counts what is allocated beyond inputs, the output and the gradients themselves."""

    backend: str
    token_tile: int  # tokens of a backward tile
    vocab_tile: int  # vocabulary rows of a tile
    chunks: int  # tiles of the backward
    kept_tokens: int  # tokens whose logits wait for the backward instead of being recomputed
    split: bool  # d_hidden and d_weight in two passes, each recomputing logits, because an fp32 d_hidden did not fit
    bytes: int
    units: float  # matrix work of forward and backward
    hidden_in_forward: bool = False  # the forward prepares d_hidden, which the backward only scales

    def __str__(self) -> str:
        return (
            f"{self.backend}: {self.chunks} tiles of {self.token_tile} tokens x {self.vocab_tile} vocabulary rows, "
            f"{self.kept_tokens} tokens keep their logits, {self._backward()} backward, "
            f"{self.bytes / MIB:.1f} MiB, {self.units:.2f} units"
        )

    def _backward(self) -> str:
        if self.hidden_in_forward:
            return "forward prepares the"
        return "two passes" if self.split else "one pass"


def refuse_budget(max_workspace_mb: float, needed: int) -> ValueError:
    least = math.ceil(10 * needed / MIB) / 10
    return ValueError(f"max_workspace_mb: expected at least {least:.1f} for this problem, got {max_workspace_mb}")


def check_workspace(max_workspace_mb: float | None) -> None:
    if max_workspace_mb is not None and not 0 < max_workspace_mb < float("inf"):
        raise ValueError(f"max_workspace_mb: expected a positive number or None, got {max_workspace_mb}")


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
