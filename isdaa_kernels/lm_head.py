"""The language-model head as one object, and the transform between its matrix product and the final logits."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LMHead:
    """What turns hidden states into logits: `softcap * tanh((hidden @ weight.T + bias) * logit_scale / softcap)`.

    weight [V, D] and bias [V] keep their own dtypes and are never copied. `logit_scale` multiplies (Cohere; Granite divides, so pass
    the inverse); `softcap` is Gemma's final soft-capping. Raises ValueError for shapes and values that do not fit.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2:
            raise ValueError(f"weight: expected [V, D], got {list(self.weight.shape)}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"bias: expected [{self.weight.shape[0]}], got {list(self.bias.shape)}")
        check_head_numbers(self.logit_scale, self.softcap)

    def requires_grad(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)


def check_head_numbers(logit_scale: float, softcap: float | None) -> None:
    """ValueError for a scale or a softcap that is no number of the right kind."""
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap)):
        if isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a number, which gets no gradient, got a tensor")
    if not 0 < abs(logit_scale) < float("inf"):
        raise ValueError(f"logit_scale: expected a finite number other than 0, got {logit_scale}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap: expected a positive finite number or None, got {softcap}")


@dataclass(frozen=True)
class Transform:
    """The head without its weight, as the backends receive it: x -> z, elementwise (formula in `linear_logprob`)."""

    bias_V: Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: float
    temperature_N: Tensor | None  # takes the place of `temperature`, one value a token
    order_V: Tensor | None = None  # of the vocabulary rows in the blocks of a routed backward

    def in_order(self, values_V: Tensor) -> Tensor:
        """Numbers of the vocabulary rows in the order of the blocks."""
        return values_V if self.order_V is None else values_V.index_select(0, self.order_V)

    def placed(self, targets_N: Tensor) -> Tensor:
        """int64: where the targets stand in the order of the blocks; those that are no vocabulary row stay what they are."""
        targets_N = targets_N.long()
        if self.order_V is None:
            return targets_N
        V = len(self.order_V)
        place_V = torch.empty_like(self.order_V)
        place_V[self.order_V] = torch.arange(V, device=place_V.device)
        known_N = (targets_N >= 0) & (targets_N < V)
        return torch.where(known_N, place_V.index_select(0, targets_N.clamp(0, V - 1)), targets_N)

    def inverse_temperature(self, rows: Tensor | None, dtype: torch.dtype) -> Tensor | float:
        """1 / temperature, of the tokens `rows` (None: of all) where each has its own."""
        if self.temperature_N is None:
            return 1.0 / self.temperature
        chosen = self.temperature_N if rows is None else self.temperature_N.index_select(0, rows)
        return chosen.to(dtype).reciprocal()
