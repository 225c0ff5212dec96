"""Golden rows of objectives/unpaired.py, from the closed forms of loss and gradient.

S(x) = (1 + tanh(x / 2)) / 2, so S'(x) = 1 / (4 cosh(x / 2)^2). The loss is the mean over the completions (pairs).
"""

from math import cosh, exp, log1p, tanh

from objective_cases import Golden


def sigmoid(x: float) -> float:
    return (1 + tanh(x / 2)) / 2


def slope(x: float) -> float:
    return 1 / (4 * cosh(x / 2) ** 2)


def softplus(x: float) -> float:
    return log1p(exp(x))


def mean(*losses: float) -> float:
    return sum(losses) / len(losses)


# four completions with the log-ratios 0.5, -1, 0.5, 0.75, good, bad, good, bad; the mean of mismatched is 0.3
FOUR = {
    "policy": (-12.0, -9.25, -7.0, -20.0),
    "reference": (-12.5, -8.25, -7.5, -20.75),
    "lengths": (5, 4, 3, 9),
    "desirable": (True, False, True, False),
}
MATCHED = FOUR | {"mismatched": (1.0, -0.5, 0.2, 0.5)}
WEIGHTED = {"desirable_weight": 1.5, "undesirable_weight": 0.5, "beta": 2.0}
# two pairs with a = 0.5, 1.5 and b = -1, 1.6: mean 1 and 0.3
PAIRS = {"policy": (-12.0, -6.0, -9.25, -3.4), "reference": (-12.5, -7.5, -8.25, -5.0), "lengths": (5, 4, 3, 9)}

ROWS = [
    # 0.1 (l - 0.3) = 0.02, -0.13, 0.02, 0.045
    Golden(
        "kto",
        mean(sigmoid(-0.02), sigmoid(-0.13), sigmoid(-0.02), sigmoid(0.045)),
        (-0.025 * slope(0.02), 0.025 * slope(0.13), -0.025 * slope(0.02), 0.025 * slope(0.045)),
        inputs=MATCHED,
    ),
    # 2 (l - 0.25) = 0.5, -2.5, 0.5, 1
    Golden(
        "kto",
        mean(1.5 * sigmoid(-0.5), 0.5 * sigmoid(-2.5), 1.5 * sigmoid(-0.5), 0.5 * sigmoid(1)),
        (-0.75 * slope(0.5), 0.25 * slope(2.5), -0.75 * slope(0.5), 0.25 * slope(1)),
        WEIGHTED | {"kl": 0.25},
        MATCHED,
    ),
    # a negative mean counts as 0
    Golden(
        "kto",
        mean(sigmoid(-0.05), sigmoid(-0.1), sigmoid(-0.05), sigmoid(0.075)),
        (-0.025 * slope(0.05), 0.025 * slope(0.1), -0.025 * slope(0.05), 0.025 * slope(0.075)),
        inputs=FOUR | {"mismatched": (1.0, -0.5, -2.2, 0.5)},
    ),
    # the third is empty: the mean of the others is 1 / 3, and 3 (l - 1 / 3) = 0.5, -4, 1.25
    Golden(
        "kto",
        mean(sigmoid(-0.5), sigmoid(-4), 0, sigmoid(1.25)),
        (-0.75 * slope(0.5), 0.75 * slope(4), 0.0, 0.75 * slope(1.25)),
        {"beta": 3.0},
        MATCHED | {"lengths": (5, 4, 0, 9)},
    ),
    Golden(
        "apo_zero_unpaired",
        mean(sigmoid(-0.05), sigmoid(-0.1), sigmoid(-0.05), sigmoid(0.075)),
        (-0.025 * slope(0.05), 0.025 * slope(0.1), -0.025 * slope(0.05), 0.025 * slope(0.075)),
        inputs=FOUR,
    ),
    Golden(
        "apo_zero_unpaired",
        mean(1.5 * sigmoid(-1), 0.5 * sigmoid(-2), 1.5 * sigmoid(-1), 0.5 * sigmoid(1.5)),
        (-0.75 * slope(1), 0.25 * slope(2), -0.75 * slope(1), 0.25 * slope(1.5)),
        WEIGHTED,
        FOUR,
    ),
    Golden(
        "bco_unpaired",
        mean(softplus(-0.05), softplus(-0.1), softplus(-0.05), softplus(0.075)),
        (-0.025 * sigmoid(-0.05), 0.025 * sigmoid(-0.1), -0.025 * sigmoid(-0.05), 0.025 * sigmoid(0.075)),
        inputs=FOUR,
    ),
    # l - 0.25 = 0.25, -1.25, 0.25, 0.5
    Golden(
        "bco_unpaired",
        mean(softplus(-0.25), softplus(-1.25), softplus(-0.25), softplus(0.5)),
        (-sigmoid(-0.25) / 4, sigmoid(-1.25) / 4, -sigmoid(-0.25) / 4, sigmoid(0.5) / 4),
        {"beta": 1.0, "baseline": 0.25},
        FOUR,
    ),
    # K_w = 0.5, of which a is all; K_l = 0
    Golden(
        "kto_pair",
        mean(sigmoid(-0.05), sigmoid(-0.15)),
        (-0.05 * (slope(0.05) + slope(0.15)), 0.05 * slope(0.15)),
    ),
    # K_w = 1, K_l = 0.3: (K_l - a) / 2 = -0.1, -0.6; (b - K_w) / 2 = -1, 0.3; a mean over 4, each K half an a or b
    Golden(
        "kto_pair",
        mean(sigmoid(-0.1), sigmoid(-0.6), sigmoid(-1), sigmoid(0.3)),
        (
            -slope(0.1) / 8 - (slope(1) + slope(0.3)) / 16,
            -slope(0.6) / 8 - (slope(1) + slope(0.3)) / 16,
            slope(1) / 8 + (slope(0.1) + slope(0.6)) / 16,
            slope(0.3) / 8 + (slope(0.1) + slope(0.6)) / 16,
        ),
        {"beta": 0.5},
        PAIRS,
    ),
]
