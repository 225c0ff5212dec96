"""Golden rows of objectives/pairwise.py, from the closed forms of loss and gradient at the standard pair.

S is the logistic function, softplus(x) = log(1 + e^x) = -log S(-x), bell its derivative. The weight w = e^(a + b) = e^-0.5 is a constant
for the gradient. The forms use softplus(x) - softplus(-x) = x, S(x) = (1 + tanh(x / 2)) / 2 and S(x) S(-x) = 1 / (4 cosh(x / 2)^2).
"""

from math import cosh, exp, log, log1p, tanh

from objective_cases import Golden


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def softplus(x: float) -> float:
    return log1p(exp(x))


def bell(x: float) -> float:
    return 0.25 / cosh(x / 2) ** 2


def discopop(scaled: float, ratio: float) -> tuple[float, float]:
    """(loss, its derivative by Delta over beta) at z = scaled, z / temperature = ratio, written by m = 1 / (1 + e^-ratio)."""
    mixing, decay = 1 / (1 + exp(-ratio)), exp(-scaled)
    slope = mixing * (1 - mixing) * ratio / scaled
    loss = log1p(decay) + mixing * (decay - log1p(decay))
    return loss, (decay - log1p(decay)) * slope - (1 - mixing) * decay / (1 + decay) - mixing * decay


def logistic(scaled: float, beta: float, smoothing: float = 0.0) -> tuple[float, float]:
    """(cDPO's loss at z = scaled, its derivative by Delta)."""
    return softplus(-scaled) + smoothing * scaled, -beta * sigmoid(-scaled) + smoothing * beta


W = exp(-0.5)
# a below 0, b above: the other side of everything that depends on a sign
SWAPPED = {"policy": (-13.5, -7.75)}
# Three pairs, log policy (-1, -2, -3 | -4, -1, -3.5), log reference (-2, -2, -1 | -2, -2.5, -3): margins of the policy u = (3, -1, 0.5),
# of the reference v = (0, 0.5, 2). In order -1, 0.5, 3 meet 0, 0.5, 2: u - v' = (1, -1, 0) by pair.
THREE = {"policy": (-1, -2, -3, -4, -1, -3.5), "reference": (-2, -2, -1, -2, -2.5, -3), "lengths": (3, 3, 3, 3, 3, 3)}
# a = (1, 0, -2), b = (-2, 1.5, -0.5): in order -2, 0, 1 meet -2, -0.5, 1.5: a - b' = (-0.5, 0.5, 0) by pair, b' that of pair 1, 2, 0.
EMPTY_THIRD = THREE | {"lengths": (3, 3, 3, 3, 3, 0)}

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
    # softplus(-z) - e z / (1 - 2 e), z = 0.15
    Golden(
        "robust_dpo",
        softplus(-0.15) - 0.15 / 8,
        (-0.1 * sigmoid(-0.15) - 0.1 / 8, 0.1 * sigmoid(-0.15) + 0.1 / 8),
    ),
    Golden(
        "robust_dpo",
        softplus(-3.0) - 1.0,
        (-2 * sigmoid(-3.0) - 2 / 3, 2 * sigmoid(-3.0) + 2 / 3),
        {"beta": 2.0, "label_smoothing": 0.2},
    ),
    # z = 5 * 0.35, 0.5 * 0.35
    Golden("dpo_mean", softplus(-1.75), (-sigmoid(-1.75), 1.25 * sigmoid(-1.75))),
    Golden("dpo_mean", softplus(-0.175), (-0.1 * sigmoid(-0.175), 0.125 * sigmoid(-0.175)), {"beta": 0.5}),
    # q (z - log((1 - e) / e)) - softplus(z) - log e
    Golden(
        "exo",
        sigmoid(0.15) * (0.15 - log(999)) - softplus(0.15) + log(1000),
        (0.1 * bell(0.15) * (0.15 - log(999)), -0.1 * bell(0.15) * (0.15 - log(999))),
    ),
    Golden(
        "exo",
        sigmoid(3.0) * (3 - log(3)) - softplus(3.0) + log(4),
        (2 * bell(3.0) * (3 - log(3)), -2 * bell(3.0) * (3 - log(3))),
        {"beta": 2.0, "label_smoothing": 0.25},
    ),
    # 3/2 softplus(beta a) - beta a + 1/2 softplus(beta b)
    Golden(
        "nca",
        1.5 * softplus(0.005) - 0.005 + 0.5 * softplus(-0.01),
        (0.01 * (0.75 * tanh(0.0025) - 0.25), 0.005 * sigmoid(-0.01)),
    ),
    Golden(
        "nca",
        1.5 * softplus(1.0) - 1 + 0.5 * softplus(-2.0),
        (1.5 * tanh(0.5) - 0.5, sigmoid(-2.0)),
        {"beta": 2.0},
    ),
    Golden("bco", softplus(-0.005) + softplus(-0.01), (-0.01 * sigmoid(-0.005), 0.01 * sigmoid(-0.01))),
    Golden(
        "bco",
        softplus(-1.3) + softplus(-1.7),
        (-2 * sigmoid(-1.3), 2 * sigmoid(-1.7)),
        {"beta": 2.0, "baseline": -0.3},
    ),
    # 499.5^2 + 499^2, 0.5^2 + 0
    Golden("sppo_hard", 498501.25, (-999.0, 998.0)),
    Golden("sppo_hard", 0.25, (-1.0, 0.0), {"beta": 0.5}),
    Golden("apo_zero", 1 - 0.5 * tanh(0.025) - 0.5 * tanh(0.05), (-0.1 * bell(0.05), 0.1 * bell(0.1))),
    Golden("apo_zero", 1 - 0.5 * tanh(0.5) - 0.5 * tanh(1.0), (-2 * bell(1.0), 2 * bell(2.0)), {"beta": 2.0}),
    Golden(
        "apo_down",
        1 + 0.5 * tanh(0.025) - 0.5 * tanh(0.075),
        (0.1 * (bell(0.05) - bell(0.15)), 0.1 * bell(0.15)),
    ),
    Golden(
        "apo_down", 1 + 0.5 * tanh(0.5) - 0.5 * tanh(1.5), (2 * (bell(1.0) - bell(3.0)), 2 * bell(3.0)), {"beta": 2.0}
    ),
    *(
        Golden("discopop", loss, (beta * slope, -beta * slope), options, inputs)
        for options, inputs, beta, (loss, slope) in (
            ({}, {}, 0.05, discopop(0.075, 1.5)),
            ({"beta": 2.0, "mixing_temperature": 0.5}, {}, 2.0, discopop(3.0, 6.0)),
            ({"beta": 2.0, "mixing_temperature": 3.0}, SWAPPED, 2.0, discopop(-3.0, -1.0)),
        )
    ),
    # z = -300, m = S(-100): the exponent 300 - 100 is held at 80
    Golden("discopop", 300 + exp(80), (-200.0, 200.0), {"beta": 200.0, "mixing_temperature": 3.0}, SWAPPED),
    Golden("ddo", softplus(-0.5) + softplus(-1.0), (-sigmoid(-0.5), sigmoid(-1.0))),
    Golden(
        "ddo",
        softplus(-0.1) + 3 * softplus(-0.2),
        (-0.2 * sigmoid(-0.1), 0.6 * sigmoid(-0.2)),
        {"beta": 0.2, "rejected_weight": 3.0},
    ),
    # One pair has the rank of its own reference: cDPO.
    *(
        Golden(name, loss, (slope, -slope), options)
        for name in ("aot", "aot_unpaired")
        for options, (loss, slope) in (
            ({}, logistic(0.015, 0.01)),
            ({"beta": 2.0, "label_smoothing": 0.2}, logistic(3.0, 2.0, 0.2)),
        )
    ),
    Golden(
        "aot",
        (softplus(-2.0) + softplus(2.0) + log(2)) / 3,
        tuple(2 / 3 * x for x in (-sigmoid(-2.0), -sigmoid(2.0), -0.5, sigmoid(-2.0), sigmoid(2.0), 0.5)),
        {"beta": 2.0},
        THREE,
    ),
    # v' given: u - v' = (2, 0, 0.5)
    Golden(
        "aot",
        (softplus(-4.0) + log(2) + softplus(-1.0)) / 3 + 0.1 * 5 / 3,
        tuple(
            2 / 3 * x
            for x in (sigmoid(4.0) - 0.9, -0.4, sigmoid(1.0) - 0.9, 0.9 - sigmoid(4.0), 0.4, 0.9 - sigmoid(1.0))
        ),
        {"beta": 2.0, "label_smoothing": 0.1, "partner": (1.0, -1.0, 0.0)},
        THREE,
    ),
    # of two pairs u = (3, -1), v = (0, 0.5): u - v' = (2.5, -1)
    Golden(
        "aot",
        (softplus(-5.0) + softplus(2.0)) / 3,
        tuple(2 / 3 * x for x in (-sigmoid(-5.0), -sigmoid(2.0), 0, sigmoid(-5.0), sigmoid(2.0), 0)),
        {"beta": 2.0},
        EMPTY_THIRD,
    ),
    Golden(
        "aot_unpaired",
        (softplus(1.0) + softplus(-1.0) + log(2)) / 3,
        tuple(2 / 3 * x for x in (-sigmoid(1.0), -sigmoid(-1.0), -0.5, 0.5, sigmoid(1.0), sigmoid(-1.0))),
        {"beta": 2.0},
        THREE,
    ),
    # a = (1, 0), b = (-2, 1.5): a - b' = (-0.5, 2), b' that of pair 1, 0
    Golden(
        "aot_unpaired",
        (softplus(1.0) + softplus(-4.0)) / 3,
        tuple(2 / 3 * x for x in (-sigmoid(1.0), -sigmoid(-4.0), 0, sigmoid(-4.0), sigmoid(1.0), 0)),
        {"beta": 2.0},
        EMPTY_THIRD,
    ),
]
