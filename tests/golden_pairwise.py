"""Golden rows of objectives/pairwise.py, from the closed forms of loss and gradient at the standard pair.

S is the logistic function, softplus(x) = log(1 + e^x) = -log S(-x). The weight w = e^(a + b) = e^-0.5 is a constant for the gradient.
"""

from math import exp, log1p

from objective_cases import Golden


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def softplus(x: float) -> float:
    return log1p(exp(x))


W = exp(-0.5)

ROWS = [
    Golden("dpo", softplus(-0.15), (-0.1 * sigmoid(-0.15), 0.1 * sigmoid(-0.15))),
    Golden("dpo", softplus(-3.0), (-2 * sigmoid(-3.0), 2 * sigmoid(-3.0)), {"beta": 2.0}),
    Golden(
        "dpo",
        0.8 * softplus(-0.15) + 0.2 * softplus(0.15),
        (0.1 * (sigmoid(0.15) - 0.8), -0.1 * (sigmoid(0.15) - 0.8)),
        {"label_smoothing": 0.2},
    ),
    Golden("is_dpo", W * softplus(-0.15), (-0.1 * W * sigmoid(-0.15), 0.1 * W * sigmoid(-0.15))),
    # (1.5 - 5)^2, (1.5 - 1)^2
    Golden("ipo", 12.25, (-7.0, 7.0)),
    Golden("ipo", 0.25, (1.0, -1.0), {"beta": 0.5}),
    Golden("is_ipo", 12.25 * W, (-7.0 * W, 7.0 * W)),
    # 0.5 / 5 + 1 / 4 = 0.35; (0.35 - 5)^2, (0.35 - 1)^2
    Golden("ipo_mean", 21.6225, (-9.3 / 5, 9.3 / 4)),
    Golden("ipo_mean", 0.4225, (-1.3 / 5, 1.3 / 4), {"beta": 0.5}),
    # either side of the kink, which is at beta = 2 / 3
    Golden("slic", 0.85, (-0.1, 0.1)),
    Golden("slic", 0.25, (-0.5, 0.5), {"beta": 0.5}),
    Golden("slic", 0.0, (0.0, 0.0), {"beta": 1.0}),
    Golden("is_slic", 0.85 * W, (-0.1 * W, 0.1 * W)),
]
