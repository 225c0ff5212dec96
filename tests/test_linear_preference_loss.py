"""linear_preference_loss against dense fp64 PyTorch. Letters: N tokens, D hidden size, V vocabulary, S sequences, P pairs."""

import math
from importlib import import_module
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence

from isdaa_kernels.linear_logprob import linear_logprob_stats
from isdaa_kernels.linear_preference_loss import linear_preference_loss
from isdaa_kernels.lm_head import LMHead
from isdaa_kernels.objectives import OBJECTIVES, ImportanceWeight, Objective, SelfWeight
from isdaa_kernels.preference_loss import preference_loss
from isdaa_kernels.preference_terms import needs_of
from isdaa_kernels.sequence_logprob import sequence_logprob, token_place

N, D, V, P = 41, 16, 53, 3
# Ragged: one token alone, a sequence without tokens (row 4, so pair 1 is empty), the rest with prompts that are not scored.
CU_SEQLENS = torch.tensor([0, 9, 10, 22, 30, 30, 41])
PROMPTS = [3, 0, 5, 1, 0, 4]
BACKENDS = ("cpu", "reference")


def make_batch(dtype=torch.float64, seed=0, weight_scale=0.5) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    targets = torch.randint(V, (N,), generator=generator)
    for start, prompt in zip(CU_SEQLENS[:-1].tolist(), PROMPTS, strict=True):
        targets[start : start + prompt] = -100
    hidden, weight = normal(N, D), normal(V, D, scale=weight_scale)
    return SimpleNamespace(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        bias=normal(V, scale=0.3).requires_grad_(),
        # Near the policy, so that the importance weights are on both sides of the clip.
        reference=((hidden + normal(N, D, scale=0.3)).detach(), (weight + normal(V, D, scale=0.02)).detach()),
        targets=targets,
    )


def dense_logprob(hidden, weight, targets, bias=None, logit_scale=1.0, softcap=None, temperature=1.0):
    """fp64 [N], 0 where the target is ignored."""
    z = hidden.double() @ weight.double().T
    z = (z if bias is None else z + bias.double()) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    logprob = z.log_softmax(-1).gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return logprob.where(targets >= 0, 0)


def dense_sums(logprob_N):
    return torch.stack([logprob_N[start:end].sum() for start, end in pairwise(CU_SEQLENS.tolist())])


def lengths(targets):
    return dense_sums((targets >= 0).double())


def dense_loss(batch, objective: str):
    """The formulas on full logits; the middle pair is empty and leaves the sum, not the denominator."""
    policy = dense_sums(dense_logprob(batch.hidden, batch.weight, batch.targets))
    reference = dense_sums(dense_logprob(*batch.reference, batch.targets))
    a, b = (policy - reference)[[0, 2, 3, 5]].chunk(2)
    if objective == "ipo_mean":
        n_a, n_b = lengths(batch.targets)[[0, 2, 3, 5]].chunk(2)
        return (a / n_a - b / n_b - 1 / (2 * 0.3)).square().sum() / P
    weight = (a + b).clamp(max=2).exp().detach()
    return -(weight * logsigmoid(0.3 * (a - b))).sum() / P


def grads(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


def assert_near(actual, expected, dtype):
    """Within a few roundings of `dtype`, of the largest entry."""
    scale = expected.abs().max().item()
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("how", ["per_token", "per_token_1N", "per_sequence", "hidden_and_weight", "hidden_and_head"])
@pytest.mark.parametrize("objective", ["is_dpo", "ipo_mean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_dense(backend, dtype, objective, how):
    batch = make_batch(dtype)
    reference_N = dense_logprob(*batch.reference, batch.targets)
    reference = {
        # What a caller has at ignored tokens is not ours to read.
        "per_token": {"reference_logprob": reference_N.where(batch.targets >= 0, math.nan)},
        "per_token_1N": {"reference_logprob": reference_N[None]},
        "per_sequence": {"reference_logprob": dense_sums(reference_N)},
        "hidden_and_weight": {"reference": batch.reference},
        "hidden_and_head": {"reference": (batch.reference[0], LMHead(batch.reference[1]))},
    }[how]
    loss, metrics = linear_preference_loss(
        batch.hidden,
        batch.weight,
        batch.targets,
        CU_SEQLENS,
        objective=objective,
        beta=0.3,
        backend=backend,
        **reference,
    )
    expected = dense_loss(batch, objective)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["empty_pairs/count"].item() == 1
    leaves = (batch.hidden, batch.weight)
    for actual, dense in zip(grads(loss, *leaves), grads(expected, *leaves), strict=True):
        assert_near(actual, dense, dtype)


SIX = torch.linspace(-1.0, 1.5, 6, dtype=torch.float64)


def more_arguments(objective: Objective) -> dict:
    """What an objective needs beside log-probs, for six sequences."""
    needs = needs_of(objective, objective.importance)
    inputs = {"rewards": SIX, "opponents": torch.stack([SIX - 20, SIX - 19]), "desirable": SIX > 0, "mismatched": SIX}
    inputs["reference_kl"] = SIX.abs()
    more = {name: value for name, value in inputs.items() if name in needs}
    if objective.kind == "group":
        more["groups"] = 3
    if objective.state is not None:
        more["state"] = objective.make_state()
    return more


def dense_inputs(batch, objective: Objective) -> dict:
    """The sums that `preference_loss` takes, of full logits."""
    needs = needs_of(objective, objective.importance)
    policy_N = dense_logprob(batch.hidden, batch.weight, batch.targets)
    reference_N = dense_logprob(*batch.reference, batch.targets)
    inputs = {"policy": dense_sums(policy_N), "reference": dense_sums(reference_N), "lengths": lengths(batch.targets)}
    if "kl_score" in needs:
        inputs["kl_score"] = dense_sums((policy_N - reference_N).detach() * policy_N)
    if "log_sum_sq_prob" in needs:
        log_p = (batch.hidden @ batch.weight.T).log_softmax(-1)
        inputs["log_sum_sq_prob"] = dense_sums((2 * log_p).logsumexp(-1).where(batch.targets >= 0, 0))
    return inputs


IN_SUMS = [
    name
    for name, objective in OBJECTIVES.items()
    if objective.token_weight is None and "token_weight" not in objective.needs and objective.kind != "token"
]


@pytest.mark.parametrize("name", IN_SUMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_objective_is_the_composition(backend, name):
    batch, objective = make_batch(), OBJECTIVES[name]
    inputs = dense_inputs(batch, objective)
    expected = preference_loss(**inputs, objective=name, **more_arguments(objective))
    actual = linear_preference_loss(
        batch.hidden,
        batch.weight,
        batch.targets,
        CU_SEQLENS,
        reference_logprob=dense_logprob(*batch.reference, batch.targets),
        objective=name,
        backend=backend,
        **more_arguments(objective),
    )
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-6, atol=1e-7)
    leaves = (batch.hidden, batch.weight)
    for mine, dense in zip(grads(actual.loss, *leaves), grads(expected.loss, *leaves), strict=True):
        assert_near(mine, dense, torch.float64)


@pytest.mark.parametrize("name", [name for name in IN_SUMS if "kl_score" not in OBJECTIVES[name].needs])
def test_packed_and_padded_batches_agree(name):
    batch, objective = make_batch(), OBJECTIVES[name]
    spans = [slice(start, end) for start, end in pairwise(CU_SEQLENS.tolist())]
    hidden = pad_sequence([batch.hidden[span] for span in spans], batch_first=True)
    targets = pad_sequence([batch.targets[span] for span in spans], batch_first=True, padding_value=-100)
    logprob, stats = linear_logprob_stats(hidden, batch.weight, targets, stats=("log_sum_sq_prob",), backend="cpu")
    reference = dense_sums(dense_logprob(*batch.reference, batch.targets))
    more = more_arguments(objective)
    squares = {}
    if "log_sum_sq_prob" in needs_of(objective, objective.importance):
        squares["log_sum_sq_prob"] = sequence_logprob(stats.log_sum_sq_prob, mask=targets >= 0)
    padded = preference_loss(
        sequence_logprob(logprob, mask=targets >= 0),
        reference,
        lengths=(targets >= 0).sum(-1),
        objective=name,
        **more_arguments(objective),
        **squares,
    )
    packed = linear_preference_loss(
        batch.hidden,
        batch.weight,
        batch.targets,
        CU_SEQLENS,
        reference_logprob=reference,
        objective=name,
        backend="cpu",
        **more,
    )
    torch.testing.assert_close(tuple(packed), tuple(padded), rtol=1e-6, atol=1e-7)
    leaves = (batch.hidden, batch.weight)
    for mine, expected in zip(grads(packed.loss, *leaves), grads(padded.loss, *leaves), strict=True):
        assert_near(mine, expected, torch.float64)


@pytest.mark.parametrize("objective", ["is_dpo", "ipo_mean", "simpo"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_token_weights(backend, objective):
    """Labels of segments, masks, decays: factors in the sums of policy and reference, not in the counts of tokens."""
    batch = make_batch()
    token_weight = torch.linspace(-1.0, 1.0, N, dtype=torch.float64)
    token_weight[12:15] = 0
    policy_N = dense_logprob(batch.hidden, batch.weight, batch.targets)
    reference_N = dense_logprob(*batch.reference, batch.targets)
    expected = preference_loss(
        dense_sums(policy_N * token_weight),
        dense_sums(reference_N * token_weight),
        objective=objective,
        lengths=lengths(batch.targets),
    )
    actual = linear_preference_loss(
        batch.hidden,
        batch.weight,
        batch.targets,
        CU_SEQLENS,
        reference_logprob=reference_N.where(batch.targets >= 0, math.nan)[None],
        token_weight=token_weight.float().double()[None],
        objective=objective,
        backend=backend,
    )
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-6, atol=1e-6)
    leaves = (batch.hidden, batch.weight)
    for mine, dense in zip(grads(actual.loss, *leaves), grads(expected.loss, *leaves), strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["wpo", "is_dpo"])
def test_a_mask_of_token_weights_is_as_if_nothing_were_scored_there(objective):
    """But for the counts of tokens, which stay."""
    batch = make_batch()
    mask = (torch.arange(N) % 3 > 0).double()
    fewer = batch.targets.where(mask > 0, -100)
    reference_N = dense_logprob(*batch.reference, batch.targets)
    common = {"objective": objective, "backend": "cpu"}
    importance = None if objective == "is_dpo" else SelfWeight(cap=None)
    arguments = (batch.hidden, batch.weight)
    weighted = linear_preference_loss(
        *arguments, batch.targets, CU_SEQLENS, reference_logprob=reference_N[None], token_weight=mask, importance=importance, **common
    )  # fmt: skip
    unscored = linear_preference_loss(
        *arguments, fewer, CU_SEQLENS, reference_logprob=reference_N[None], importance=importance, **common
    )
    names = ("margin/mean", "log_weight/mean") if objective == "is_dpo" else ("margin/mean",)
    for name in names:
        torch.testing.assert_close(weighted.metrics[name], unscored.metrics[name])
    if objective == "wpo":  # sums of a completion over its whole length
        log_p = (batch.hidden @ batch.weight.T).log_softmax(-1)
        own = dense_logprob(*arguments, batch.targets) - (2 * log_p).logsumexp(-1).where(batch.targets >= 0, 0)
        mean_S = dense_sums(own * mask) / lengths(batch.targets).clamp(min=1)
        expected = (mean_S[[0, 2]] + mean_S[[3, 5]]).mean().float()
        torch.testing.assert_close(weighted.metrics["log_weight/mean"], expected)


def test_token_weights_enter_the_score_of_nash_md_once():
    batch = make_batch()
    reference_N = dense_logprob(*batch.reference, batch.targets)[None]
    common = {"objective": "nash_md", "backend": "reference", "reference_logprob": reference_N}
    arguments = (batch.hidden, batch.weight, batch.targets, CU_SEQLENS)
    whole = linear_preference_loss(*arguments, preference=0.5, **common)
    half = linear_preference_loss(*arguments, preference=0.5, token_weight=torch.full((N,), 0.5), **common)
    torch.testing.assert_close(2 * half.loss, whole.loss)
    (grad,), (expected,) = grads(half.loss, batch.hidden), grads(whole.loss, batch.hidden)
    torch.testing.assert_close(2 * grad, expected)


def test_where_tokens_stand():
    scored = torch.tensor([0, 1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1], dtype=torch.bool)
    cu_seqlens = torch.tensor([0, 4, 8, 8, 12])  # 3, 3, 0 and 2 scored tokens
    place = token_place(scored, cu_seqlens, None)
    assert place.position[scored].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert place.length[scored].tolist() == [3, 3, 3, 3, 3, 3, 2, 2]
    assert place.other_length[scored].tolist() == [0, 0, 0, 2, 2, 2, 3, 3]
    # the shorter one of two partners; a row in no pair has none
    place = token_place(scored, cu_seqlens, torch.tensor([[0, 1], [3, 0]]))
    assert place.other_length[scored].tolist() == [2, 2, 2, 3, 3, 3, 3, 3]
    place = token_place(scored, cu_seqlens, torch.tensor([[1, 3]]))
    assert place.other_length[scored].tolist() == [math.inf] * 3 + [2, 2, 2, 3, 3]


# Every argument that is passed on, all at once: dropping one changes the result.
@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_reach_the_kernel_and_the_loss(backend):
    batch = make_batch()
    transforms = {"logit_scale": 0.7, "softcap": 5.0}
    temperature = torch.linspace(0.8, 1.3, N, dtype=torch.float64)
    targets = batch.targets.where(batch.targets >= 0, -7)
    settings = {
        "pairs": torch.tensor([[0, 3], [2, 5], [1, 3]]),
        "importance": ImportanceWeight(epsilon=0.5, length_exponent=1.0),
        "sample_weight": torch.tensor([1.0, 0.5, 2.0]),
        "denominator": 7.0,
        "label_smoothing": 0.1,
        "beta": 0.2,
    }
    behaviour_N = dense_logprob(*batch.reference, batch.targets) - 0.05
    actual = linear_preference_loss(
        batch.hidden[None],
        LMHead(batch.weight, batch.bias, **transforms),
        targets[None],
        CU_SEQLENS.int(),
        reference=(batch.reference[0][None], LMHead(batch.reference[1], **transforms)),
        behaviour_logprob=behaviour_N,
        temperature=temperature[None],
        ignore_index=-7,
        max_scored=30,
        max_workspace_mb=1.0,
        backend=backend,
        validate=True,
        **settings,
    )
    dense = {**transforms, "temperature": temperature}
    policy_N = dense_logprob(batch.hidden, batch.weight, batch.targets, bias=batch.bias, **dense)
    expected = preference_loss(
        dense_sums(policy_N),
        dense_sums(dense_logprob(*batch.reference, batch.targets, **dense)),
        behaviour=dense_sums(behaviour_N.where(batch.targets >= 0, 0)),
        lengths=lengths(batch.targets),
        **settings,
    )
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-6, atol=1e-7)
    leaves = (batch.hidden, batch.weight, batch.bias)
    for mine, dense in zip(grads(actual.loss, *leaves), grads(expected.loss, *leaves), strict=True):
        assert_near(mine, dense, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_policies_have_weight_one_to_the_last_bit(backend):
    batch = make_batch(torch.float32)
    same = (batch.hidden.detach(), batch.weight.detach())
    _, metrics = linear_preference_loss(
        batch.hidden,
        batch.weight,
        batch.targets,
        CU_SEQLENS,
        reference=same,
        backend=backend,
    )
    assert metrics["weight/mean"].item() == metrics["weight/max"].item() == 1.0
    assert metrics["margin/mean"].item() == 0.0


def test_reference_receives_no_gradient_and_builds_no_graph(monkeypatch):
    batch, module, grad_enabled = make_batch(), import_module("isdaa_kernels.packed_batch"), []
    kernel = module.linear_logprob

    def recording(*arguments, **options):
        grad_enabled.append(torch.is_grad_enabled())
        return kernel(*arguments, **options)

    monkeypatch.setattr(module, "linear_logprob", recording)
    reference = tuple(x.clone().requires_grad_() for x in batch.reference)
    loss, _ = linear_preference_loss(
        batch.hidden, batch.weight, batch.targets, CU_SEQLENS, reference=reference, backend="reference"
    )
    loss.backward()
    assert grad_enabled == [False, True]
    assert reference[0].grad is None
    assert reference[1].grad is None
    assert batch.hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_scored_tokens_of_full_pairs_get_a_gradient(backend):
    batch = make_batch(torch.float32)
    loss, _ = linear_preference_loss(
        batch.hidden,
        batch.weight,
        batch.targets,
        CU_SEQLENS,
        reference=batch.reference,
        backend=backend,
    )
    loss.backward()
    expected = batch.targets >= 0
    expected[9:10] = False  # its partner, row 4, is empty
    assert torch.equal(batch.hidden.grad.abs().sum(-1) > 0, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_with_a_denominator_add_up(backend):
    batch = make_batch()
    arguments = {"objective": "is_ipo", "backend": backend}
    reference_S = dense_sums(dense_logprob(*batch.reference, batch.targets))
    whole, _ = linear_preference_loss(
        batch.hidden, batch.weight, batch.targets, CU_SEQLENS, reference_logprob=reference_S, **arguments
    )
    bounds, total = CU_SEQLENS.tolist(), 0
    for pair in range(P):
        spans = [slice(bounds[row], bounds[row + 1]) for row in (pair, P + pair)]
        ends = torch.tensor([0, *(span.stop - span.start for span in spans)]).cumsum(0)
        loss, _ = linear_preference_loss(
            torch.cat([batch.hidden[span] for span in spans]),
            batch.weight,
            torch.cat([batch.targets[span] for span in spans]),
            ends,
            reference_logprob=reference_S[[pair, P + pair]],
            denominator=P,
            **arguments,
        )
        total = total + loss
    torch.testing.assert_close(total, whole)
    leaves = (batch.hidden, batch.weight)
    for mine, expected in zip(grads(total, *leaves), grads(whole, *leaves), strict=True):
        assert_near(mine, expected, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_token_reaches_no_other_pair(backend):
    batch = make_batch(torch.float32)
    arguments = {"reference": batch.reference, "backend": backend}
    clean, _ = linear_preference_loss(batch.hidden, batch.weight, batch.targets, CU_SEQLENS, **arguments)
    (expected,) = grads(clean, batch.hidden)
    broken = batch.hidden.detach().clone()
    broken[20] = math.nan  # sequence 2, so pair 2: rows 2 and 5
    broken.requires_grad_()
    loss, _ = linear_preference_loss(broken, batch.weight, batch.targets, CU_SEQLENS, **arguments)
    (grad,) = grads(loss, broken)
    assert loss.isnan()
    torch.testing.assert_close(grad[:10], expected[:10], rtol=0, atol=0)
    torch.testing.assert_close(grad[22:30], expected[22:30], rtol=0, atol=0)
    assert grad[20].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [0, 6])
def test_nothing_to_score(backend, tokens):
    hidden, weight = torch.randn(tokens, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    targets = torch.full((tokens,), -100)
    cu_seqlens = torch.tensor([0, 2, 6]) if tokens else torch.tensor([0])
    loss, metrics = linear_preference_loss(
        hidden, weight, targets, cu_seqlens, reference=(hidden.detach(), weight.detach()), backend=backend
    )
    loss.backward()
    assert loss.item() == 0
    assert metrics["empty_pairs/count"].item() == (1 if tokens else 0)
    assert hidden.grad.count_nonzero() == 0
    assert weight.grad.count_nonzero() == 0


def test_fullgraph_compile():
    batch = make_batch(torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(linear_preference_loss, fullgraph=True, backend="aot_eager")
    arguments = {"reference": batch.reference, "backend": "reference", "beta": 0.3}
    results = [
        function(batch.hidden, batch.weight, batch.targets, CU_SEQLENS, **arguments)
        for function in (compiled, linear_preference_loss)
    ]
    torch.testing.assert_close(*(tuple(result) for result in results))
    leaves = (batch.hidden, batch.weight)
    torch.testing.assert_close(*(grads(result.loss, *leaves) for result in results))


PER_TOKEN = torch.zeros(N)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": torch.zeros(2, N, D)}, r"hidden: expected \[N, D\] or \[1, N, D\], got \[2, 41, 16\]"),
        ({"hidden": torch.zeros(D)}, r"hidden: expected \[N, D\] or \[1, N, D\], got \[16\]"),
        ({"hidden": torch.zeros(N, D + 1)}, r"hidden: expected .*16"),
        ({"targets": torch.zeros(N - 1, dtype=torch.long)}, r"targets: expected \[41\], got \[40\]"),
        ({"targets": torch.full((N,), V)}, r"targets: .*53"),
        ({"cu_seqlens": CU_SEQLENS[:-1]}, r"cu_seqlens: expected non-decreasing values from 0 to 41, got \[0, 9"),
        ({"cu_seqlens": CU_SEQLENS[[0, 1, 2, 6]]}, "policy: expected an even number of sequences, .* got 3"),
        ({"reference_logprob": None}, "reference: expected .* frozen reference policy for 'is_dpo', got None"),
        ({"reference": (torch.zeros(N, D), torch.zeros(V, D))}, "expected one of the two, got both"),
        ({"reference_logprob": None, "reference": torch.zeros(2, D)}, r"reference: expected a tuple .* got Tensor"),
        (
            {"reference_logprob": None, "reference": (torch.zeros(3, D), torch.zeros(V, D))},
            r"reference: expected hidden \[41, 'D'\], got \[3, 16\]",
        ),
        ({"reference_logprob": torch.zeros(7)}, r"reference_logprob: expected \[41\] .* or \[6\] .* got \[7\]"),
        (
            {"reference_logprob": PER_TOKEN.long()},
            "reference_logprob: expected a floating dtype on cpu, got torch.int64",
        ),
        ({"behaviour_logprob": torch.zeros(7)}, r"behaviour_logprob: expected \[41\] .* got \[7\]"),
        ({"behaviour_logprob": PER_TOKEN, "objective": "dpo"}, "behaviour: 'dpo' would ignore it"),
        ({"objective": "dop"}, "objective: expected one of dpo, .*, got 'dop'"),
        ({"gamma": 1.0}, "is_dpo: unknown option 'gamma'"),
        ({"denominator": 0.0}, "denominator: expected a number above 0, got 0.0"),
        ({"pairs": torch.tensor([[0, 6]])}, r"pairs: expected rows in 0..5, got \[\[0, 6\]\]"),
        ({"token_weight": PER_TOKEN[:5]}, r"token_weight: expected \[41\], got \[5\]"),
        ({"token_weight": PER_TOKEN.long()}, "token_weight: expected a floating dtype on cpu, got torch.int64"),
        (
            {"token_weight": PER_TOKEN, "reference_logprob": torch.zeros(6)},
            r"reference_logprob: expected one a token where tokens are weighted, got \[6\]",
        ),
        ({"objective": "dpo_rw", "groups": 2, "rewards": torch.zeros(10)}, r"rewards: expected \[6\], got \[10\]"),
        (
            {"objective": "kto", "desirable": [True] * 6, "mismatched": torch.zeros(6)},
            r"desirable: expected \[6\], got",
        ),
        (
            {"objective": "inpo", "opponents": torch.zeros(1, 6), "token_weight": PER_TOKEN},
            "opponents: sums cannot be weighted by token",
        ),
        (
            {"objective": "nash_md", "reference_logprob": torch.zeros(6)},
            r"reference_logprob: expected one a token for 'nash_md', got \[6\]",
        ),
        (
            {"token_weight": PER_TOKEN.to("meta")},
            "token_weight: expected a floating dtype on cpu, got torch.float32 on meta",
        ),
        ({"backend": "fpga"}, "backend: expected one of .*, got 'fpga'"),
    ],
)
def test_bad_input(arguments, message):
    arguments = {
        "hidden": torch.zeros(N, D),
        "head": torch.zeros(V, D),
        "targets": torch.zeros(N, dtype=torch.long),
        "cu_seqlens": CU_SEQLENS,
        "reference_logprob": PER_TOKEN,
        "backend": "reference",
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        linear_preference_loss(**arguments)


def test_settings_are_checked_before_any_work():
    # A head of the wrong width would fail in the kernel; the option is found first.
    with pytest.raises(ValueError, match="unknown option"):
        linear_preference_loss(
            torch.zeros(2, D),
            torch.zeros(V, D + 1),
            torch.zeros(2, dtype=torch.long),
            torch.tensor([0, 1, 2]),
            reference_logprob=torch.zeros(1, 2),
            gamma=1.0,
        )


def test_one_token_a_sequence_is_ambiguous_for_a_flat_reference():
    arguments = (torch.zeros(2, D), torch.zeros(V, D), torch.tensor([1, 2]), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"reference_logprob: \[2\] could be per token or per sequence"):
        linear_preference_loss(*arguments, reference_logprob=torch.zeros(2))
    loss, _ = linear_preference_loss(*arguments, reference_logprob=torch.full((1, 2), -math.log(V)))
    assert loss.item() == pytest.approx(math.log(2))
