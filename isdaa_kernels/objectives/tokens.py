"""Factors for the log-probs of single tokens, before they are summed over a completion. Letters: N tokens of a packed batch."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenPlace:
    """Where each token stands, fp64 [N]; what it says of tokens that are not scored is not used."""

    position: Tensor  # scored tokens before it in its completion
    length: Tensor  # scored tokens of its completion
    other_length: Tensor  # of the shorter one, if several, of the completions that it is paired with


def tail_weight(place: TokenPlace, *, tail_weight: float = 0.5) -> Tensor:
    """1 for the first min(|chosen|, |rejected|) tokens of a completion, `tail_weight` beyond; [N].

    Liu et al. 2024 (LD-DPO, arXiv 2409.06411), where it is called alpha. One number: a completion may be in several pairs.
    """
    in_both = place.position < torch.minimum(place.length, place.other_length)
    # where() of two numbers would round them to fp32
    return torch.where(in_both, torch.ones_like(place.position), tail_weight)
