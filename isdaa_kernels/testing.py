"""What tests and benchmarks share: sample problems, the fp64 truth, the error contract, a flop counter, NaN-poisoned memory.

N tokens, D hidden size, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from isdaa_kernels import ops
from isdaa_kernels.backends.cpu import products
from isdaa_kernels.backends.cpu.routed_kernels import RoutedKernels
from isdaa_kernels.lm_head import LMHead
from isdaa_kernels.stats import DIFFERENTIABLE, STATS, VocabStats

_OPERATORS = {
    torch.ops.isdaa.linear_kl_forward.default: ops.linear_kl_forward._init_fn,
    torch.ops.isdaa.linear_kl_backward.default: ops.linear_kl_backward._init_fn,
    torch.ops.isdaa.linear_logprob_forward.default: ops.linear_logprob_forward._init_fn,
    torch.ops.isdaa.linear_logprob_backward.default: ops.linear_logprob_backward._init_fn,
    torch.ops.isdaa.logprob_from_logits_forward.default: ops.logprob_from_logits_forward._init_fn,
    torch.ops.isdaa.logprob_from_logits_backward.default: ops.logprob_from_logits_backward._init_fn,
    torch.ops.isdaa.logprob_from_logits_backward_.default: ops.logprob_from_logits_backward_._init_fn,
}
_PRODUCTS = {  # operator -> positions of its two factors
    "mm": (0, 1),
    "matmul": (0, 1),  # of two matrices: seen undivided inside our operators
    "addmm": (1, 2),
    "bmm": (0, 1),
    "baddbmm": (1, 2),
}


@dataclass
class Sample:
    """A problem with its upstream gradient; `grads` runs a function of (hidden, weight, bias) and returns value and gradients."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    upstream: Tensor  # [N]
    bias: Tensor | None = None  # [V]

    def grads(self, function, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """(value, d_hidden, d_weight[, d_bias]) of `function(hidden, weight, bias)`, inputs cast to `dtype` first."""
        leaves = [
            x.detach().to(dtype or x.dtype).requires_grad_()
            for x in (self.hidden, self.weight, self.bias)
            if x is not None
        ]
        value = function(leaves[0], leaves[1], leaves[2] if self.bias is not None else None)
        value.backward(self.upstream.to(value.dtype))
        return value.detach(), *(leaf.grad for leaf in leaves)


def make_sample(
    N: int,
    D: int,
    V: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    ignored: float = 0.0,
    sharpness: float = 3.0,
    seed: int = 0,
) -> Sample:
    """Random states whose logits have the standard deviation `sharpness`; a share `ignored` of the targets is -100."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=random).to(dtype)
    weight = (torch.randn(V, D, generator=random) * sharpness / D**0.5).to(dtype)
    targets = torch.randint(V, (N,), generator=random)
    targets[torch.rand(N, generator=random) < ignored] = -100
    upstream = torch.randn(N, generator=random)
    return Sample(hidden, weight, targets, upstream, torch.randn(V, generator=random).to(dtype) if bias else None)


def dense_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """The same numbers by autograd over dense logits, in fp32 (fp64 for fp64 inputs): truth and contender."""
    head = {"logit_scale": logit_scale, "softcap": softcap, "temperature": temperature}
    return dense_logprob_from_logits(_dense_product(hidden, weight, bias), targets, ignore_index=ignore_index, **head)


def dense_logprob_from_logits(logits: Tensor, targets: Tensor, *, ignore_index: int = -100, **head) -> Tensor:
    """`logprob_from_logits` by autograd over an fp32 (fp64) copy of the logits."""
    z = _dense_transform(logits, **head)
    scored = targets != ignore_index
    picked = z.log_softmax(-1).gather(-1, targets.where(scored, 0).long()[..., None])[..., 0]
    return picked.where(scored, 0.0)


def dense_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    stats: Sequence[str] = STATS,
    top_k: int = 20,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    **head,
) -> tuple[Tensor, VocabStats]:
    """`linear_logprob_stats` by autograd over dense logits, straight from the formulas. `head`: logit_scale, softcap, temperature."""
    logits = _dense_product(hidden, weight, bias)
    return dense_stats_from_logits(logits, targets, stats=stats, top_k=top_k, ignore_index=ignore_index, **head)


def dense_stats_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    stats: Sequence[str] = STATS,
    top_k: int = 20,
    ignore_index: int = -100,
    **head,
) -> tuple[Tensor, VocabStats]:
    """`logprob_stats_from_logits` by autograd over an fp32 (fp64) copy of the logits."""
    z, scored = _dense_transform(logits, **head), targets != ignore_index
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    terms = -p * log_p.masked_fill(log_p == float("-inf"), 0)  # 0 log 0 = 0
    largest = p.topk(min(top_k, p.shape[-1])).indices
    target = targets.where(scored, 0).long()[..., None]
    formulas = {
        "entropy": lambda: terms.sum(-1),
        "lse": lambda: z.logsumexp(-1),
        "mean_logit": lambda: z.mean(-1),
        "log_sum_sq_prob": lambda: (2 * log_p).logsumexp(-1),
        "is_top1": lambda: (z.gather(-1, target) >= z).all(-1),
        "top_k_mass": lambda: p.gather(-1, largest).sum(-1),
        "top_k_entropy": lambda: terms.gather(-1, largest).sum(-1),
    }
    values = {
        name: formulas[name]().where(scored, torch.zeros((), dtype=torch.bool if name == "is_top1" else z.dtype))
        for name in stats
    }
    fixed = {name: value if name in DIFFERENTIABLE else value.detach() for name, value in values.items()}
    return log_p.gather(-1, target)[..., 0].where(scored, 0.0), VocabStats(**fixed)


def dense_kl(
    policy_hidden: Tensor,
    policy_head: LMHead,
    reference_hidden: Tensor,
    reference_head: LMHead,
    *,
    direction: str,
    targets: Tensor | None = None,
    jsd_weight: float = 0.5,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """`linear_kl` by autograd over dense logits, straight from the formulas."""
    with torch.no_grad():
        log_q = _dense_log_softmax(reference_hidden, reference_head, temperature)
    log_p = _dense_log_softmax(policy_hidden, policy_head, temperature)
    if direction == "jsd":
        log_m = torch.logaddexp(log_p + math.log(1 - jsd_weight), log_q + math.log(jsd_weight))
        value = (1 - jsd_weight) * _dense_divergence(log_p, log_m) + jsd_weight * _dense_divergence(log_q, log_m)
    else:
        value = _dense_divergence(*((log_q, log_p) if direction == "forward" else (log_p, log_q)))
    return value if targets is None else value.where(targets != ignore_index, 0.0)


def _dense_divergence(log_b: Tensor, log_o: Tensor) -> Tensor:
    none = log_b == float("-inf")  # 0 log 0 = 0
    return (log_b.exp() * (log_b.masked_fill(none, 0) - log_o.masked_fill(none, 0))).sum(-1)


def _dense_log_softmax(hidden: Tensor, head: LMHead, temperature: float | Tensor) -> Tensor:
    numbers = {"logit_scale": head.logit_scale, "softcap": head.softcap, "temperature": temperature}
    return _dense_transform(_dense_product(hidden, head.weight, head.bias), **numbers).log_softmax(-1)


def _dense_product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _dense_transform(
    logits: Tensor, *, logit_scale: float = 1.0, softcap: float | None = None, temperature: float | Tensor = 1.0
) -> Tensor:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature[..., None] if isinstance(temperature, Tensor) and temperature.dim() else temperature)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    value, truth = value.detach().double(), truth.detach().double()
    difference = (value - truth).norm()
    return float(difference / truth.norm().clamp_min(1e-300)) if truth.numel() else 0.0


def row_errors(value: Tensor, truth: Tensor, faint: float = 1e-18) -> Tensor:
    """Norm of each row's difference over the norm of the true row. Rows fainter than `faint` times the largest are judged against
    that floor, as far as they differ at all."""
    value, truth = value.double().flatten(1), truth.double().flatten(1)
    size = truth.norm(dim=1)
    return (value - truth).norm(dim=1) / size.clamp_min(max(faint * float(size.max()), 1e-300))


def assert_error_contract(name: str, ours: Tensor, dense: Tensor, truth: Tensor, floor: float = 2e-7) -> None:
    """Against an fp64 truth: Frobenius error at most 1.5 times that of dense PyTorch with fp32 logits, by row at the 99 % quantile at
    most 4 times; plus a floor (a few units in the last place of fp32)."""
    error, bar = relative_error(ours, truth), 1.5 * relative_error(dense, truth) + floor
    assert error <= bar, f"{name}: Frobenius error {error:.2e} above {bar:.2e}"
    if truth.dim() < 2:
        return
    error, bar = (row_errors(x, truth).quantile(0.99).item() for x in (ours, dense))
    assert error <= 4 * bar + 10 * floor, f"{name}: row error {error:.2e} at the 99 % quantile against {bar:.2e} dense"


class FlopCounter(TorchDispatchMode):
    """Counts the flop of every matrix product inside the block, also within our operators: `with FlopCounter() as c: ...; c.flop`.

    Vector work and matrix-vector products are not counted, nor are products inside the kernels of a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0
        self.watches: list = []  # of the nested entries of this mode

    def __enter__(self):
        self.watches.append(_watched_products(count=self._count) if not self.watches else nullcontext())
        self.watches[-1].__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        self.watches.pop().__exit__(*error)
        return super().__exit__(*error)

    def _count(self, flop: int) -> None:
        self.flop += flop

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _OPERATORS:
            with self:
                return _OPERATORS[func](*args, **(kwargs or {}))
        factors = _PRODUCTS.get(func._schema.name.removeprefix("aten::").removesuffix("_"))
        if factors is not None:
            a, b = (args[i] for i in factors)
            self.flop += 2 * a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within the block torch.empty gives NaN (integers: their largest value), so that an output which nobody wrote shows."""
    plain = torch.empty

    def poisoned(*args, **kwargs):
        out = plain(*args, **kwargs)
        fill = (
            float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max if out.dtype != torch.bool else True
        )
        return out.fill_(fill)

    with mock.patch.object(torch, "empty", poisoned):
        yield


@contextmanager
def walled_empty() -> Iterator[list[Tensor]]:
    """Within the block each tensor of torch.empty lies between two walls of sevens, which are yielded, and holds NaN (integers: their
    largest value). On the CPU alone."""
    margin, walls = 4096, []

    def walled(*shape, dtype=torch.float32, device=None):
        shape = shape[0] if shape and not isinstance(shape[0], int) else shape
        count = int(torch.Size(shape).numel())
        whole = torch.full((count + 2 * margin,), 7, dtype=dtype)
        whole[margin : margin + count] = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
        walls.extend((whole[:margin], whole[margin + count :]))
        return whole[margin : margin + count].view(shape)

    with mock.patch.object(torch, "empty", walled):
        yield walls


@contextmanager
def denormal_numbers_in_products() -> Iterator[list[bool]]:
    """Within the block, for each factor and result of a product of the CPU backend: whether it held a denormal fp32 number."""
    seen: list[bool] = []

    def look(*tensors: Tensor) -> None:
        for tensor in tensors:
            size = tensor.abs()
            seen.append(bool(((size > 0) & (size < torch.finfo(torch.float32).smallest_normal)).any()))

    with _watched_products(look=look):
        yield seen


@contextmanager
def _watched_products(count=lambda flop: None, look=lambda *tensors: None) -> Iterator[None]:
    """Within the block, after each product of the CPU backend: `count(flop)` and `look(*tensors)` at its factors and result. Of a routed
    block `look` sees the gradient of the logits of its last piece of tokens."""
    multiply, block_gradient = products.multiply, RoutedKernels.block_gradient

    def watched_multiply(left, panels, out, *, left_rows=None, out_rows=None, **options):
        multiply(left, panels, out, left_rows=left_rows, out_rows=out_rows, **options)
        factor = left if left_rows is None else left[left_rows]
        look(factor, panels.used(), out if out_rows is None else out[out_rows])
        if factor.numel() > panels.K:  # more than one row
            count(2 * factor.numel() * panels.J)
        return out

    def watched_block(self, routes, b, C, hidden_ND, row_N, weight, scratch, d_hidden_ND, d_CD, need_bias):
        block_gradient(self, routes, b, C, hidden_ND, row_N, weight, scratch, d_hidden_ND, d_CD, need_bias)
        tokens, piece = routes.weight_counts[b], len(scratch.product_TC)
        last = tokens - max(tokens - 1, 0) // piece * piece
        look(scratch.product_TC.view(-1)[: last * C], *(d for d in (d_hidden_ND, d_CD) if d is not None))
        pairs = tokens + (d_CD is not None) * tokens + (d_hidden_ND is not None) * routes.hidden_counts[b]
        count(2 * pairs * C * hidden_ND.shape[1])

    with (
        mock.patch.object(products, "multiply", watched_multiply),
        mock.patch.object(RoutedKernels, "block_gradient", watched_block),
    ):
        yield
