"""Golden rows of objectives/regularised.py: closed forms of loss and gradient at the standard pair, where a = 0.5 and b = -1.

S is the logistic function, softplus(x) = log(1 + e^x) = -log S(-x).
"""

from math import exp, log, log1p

from objective_cases import Golden

from isdaa_kernels.objectives import SelfWeight
from isdaa_kernels.objectives.beta_state import BetaState


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def softplus(x: float) -> float:
    return log1p(exp(x))


def logistic(
    objective: str, u: float, beta: float, rejected_beta: float | None = None, weight: float = 1, **row
) -> Golden:
    """-weight log S(u), where u grows by beta with a and falls by rejected_beta with b."""
    rejected_beta = beta if rejected_beta is None else rejected_beta
    gradient = (-weight * beta * sigmoid(-u), weight * rejected_beta * sigmoid(-u))
    return Golden(objective, weight * softplus(-u), gradient, **row)


CHOSEN_FELL = {"policy": (-13.0, -9.25)}  # a = -0.5, Delta = 0.5
REJECTED_ROSE = {"policy": (-12.0, -7.25)}  # b = 1, Delta = -0.5
SHORT_CHOSEN = {"lengths": (4, 5)}


def scale_of_authors(scaled: float, penalty: float = 0.1) -> float:
    """tau of adaptive preference scaling by the iteration of its code, slope and curvature written with p = S(z / tau) and its entropy."""
    tau = 1.0
    for _ in range(5):
        p = sigmoid(scaled / tau)
        slope = -p * log(p) - (1 - p) * log(1 - p) - log(2) + penalty
        curvature = max(scaled**2 / tau**3 * p * (1 - p), 1e-6)
        tau = min(max(tau - slope / curvature, 0.1), 5.0)
    return tau


def adaptive(scaled: float, beta: float, tau: float, penalty: float = 0.1, **row) -> Golden:
    slope = beta * sigmoid(-scaled / tau)
    return Golden("ada_dpo", tau * (softplus(-scaled / tau) + penalty - log(2)), (-slope, slope), **row)


def state(mean: float, **options) -> BetaState:
    """One that no call moves; a single pair is always kept."""
    found = BetaState(**options).eval()
    found.mean.fill_(mean)
    return found


ROWS = [
    # chosen above the reference: no penalty; 0.5 below it: 0.3 (0.5 - 50 * 0.5) = -7.35 and a slope of 0.3 (1 + 50) in a
    logistic("dpop", 0.45, 0.3),
    logistic("dpop", -7.35, 15.3, 0.3, inputs=CHOSEN_FELL),
    logistic("dpop", -0.05, 0.3, 0.1, options={"beta": 0.1, "drop_weight": 2.0}, inputs=CHOSEN_FELL),
    # one token longer, one token shorter
    logistic("r_dpo", 0.16, 0.1),
    logistic("r_dpo", 0.05, 0.1, options={"length_weight": 0.1}, inputs=SHORT_CHOSEN),
    logistic("r_dpo", 3.25, 2.0, options={"beta": 2.0, "length_weight": 0.25}),
    # targets +-5: (0.5 - 5)^2 + (-1 + 5)^2; targets +-1: (0.5 - 1)^2 + 0
    Golden("cal_dpo", softplus(-1.5) + 36.25, (-9 - sigmoid(-1.5), 8 + sigmoid(-1.5))),
    Golden(
        "cal_dpo",
        softplus(-1.5) + 0.125,
        (-0.5 - sigmoid(-1.5), sigmoid(-1.5)),
        {"beta": 0.5, "calibration_weight": 0.5},
    ),
    # b = -1 is no longer pushed, b = 1 is: 0.1 (0.5 - 1)
    logistic("minor_dpo", 0.05, 0.1, 0.0),
    logistic("minor_dpo", -0.05, 0.1, inputs=REJECTED_ROSE),
    logistic("minor_dpo", 1.0, 2.0, 0.0, options={"beta": 2.0}),
    # 0.1 * 0.5 + 0.08 * 1
    logistic("flex_dpo", 0.13, 0.1, 0.08),
    logistic("flex_dpo", 0.6, 0.2, 0.5, options={"beta": 0.2, "rejected_beta": 0.5}),
    logistic("flex_dpo", 0.05, 0.1, 0.0, options={"rejected_beta": 0.0}),
    logistic("odpo", 0.15, 0.1),
    logistic("odpo", -0.85, 0.1, options={"margin": 1.0}),
    logistic("odpo", 2.5, 2.0, options={"beta": 2.0, "margin": 0.5}),
    # two pairs alike with margins of their own: the mean of two losses
    Golden(
        "odpo",
        (log(2) + softplus(2)) / 2,
        (-0.025, -0.05 * sigmoid(2), 0.025, 0.05 * sigmoid(2)),
        {"margin": (0.15, 2.15)},
        {"policy": (-12.0, -12.0, -9.25, -9.25), "reference": (-12.5, -12.5, -8.25, -8.25), "lengths": (5, 5, 4, 4)},
    ),
    # 0.15 / 0.5; (0.15 - 0.4) / 0.8
    logistic("modpo", 0.3, 0.2),
    logistic("modpo", -0.3125, 0.125, options={"margin": 0.4, "objective_weight": 0.8}),
    logistic("modpo", 1.0, 0.8, options={"beta": 0.4, "margin": 0.1}),
    # either side of the kink: 1 - 0.3; 1 - 3; 1 - (1.5 - 1.4) / 0.5
    Golden("modpo_hinge", 0.7, (-0.2, 0.2)),
    Golden("modpo_hinge", 0.0, (0.0, 0.0), {"beta": 1.0}),
    Golden("modpo_hinge", 0.4, (-0.4, 0.4), {"objective_weight": 0.25}),
    Golden("modpo_hinge", 0.8, (-2.0, 2.0), {"beta": 1.0, "margin": 1.4}),
    # tau inside its bounds, on the lower one, on the upper one, and at a fixed 1, which is dpo and a constant
    adaptive(0.15, 0.1, scale_of_authors(0.15)),
    adaptive(-0.5, 1.0, scale_of_authors(-0.5), options={"beta": 1.0}, inputs=REJECTED_ROSE),
    adaptive(0.015, 0.01, 0.1, options={"beta": 0.01}),
    adaptive(15.0, 10.0, 5.0, options={"beta": 10.0}),
    adaptive(15.0, 10.0, 2.0, options={"beta": 10.0, "scale_ceiling": 2.0}),
    adaptive(0.15, 0.1, 1.0, 0.6, options={"scale_floor": 1.0, "scale_ceiling": 1.0, "scale_penalty": 0.6}),
    # labels 1, 0.9, 1/4 (turned round) and 1/2 (nothing to learn)
    logistic("gdpo", 0.15, 0.1),
    logistic("gdpo", 0.12, 0.08, options={"preference": 0.9}),
    logistic("gdpo", -0.075, -0.05, options={"preference": 0.25}),
    logistic("gdpo", 0.3, 0.2, options={"preference": 0.75, "beta": 0.4}),
    Golden("gdpo", log(2), (0.0, 0.0), {"preference": 0.5, "beta": 3.0}),
    # equal rewards: weight 1. k = (2 - 1) / (1 - 1/2) = 2. Gap 2 + log 2: c = 0.5 + 1.5 / (1 + 2 * 2) = 0.8.
    logistic("madpo", 0.15, 0.1),
    logistic(
        "madpo",
        0.15,
        0.1,
        weight=sigmoid(0.8 * (2 + log(2))) / sigmoid(2 + log(2)),
        options={"reward_gap": 2 + log(2), "gap_threshold": 2.0},
    ),
    # gap -1 and a threshold log 4 above 1: c = 0.5 + 1.5 / (1 + 2 / 4) = 1.5; gap -3 beyond its threshold: weight 1
    logistic(
        "madpo",
        0.15,
        0.1,
        weight=sigmoid(-1.5) / sigmoid(-1),
        options={"reward_gap": -1.0, "gap_threshold": 1 + log(4)},
    ),
    logistic("madpo", 0.15, 0.1, options={"reward_gap": -3.0, "gap_threshold": 2.0}),
    # k = 2 / 0.75, times e^(2 (gap - threshold)) = 1 / 2: c = 0.25 + 2.75 / (1 + 4 / 3) = 10 / 7
    logistic(
        "madpo",
        0.6,
        0.4,
        weight=sigmoid(10 / 7 * (3 - log(2) / 2)) / sigmoid(3 - log(2) / 2),
        options={
            "beta": 0.4,
            "reward_gap": 3 - log(2) / 2,
            "gap_threshold": 3.0,
            "gap_slope": 2.0,
            "largest_factor": 3.0,
            "least_factor": 0.25,
        },
    ),
    # beta: 0.1 (1 + 0.6 * 1.5); 0.2 (1 + 1.5 - 2); 0.1 (1 + 0.6 (1.5 - 10)) is below 0, so 1e-3
    logistic("beta_dpo", 0.285, 0.19, options={"state": state(0.0)}),
    logistic("beta_dpo", 0.15, 0.1, options={"state": state(2.0, beta=0.2, strength=1.0)}),
    logistic("beta_dpo", 0.0015, 0.001, options={"state": state(10.0)}),
    # e^(-1 / 5 - 2 / 4); e^(5 / 5 + 4 / 4), which is capped, capped at 3, and not capped
    logistic("wpo", 0.15, 0.1, weight=exp(-0.7), inputs={"log_sum_sq_prob": (-11.0, -7.25)}),
    logistic("wpo", 0.15, 0.1, inputs={"log_sum_sq_prob": (-17.0, -13.25)}),
    logistic(
        "wpo",
        0.15,
        0.1,
        weight=3.0,
        options={"importance": SelfWeight(cap=3.0)},
        inputs={"log_sum_sq_prob": (-17.0, -13.25)},
    ),
    logistic(
        "wpo",
        3.0,
        2.0,
        weight=exp(2.0),
        options={"beta": 2.0, "importance": SelfWeight(cap=None)},
        inputs={"log_sum_sq_prob": (-17.0, -13.25)},
    ),
    # dpo once the tokens are weighted and summed
    *(
        logistic(name, u, beta, options=options)
        for name in ("segment_dpo", "ld_dpo", "ld_dpo_policy")
        for u, beta, options in ((0.15, 0.1, {}), (3.0, 2.0, {"beta": 2.0}))
    ),
]
