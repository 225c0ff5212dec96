"""The registry of objectives: golden rows, gradients, laws, and the rules that all of it keeps.

Letters: S sequences, P pairs, G groups.
"""

import ast
import importlib
import inspect
import math
import re
import textwrap
from collections import defaultdict
from dataclasses import fields, replace

import pytest
import torch
from objective_cases import STANDARD, Golden, sample

from isdaa_kernels.linear_policy_loss import linear_policy_loss
from isdaa_kernels.linear_preference_loss import linear_preference_loss
from isdaa_kernels.objectives import (
    FAMILIES,
    OBJECTIVES,
    ImportanceWeight,
    Objective,
    Pair,
    PairLogprob,
    SequenceInputs,
    get_objective,
    importance_sampled,
    token_weighted,
    weighted_sum,
)
from isdaa_kernels.objectives.objective import KINDS, NEEDS, REDUCTIONS, keyword_defaults
from isdaa_kernels.objectives.tokens import tail_weight
from isdaa_kernels.policy_loss import policy_loss
from isdaa_kernels.preference_loss import preference_loss
from isdaa_kernels.preference_terms import columns_of, needs_of

GOLDEN: list[Golden] = [
    row for family in FAMILIES for row in importlib.import_module(f"golden_{family.__name__.split('.')[-1]}").ROWS
]
BASES = {name: objective for name, objective in OBJECTIVES.items() if not name.startswith("is_")}
PAIRWISE = {name: objective for name, objective in BASES.items() if objective.kind == "pair"}
OF_TOKENS = {name: objective for name, objective in BASES.items() if objective.kind == "token"}
OF_SEQUENCES = {name: objective for name, objective in OBJECTIVES.items() if name not in OF_TOKENS}
# Those that weigh tokens are the ones they are made from, once tokens are summed.
IN_SUMS = {
    name: objective for name, objective in BASES.items() if objective.token_weight is None and name in OF_SEQUENCES
}


def batch_of(objective: Objective, inputs: SequenceInputs, groups=None):
    if objective.kind == "pair":
        return inputs.pairs(None, columns_of(objective))
    return inputs.completions() if objective.kind == "completion" else inputs.groups(groups)[0]


def split(arguments: dict) -> tuple[dict, dict]:
    """(tensors of `SequenceInputs`, the rest)"""
    names = {field.name for field in fields(SequenceInputs)}
    return {n: v for n, v in arguments.items() if n in names}, {n: v for n, v in arguments.items() if n not in names}


def run(objective: Objective, arguments: dict, by: str | None = None, **options):
    """(loss, gradient by the policy, or by another input)"""
    tensors = dict(arguments)
    by = by or ("logprob" if objective.kind == "token" else "policy")
    leaf = tensors[by] = tensors[by].clone().requires_grad_()
    if objective.kind == "token":
        loss, _ = policy_loss(**tensors, objective=objective, **options)
        (grad,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), grad
    if objective.token_weight is not None:  # in sums its tokens are weighted already
        objective = replace(objective, token_weight=None, defaults={"beta": 0.1})
    if "token_weight" in objective.needs:
        objective = replace(objective, needs=objective.needs - {"token_weight"})
    loss, _ = preference_loss(**tensors, objective=objective, **options)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


# ---- Golden rows


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row.objective}-{row.options}")
def test_golden_row(row):
    arguments, options = row.tensors(), row.arguments()
    loss, grad = run(get_objective(options.pop("objective")), arguments, row.by, **options)
    assert loss.item() == pytest.approx(row.loss, rel=1e-6, abs=1e-9)
    torch.testing.assert_close(grad, torch.tensor(row.gradient, dtype=torch.float64), rtol=1e-6, atol=1e-12)


# Those of one pair: its weight is e^min(a + b, 2), a constant for the gradient.
OF_ONE_PAIR = [
    row
    for row in GOLDEN
    if f"is_{row.objective}" in OBJECTIVES
    and row.by is None
    and row.tensors()["policy"].numel() == columns_of(OBJECTIVES[row.objective])
    and "reference" in row.tensors()
]


@pytest.mark.parametrize("row", OF_ONE_PAIR, ids=lambda row: f"is_{row.objective}-{row.options}")
def test_golden_row_with_the_importance_weight(row):
    arguments = row.tensors()
    ratio = (arguments["policy"] - arguments["reference"])[:2].sum().item()
    weight = math.exp(min(ratio, 2.0))
    options = row.arguments()
    options.pop("objective")
    loss, grad = run(OBJECTIVES[f"is_{row.objective}"], arguments, **options)
    assert loss.item() == pytest.approx(weight * row.loss, rel=1e-6, abs=1e-9)
    expected = weight * torch.tensor(row.gradient, dtype=torch.float64)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-12)


def test_every_objective_has_golden_rows_at_its_defaults_and_with_options():
    for name, objective in BASES.items():
        rows = [row for row in GOLDEN if row.objective == name]
        assert any(row.options.keys() <= {"state", "max_length"} for row in rows), (
            f"{name}: no golden row at the defaults"
        )
        if objective.defaults:
            assert any(row.options for row in rows) or len(rows) > 1, f"{name}: one golden row alone"


def options_in_sums() -> list[tuple[str, str]]:
    """(objective, option), but for what weighs tokens and what a state gives, of which sums or options show nothing."""
    found = []
    for name, objective in BASES.items():
        of_tokens = () if objective.token_weight is None else keyword_defaults(objective.token_weight)
        given = objective.state.gives if objective.state_required else ()
        found += [(name, option) for option in objective.defaults if option not in (*of_tokens, *given)]
    return found


@pytest.mark.parametrize(("name", "option"), options_in_sums())
def test_golden_rows_see_every_option(name, option):
    """One row at least changes when the option is put back to its default; of those that share a formula, a row of any."""
    objective, seen = BASES[name], []
    alike = {other for other, it in BASES.items() if it.function is objective.function}
    for row in (row for row in GOLDEN if row.objective in alike and option in row.options):
        own, options = BASES[row.objective], row.arguments()
        options.pop("objective")
        loss, grad = run(own, row.tensors(), row.by, **options)
        default = {option: own.defaults[option]} if own.defaults[option] is not None else {}
        other, other_grad = run(
            own, row.tensors(), row.by, **{n: v for n, v in options.items() if n != option}, **default
        )
        seen.append(not torch.allclose(loss, other, rtol=1e-6) or not torch.allclose(grad, other_grad, rtol=1e-6))
    assert any(seen), f"{name}: no golden row sees {option}"


# ---- Rules of the registry


@pytest.mark.parametrize("name", OBJECTIVES)
def test_registry_rules(name):
    objective = OBJECTIVES[name]
    assert objective.name == name
    assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
    assert objective.needs <= set(NEEDS)
    assert objective.kind in KINDS.values()
    assert objective.source
    ends = {"pair": "[P].", "completion": "[S].", "group": "[G].", "token": "[N]."}
    assert objective.formula.endswith(ends[objective.kind])
    assert (objective.reduction in REDUCTIONS) == (objective.kind == "token")
    assert objective.resolve_options({}) == objective.defaults
    both = (policy_loss, linear_policy_loss) if name in OF_TOKENS else (preference_loss, linear_preference_loss)
    arguments = {parameter for function in both for parameter in inspect.signature(function).parameters}
    assert not set(objective.defaults) & (arguments - {"beta"})
    numbers = {n: v for n, v in objective.defaults.items() if v is not None and not isinstance(v, torch.Tensor)}
    assert objective.resolve_options(numbers) == objective.defaults


def body_lines(function) -> int:
    """Lines of a function beside its decorators, its signature and its docstring."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    first, *_ = (
        node for node in tree.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    )
    return tree.body[-1].end_lineno - first.lineno + 1


@pytest.mark.parametrize("name", BASES)
def test_an_objective_is_at_most_fifteen_lines(name):
    assert body_lines(BASES[name].function) <= 15


@pytest.mark.parametrize("name", [name for name, objective in PAIRWISE.items() if objective.has_importance_ratio])
def test_importance_sampled_keeps_the_formula_of_its_base(name):
    base, weighted = OBJECTIVES[name], OBJECTIVES[f"is_{name}"]
    assert weighted == importance_sampled(base)
    assert (weighted.function, weighted.needs, weighted.defaults) == (base.function, base.needs, base.defaults)
    assert weighted.importance == ImportanceWeight()


@pytest.mark.parametrize("name", [name for name in BASES if name in OF_SEQUENCES])
def test_what_is_needed_is_missed_and_what_is_not_is_refused(name):
    objective, arguments = BASES[name], sample(BASES[name])
    if objective.token_weight is not None or "token_weight" in objective.needs:
        with pytest.raises(ValueError, match=r"linear_preference_loss|token_weight: expected"):
            preference_loss(**arguments, objective=name)
        return
    preference_loss(**arguments, objective=name)
    needs = needs_of(objective, objective.importance)
    for need in needs - {"gold", "behaviour"}:
        with pytest.raises(ValueError, match=f"{need}: expected .* for '{name}', got None"):
            preference_loss(**{**arguments, need: None}, objective=name)
    policy = arguments["policy"]
    others = {"rewards": policy, "desirable": policy > 0, "mismatched": policy, "kl_score": policy}
    others |= {"reference_kl": policy, "log_sum_sq_prob": policy, "opponents": policy[None], "behaviour": policy}
    for other, value in others.items():
        if other not in needs:
            with pytest.raises(ValueError, match=f"{other}: '{name}' would ignore it"):
                preference_loss(**arguments, **{other: value}, objective=name)


# ---- Gradients


# The gradient that is meant leaves out what these hold constant (the scale that minimises a pair's own loss); golden rows have it.
HOLD_CONSTANT = {"ada_dpo"}
CONSTANT_IN = defaultdict(set, {"tdpo2": {"reference_kl"}})


@pytest.mark.parametrize("name", [name for name in IN_SUMS if name not in HOLD_CONSTANT])
def test_gradcheck(name):
    objective = BASES[name]
    tensors, rest = split(sample(objective, items=3, seed=5))
    policy = tensors.pop("policy")
    names = [
        name for name in ("kl_score", "reference_kl") if name in tensors and name not in CONSTANT_IN[objective.name]
    ]
    others = [tensors.pop(name).requires_grad_() for name in names]
    options = objective.resolve_options({})
    if "state" in rest:
        options |= rest["state"](batch_of(objective, SequenceInputs(policy, **tensors)))

    def loss(policy, *others):
        inputs = SequenceInputs(policy, **tensors, **dict(zip(names, others, strict=True)))
        return objective.loss(batch_of(objective, inputs, rest.get("groups")), options)

    assert torch.autograd.gradcheck(loss, (policy.requires_grad_(), *others))


EXTREMES = (0.0, 1e4, -1e4, 700.0, -700.0)


@pytest.mark.parametrize("name", OF_SEQUENCES)
def test_log_ratios_beyond_all_bounds_leave_loss_and_gradient_finite(name):
    objective = OBJECTIVES[name]
    for chosen in EXTREMES:
        for rejected in EXTREMES:
            arguments = sample(objective, items=2)
            # of each pair the two that are compared, of each group the first two, of single completions every other one
            log_ratio = arguments["policy"] - arguments["reference"]
            sides = log_ratio.view(columns_of(objective), 2) if objective.kind == "pair" else log_ratio.view(-1, 2).T
            sides[0], sides[1] = chosen, rejected
            arguments = sample(objective, items=2, log_ratio=log_ratio)
            loss, grad = run(objective, arguments)
            assert loss.isfinite(), (chosen, rejected)
            assert grad.isfinite().all(), (chosen, rejected)


@pytest.mark.parametrize("name", [name for name in IN_SUMS if not BASES[name].state_required])
def test_empty_completions_leave_no_trace(name):
    """Whatever their log-probs are, the loss of the others is the same, and so is their gradient."""
    objective = BASES[name]
    whole = sample(objective, items=4, seed=2)
    tensors, rest = split(whole)
    columns = {"pair": columns_of(objective), "completion": 1, "group": 4}[objective.kind]
    item = 1 if objective.kind != "group" else slice(4, 8)
    by_item = {
        n: (v.view(*v.shape[:-1], columns, -1) if objective.kind != "group" else v).clone() for n, v in tensors.items()
    }
    by_item["lengths"][..., item] = 0
    bad = {n: v.clone() for n, v in by_item.items()}
    for n in ("policy", "reference"):
        bad[n][..., item] = math.nan
    loss, grad = run(objective, {n: v.view(tensors[n].shape) for n, v in bad.items()} | rest, denominator=3)
    if objective.kind == "group":
        keep = torch.tensor([0, 2, 3])
        fewer = tensors | {"groups": rest["groups"][keep]}
    else:
        keep = torch.tensor([0, 2, 3])
        fewer = {n: v[..., keep].reshape(*tensors[n].shape[:-1], -1) for n, v in by_item.items()}
    expected, expected_grad = run(objective, fewer, denominator=3)
    torch.testing.assert_close(loss, expected)
    if objective.kind != "group":
        grad = grad.view(columns, -1)
        assert (grad[:, 1] == 0).all()
        grad = grad[:, keep].reshape(-1)
    torch.testing.assert_close(grad, expected_grad)


# ---- Laws

# A loss of log-ratios alone does not see where the reference stands.
LOG_RATIOS = [
    name
    for name, objective in IN_SUMS.items()
    if "reference" in objective.needs
    and not {"gold", "kl_score"} & objective.needs
    and name not in {"rpo", "iterative_rpo", "mpo", "xpo"}  # which take the policy's own log-probs too
    and objective.importance is None  # a weight of the policy's own sharpness
    and not objective.state_required
]


@pytest.mark.parametrize("name", LOG_RATIOS)
def test_shift_law(name):
    objective, arguments = BASES[name], sample(BASES[name])
    shift = torch.linspace(-64, 32, arguments["policy"].numel(), dtype=torch.float64)
    moved = {n: v + shift if n in ("policy", "reference", "opponents") else v for n, v in arguments.items()}
    found, expected = run(objective, moved), run(objective, arguments)
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=1e-9)


# L(z) = -log S(z) at these options: swapping the two completions adds z. (name, options, z of a log-ratio of a, b and lengths n)
LOGISTIC = [
    ("dpo", {"beta": 0.7}, lambda a, b, n: 0.7 * (a - b)),
    ("dpo_mean", {"beta": 0.7}, lambda a, b, n: 0.7 * (a / n[0] - b / n[1])),
    ("dpo_js", {"beta": 0.7}, lambda a, b, n: 0.7 * (math.log((1 + math.exp(-b)) / (1 + math.exp(-a))))),
    ("dpo_forward_kl", {"beta": 0.7}, lambda a, b, n: 0.7 * (math.exp(-b) - math.exp(-a))),
]


@pytest.mark.parametrize(("name", "options", "scaled"), LOGISTIC)
@pytest.mark.parametrize(("a", "b"), [(0.5, -1.0), (-2.0, 1.5)])
def test_swapping_a_pair_adds_its_scaled_margin(name, options, scaled, a, b):
    def loss(a, b, lengths):
        policy = torch.tensor([a, b], dtype=torch.float64)
        lengths = torch.tensor(lengths)
        return run(OBJECTIVES[name], {"policy": policy, "reference": torch.zeros(2), "lengths": lengths}, **options)[0]

    difference = loss(b, a, (4, 5)) - loss(a, b, (5, 4))
    assert difference.item() == pytest.approx(scaled(a, b, (5, 4)), rel=1e-5)


# loss(c beta, x / c) = c^power loss(beta, x): the scale of log-ratios is that of 1 / beta.
SCALE = [
    ("dpo", 0),
    ("slic", 0),
    ("robust_dpo", 0),
    ("exo", 0),
    ("nca", 0),
    ("bco", 0),
    ("apo_zero", 0),
    ("apo_down", 0),
]
SCALE += [("ipo", -2), ("ipo_mean", -2), ("sppo_hard", -2), ("discopop", 0), ("minor_dpo", 0), ("dpop", 0)]


@pytest.mark.parametrize(("name", "power"), SCALE)
def test_scale_law(name, power):
    arguments = sample(OBJECTIVES[name])
    log_ratio = arguments["policy"] - arguments["reference"]
    scaled = arguments | {"policy": arguments["reference"] + log_ratio / 4}
    expected, _ = run(OBJECTIVES[name], arguments, beta=0.3)
    found, _ = run(OBJECTIVES[name], scaled, beta=1.2)
    assert found.item() == pytest.approx(4.0**power * expected.item(), rel=1e-6)


def test_label_smoothing_of_one_half_ignores_the_label():
    arguments = sample(OBJECTIVES["dpo"], items=1)
    swapped = {name: value.flip(0) for name, value in arguments.items()}
    loss, _ = run(OBJECTIVES["dpo"], arguments, label_smoothing=0.5)
    torch.testing.assert_close(run(OBJECTIVES["dpo"], swapped, label_smoothing=0.5)[0], loss)


def test_ipo_mean_equals_ipo_at_length_one():
    arguments = sample(OBJECTIVES["ipo_mean"]) | {"lengths": torch.ones(12)}
    assert torch.equal(run(OBJECTIVES["ipo_mean"], arguments)[1], run(OBJECTIVES["ipo"], arguments)[1])


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, objective in IN_SUMS.items()
        if "beta" in objective.defaults
        and objective.kind != "group"
        and not objective.state_required
        and not objective.whole_batch
    ],
)
def test_an_option_may_hold_one_value_an_item(name):
    objective = BASES[name]
    arguments = sample(objective, items=2)
    beta = torch.tensor([0.1, 0.7], dtype=torch.float64)
    columns = {"pair": columns_of(objective), "completion": 1}[objective.kind]
    together, _ = run(objective, arguments, beta=beta)

    def alone(item: int):
        return {
            n: v.view(*v.shape[:-1], columns, 2)[..., item].reshape(*v.shape[:-1], -1) for n, v in arguments.items()
        }

    apart = [run(objective, alone(item), beta=beta[item].item())[0] for item in (0, 1)]
    torch.testing.assert_close(together, torch.stack(apart).mean())


def test_only_what_divides_by_length_needs_lengths():
    standard = {name: torch.tensor(value, dtype=torch.float64) for name, value in STANDARD.items()}
    for name in ("dpo", "ipo", "slic"):
        without, _ = run(OBJECTIVES[name], {**standard, "lengths": None})
        assert without == run(OBJECTIVES[name], standard)[0]
    assert "lengths" in OBJECTIVES["ipo_mean"].needs


def test_what_is_no_ratio_of_probabilities_has_no_importance_weight():
    for name in ("ld_dpo_policy", "segment_dpo", "wpo", "kto", "exo_rw"):
        assert f"is_{name}" not in OBJECTIVES
        with pytest.raises(ValueError, match="base: expected a pairwise objective of sums of log-probs"):
            importance_sampled(OBJECTIVES[name])
    assert "is_ld_dpo" in OBJECTIVES


@pytest.mark.parametrize("name", ["tpo", "kto", "exo_rw", "ld_dpo"])
def test_tokens_are_weighted_in_pairs_of_two(name):
    with pytest.raises(ValueError, match="base: expected a pairwise objective of two completions"):
        token_weighted(OBJECTIVES[name], "own", tail_weight)


def test_a_state_is_made_from_options_and_settings():
    state = OBJECTIVES["beta_dpo"].make_state(beta=0.3, strength=0.9)
    assert (state.beta, state.strength) == (0.3, 0.9)
    assert OBJECTIVES["bco"].make_state().beta == 0.01
    assert OBJECTIVES["dpo"].make_state() is None
    with pytest.raises(ValueError, match="bco: unknown option 'strength'"):
        OBJECTIVES["bco"].make_state(strength=1.0)
    mixed = weighted_sum("mixed", {"dpo": 0.8, "bco": 0.2})
    with pytest.raises(ValueError, match="mixed: beta: its parts have their own"):
        mixed.make_state()
    assert mixed.make_state(beta=0.2).beta == 0.2
    with pytest.raises(ValueError, match="the state of beta_dpo gives an option of ipo, too"):
        weighted_sum("mixed", {"beta_dpo": 0.5, "ipo": 0.5})


def test_a_number_for_the_divergence_spares_the_mismatched_completions():
    arguments = sample(OBJECTIVES["kto"])
    expected, _ = run(OBJECTIVES["kto"], arguments, kl=0.25)
    found, _ = run(OBJECTIVES["kto"], {**arguments, "mismatched": None}, kl=0.25)
    assert found == expected


@pytest.mark.parametrize("name", ["exo_rw", "dpo_rw", "adpo", "brain", "plackett_luce", "lipo", "rank_dpo"])
def test_a_nan_reward_reaches_the_loss(name):
    arguments = sample(OBJECTIVES[name])
    arguments["rewards"][1] = math.nan
    loss, grad = run(OBJECTIVES[name], arguments)
    assert loss.isnan()
    assert grad[4:].isfinite().all()


# ---- Objectives of the caller's own, and bad input


def test_own_objective_passes_through():
    own = Objective("square", lambda pair: pair.margin**2, frozenset({"reference"}), {})
    assert get_objective(own) is own
    loss, _ = preference_loss(torch.tensor([3.0, 1.0]), torch.zeros(2), objective=own)
    assert loss.item() == 4.0


def test_a_pair_without_reference_is_its_own_log_ratio():
    pair = PairLogprob(Pair(torch.tensor([-1.0]), torch.tensor([-3.0])))
    assert pair.margin.item() == 2.0


def test_unknown_objective_lists_the_names():
    with pytest.raises(ValueError, match=r"objective: expected one of dpo, ipo, .*is_slic.*, got 'dop'"):
        get_objective("dop")
    with pytest.raises(ValueError, match="objective: expected one of"):
        get_objective(["dpo"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("is_dpo", {"gamma": 1.0}, "is_dpo: unknown option 'gamma', expected one of beta, label_smoothing"),
        ("ipo", {"label_smoothing": 0.1}, "ipo: unknown option 'label_smoothing', expected one of beta"),
        ("dpo", {"beta": 0.0}, "dpo: beta: expected a finite number above 0, got 0.0"),
        ("slic", {"beta": math.nan}, "slic: beta: expected a finite number above 0, got nan"),
        ("ipo", {"beta": "0.1"}, "ipo: beta: expected a finite number above 0, got '0.1'"),
        ("dpo", {"label_smoothing": 0.6}, r"dpo: label_smoothing: expected a number in \[0, 0.5\], got 0.6"),
    ],
)
def test_bad_option(name, options, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(torch.zeros(2), torch.zeros(2), objective=name, **options)
