"""The loss stage in one launch: from log-probs to the loss of preference pairs, its metrics and the slopes of the sums.

What is covered; the rest is computed by PyTorch from the formulas in `objectives`, which give the same to within fp64 rounding (a gradient
that is not finite may be inf in one and NaN in the other):

    objectives   dpo (with label smoothing), ipo, ipo_mean, slic, and each with a weight (is_...): the loss of a pair is a closed function
                 of its two sums of log-ratios, or of their means. An `Objective` of the caller's own is not.
    importance   an `ImportanceWeight` with any settings; not an instance of a subclass
    tensors      beta and label_smoothing with one value a pair, sample_weight, denominator, unless they require a gradient or lie on
                 another device than the policy

This file holds the way from `preference_loss` through an operator to a kernel. A kernel is called with the fields of
csrc/pair_loss_params.h; the Triton kernels take the same tensors.

N numbers of the policy: token log-probs of a packed batch, or, without cu_seqlens, one sum a sequence (N = S). S sequences, P pairs, K
pieces that a sequence is cut into for summing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

BASES = ("dpo", "ipo", "ipo_mean", "slic")  # in the order of csrc/pair_loss.h, as is what follows
MODES = ("joint", "per_completion", "none")
METRICS = 13
RECORD = 13  # numbers of a pair in the workspace
SUMS = 4  # numbers of a piece in the workspace: policy, reference, behaviour, scored tokens
PIECE = 4096  # tokens that a block sums when all sequences are of one length
MOST_PIECES = 64


@dataclass(frozen=True)
class PairLossNumbers:
    """What does not differ from pair to pair. weighted: there is an importance weight, whose settings follow (floor 0: none). beta,
    label_smoothing and denominator (0: the number of pairs) hold where no tensor of terms is given."""

    base: int
    mode: int = 0
    weighted: bool = False
    normalize: bool = False
    detach: bool = True
    ignore_index: int = -100
    beta: float = 0.0
    label_smoothing: float = 0.0
    denominator: float = 0.0
    epsilon: float = 0.0
    floor: float = 0.0
    power: float = 1.0
    length_exponent: float = 0.0

    def pack(self) -> list[float]:
        """As the operator takes it; `unpack` is its inverse."""
        return [float(getattr(self, name)) for name in _NUMBERS]

    @classmethod
    def unpack(cls, numbers: Sequence[float]) -> "PairLossNumbers":
        base, mode, weighted, normalize, detach, ignore_index, *others = numbers
        return cls(int(base), int(mode), bool(weighted), bool(normalize), bool(detach), int(ignore_index), *others)


_NUMBERS = tuple(field.name for field in fields(PairLossNumbers))


@dataclass(frozen=True)
class Packing:
    """Which number of the policy belongs to which sequence, and which sequences make a pair."""

    N: int
    cu_seqlens: Tensor | None  # [S + 1] int32 or int64, as the next
    targets: Tensor | None  # [N], or None: all tokens are scored
    pairs: Tensor | None  # [P, 2], or None: p and P + p
    ignore_index: int

    @classmethod
    def of(cls, N: int, cu_seqlens: Tensor | None, targets: Tensor | None, pairs: Tensor | None, ignore_index: int):
        return cls(N, _integers(cu_seqlens), _integers(targets), _integers(pairs), ignore_index)

    @property
    def n_sequences(self) -> int:
        return self.N if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def n_pairs(self) -> int:
        return self.n_sequences // 2 if self.pairs is None else self.pairs.shape[0]

    def pieces(self) -> int:
        """K for a GPU. It depends on shapes alone, so that the order of summation does."""
        if self.cu_seqlens is None:
            return 1
        return min(max(-(-self.N // (max(self.n_sequences, 1) * PIECE)), 1), MOST_PIECES)

    def arguments(self, K: int) -> dict[str, int]:
        return {
            **_address("cu_seqlens", self.cu_seqlens),
            **_address("targets", self.targets),
            **_address("pairs", self.pairs),
            "N": self.N,
            "S": self.n_sequences,
            "P": self.n_pairs,
            "K": K,
            "ignore_index": self.ignore_index,
        }


@dataclass(frozen=True)
class PairLossCall:
    """The arguments of a forward, as kernels can read them: without gaps, and in a dtype that they know."""

    packing: Packing
    policy: Tensor  # [N] fp32 or fp64, as the next two
    reference: Tensor  # [N]; or [1, S], a sum for each sequence
    behaviour: Tensor | None  # likewise; None: the reference
    lengths: Tensor | None  # fp64 [S], without cu_seqlens only; None: no completion is empty
    terms: (
        Tensor | None
    )  # fp64 [4, P]: beta, label_smoothing, sample_weight, denominator; None: as in `numbers`, sample weights of 1
    numbers: PairLossNumbers

    @classmethod
    def of(
        cls, policy, reference, behaviour, cu_seqlens, scored, pairs, terms, numbers: Sequence[float]
    ) -> "PairLossCall":
        """scored: targets [N] with cu_seqlens, else lengths [S]."""
        numbers = PairLossNumbers.unpack(numbers)
        targets, lengths = (None, scored) if cu_seqlens is None else (scored, None)
        packing = Packing.of(policy.shape[0], cu_seqlens, targets, pairs, numbers.ignore_index)
        logprobs = (_wide(policy), _wide(reference), _wide(behaviour))
        return cls(packing, *logprobs, None if lengths is None else lengths.double().contiguous(), terms, numbers)

    @property
    def denominator(self) -> float:
        return self.numbers.denominator or float(max(self.packing.n_pairs, 1))

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """(loss [], metrics [METRICS], slope [2, P]), not yet written."""
        device = self.policy.device
        return (
            torch.empty((), dtype=torch.float32, device=device),
            torch.empty(METRICS, dtype=torch.float32, device=device),
            torch.empty(2, self.packing.n_pairs, dtype=torch.float64, device=device),
        )

    def forward(self, kernel: Callable[..., None], K: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Runs a kernel of csrc, which takes the fields of PairLossForward, and gives what `outputs` says."""
        packing, numbers = self.packing, self.numbers
        loss, metrics, slope = self.outputs()
        sums = packing.n_sequences * K * SUMS if packing.cu_seqlens is not None else 0
        workspace = torch.empty(1 + sums + packing.n_pairs * RECORD, dtype=torch.float64, device=slope.device)
        kernel(
            **packing.arguments(K),
            **_address("policy", self.policy),
            **_address("reference", self.reference),
            **_address("behaviour", self.behaviour),
            reference_per_token=self.reference.ndim == 1,
            behaviour_per_token=self.behaviour is not None and self.behaviour.ndim == 1,
            lengths=_pointer(self.lengths),
            terms=_pointer(self.terms),
            counter=workspace.data_ptr(),
            sums=workspace.data_ptr() + 8,
            records=workspace.data_ptr() + 8 + 8 * sums,
            slope=slope.data_ptr(),
            loss=loss.data_ptr(),
            metrics=metrics.data_ptr(),
            base=numbers.base,
            mode=numbers.mode,
            weighted=numbers.weighted,
            normalize=numbers.normalize,
            detach=numbers.detach,
            beta=numbers.beta,
            label_smoothing=numbers.label_smoothing,
            denominator=self.denominator,
            epsilon=numbers.epsilon,
            floor=numbers.floor,
            power=numbers.power,
            length_exponent=numbers.length_exponent,
        )
        return loss, metrics, slope


def backward(
    kernel: Callable[..., None], packing: Packing, grad: Tensor, slope: Tensor, like: Tensor, K: int = 1
) -> Tensor:
    """d_policy [N] in the dtype of `like`, by a kernel of csrc, which takes the fields of PairLossBackward."""
    out = torch.empty(packing.N, dtype=like.dtype if like.dtype in _WIDE else torch.float32, device=like.device)
    kernel(**packing.arguments(K), grad=grad.data_ptr(), slope=slope.data_ptr(), **_address("out", out))
    return out.to(like.dtype)


_WIDE = (torch.float32, torch.float64)


def _wide(logprob: Tensor | None) -> Tensor | None:
    if logprob is None:
        return None
    return (logprob if logprob.dtype in _WIDE else logprob.float()).contiguous()


def _integers(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return (tensor if tensor.dtype in (torch.int32, torch.int64) else tensor.long()).contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _address(name: str, tensor: Tensor | None) -> dict[str, int]:
    return {name: _pointer(tensor), f"{name}_bytes": 0 if tensor is None else tensor.element_size()}
