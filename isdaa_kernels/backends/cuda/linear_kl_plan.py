"""Tiles, workspace and matrix work of `linear_kl` on a GPU that need not be here: pure arithmetic.

N tokens, D hidden size (E that of the reference), V vocabulary, T tokens of a slab, C vocabulary rows of a chunk.
"""

from dataclasses import dataclass, replace

import torch

from isdaa_kernels.backends.cuda.launch_linear_kl import SLOT_BYTES, SLOT_COLUMNS
from isdaa_kernels.backends.cuda.shapes import CudaShapes
from isdaa_kernels.backends.gpu import plan as exact
from isdaa_kernels.backends.gpu.call import Call, product_dtype
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.workspace import MIB, Plan, ceil_div, refuse_budget

STRIPE_MIB = 256  # of both heads' logits for all of the vocabulary, which jsd's forward would like to keep
_LEAST_STRIPE = 256  # tokens
_TOKEN_BYTES = 160  # of the call: numbers, as the backward keeps them, coefficient, bound, index, slot, target


@dataclass(frozen=True)
class Side:
    """One of the two models as a problem of its own: products of `dtype`, summed in fp32."""

    problem: Problem

    @property
    def dtype(self) -> torch.dtype:
        return product_dtype(self.problem)

    def bytes(self, T: int, C: int, columns: int) -> int:
        """A slab of hidden states, a chunk of the weight in another dtype, and logits [T, columns]."""
        converted = C * self.problem.D * self.dtype.itemsize if self.problem.weight_dtype != self.dtype else 0
        return T * (self.problem.D + 8) * self.dtype.itemsize + converted + 4 * T * columns


def sides(problem: Problem) -> tuple[Side, Side]:
    """(policy, reference)."""
    divergence, alone = problem.divergence, replace(problem, divergence=None)
    hidden_dtype, weight_dtype = divergence.dtypes()
    other = replace(alone, D=divergence.reference_D, hidden_dtype=hidden_dtype, weight_dtype=weight_dtype)
    return Side(alone), Side(other)


def halves(problem: Problem) -> int:
    """Products that each gradient takes: of 16 bits one more, of what rounding the chunk leaves. Unlike that of a log-prob the gradient
    has no one entry that outweighs the others and could stand outside the chunk."""
    return 2 if sides(problem)[0].dtype.itemsize == 2 else 1


def forward_shape(problem: Problem) -> tuple[int, int]:
    """(tokens, columns) of the forward's products, which depend on the vocabulary and the device alone, and so do the bits of what comes
    out. jsd: as many tokens as leave the logits of both heads small enough to be kept."""
    T, C = exact.forward_shape(_policy_call(problem))
    if problem.divergence.direction == "jsd":
        while T > _LEAST_STRIPE and 2 * 4 * T * problem.V > STRIPE_MIB * MIB:
            T //= 2
    return T, C


def keeps_stripe(problem: Problem) -> bool:
    """Whether jsd's forward keeps both heads' logits of a slab, instead of making them again when it has the log-sum-exps."""
    return problem.divergence.direction == "jsd" and _forward_bytes(problem, True) + _fixed_bytes(problem) <= _budget(
        problem
    )


def make_plan(problem: Problem) -> Plan:
    """The slabs and chunks that move the fewest bytes of those that fit, as `backends.gpu.plan` chooses them. A unit is a product of the
    policy; one of the reference counts by its hidden size. Without `max_workspace_mb` nothing is refused."""
    limited, both = problem.max_workspace_mb is not None, problem.need_hidden and problem.need_weight
    shapes = [(T, C) for T in exact._slabs(_policy_call(problem)) for C in exact._chunks(problem)]
    one_pass = [
        s
        for s in shapes
        if _bytes(problem, *s, split=False) - (0 if limited else exact._sums(problem, s[0])) <= _budget(problem)
    ]
    split = not one_pass and both and limited
    fit = [s for s in shapes if _bytes(problem, *s, split=True) <= _budget(problem)] if split else one_pass
    if not fit:
        if limited:
            raise refuse_budget(problem.max_workspace_mb, min(_bytes(problem, *s, both) for s in shapes))
        fit = [shapes[-1]]
    T, C = min(fit, key=lambda shape: exact._traffic(problem, *shape))
    work = problem.need_hidden + problem.need_weight
    again = problem.divergence.direction == "jsd" and not keeps_stripe(problem)
    passes = 1 + again + (2 if split else 1) * (work > 0)
    return Plan(
        backend="cuda",
        token_tile=T,
        vocab_tile=C,
        chunks=ceil_div(problem.N, T) * ceil_div(problem.V, C),
        kept_tokens=0,
        split=split,
        bytes=_bytes(problem, T, C, split),
        units=passes * (1 + problem.divergence.reference_D / problem.D) + halves(problem) * work,
    )


def _policy_call(problem: Problem) -> Call:
    return Call(CudaShapes(fused=False), sides(problem)[0].problem)


def _budget(problem: Problem) -> float:
    return (exact.DEFAULT_MIB if problem.max_workspace_mb is None else problem.max_workspace_mb) * MIB


def _fixed_bytes(problem: Problem) -> int:
    return problem.N * _TOKEN_BYTES


def _bytes(problem: Problem, T: int, C: int, split: bool) -> int:
    backward = 0
    if problem.need_hidden or problem.need_weight:
        backward = exact._backward_bytes(_policy_call(problem), T, C, split) + sides(problem)[1].bytes(T, C, C)
        backward += 0 if split else exact._sums(problem, T)
    return _fixed_bytes(problem) + max(_forward_bytes(problem, keeps_stripe(problem)), backward)


def _forward_bytes(problem: Problem, stripe: bool) -> int:
    T, C = forward_shape(problem)
    slots = T * ceil_div(problem.V, SLOT_COLUMNS) * SLOT_BYTES
    return slots + sum(side.bytes(T, C, problem.V if stripe else C) for side in sides(problem))
