"""Losses of methods that look for the equilibrium of a preference game, each one iteration of it.

Letters: P preference pairs, S completions, H earlier policies; a, b log-ratios to the reference of chosen and rejected; Delta = a - b;
u(pi) = log pi(chosen) - log pi(rejected), of sums or, where a docstring says mean, of nats per scored token; S sigmoid, LS log-sigmoid.
pi_t is the policy that the iteration starts from. Where the loss has no other policy, the reference is pi_t.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import logsigmoid

from isdaa_kernels.objectives.batch import CompletionLogprob, PairLogprob
from isdaa_kernels.objectives.objective import declare, make_objective
from isdaa_kernels.objectives.options import Domain, is_finite_number, optional
from isdaa_kernels.objectives.pairwise import logistic

OPPONENT_WEIGHTS = Domain(
    "a tuple of numbers of at least 0, not all 0",
    lambda value: isinstance(value, (tuple, list))
    and all(is_finite_number(weight) and weight >= 0 for weight in value)
    and sum(value) > 0,
    by_item=False,
)


@declare("reference", source="Rosset et al. 2024, arXiv 2404.03715", systems=("DNO",))
def dno(pair: PairLogprob, *, beta: float = 0.1, preference: float = 1.0) -> Tensor:
    """-P LS(beta Delta) - (1 - P) LS(-beta Delta), P = preference; [P].

    Direct Nash optimisation, Rosset et al. 2024 (arXiv 2404.03715); beta is their eta, the reference is pi_t. P = S(r(chosen) -
    r(rejected)), r(y) the probability that y beats a completion of pi_t. The practical form (DNO-Prct) is P = 1, `dpo` with new pairs and
    a new reference in every iteration. The loss is that of `dpo` with label_smoothing = 1 - P, and P may be below 1/2.
    d/da = beta (S(beta Delta) - P) = -d/db. The default of beta is DPO's.
    """
    return logistic(beta * pair.margin, 1 - preference)


@declare("reference", source="Wu et al. 2024, arXiv 2405.00675", systems=("SPPO",))
def sppo(pair: PairLogprob, *, beta: float = 1e-3, preference: float = 1.0, rejected_preference: float = 0.0) -> Tensor:
    """((a - (P_w - 1/2) / beta)^2 + (b - (P_l - 1/2) / beta)^2) / 2, P_w = preference, P_l = rejected_preference; [P].

    Self-play preference optimisation, Wu et al. 2024 (arXiv 2405.00675) and their code (`sppo`), where beta is 1 / eta and the reference
    is pi_t. P_w and P_l are the probabilities that the completion beats one of pi_t, by their estimate the mean over the completions
    sampled for the prompt, itself among them. At the defaults it is half of TRL's `sppo_hard`.
    d/da = a - (P_w - 1/2) / beta, d/db = b - (P_l - 1/2) / beta.
    """
    a, b = pair.log_ratio
    target_w, target_l = (preference - 0.5) / beta, (rejected_preference - 0.5) / beta
    return ((a - target_w).square() + (b - target_l).square()) / 2


@declare("reference", source="Wu et al. 2024, arXiv 2405.00675", systems=("SPPO",))
def sppo_single(pair: PairLogprob, *, beta: float = 1e-3, preference: float = 1.0) -> Tensor:
    """((a - (P - 1/2) / beta)^2 + (b + (P - 1/2) / beta)^2) / 2, P = preference; [P].

    `sppo` where one number is known, the probability that chosen beats rejected (`sppo_single` in the authors' code).
    d/da = a - (P - 1/2) / beta, d/db = b + (P - 1/2) / beta.
    """
    return sppo(pair, beta=beta, preference=preference, rejected_preference=1 - preference)


@declare("reference", "opponents", source="Zhang et al. 2024, arXiv 2407.00617", systems=("INPO",))
def inpo(pair: PairLogprob, *, beta: float = 0.0075, reference_share: float = 1 / 3) -> Tensor:
    """(u(policy) - r u(reference) - (1 - r) u(pi_t) - 1 / (2 beta))^2 of sums, r = reference_share; [P].

    Iterative Nash policy optimisation, Zhang et al. 2024 (arXiv 2407.00617), where beta is eta and r is tau / eta. pi_t is the newest of
    the opponents; older ones do not enter. The defaults are those of the MNPO authors' configurations. r = 1 gives `ipo`.
    With h the difference in the brackets: d/da = 2 h = -d/db.
    """
    anchor_P = reference_share * pair.reference.difference + (1 - reference_share) * pair.opponents[0].difference
    return (pair.policy.difference - anchor_P - 1 / (2 * beta)).square()


@declare(
    "reference",
    "lengths",
    "opponents",
    source="Wu et al. 2025, arXiv 2509.23102",
    systems=("MNPO",),
    opponent_weights=optional(OPPONENT_WEIGHTS),
)
def mnpo(
    pair: PairLogprob,
    *,
    beta: float = 0.0075,
    reference_share: float = 1 / 3,
    opponent_weights: Sequence[float] | None = None,
) -> Tensor:
    """(u(policy) - r u(reference) - (1 - r) sum_j w_j u(opponent j) - 1 / (2 beta))^2 of mean log-probs, r = reference_share; [P].

    Multiplayer Nash preference optimisation, Wu et al. 2025 (arXiv 2509.23102), as in their code (smiles724/MNPO), where beta is eta, r is
    ratio, and log-probs are divided by length. w are `opponent_weights`, one for each of the H opponents, divided by their sum; None
    (default): all equal. Raises ValueError for another number of weights than of opponents. The other defaults are those of the authors'
    configurations, which have two opponents and put all weight on the newer. With h the difference in the brackets:
    d/da = 2 h / |chosen|, d/db = -2 h / |rejected|.
    """
    weights = [1.0] * len(pair.opponents) if opponent_weights is None else opponent_weights
    if len(weights) != len(pair.opponents):
        raise ValueError(f"opponent_weights: expected {len(pair.opponents)} numbers, one an opponent, got {weights!r}")
    opponents_P = sum(
        weight / sum(weights) * opponent.over(pair.lengths).difference
        for weight, opponent in zip(weights, pair.opponents, strict=True)
    )
    anchor_P = reference_share * pair.reference.over(pair.lengths).difference + (1 - reference_share) * opponents_P
    return (pair.mean_policy.difference - anchor_P - 1 / (2 * beta)).square()


@declare("reference", "lengths", source="Zhou et al. 2025, arXiv 2503.08942", systems=("EGPO",))
def egpo(pair: PairLogprob, *, beta: float = 0.1, preference_difference: float = 0.5) -> Tensor:
    """(a / |chosen| - b / |rejected| - d / beta)^2, d = preference_difference; [P].

    One half-step of extragradient preference optimisation, and online IPO, Zhou et al. 2025 (arXiv 2503.08942), as in their code with its
    default of log-probs divided by length; lengths of 1 give sums. d is P(chosen beats y) - P(rejected beats y) for a completion y of
    the policy, in [-1, 1]. The default, 1/2, is that of y = rejected and a sure win, and gives `ipo_mean`. The extragradient is the
    optimiser's: a step from the start with the gradient found after a first step. With h the difference in the brackets:
    d/da = 2 h / |chosen|, d/db = -2 h / |rejected|.
    """
    mean_a, mean_b = pair.mean_log_ratio
    return (mean_a - mean_b - preference_difference / beta).square()


@declare("reference", source="Xie et al. 2024, arXiv 2405.21046")
def xpo(
    pair: PairLogprob, *, beta: float = 0.1, exploration_weight: float = 1e-5, reference_chosen: float = 0.0
) -> Tensor:
    """-LS(beta Delta) + w (c log policy(chosen) + (1 - c) log policy(rejected)), w = exploration_weight, c = reference_chosen; [P].

    Exploratory preference optimisation, Xie et al. 2024 (arXiv 2405.21046), where w is alpha: `dpo` of a completion of the policy and one
    of the reference, whose log-prob is pushed down. c says which that is: 1 where it is the chosen one, 0 where it is the rejected one; a
    tensor gives each pair its own. The default of w is TRL's. d/da = -beta S(-beta Delta) + w c, d/db = beta S(-beta Delta) + w (1 - c).
    """
    from_reference_P = reference_chosen * pair.policy.chosen + (1 - reference_chosen) * pair.policy.rejected
    return -logsigmoid(beta * pair.margin) + exploration_weight * from_reference_P


@declare("reference", "kl_score", source="Munos et al. 2023, arXiv 2312.00886", systems=("Nash-MP",))
def nash_md(batch: CompletionLogprob, *, beta: float = 0.1, preference: float = 1.0) -> Tensor:
    """-(P - 1/2) log policy + beta kl_score, P = preference; [S].

    The policy gradient of Nash mirror descent (Nash-MD-PG), Munos et al. 2023 (arXiv 2312.00886), as in TRL, where P is the probability
    that the completion, of the policy, beats one of the opponent, a mixture of policy and reference. kl_score holds the reference: its
    gradient is that of the KL divergence token by token, without what a token does to later ones. Only the gradient means anything:
    d/dlog policy = -(P - 1/2), d/dkl_score = beta.

    A second anchor needs no second term. Nash-MP (Tiapkin et al. 2025, arXiv 2505.19731) adds the divergence to pi_t, an earlier policy or
    a moving average, with the factor beta / eta. That is this loss with beta (1 + 1 / eta) and, for the reference, the log-probs
    (eta * log reference + log pi_t) / (eta + 1) of each token.
    """
    return (0.5 - preference) * batch.policy + beta * batch.kl_score


OBJECTIVES = tuple(make_objective(function) for function in (dno, sppo, sppo_single, inpo, mnpo, egpo, xpo, nash_md))
