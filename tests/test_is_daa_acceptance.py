"""The acceptance tests of IS-DAA (arXiv 2506.08681): what makes the weight an importance weight, one test each."""

import math

import pytest
import torch
from objective_cases import PLAIN
from torch.nn.functional import logsigmoid

from isdaa_kernels.objectives import OBJECTIVES, ImportanceWeight
from isdaa_kernels.preference_loss import preference_loss

BASES = [name for name in PLAIN if not OBJECTIVES[name].importance_weighted]
REFERENCE = torch.tensor([-12.5, -20.25, -3.0, -11.0, -30.0, -4.75])
LENGTHS = torch.tensor([5, 7, 2, 4, 9, 3])


def run(policy, reference, **arguments):
    policy = policy.detach().clone().requires_grad_()
    loss, metrics = preference_loss(policy, reference, **arguments)
    loss.backward()
    return loss.detach(), policy.grad, metrics


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_1_equal_policies_give_bit_equal_loss_and_gradients_to_the_base(base, normalize):
    importance = ImportanceWeight(normalize=normalize)
    loss, grad, metrics = run(REFERENCE, REFERENCE, objective=f"is_{base}", lengths=LENGTHS, importance=importance)
    base_loss, base_grad, _ = run(REFERENCE, REFERENCE, objective=base, lengths=LENGTHS)
    assert torch.equal(loss, base_loss)
    assert torch.equal(grad, base_grad)
    assert metrics["weight/mean"].item() == metrics["weight/max"].item() == 1.0
    assert metrics["weight/ess"].item() == 3.0


def test_2_the_weight_is_clipped_at_exp_of_two_epsilon():
    _, _, metrics = run(torch.tensor([7.0, 3.0]), torch.zeros(2), importance=ImportanceWeight(epsilon=1.0))
    assert metrics["weight/max"].item() == pytest.approx(math.e**2, rel=1e-7)
    assert metrics["log_weight/mean"].item() == 10.0
    assert metrics["weight/clipped_frac"].item() == 1.0


@pytest.mark.parametrize("base", BASES)
def test_3_a_pair_that_the_policy_has_left_vanishes(base):
    loss, grad, metrics = run(
        torch.tensor([-150.0, -50.0]), torch.zeros(2), objective=f"is_{base}", lengths=torch.tensor([3, 4])
    )
    assert metrics["weight/max"].item() == 0.0
    assert metrics["weight/vanished_frac"].item() == 1.0
    assert loss.item() == 0.0
    assert grad.tolist() == [0.0, 0.0]


def test_4_the_gradient_is_that_of_the_loss_with_a_frozen_weight():
    reference = REFERENCE.double()
    policy = reference + torch.tensor([0.5, -1.0, 2.0, -0.25, 0.75, 1.0], dtype=torch.float64)
    _, grad, _ = run(policy, reference, objective="is_dpo", beta=0.3)
    frozen = (policy - reference).unflatten(0, (2, 3)).sum(0).clamp(max=2).exp()

    def loss_with_frozen_weight(policy):
        chosen, rejected = (policy - reference).chunk(2)
        return -(frozen * logsigmoid(0.3 * (chosen - rejected))).mean()

    step = 1e-5
    for i, direction in enumerate(step * torch.eye(6, dtype=torch.float64)):
        slope = (loss_with_frozen_weight(policy + direction) - loss_with_frozen_weight(policy - direction)) / (2 * step)
        assert grad[i].item() == pytest.approx(slope.item(), rel=1e-8)


@pytest.mark.parametrize("base", BASES)
def test_5_the_behaviour_policy_changes_the_weight_and_never_the_margin(base):
    policy, behaviour = REFERENCE + 0.25, REFERENCE + 0.25 - torch.tensor([0.5, 0.5, 0.5, -0.25, -0.25, -0.25])
    _, base_grad, base_metrics = run(policy, REFERENCE, objective=base, lengths=LENGTHS)
    _, grad, metrics = run(policy, REFERENCE, objective=f"is_{base}", lengths=LENGTHS, behaviour=behaviour)
    torch.testing.assert_close(metrics["weight/mean"].item(), math.exp(0.25), rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, base_grad * math.exp(0.25))
    for name in ("margin/mean", "accuracy/frac", "chosen/mean", "rejected/mean", "kl/mean"):
        assert torch.equal(metrics[name], base_metrics[name])


@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_6_the_weighted_square_over_all_pairs_has_four_times_the_gradient_of_the_kl(beta):
    # Two possible answers; every ordered pair (y1, y2), drawn from the reference. The target 1 / (2 beta) of IPO drops
    # out of the sum because the margin is antisymmetric in (y1, y2) and the weight is not differentiated.
    reference = torch.tensor([0.3, 1.1], dtype=torch.float64).log_softmax(0)
    logits = torch.tensor([-0.4, 0.9], dtype=torch.float64, requires_grad=True)
    first, second = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    rows = torch.cat([first, second])
    loss, _ = preference_loss(
        logits.log_softmax(0)[rows],
        reference[rows],
        objective="is_ipo",
        beta=beta,
        importance=ImportanceWeight(mode="none"),
        sample_weight=(reference[first] + reference[second]).exp(),
        denominator=1.0,
    )
    (grad,) = torch.autograd.grad(loss, logits)
    policy = logits.log_softmax(0)
    (grad_kl,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits)
    torch.testing.assert_close(grad, 4 * grad_kl, rtol=1e-10, atol=0)
