"""Golden rows of objectives/token_level.py, from the closed forms of loss and gradient at the standard pair: Delta = 1.5.

softplus(x) = -LS(-x). `tgdpo` and `mcts_dpo` are `dpo` once their tokens are weighed: tests/test_objectives_token_level.py weighs them.
"""

from math import exp, log1p

from golden_pairwise import logistic, sigmoid
from objective_cases import Golden

KL = {"reference_kl": (0.4, 0.7)}


def softplus(x: float) -> float:
    return log1p(exp(x))


ROWS = [
    # 0.1 (1.5 - 0.3)
    Golden("tdpo1", softplus(-0.12), (-0.1 * sigmoid(-0.12), 0.1 * sigmoid(-0.12)), {}, KL),
    Golden("tdpo1", softplus(-2.4), (-2 * sigmoid(-2.4), 2 * sigmoid(-2.4)), {"beta": 2.0}, KL),
    Golden("tdpo1", softplus(-0.12), (-0.1 * sigmoid(-0.12), 0.1 * sigmoid(-0.12)), {}, KL, "reference_kl"),
    # 0.1 (1.5 - 0.15)
    Golden("tdpo2", softplus(-0.135), (-0.1 * sigmoid(-0.135), 0.1 * sigmoid(-0.135)), {}, KL),
    Golden("tdpo2", softplus(-1.8), (-2 * sigmoid(-1.8), 2 * sigmoid(-1.8)), {"beta": 2.0, "kl_weight": 2.0}, KL),
    Golden("tdpo2", softplus(-1.8), (0.0, 4 * sigmoid(-1.8)), {"beta": 2.0, "kl_weight": 2.0}, KL, "reference_kl"),
    *(
        Golden(name, loss, (slope, -slope), options)
        for name in ("tgdpo", "mcts_dpo")
        for options, (loss, slope) in (
            ({}, logistic(0.15, 0.1)),
            ({"beta": 2.0, "label_smoothing": 0.2}, logistic(3.0, 2.0, 0.2)),
        )
    ),
]
