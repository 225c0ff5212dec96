"""Golden rows of objectives/games.py, from the closed forms of loss and gradient at the standard pair.

There u(policy) = -2.75 and u(reference) = -4.25; of nats per token -0.0875 and -0.4375, and the log-ratios are 0.1 and -0.25. S is the
logistic function, softplus(x) = log(1 + e^x).
"""

from math import exp, log1p

from objective_cases import Golden


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def softplus(x: float) -> float:
    return log1p(exp(x))


def square(h: float, chosen: float = 1, rejected: float = 1) -> tuple[float, tuple[float, float]]:
    """Loss and gradient of h^2, where h grows by 1 / chosen and falls by 1 / rejected a nat."""
    return h**2, (2 * h / chosen, -2 * h / rejected)


# u = -3.2 and -5.0; of nats per token -0.19 and -0.6
ONE = {"opponents": ((-12.2, -9.0),)}
TWO = {"opponents": ((-12.2, -9.0), (-13.0, -8.0))}

ROWS = [
    Golden("dno", softplus(-0.15), (-0.1 * sigmoid(-0.15), 0.1 * sigmoid(-0.15))),
    # 0.7 softplus(-3) + 0.3 softplus(3), and softplus(3) = softplus(-3) + 3
    Golden(
        "dno", softplus(-3) + 0.9, (2 * (sigmoid(3) - 0.7), -2 * (sigmoid(3) - 0.7)), {"beta": 2.0, "preference": 0.7}
    ),
    Golden(
        "dno",
        softplus(-0.15) + 0.12,
        (0.1 * (sigmoid(0.15) - 0.2), -0.1 * (sigmoid(0.15) - 0.2)),
        {"preference": (0.2,)},
    ),
    # (499.5^2 + 499^2) / 2
    Golden("sppo", 249250.625, (-499.5, 499.0)),
    # targets 3 and -1.5
    Golden("sppo", 3.25, (-2.5, 0.5), {"beta": 0.1, "preference": 0.8, "rejected_preference": 0.35}),
    Golden("sppo_single", 249250.625, (-499.5, 499.0)),
    # targets -2 and 2
    Golden("sppo_single", 7.625, (2.5, -3.0), {"beta": 0.1, "preference": 0.3}),
    # -2.75 + 4.25 / 3 + 2 * 3.2 / 3 = 0.8; 1 / 0.015 = 200 / 3
    Golden("inpo", *square(0.8 - 200 / 3), inputs=ONE),
    # -2.75 + 4.25 / 2 + 3.2 / 2 - 1; the second opponent does not enter
    Golden("inpo", *square(-0.025), {"beta": 0.5, "reference_share": 0.5}, TWO),
    Golden("inpo", 12.25, (-7.0, 7.0), {"beta": 0.1, "reference_share": 1.0}, ONE),
    # -0.0875 + 0.4375 / 3 + 2 * 0.19 / 3 = 0.185
    Golden("mnpo", *square(0.185 - 200 / 3, 5, 4), inputs=ONE),
    # opponents at -0.395: -0.0875 + 0.4375 / 3 + 2 * 0.395 / 3 = 0.965 / 3
    Golden("mnpo", *square((0.965 - 200) / 3, 5, 4), inputs=TWO),
    # opponents at -(3 * 0.19 + 0.6) / 4 = -0.2925: -0.0875 + 0.21875 + 0.14625 - 1
    Golden(
        "mnpo",
        *square(-0.7225, 5, 4),
        {"beta": 0.5, "reference_share": 0.5, "opponent_weights": [3.0, 1.0]},
        TWO,
    ),
    # -0.0875 + 0.109375 + 0.1425 - 0.5
    Golden(
        "mnpo", *square(-0.335625, 5, 4), {"beta": 1.0, "reference_share": 0.25, "opponent_weights": [0.5, 0.0]}, TWO
    ),
    # 0.35 - 5, 0.35 + 1.5
    Golden("egpo", *square(-4.65, 5, 4)),
    Golden("egpo", *square(1.85, 5, 4), {"beta": 0.2, "preference_difference": -0.3}),
    Golden("xpo", softplus(-0.15) - 9.25e-5, (-0.1 * sigmoid(-0.15), 0.1 * sigmoid(-0.15) + 1e-5)),
    Golden(
        "xpo",
        softplus(-3) - 3,
        (-2 * sigmoid(-3) + 0.25, 2 * sigmoid(-3)),
        {"beta": 2.0, "exploration_weight": 0.25, "reference_chosen": (1.0,)},
    ),
    # two completions: (6 + 0.2 + 4.625 - 0.3) / 2
    Golden("nash_md", 5.2625, (-0.25, -0.25), inputs={"kl_score": (2.0, -3.0)}),
    # (-3.6 + 1 + 3.7 - 1.5) / 2
    Golden("nash_md", -0.2, (0.15, -0.2), {"beta": 0.5, "preference": (0.2, 0.9)}, {"kl_score": (2.0, -3.0)}),
]
