"""Golden rows of objectives/imitation.py, from the closed forms of loss and gradient.

At the standard pair a = 0.5, b = -1.0, Delta = 1.5, logp_w = -12 over 5 tokens. S is the logistic function, softplus(x) = log(1 + e^x).
"""

from math import exp, log1p

from objective_cases import Golden


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def softplus(x: float) -> float:
    return log1p(exp(x))


# Two pairs: chosen -12 over 5 tokens and -3 over 2; log-ratios 0.5, 0.25 of chosen and -1, 0 of rejected.
TWO = {
    "policy": (-12.0, -3.0, -9.25, -4.0),
    "reference": (-12.5, -3.25, -8.25, -4.0),
    "lengths": (5, 2, 4, 3),
}
GOLD = {"policy": (-12.0, -9.25, -8.0), "reference": (-12.5, -8.25, -7.0), "lengths": (5, 4, 5)}
TWO_GOLD = {
    "policy": (-12.0, -3.0, -9.25, -4.0, -8.0, -2.0),
    "reference": (-12.5, -3.25, -8.25, -4.0, -7.0, -2.0),
    "lengths": (5, 2, 4, 3, 5, 3),
}
ONE_EMPTY = TWO | {"lengths": (5, 2, 4, 0)}

ROWS = [
    Golden("sft", 2.4, (-0.2, 0.0)),
    # 15 nats over 7 tokens; with the second pair empty 12 over 5, divided by both pairs
    Golden("sft", 15 / 7, (-1 / 7, -1 / 7, 0.0, 0.0), {}, TWO),
    Golden("sft", 1.2, (-0.1, 0.0, 0.0, 0.0), {}, ONE_EMPTY),
    # gold: 8 nats over 5 tokens; then 8 and 2 over 5 and 3, and with an empty rejected completion in the second pair 8 over 5 for both
    Golden("sft_gold", 1.6, (0.0, 0.0, -0.2), {}, GOLD),
    Golden("sft_gold", 1.25, (0.0, 0.0, 0.0, 0.0, -0.125, -0.125), {}, TWO_GOLD),
    Golden("sft_gold", 0.8, (0.0, 0.0, 0.0, 0.0, -0.1, 0.0), {}, TWO_GOLD | {"lengths": (5, 2, 4, 0, 5, 3)}),
    Golden("sft_mean", 2.4, (-0.2, 0.0)),
    Golden("sft_mean", 1.95, (-0.1, -0.25, 0.0, 0.0), {}, TWO),
    Golden("sft_sum", 12.0, (-1.0, 0.0)),
    Golden("sft_sum", 7.5, (-0.5, -0.5, 0.0, 0.0), {}, TWO),
    Golden("rpo", softplus(-0.015) + 0.0006, (-0.01 * sigmoid(-0.015) - 0.00005, 0.01 * sigmoid(-0.015))),
    Golden(
        "rpo",
        softplus(-0.75) + 1.2,
        (-0.5 * sigmoid(-0.75) - 0.1, 0.5 * sigmoid(-0.75)),
        {"beta": 0.5, "sft_weight": 0.2},
    ),
    Golden("iterative_rpo", softplus(-0.15) + 2.4, (-0.1 * sigmoid(-0.15) - 0.2, 0.1 * sigmoid(-0.15))),
    Golden(
        "iterative_rpo",
        softplus(-1.5) + 0.6,
        (-sigmoid(-1.5) - 0.05, sigmoid(-1.5)),
        {"beta": 1.0, "sft_weight": 0.25},
    ),
    # 0.8 dpo + 0.2 bco + sft, beta 0.1 in both: z = 0.15, rewards 0.05 and -0.1
    Golden(
        "mpo",
        0.8 * softplus(-0.15) + 0.2 * (softplus(-0.05) + softplus(-0.1)) + 2.4,
        (-0.08 * sigmoid(-0.15) - 0.02 * sigmoid(-0.05) - 0.2, 0.08 * sigmoid(-0.15) + 0.02 * sigmoid(-0.1)),
    ),
    # beta 1, labels of dpo smoothed: 0.9 softplus(-1.5) + 0.1 softplus(1.5) = softplus(-1.5) + 0.15; rewards 0.5 and -1 over 0.25
    Golden(
        "mpo",
        0.8 * (softplus(-1.5) + 0.15) + 0.2 * (softplus(-0.25) + softplus(-1.25)) + 2.4,
        (
            0.8 * (sigmoid(1.5) - 0.9) - 0.2 * sigmoid(-0.25) - 0.2,
            0.8 * (0.9 - sigmoid(1.5)) + 0.2 * sigmoid(-1.25),
        ),
        {"beta": 1.0, "label_smoothing": 0.1, "baseline": 0.25},
    ),
    # z = 0.15, 0.025; rewards 0.05, -0.1 and 0.025, 0; the imitated tokens count alike
    Golden(
        "mpo",
        0.4 * (softplus(-0.15) + softplus(-0.025))
        + 0.1 * (softplus(-0.05) + softplus(-0.1) + softplus(-0.025) + softplus(0.0))
        + 15 / 7,
        (
            -0.04 * sigmoid(-0.15) - 0.01 * sigmoid(-0.05) - 1 / 7,
            -0.04 * sigmoid(-0.025) - 0.01 * sigmoid(-0.025) - 1 / 7,
            0.04 * sigmoid(-0.15) + 0.01 * sigmoid(-0.1),
            0.04 * sigmoid(-0.025) + 0.01 * 0.5,
        ),
        {},
        TWO,
    ),
]
