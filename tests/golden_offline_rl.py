"""Golden rows of objectives/offline_rl.py, worked out by hand.

Of `STANDARD_TOKENS` the old policy is the reference: log-ratios 0, log 1.5, -log 2 with R = 1 and log 0.75, log 1.5 with R = 0. Their sums
from each token on are log 0.75, log 0.75, -log 2 and log 1.125, log 1.5.
"""

from math import log

from objective_cases import STANDARD_TOKENS, Golden

OREO = {
    "old_logprob": None,
    "advantages": None,
    "reference_logprob": STANDARD_TOKENS["old_logprob"],
    "values": (0.5, 0.2, 0.1, 0.4, -0.3),
    "rewards": (1.0, 0.0),
}
STEPS = OREO | {"step_cu_seqlens": (0, 2, 3, 5)}


def residuals(beta: float) -> tuple[float, ...]:
    return (
        beta * log(0.75) - 0.5,
        beta * log(0.75) - 0.8,
        -beta * log(2) - 0.9,
        beta * log(1.125) + 0.4,
        beta * log(1.5) - 0.3,
    )


def by_token(name: str, scale: float, beta: float, options: dict, by: str | None) -> Golden:
    """The mean over each completion, then over both; the gradient of a square is 2 scale times its root."""
    r = residuals(beta)
    loss = (r[0] ** 2 + r[1] ** 2 + r[2] ** 2) / 6 + (r[3] ** 2 + r[4] ** 2) / 4
    slopes = (r[0] / 3, r[1] / 3, r[2] / 3, r[3] / 2, r[4] / 2)
    return Golden(name, loss, tuple(scale * slope for slope in slopes), options, OREO, by)


def by_step(beta: float) -> list[Golden]:
    """Steps of tokens 1 and 2, 3, and 4 and 5."""
    r = residuals(beta)
    loss = (r[0] ** 2 + r[2] ** 2) / 4 + r[3] ** 2 / 2
    actor = (beta * r[0] / 2, beta * r[0] / 2, beta * r[2] / 2, beta * r[3], beta * r[3])
    critic = (r[0] / 2, 0.0, r[2] / 2, r[3], 0.0)
    return [
        Golden("oreo_actor", loss, actor, {"beta": beta}, STEPS),
        Golden("oreo_critic", loss, critic, {"beta": beta}, STEPS, "values"),
    ]


ROWS = [
    by_token("oreo_actor", 0.03, 0.03, {}, None),
    by_token("oreo_actor", 0.5, 0.5, {"beta": 0.5}, None),
    by_token("oreo_critic", 1.0, 0.03, {}, "values"),
    by_token("oreo_critic", 1.0, 0.5, {"beta": 0.5}, "values"),
    *by_step(0.03),
    *by_step(0.5),
    # of the standard pair as two steps: log-ratios 0.5 and -1
    Golden("dapo_direct", (0.05**2 + 0.1**2) / 4, (0.1 * 0.05 / 2, -0.1 * 0.1 / 2)),
    # 0.3 / 2 - 0.25 = -0.1 and -0.4 / 2 + 0.5 = 0.3
    Golden(
        "dapo_direct",
        (0.1**2 + 0.3**2) / 4,
        (0.5 * 0.1 / 2, -0.5 * 0.3 / 2),
        {"beta": 0.5, "advantage": (0.3, -0.4), "advantage_scale": 2.0},
    ),
]
