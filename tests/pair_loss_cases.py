"""What every kernel of the loss stage must agree on with PyTorch: batches, settings, and the comparison. Letters: N tokens, S sequences,
P pairs."""

import itertools
import math
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from isdaa_kernels.objectives import ImportanceWeight, SequenceInputs
from isdaa_kernels.ops import pair_loss as pair_loss_ops
from isdaa_kernels.pair_loss import BASES
from isdaa_kernels.preference_loss import dense_preference_loss, fused_preference_loss
from isdaa_kernels.preference_terms import check_preference
from isdaa_kernels.sequence_logprob import sequence_length, sequence_logprob

P = 5
PROMPT = -100
# Ragged, with borders that are no multiples of 4; sequence 3 has no tokens, sequence 6 none that is scored: pairs 3 and 1 are empty.
LENGTHS = (9, 1, 17, 0, 6, 11, 5, 4, 13, 8)
UNSCORED = 6


@dataclass(frozen=True)
class Batch:
    """Token log-probs of a packed batch, or, without cu_seqlens, sums."""

    policy: Tensor  # [N]
    reference: Tensor  # [N], or [1, S]
    cu_seqlens: Tensor | None
    scored: Tensor | None  # targets [N], or lengths [S]
    behaviour: Tensor | None = None
    ignore_index: int = PROMPT

    @property
    def n_sequences(self) -> int:
        return len(self.policy) if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def to(self, device: torch.device) -> "Batch":
        return replace(self, **{name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)})


@dataclass(frozen=True)
class Settings:
    objective: str = "is_dpo"
    importance: ImportanceWeight | None = None
    more: dict = field(default_factory=dict)

    def __str__(self) -> str:
        weight = (
            ""
            if self.importance is None
            else "-"
            + "-".join(
                f"{name}={value}"
                for name, value in vars(self.importance).items()
                if value != getattr(ImportanceWeight(), name)
            )
        )
        return self.objective + weight + "".join(f"-{name}" for name in self.more)


def on(device: torch.device, settings: Settings) -> Settings:
    return replace(
        settings, more={name: x.to(device) if isinstance(x, Tensor) else x for name, x in settings.more.items()}
    )


def make_batch(
    *,
    lengths: tuple[int, ...] = LENGTHS,
    dtype: torch.dtype = torch.float64,
    spread: float = 0.4,
    behaviour: bool = False,
    seed: int = 0,
) -> Batch:
    """A third of the tokens is a prompt, where the reference is NaN: nobody may read it."""
    random = torch.Generator().manual_seed(seed)
    N = sum(lengths)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    targets = torch.randint(50, (N,), generator=random)
    targets[torch.rand(N, generator=random) < 0.3] = PROMPT
    targets[cu_seqlens[:-1][torch.tensor(lengths) > 0]] = (
        1  # the first token is scored, so that one token alone is no empty completion
    )
    if len(lengths) > UNSCORED:
        targets[cu_seqlens[UNSCORED] : cu_seqlens[UNSCORED + 1]] = PROMPT
    policy = -4 * torch.rand(N, generator=random, dtype=torch.float64)
    other = [policy + spread * torch.randn(N, generator=random, dtype=torch.float64) for _ in range(2)]
    reference, wrote = (x.to(dtype).where(targets != PROMPT, math.nan) for x in other)
    return Batch(
        policy.where(targets != PROMPT, 0).to(dtype), reference, cu_seqlens, targets, wrote if behaviour else None
    )


def in_sums(batch: Batch) -> Batch:
    """The same as sums [S] with lengths."""
    scored_N = batch.scored != batch.ignore_index
    sums = lambda x: None if x is None else sequence_logprob(x, batch.cu_seqlens, mask=scored_N)  # noqa: E731
    lengths_S = sequence_length(scored_N, batch.cu_seqlens)
    return Batch(sums(batch.policy), sums(batch.reference), None, lengths_S, sums(batch.behaviour))


WEIGHTS = [
    {},
    {"mode": "per_completion", "epsilon": 0.7},
    {"mode": "none"},
    {"floor": 0.4},
    {"power": 0.3},
    {"length_exponent": 1.0},
    {"length_exponent": 0.5, "power": 2.0, "mode": "per_completion"},
    {"epsilon": 0.0},
    {"normalize": True},
    {"normalize": True, "floor": 0.2, "mode": "per_completion", "length_exponent": 0.7},
]
BY_PAIR = torch.tensor([0.1, 0.7, 0.3, 0.2, 0.05])
MORE = [
    {"beta": 0.7},
    {"beta": BY_PAIR},
    {"beta": torch.tensor(0.4)},
    {"label_smoothing": 0.2},
    {"label_smoothing": BY_PAIR / 2, "beta": BY_PAIR.double()},
    {"sample_weight": torch.tensor([2.0, 0.0, -1.0, 0.5, 3.0])},
    {"denominator": 7.0},
    {"denominator": torch.tensor(7)},
    {"pairs": torch.tensor([[8, 0], [4, 5], [1, 9], [7, 8], [3, 0], [2, 2]])},
    {
        "pairs": torch.tensor([[9, 1], [0, 2]], dtype=torch.int32),
        "sample_weight": torch.tensor([0.3, 2.0]),
        "denominator": 3.0,
    },
]
# What the kernels cover.
FUSED = tuple(f"{prefix}{base}" for base in BASES for prefix in ("", "is_"))
SETTINGS = [
    *(Settings(name) for name in FUSED),
    *(
        Settings(name, ImportanceWeight(**options, detach=detach))
        for options, detach in itertools.product(WEIGHTS, (True, False))
        for name in ("is_dpo", "is_ipo_mean")
    ),
    *(Settings("is_dpo", more=more) for more in MORE),
]
# One of each kind, for kernels that run in an emulator or an interpreter.
FEW_SETTINGS = [
    *(Settings(name) for name in ("dpo", "ipo", "is_ipo_mean", "is_slic")),
    *(Settings("is_dpo", ImportanceWeight(**options, detach=False)) for options in WEIGHTS),
    *(Settings("is_dpo", more=more) for more in (MORE[1], MORE[4], MORE[5], MORE[8], MORE[9])),
]

# What a run gone wrong reaches, on either completion of a pair; a pair a row.
EXTREMES = tuple(itertools.product([0.0, 3.0, -1e4, 1e4, math.inf, -math.inf, math.nan], repeat=2))


def extreme_sums(rows: tuple[tuple[float, float], ...] = EXTREMES) -> Batch:
    policy = torch.tensor(rows, dtype=torch.float64).T.reshape(-1)
    return Batch(policy, torch.zeros_like(policy), None, torch.full_like(policy, 3.0))


def terms_of(batch: Batch, settings: Settings):
    return check_preference(
        batch.n_sequences,
        batch.policy.device,
        objective=settings.objective,
        importance=settings.importance,
        given={"reference", *({"behaviour"} if batch.behaviour is not None else ())},
        made={"lengths"} if batch.scored is not None or batch.cu_seqlens is not None else set(),
        **settings.more,
    )


def dense(batch: Batch, settings: Settings, upstream: float = 1.0) -> SimpleNamespace:
    """Loss, metrics and the gradient of the policy [N] by PyTorch's autograd."""
    policy = batch.policy.clone().requires_grad_()
    sums = [policy, *(None if x is None else x.reshape(-1) for x in (batch.reference, batch.behaviour))]
    lengths = batch.scored
    if batch.cu_seqlens is not None:
        scored_N = (
            torch.ones_like(policy, dtype=torch.bool) if batch.scored is None else batch.scored != batch.ignore_index
        )
        of_tokens = lambda x: x is not None and x.shape == policy.shape  # noqa: E731
        sums = [sequence_logprob(x, batch.cu_seqlens, mask=scored_N) if of_tokens(x) else x for x in sums]
        lengths = sequence_length(scored_N, batch.cu_seqlens)
    policy_S, reference_S, behaviour_S = sums
    inputs = SequenceInputs(policy_S, reference_S, lengths, behaviour_S)
    loss, metrics = dense_preference_loss(terms_of(batch, settings), inputs)
    loss.backward(torch.full((), upstream, device=loss.device))  # filled in on the device: nothing waits
    return SimpleNamespace(loss=loss.detach(), metrics=metrics, grad=policy.grad)


def fused(batch: Batch, settings: Settings, backend: str, upstream: float = 1.0) -> SimpleNamespace:
    policy = batch.policy.clone().requires_grad_()
    packing = {"cu_seqlens": batch.cu_seqlens, "scored": batch.scored, "ignore_index": batch.ignore_index}
    terms = terms_of(batch, settings)
    loss, metrics = fused_preference_loss(terms, backend, policy, batch.reference, batch.behaviour, **packing)
    loss.backward(torch.full((), upstream, device=loss.device))  # filled in on the device: nothing waits
    return SimpleNamespace(loss=loss.detach(), metrics=metrics, grad=policy.grad)


def assert_equal_to_dense(batch: Batch, settings: Settings, backend: str, **options) -> None:
    """To a few roundings: loss and metrics of fp32, a gradient of the policy's dtype."""
    expected, found = dense(batch, settings, **options), fused(batch, settings, backend, **options)
    assert list(found.metrics) == list(expected.metrics)
    near = {"equal_nan": True, "rtol": 3e-7, "atol": 1e-12}
    torch.testing.assert_close(found.loss, expected.loss, **near)
    torch.testing.assert_close(found.metrics, expected.metrics, **near)
    assert_equal_gradients(found.grad, expected.grad)


def assert_equal_gradients(found: Tensor, expected: Tensor) -> None:
    """NaN and infinities count as the same: inf * 0 may be met in one order of the factors and not in another."""
    found, expected = (x.where(x.isfinite(), math.nan) for x in (found, expected))
    near = {"rtol": 3e-7, "atol": 1e-12} if found.dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-15}
    torch.testing.assert_close(found, expected, equal_nan=True, **near)


def assert_extremes_equal_dense(settings: Settings, backend: str, rows=EXTREMES) -> None:
    """Gradients with all pairs in one batch, the rest pair by pair, since one NaN makes NaN of a batch's loss."""
    if settings.importance is None or not settings.importance.normalize:
        batch = extreme_sums(rows)
        assert_equal_gradients(fused(batch, settings, backend).grad, dense(batch, settings).grad)
    for row in rows:
        assert_equal_to_dense(extreme_sums((row,)), settings, backend)


def moved(batch: Batch, offset: int) -> Batch:
    """The same numbers at addresses that are no multiple of 16 bytes."""

    def move(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        out = torch.empty(len(x) + offset, dtype=x.dtype)[offset:]
        return out.copy_(x)

    return replace(batch, policy=move(batch.policy), reference=move(batch.reference), scored=move(batch.scored))


def use_backend(monkeypatch, name: str, module) -> None:
    """Operators called with backend=`name` run `module`."""
    known = pair_loss_ops._pair_loss_module
    monkeypatch.setattr(
        pair_loss_ops,
        "_pair_loss_module",
        lambda backend, device: module if backend == name else known(backend, device),
    )
