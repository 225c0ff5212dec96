"""preference_loss: layout, reduction, empties, metrics, robustness, bad input. Letters: S sequences, P pairs."""

import math
from dataclasses import replace

import pytest
import torch
from objective_cases import PLAIN
from pair_loss_cases import FUSED

from isdaa_kernels.objectives import OBJECTIVES, BatchState, ImportanceWeight
from isdaa_kernels.objectives.unpaired_state import RewardMean
from isdaa_kernels.preference_loss import preference_loss

A = torch.tensor([0.5, -3.0, 2.0, 0.25])  # log-ratios of the chosen completions
B = torch.tensor([-1.0, 1.0, 1.5, -0.75])
REFERENCE = torch.tensor([-12.5, -20.0, -3.0, -8.0, -11.0, -30.0, -4.0, -9.0])
POLICY = REFERENCE + torch.cat([A, B])
LENGTHS = torch.tensor([5, 7, 2, 3, 4, 9, 2, 6])
METRICS = {
    "loss/mean",
    "margin/mean",
    "accuracy/frac",
    "chosen/mean",
    "rejected/mean",
    "weight/mean",
    "weight/max",
    "weight/clipped_frac",
    "weight/vanished_frac",
    "weight/ess",
    "log_weight/mean",
    "kl/mean",
    "empty_pairs/count",
}


def run(policy=POLICY, reference=REFERENCE, **arguments):
    """(loss, metrics, gradient of the policy)"""
    policy = policy.detach().clone().requires_grad_()
    loss, metrics = preference_loss(policy, reference, **{"lengths": LENGTHS[: len(policy)], **arguments})
    loss.backward()
    return loss.detach(), metrics, policy.grad


@pytest.mark.parametrize("name", PLAIN)
def test_loss_is_the_mean_over_single_pairs(name):
    loss, _, grad = run(objective=name)
    losses = []
    for i in range(4):
        rows = torch.tensor([i, 4 + i])
        single, _, single_grad = run(POLICY[rows], REFERENCE[rows], objective=name, lengths=LENGTHS[rows])
        losses.append(single)
        torch.testing.assert_close(grad[rows], single_grad / 4)
    torch.testing.assert_close(loss, torch.stack(losses).mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    loss, metrics, grad = run(POLICY.to(dtype), REFERENCE.to(dtype))
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    assert all(m.dtype == torch.float32 and m.ndim == 0 and not m.requires_grad for m in metrics.values())


def test_arithmetic_is_fp64():
    # In fp32 the log-ratio of such sums is off by up to 0.004 and the margin by more.
    reference = torch.tensor([-65536.3, -65536.9], dtype=torch.float64)
    policy = (reference + torch.tensor([1e-3, -2e-3], dtype=torch.float64)).requires_grad_()
    loss, _ = preference_loss(policy, reference, objective="is_ipo", beta=1.0)
    assert loss.item() == pytest.approx(math.exp(-1e-3) * (3e-3 - 0.5) ** 2, rel=1e-6)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pairs_name_the_rows(name, dtype):
    loss, _, grad = run(objective=name)
    order = torch.tensor([6, 0, 3, 7, 1, 4, 2, 5])  # where each row goes
    pairs = torch.stack([order[:4], order[4:]], 1).to(dtype)

    def shuffle(x):
        return torch.empty_like(x).index_copy(0, order, x)

    shuffled = run(shuffle(POLICY), shuffle(REFERENCE), objective=name, lengths=shuffle(LENGTHS), pairs=pairs)
    torch.testing.assert_close(shuffled[0], loss, rtol=0, atol=0)
    torch.testing.assert_close(shuffled[2], shuffle(grad), rtol=0, atol=0)


def test_pairs_may_repeat_a_row():
    pairs = torch.tensor([[0, 1], [0, 2]])
    _, _, grad = run(POLICY[:3], REFERENCE[:3], objective="dpo", pairs=pairs)
    grads = [run(POLICY[:3], REFERENCE[:3], objective="dpo", pairs=pairs[i : i + 1])[2] for i in range(2)]
    torch.testing.assert_close(grad, (grads[0] + grads[1]) / 2)


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("name", PLAIN)
def test_micro_batches_with_a_denominator_add_up(name, kind):
    loss, _, grad = run(objective=name)
    total = torch.zeros(())
    for rows in (torch.tensor([0, 4]), torch.tensor([1, 2, 3, 5, 6, 7])):
        part = run(POLICY[rows], REFERENCE[rows], objective=name, lengths=LENGTHS[rows], denominator=kind(4.0))
        total += part[0]
        torch.testing.assert_close(part[2], grad[rows])
    torch.testing.assert_close(total, loss)


def test_sample_weight_scales_each_pair():
    factor = torch.tensor([2.0, 0.0, -1.0, 0.5])
    _, _, grad = run()
    _, _, weighted = run(sample_weight=factor)
    torch.testing.assert_close(weighted, grad * torch.cat([factor, factor]))


def test_option_with_one_value_a_pair():
    beta = torch.tensor([0.1, 0.7, 0.3, 0.2])
    _, _, grad = run(objective="dpo", beta=beta)
    for i in range(4):
        _, _, single = run(objective="dpo", beta=beta[i].item(), pairs=torch.tensor([[i, 4 + i]]), denominator=4)
        torch.testing.assert_close(grad[[i, 4 + i]], single[[i, 4 + i]])


def test_only_the_policy_receives_a_gradient():
    constants = [x.clone().requires_grad_() for x in (REFERENCE, REFERENCE - 0.5, torch.ones(4))]
    policy, importance = POLICY.clone().requires_grad_(), ImportanceWeight(detach=False)
    reference, behaviour, factor = constants
    preference_loss(policy, reference, behaviour=behaviour, sample_weight=factor, importance=importance).loss.backward()
    assert [x.grad for x in constants] == [None] * 3
    assert policy.grad.count_nonzero() == 8


# What an empty completion holds must not matter, whatever the objective does with it.
@pytest.mark.parametrize("rubbish", [0.0, math.nan, math.inf, -1e4])
@pytest.mark.parametrize("name", PLAIN)
def test_an_empty_completion_takes_its_pair_out(name, rubbish):
    policy, reference, lengths = POLICY.clone(), REFERENCE.clone(), LENGTHS.clone()
    policy[1] = reference[1] = rubbish
    lengths[1] = 0
    with torch.autograd.set_detect_anomaly(True):  # raises if a NaN passes through the backward, even one masked later
        loss, metrics, grad = run(policy, reference, objective=name, lengths=lengths)
    rows = torch.tensor([0, 2, 3, 4, 6, 7])
    expected = run(POLICY[rows], REFERENCE[rows], objective=name, lengths=LENGTHS[rows], denominator=4)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(grad[rows], expected[2])
    assert grad[[1, 5]].tolist() == [0.0, 0.0]
    assert metrics.pop("empty_pairs/count").item() == 1
    assert expected[1].pop("empty_pairs/count").item() == 0
    torch.testing.assert_close(metrics, expected[1])


def test_an_empty_pair_does_not_reach_the_others_through_a_whole_batch_formula():
    """Neither by a weight beyond all bounds nor by what a caller has in its place."""
    policy = torch.tensor([1.0, 1, 1, -1600, -1600, -1600], dtype=torch.float64)
    lengths = torch.tensor([3, 0, 3, 3, 3, 3])
    nan = torch.tensor([0.3, math.nan, 0.3], dtype=torch.float64)
    for more in ({"importance": ImportanceWeight(normalize=True)}, {"sample_weight": nan}, {"beta": nan}):
        _, _, grad = run(policy, torch.zeros(6), objective="is_kto_pair", lengths=lengths, **more)
        assert grad.isfinite().all(), more
        assert grad[[1, 4]].tolist() == [0, 0]


def test_a_state_is_asked_even_where_the_formula_has_a_kernel():
    class Five(BatchState):
        gives = frozenset({"beta"})

        def forward(self, batch):
            return {"beta": torch.tensor(5.0)}

    stateful = replace(OBJECTIVES["dpo"], name="own", state=Five, state_required=True)
    loss, _, _ = run(objective=stateful, state=Five())
    assert loss == run(objective="dpo", beta=5.0)[0]
    with pytest.raises(ValueError, match="own: beta: the state gives it"):
        run(objective=stateful, state=Five(), beta=1.0)


def test_loss_and_state_have_one_beta():
    run(objective="bco", beta=0.1, state=RewardMean(0.1))
    with pytest.raises(ValueError, match=r"state: expected one with the beta of the loss, 0.1, got 0.01"):
        run(objective="bco", beta=0.1, state=RewardMean(0.01))


def test_a_state_keeps_its_dtype_when_a_model_changes_its_own():
    state = RewardMean(0.1)
    model = torch.nn.ModuleDict({"state": state, "layer": torch.nn.Linear(2, 2)}).to(torch.bfloat16)
    assert model["layer"].weight.dtype == torch.bfloat16
    assert state.mean.dtype == torch.float64
    assert state.to("meta").mean.device.type == "meta"


def test_metrics_of_completions():
    desirable = torch.tensor([True, True, True, True, False, False, False, False])
    _, metrics, _ = run(objective="bco_unpaired", desirable=desirable, lengths=torch.tensor([5, 7, 2, 0, 4, 9, 2, 6]))
    expected = {
        "log_ratio/mean": (0.5 - 3 + 2 - 1 + 1 + 1.5 - 0.75) / 7,
        "desirable/mean": (0.5 - 3 + 2) / 3,
        "undesirable/mean": (-1 + 1 + 1.5 - 0.75) / 4,
        "kl/mean": -(0.5 - 3 + 2 - 1 + 1 + 1.5 - 0.75) / 7,
        "empty_completions/count": 1,
    }
    assert metrics.keys() == {"loss/mean", *expected}
    assert {name: metrics[name].item() for name in expected} == pytest.approx(expected, rel=1e-6)


def test_metrics_of_groups():
    """The most likely completion has the largest reward in the first group, ties in the second; the third has one completion alone."""
    groups = torch.tensor([[0, 1, 2], [3, 4, -1], [5, 6, 7]])
    reference = torch.zeros(8)
    policy = torch.tensor([1.0, 3.0, 2.0, 0.5, 0.5, 1.0, 2.0, 3.0])
    lengths = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0])
    rewards = torch.tensor([0.0, 1.0, 1.0, 2.0, 1.0, 0.0, 0.0, 0.0])
    loss, metrics, grad = run(policy, reference, objective="dpo_rw", groups=groups, rewards=rewards, lengths=lengths)
    expected = {"log_ratio/mean": (2 + 0.5) / 2, "accuracy/frac": 0.5, "kl/mean": -1.25, "empty_groups/count": 1}
    assert {name: metrics[name].item() for name in expected} == pytest.approx(expected)
    assert metrics["loss/mean"].item() == pytest.approx(loss.item() * 3 / 2)
    assert grad[5:].tolist() == [0, 0, 0]


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"length_exponent": 1.0, "detach": False}], ids=str)
def test_all_pairs_empty(options):
    loss, metrics, grad = run(importance=ImportanceWeight(**options), lengths=torch.zeros(8))
    assert loss.item() == 0
    assert grad.tolist() == [0.0] * 8
    assert metrics["empty_pairs/count"].item() == 4
    assert all(value.item() == 0 for name, value in metrics.items() if name != "empty_pairs/count")


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("pairs", [None, torch.zeros(0, 2, dtype=torch.int64)])
def test_no_pairs(name, pairs):
    policy = POLICY if pairs is not None else POLICY[:0]
    loss, metrics, grad = run(policy, REFERENCE[: len(policy)], objective=name, pairs=pairs)
    assert loss.item() == 0
    assert grad.tolist() == [0.0] * len(policy)
    assert all(value.item() == 0 for value in metrics.values())


@pytest.mark.parametrize("name", FUSED)
def test_a_nan_stays_in_its_pair(name):
    policy = POLICY.clone()
    policy[5] = math.nan
    importance = ImportanceWeight(normalize=True) if name.startswith("is_") else None
    loss, _, grad = run(policy, objective=name, importance=importance)
    rows = torch.tensor([0, 2, 3, 4, 6, 7])
    expected = run(
        POLICY[rows], REFERENCE[rows], objective=name, lengths=LENGTHS[rows], importance=importance, denominator=4
    )
    assert loss.isnan()
    torch.testing.assert_close(grad[rows], expected[2])
    assert name == "slic" or grad[5].isnan()  # the slope of a hinge does not hold its value


# Log-ratios that a run gone wrong reaches; either sign on either completion.
@pytest.mark.parametrize("a", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("b", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("mode", ["joint", "per_completion"])
@pytest.mark.parametrize("name", FUSED)
def test_extreme_log_ratios_stay_finite(name, a, b, mode):
    importance = ImportanceWeight(mode=mode) if name.startswith("is_") else None
    log_ratio, lengths = torch.tensor([a, b]), torch.tensor([3, 2])
    policy = log_ratio.clamp(max=0) - 1.0
    loss, metrics, grad = run(policy, policy - log_ratio, objective=name, importance=importance, lengths=lengths)
    assert torch.isfinite(torch.stack([loss, *grad, *metrics.values()])).all()


def test_metric_values():
    # s = a + b = -0.5, -2, 3.5, -0.5 with the last pair empty; the clip of 2 bites in the third.
    lengths = LENGTHS.clone()
    lengths[7] = 0
    _, metrics, _ = run(objective="is_slic", lengths=lengths)
    weights = [math.exp(-0.5), math.exp(-2), math.exp(2)]
    total = sum(weights)
    expected = {
        "loss/mean": (weights[0] * 0.85 + weights[1] * 1.4 + weights[2] * 0.95) / 3,
        "margin/mean": (1.5 - 4.0 + 0.5) / 3,
        "accuracy/frac": 2 / 3,
        "chosen/mean": (0.5 - 3.0 + 2.0) / 3,
        "rejected/mean": (-1.0 + 1.0 + 1.5) / 3,
        "weight/mean": total / 3,
        "weight/max": math.exp(2),
        "weight/clipped_frac": 1 / 3,
        "weight/vanished_frac": 0.0,
        "weight/ess": total**2 / sum(w * w for w in weights),
        "log_weight/mean": (-0.5 - 2 + 3.5) / 3,
        "kl/mean": -(-0.5 - 2 + 3.5) / 6,
        "empty_pairs/count": 1.0,
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", PLAIN)
def test_metric_names_do_not_depend_on_the_objective(name):
    _, metrics, _ = run(objective=name)
    assert set(metrics) == METRICS
    if not name.startswith("is_"):
        assert metrics["weight/mean"].item() == metrics["weight/max"].item() == 1
        assert metrics["weight/ess"].item() == 4
        assert metrics["log_weight/mean"].item() == 0


def test_vanished_share_and_effective_sample_size_of_tiny_weights():
    reference = torch.zeros(6)
    policy = torch.tensor([-200.0, -201.0, -5.0, 0.0, 0.0, 0.0])
    _, metrics, _ = run(policy, reference)
    assert metrics["weight/vanished_frac"].item() == pytest.approx(2 / 3)
    assert metrics["weight/ess"].item() == pytest.approx(1.0)
    _, metrics, _ = run(policy[[0, 1, 3, 4]] - 100, reference[:4])  # both weights near e^-400
    assert metrics["weight/ess"].item() == pytest.approx((1 + math.exp(-1)) ** 2 / (1 + math.exp(-2)))
    assert metrics["weight/vanished_frac"].item() == 1
    _, metrics, _ = run(policy[[0, 1, 3, 4]] - 1e4, reference[:4])  # both underflow
    assert metrics["weight/ess"].item() == 0


def test_ties_do_not_count_as_accurate():
    _, metrics, _ = run(REFERENCE)
    assert metrics["accuracy/frac"].item() == 0
    assert metrics["kl/mean"].item() == 0


@pytest.mark.parametrize("importance", [None, ImportanceWeight(normalize=True, length_exponent=1.0, floor=0.1)])
@pytest.mark.parametrize("with_pairs", [False, True])
def test_no_value_is_read_on_the_hot_path(importance, with_pairs):
    # A meta tensor has no values: whatever would wait for a device raises on it.
    policy = torch.empty(8, device="meta", requires_grad=True)
    reference, behaviour, lengths = (torch.empty(8, device="meta") for _ in range(3))
    result = preference_loss(
        policy,
        reference,
        behaviour=behaviour,
        lengths=lengths,
        importance=importance,
        pairs=torch.empty(4, 2, dtype=torch.int64, device="meta") if with_pairs else None,
        sample_weight=torch.empty(4, device="meta"),
        denominator=torch.empty((), device="meta"),
    )
    result.loss.backward()
    assert policy.grad.shape == (8,)
    with pytest.raises(RuntimeError):
        result.loss.item()


# Without and with a weight; with every argument that adds operations.
@pytest.mark.parametrize(
    "arguments",
    [
        {"objective": "ipo_mean", "beta": 0.3},
        {"importance": ImportanceWeight(normalize=True, length_exponent=0.5), "denominator": torch.tensor(5.0)},
        {"pairs": torch.tensor([[0, 4], [1, 5]]), "behaviour": POLICY - 0.5, "sample_weight": torch.tensor([1.0, 2.0])},
    ],
    ids=["ipo_mean", "is_dpo-normalize", "is_dpo-pairs"],
)
def test_fullgraph_compile(arguments):
    torch.compiler.reset()
    compiled = torch.compile(preference_loss, fullgraph=True, backend="aot_eager")
    policy = POLICY.clone().requires_grad_()
    loss, metrics = compiled(policy, REFERENCE, lengths=LENGTHS, **arguments)
    loss.backward()
    torch.testing.assert_close((loss.detach(), metrics, policy.grad), run(**arguments))


@pytest.mark.slow
def test_fullgraph_compile_with_the_default_backend():
    torch.compiler.reset()
    policy = POLICY.clone().requires_grad_()
    loss, metrics = torch.compile(preference_loss, fullgraph=True)(policy, REFERENCE, lengths=LENGTHS)
    loss.backward()
    torch.testing.assert_close((loss.detach(), metrics, policy.grad), run())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": POLICY[None]}, r"policy: expected a floating tensor \[S\], got torch.float32 \[1, 8\]"),
        ({"policy": POLICY.long()}, r"policy: expected a floating tensor \[S\], got torch.int64 \[8\]"),
        ({"policy": POLICY[:7], "reference": POLICY[:7], "lengths": None}, "policy: expected an even number .* got 7"),
        ({"reference": REFERENCE[:6]}, r"reference: expected \[8\], got \[6\]"),
        ({"reference": None}, r"reference: expected \[S\] sums .* for 'is_dpo', got None"),
        ({"reference": REFERENCE.to("meta")}, "reference: expected on cpu, got meta"),
        ({"reference": REFERENCE.long()}, "reference: expected a floating dtype, got torch.int64"),
        ({"behaviour": REFERENCE[:6]}, r"behaviour: expected \[8\], got \[6\]"),
        ({"behaviour": REFERENCE, "objective": "ipo"}, "behaviour: 'ipo' would ignore it"),
        ({"lengths": LENGTHS[:4]}, r"lengths: expected \[8\], got \[4\]"),
        ({"lengths": None, "objective": "ipo_mean"}, r"lengths: expected \[S\] counts .* for 'ipo_mean', got None"),
        ({"lengths": None, "importance": ImportanceWeight(length_exponent=1.0)}, "lengths: .* for 'is_dpo', got None"),
        ({"importance": ImportanceWeight(), "objective": "dpo"}, "importance: 'dpo' is not importance weighted"),
        ({"importance": {"epsilon": 1.0}}, "importance: expected an ImportanceWeight, got {'epsilon': 1.0}"),
        ({"objective": "dop"}, "objective: expected one of dpo, .*, got 'dop'"),
        ({"gamma": 1.0}, "is_dpo: unknown option 'gamma'"),
        ({"beta": -0.1}, "is_dpo: beta: expected a finite number above 0, got -0.1"),
        ({"beta": torch.ones(3)}, r"beta: expected \[4\], one value a pair, got \[3\]"),
        ({"pairs": torch.zeros(4)}, r"pairs: expected int32 or int64 \[P, 2\], got torch.float32 \[4\]"),
        ({"pairs": torch.tensor([[0, 8]])}, r"pairs: expected rows in 0..7, got \[\[0, 8\]\]"),
        ({"pairs": torch.tensor([[-1, 2]])}, r"pairs: expected rows in 0..7, got \[\[-1, 2\]\]"),
        ({"pairs": torch.zeros(1, 2, dtype=torch.int64, device="meta")}, "pairs: expected on cpu, got meta"),
        ({"sample_weight": torch.ones(8)}, r"sample_weight: expected \[4\], one value a pair, got \[8\]"),
        ({"sample_weight": torch.ones(())}, r"sample_weight: expected \[4\], one value a pair, got \[\]"),
        ({"sample_weight": 2.0}, r"sample_weight: expected a tensor \[4\], got 2.0"),
        ({"sample_weight": torch.ones(4, dtype=torch.complex64)}, "sample_weight: expected a real dtype, got torch.c"),
        ({"lengths": LENGTHS.cfloat()}, "lengths: expected a real dtype, got torch.complex64"),
        ({"denominator": math.inf}, "denominator: expected a number above 0, got inf"),
        ({"denominator": "a"}, "denominator: expected a number above 0, got 'a'"),
        ({"pairs": [[0, 1]]}, r"pairs: expected int32 or int64 \[P, 2\], got \[\[0, 1\]\]"),
        ({"objective": "inpo", "opponents": torch.zeros(0, 8)}, r"opponents: expected \['H', 8\], got \[0, 8\]"),
        ({"objective": "inpo", "opponents": REFERENCE}, r"opponents: expected \['H', 8\], got \[8\]"),
        (
            {"objective": "mnpo", "opponents": REFERENCE[None], "opponent_weights": torch.ones(4)},
            "mnpo: opponent_weights: expected a tuple of numbers",
        ),
        ({"groups": 2}, "groups: 'is_dpo' is a loss of a pair; expected None"),
        ({"rewards": REFERENCE}, "rewards: 'is_dpo' would ignore it; expected None"),
        ({"state": BatchState()}, "state: 'is_dpo' would ignore it; expected None"),
        ({"denominator": 0}, "denominator: expected a number above 0, got 0"),
        ({"denominator": math.nan}, "denominator: expected a number above 0, got nan"),
        ({"denominator": torch.ones(2)}, r"denominator: expected a scalar, got \[2\]"),
    ],
)
def test_bad_input(arguments, message):
    arguments = {"policy": POLICY, "reference": REFERENCE, "lengths": LENGTHS, **arguments}
    with pytest.raises(ValueError, match=message):
        preference_loss(**arguments)
