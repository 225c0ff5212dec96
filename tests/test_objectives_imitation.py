"""Terms that imitate a completion, and weighted sums of objectives. Letters: S sequences, P pairs, V vocabulary."""

import inspect
import math

import pytest
import torch
from objective_cases import sample
from torch.nn.functional import cross_entropy

from isdaa_kernels.objectives import (
    OBJECTIVES,
    Objective,
    Pair,
    PairLogprob,
    importance_sampled,
    make_objective,
)
from isdaa_kernels.objectives.imitation import sft, weighted_sum
from isdaa_kernels.objectives.pairwise import bco, dpo, ipo
from isdaa_kernels.objectives.reference_free import cpo, simpo, tpo
from isdaa_kernels.preference_loss import preference_loss


def run(objective: str | Objective, arguments: dict, **options):
    """(loss, gradient of the policy)"""
    tensors = dict(arguments)
    policy = tensors.pop("policy").clone().requires_grad_()
    loss, _ = preference_loss(policy, objective=objective, **tensors, **options)
    (grad,) = torch.autograd.grad(loss, policy)
    return loss.detach(), grad


def assert_sum(found, *weighted):
    """found = sum of weight * (loss, gradient)"""
    loss = sum(weight * part[0] for weight, part in weighted)
    grad = sum(weight * part[1] for weight, part in weighted)
    torch.testing.assert_close(found, (loss, grad), rtol=1e-6, atol=1e-9)


# ---- The three reductions


def test_reductions_of_a_token_cross_entropy():
    """Chosen completions of 2, 5 and 3 tokens: over all tokens at once, over each completion, and summed."""
    torch.manual_seed(0)
    lengths = [2, 5, 3]
    logits = [torch.randn(n, 11, dtype=torch.float64) for n in lengths]
    labels = [torch.randint(11, (n,)) for n in lengths]
    by_token = [cross_entropy(*pair, reduction="none") for pair in zip(logits, labels, strict=True)]
    policy = -torch.stack([losses.sum() for losses in by_token])
    arguments = {"policy": torch.cat([policy, -torch.ones(3)]), "lengths": torch.tensor([*lengths, 1, 1, 1])}

    expected = cross_entropy(torch.cat(logits), torch.cat(labels))
    torch.testing.assert_close(run("sft", arguments)[0], expected.float())
    expected = torch.stack([losses.mean() for losses in by_token]).mean()
    torch.testing.assert_close(run("sft_mean", arguments)[0], expected.float())
    expected = torch.stack([losses.sum() for losses in by_token]).mean()
    torch.testing.assert_close(run("sft_sum", arguments)[0], expected.float())


def test_sft_leaves_out_the_tokens_of_pairs_that_do_not_count():
    arguments = sample(OBJECTIVES["sft"], items=4)
    arguments["lengths"][2] = arguments["lengths"][4 + 1] = 0  # a chosen and a rejected completion
    arguments["policy"][2] = math.nan
    loss, grad = run("sft", arguments, denominator=2)
    tokens = arguments["lengths"][[0, 3]].sum()
    torch.testing.assert_close(loss, (-arguments["policy"][[0, 3]].sum() / tokens).float())
    expected = torch.zeros(8, dtype=torch.float64)
    expected[[0, 3]] = -1 / tokens.double()
    torch.testing.assert_close(grad, expected)


def test_sft_of_no_pair_that_counts():
    arguments = sample(OBJECTIVES["sft"], items=2) | {"lengths": torch.zeros(4)}
    loss, grad = run("sft", arguments)
    assert loss == 0
    assert (grad == 0).all()


def test_sft_without_presence_counts_all():
    pair = PairLogprob(Pair(torch.tensor([-12.0, -3.0]), torch.zeros(2)), lengths=Pair(torch.tensor([5.0, 2.0]), None))
    torch.testing.assert_close(sft(pair), torch.tensor([12.0, 3.0]) * 2 / 7)


# ---- Sums


def test_mpo_is_the_sum_of_its_parts():
    arguments = sample(OBJECTIVES["mpo"])
    parts = [(0.8, run("dpo", arguments, beta=0.1)), (0.2, run("bco", arguments, beta=0.1)), (1, run("sft", arguments))]
    assert_sum(run("mpo", arguments), *parts)


def test_the_state_of_a_part_is_that_of_the_sum():
    arguments, objective = sample(OBJECTIVES["mpo"]), OBJECTIVES["mpo"]
    ratio = arguments["policy"] - arguments["reference"]
    found = run("mpo", arguments, state=objective.state(0.1))
    quality = run("bco", arguments, beta=0.1, baseline=0.1 * ratio.mean().item())
    assert_sum(found, (0.8, run("dpo", arguments)), (0.2, quality), (1, run("sft", arguments)))
    assert not objective.state_required


# By name, by function, as objectives; as a dict and as tuples.
@pytest.mark.parametrize(
    "parts",
    [
        {"dpo": 0.5, "simpo": 2},
        {dpo: 0.5, "simpo": 2},
        [(OBJECTIVES["dpo"], 0.5), (simpo, 2)],
        ((part, weight) for part, weight in ((dpo, 0.5), (make_objective(simpo), 2))),
    ],
    ids=["names", "functions", "objectives", "generator"],
)
def test_what_a_part_may_be(parts):
    mixed = weighted_sum("mixed", parts)
    arguments = sample(mixed)
    assert_sum(run(mixed, arguments), (0.5, run("dpo", arguments)), (2, run("simpo", arguments)))
    assert mixed.needs == {"reference", "lengths"}
    assert mixed.kind == "pair"
    assert mixed.importance is None


def test_options_reach_the_parts_that_have_them():
    mixed = weighted_sum("mixed", {dpo: 0.5, simpo: 2.0, "slic_hf": 1.0})
    arguments = sample(mixed)
    # beta is 0.1 in dpo and 2 in simpo, margin 0.5 in simpo and 1 in slic_hf, sft_weight 0 and 0.1
    assert mixed.defaults == {"beta": None, "label_smoothing": 0.0, "margin": None, "sft_weight": None}
    assert_sum(
        run(mixed, arguments),
        (0.5, run("dpo", arguments)),
        (2, run("simpo", arguments)),
        (1, run("slic_hf", arguments)),
    )
    beta = torch.linspace(0.1, 0.6, 6)
    assert_sum(
        run(mixed, arguments, beta=beta, label_smoothing=0.2, margin=-1.0),
        (0.5, run("dpo", arguments, beta=beta, label_smoothing=0.2)),
        (2, run("simpo", arguments, beta=beta, label_smoothing=0.2, margin=-1.0)),
        (1, run("slic_hf", arguments, margin=-1.0)),
    )


def test_none_is_the_default_of_each_part_where_they_differ():
    mixed = weighted_sum("mixed", {dpo: 1.0, simpo: 1.0})
    arguments = sample(mixed)
    assert_sum(run(mixed, arguments, beta=None), (1, run(mixed, arguments)))
    with pytest.raises(ValueError, match=r"mixed: beta: expected a finite number above 0, or None, got 0"):
        run(mixed, arguments, beta=0)
    with pytest.raises(ValueError, match=r"mixed: label_smoothing: expected a number in \[0, 0.5\], got None"):
        run(mixed, arguments, label_smoothing=None)
    with pytest.raises(
        ValueError, match="mixed: unknown option 'alpha', expected one of beta, label_smoothing, margin"
    ):
        run(mixed, arguments, alpha=1.0)


def test_defaults_of_the_sum_are_for_all_parts():
    mixed = weighted_sum("mixed", {dpo: 1.0, simpo: 1.0}, beta=0.7, margin=0.0)
    assert mixed.defaults["beta"] == 0.7
    arguments = sample(mixed)
    assert_sum(
        run(mixed, arguments), (1, run("dpo", arguments, beta=0.7)), (1, run("simpo", arguments, beta=0.7, margin=0.0))
    )


def test_a_value_must_be_in_the_domain_of_every_part():
    robust, plain = weighted_sum("half", {"robust_dpo": 0.5}), weighted_sum("mixed", {"robust_dpo": 0.5, "dpo": 1.0})
    assert robust.domains["label_smoothing"] == OBJECTIVES["robust_dpo"].domains["label_smoothing"]
    arguments = sample(plain)
    run(plain, arguments, label_smoothing=0.25)
    for value in (0.5, 0.6):  # one that dpo takes and robust_dpo does not, one that neither does
        with pytest.raises(ValueError, match=r"mixed: label_smoothing: expected .* and a number in \[0, 0.5\]"):
            run(plain, arguments, label_smoothing=value)


def test_a_sum_may_be_a_part():
    inner = weighted_sum("inner", {dpo: 0.5, simpo: 1.0})
    outer = weighted_sum("outer", [(inner, 2.0), ("sft_mean", 0.1)])
    arguments = sample(outer)
    parts = [(1.0, run("dpo", arguments)), (2.0, run("simpo", arguments)), (0.1, run("sft_mean", arguments))]
    assert_sum(run(outer, arguments), *parts)


def test_a_part_with_gold_makes_pairs_of_three():
    mixed = weighted_sum("mixed", {tpo: 1.0, ipo: 0.01})
    arguments = sample(mixed)
    assert arguments["policy"].numel() == 18
    loss, grad = run(mixed, arguments)
    of_two = {name: value[:12] for name, value in arguments.items()}
    quadratic = run("ipo", of_two)
    whole, whole_grad = run("tpo", arguments)
    torch.testing.assert_close(loss, whole + 0.01 * quadratic[0])
    torch.testing.assert_close(grad[:12], whole_grad[:12] + 0.01 * quadratic[1])


def test_the_sum_may_be_importance_weighted():
    arguments = sample(OBJECTIVES["dpo"], items=1)
    mixed = weighted_sum("mixed", {dpo: 0.5, simpo: 1.0})
    ratio = (arguments["policy"] - arguments["reference"]).sum().item()
    assert_sum(run(importance_sampled(mixed), arguments), (math.exp(min(ratio, 2)), run(mixed, arguments)))


def test_the_record_of_a_sum():
    mixed = weighted_sum(
        "mixed", [(dpo, 1.0), (bco, -0.25), (sft, 2)], source="Somebody 2025", systems=("Mixture",), note="Why it is."
    )
    assert (mixed.name, mixed.source, mixed.systems) == ("mixed", "Somebody 2025", ("Mixture",))
    assert mixed.formula == "dpo - 0.25 bco + 2 sft; [P]."
    assert mixed.function.__doc__.endswith("Why it is.\n\nDefault of beta: 0.1 in dpo, 0.01 in bco.")
    assert mixed.function.__name__ == "mixed"
    parameters = inspect.signature(mixed.function).parameters
    assert {name: parameters[name].default for name in mixed.defaults} == dict(mixed.defaults)
    pair = PairLogprob(*(Pair(torch.zeros(1), torch.zeros(1)) for _ in range(4)))
    with pytest.raises(TypeError, match="mixed: unexpected options"):
        mixed.function(pair, betta=0.1)


def test_the_function_of_a_sum_has_its_defaults():
    arguments = sample(OBJECTIVES["mpo"], items=1)
    policy, reference, lengths = (
        Pair(*arguments[name].view(2, 1).unbind(0)) for name in ("policy", "reference", "lengths")
    )
    loss = OBJECTIVES["mpo"].function(PairLogprob(policy, reference, lengths=lengths))
    torch.testing.assert_close(loss.sum().float(), run("mpo", arguments)[0])


@pytest.mark.parametrize(
    ("parts", "defaults", "message"),
    [
        ({}, {}, "mixed: parts: expected at least one objective"),
        ({"dop": 1.0}, {}, "objective: expected one of dpo, .*, got 'dop'"),
        ({"is_dpo": 1.0}, {}, "mixed: parts: expected pairwise objectives without importance .*, got 'is_dpo'"),
        ({"ld_dpo": 1.0}, {}, "mixed: parts: expected pairwise objectives without .* token weights, got 'ld_dpo'"),
        ({"kto": 1.0}, {}, "mixed: parts: expected pairwise objectives .*, got 'kto'"),
        ({math.exp: 1.0}, {}, "mixed: parts: expected objectives, their functions or names, got .*exp"),
        ({dpo: math.nan}, {}, "mixed: weight of dpo: expected a finite number, got nan"),
        ({dpo: "1"}, {}, "mixed: weight of dpo: expected a finite number, got '1'"),
        ([(bco, 1.0), (bco, 0.5)], {}, "mixed: parts: expected at most one with a state, got bco, bco"),
        ({dpo: 1.0}, {"margin": 0.5}, "mixed: no part has the option 'margin'"),
        ({dpo: 1.0}, {"beta": -1.0}, "mixed: beta: expected a finite number above 0, got -1.0"),
    ],
)
def test_bad_sums(parts, defaults, message):
    with pytest.raises(ValueError, match=message):
        weighted_sum("mixed", parts, **defaults)


# ---- What other libraries do, as sums


def test_the_cpo_of_trl():
    """TRL imitates with the mean over all chosen tokens of the batch."""
    objective = weighted_sum("cpo_of_trl", {cpo: 1.0, sft: 1.0}, sft_weight=0.0)
    arguments = sample(objective)
    policy, lengths = arguments["policy"].view(2, 6), arguments["lengths"].view(2, 6)
    expected = torch.log1p(torch.exp(-0.1 * (policy[0] - policy[1]))).mean() - policy[0].sum() / lengths[0].sum()
    torch.testing.assert_close(run(objective, arguments)[0], expected.float())


def test_the_bco_weight_of_llama_factory():
    """(loss + w * bco) / (1 + w) with one beta."""
    objective = weighted_sum("with_bco", {dpo: 1 / 1.5, bco: 0.5 / 1.5}, beta=0.1)
    arguments = sample(objective)
    preference, quality = run("dpo", arguments, beta=0.1)[0], run("bco", arguments, beta=0.1)[0]
    torch.testing.assert_close(run(objective, arguments)[0], (preference + 0.5 * quality) / 1.5)


def test_iterative_rpo_and_rpo_as_sums():
    arguments = sample(OBJECTIVES["rpo"])
    assert_sum(
        run("iterative_rpo", arguments, beta=0.3, sft_weight=0.7),
        (1, run(weighted_sum("mixed", {dpo: 1.0, "sft_mean": 0.7}), arguments, beta=0.3)),
    )
    assert_sum(
        run("rpo", arguments, beta=0.3, sft_weight=0.7),
        (1, run(weighted_sum("mixed", {dpo: 1.0, "sft_sum": 0.21}), arguments, beta=0.3)),
    )


# ---- Devices


@pytest.mark.parametrize("name", ["sft", "mpo", "is_mpo"])
def test_no_value_is_read(name):
    # A meta tensor has no values: whatever would wait for a device raises on it.
    policy = torch.empty(8, device="meta", requires_grad=True)
    reference, lengths = (torch.empty(8, device="meta") for _ in range(2))
    loss, _ = preference_loss(policy, reference, lengths=lengths, objective=name)
    loss.backward()
    assert policy.grad.shape == (8,)


@pytest.mark.parametrize("name", ["mpo", "orpo", "alphapo"])
def test_fullgraph_compile(name):
    torch.compiler.reset()
    arguments = sample(OBJECTIVES[name])
    policy = arguments.pop("policy").clone().requires_grad_()
    compiled = torch.compile(preference_loss, fullgraph=True, backend="aot_eager")
    loss, _ = compiled(policy, **arguments, objective=name)
    (grad,) = torch.autograd.grad(loss, policy)
    torch.testing.assert_close((loss.detach(), grad), run(name, {"policy": policy.detach(), **arguments}))
