"""Golden rows of objectives/clipped_ratio.py, worked out by hand at `STANDARD_TOKENS`.

The first completion has A = 1 and the ratios 1, 1.5, 0.5, the second A = -2 and 0.75, 1.5. With the clip 0.2 the losses of the tokens are
-1, -1.2 (clipped), -0.5 and 1.6 (clipped), 3, their gradients -1, 0, -0.5 and 0, 3. Geometric means: cbrt(0.75) and sqrt(1.125).
"""

from math import exp, log, sqrt

from objective_cases import Golden

CUBE, ROOT = 0.75 ** (1 / 3), sqrt(1.125)
# the other sign: losses 1, 1.5, 0.8 (clipped) and -1.5, -2.4 (clipped), gradients 1, 1.5, 0 and -1.5, 0
SWAPPED = {"advantages": (-1.0, 2.0)}


def over(number: float, *values: float) -> tuple[float, ...]:
    return tuple(value / number for value in values)


MEAN_OF_TWO = (-1 / 6, 0.0, -0.5 / 6, 0.0, 3 / 4)
# (3.3 / 3 - 3.9 / 2) / 2
MEAN_OF_TWO_SWAPPED = (1 / 6, 1.5 / 6, 0.0, -1.5 / 4, 0.0)
# held at 1.4: the last token costs 2.8 and has no gradient
CAPPED = {"ratio_cap": 1.4}
# clipped to 0.9 and 1.6: the second token has -1.5 with its gradient, the fourth 1.8
WIDE = {"clip_low": 0.1, "clip_high": 0.6}
GEOMETRIC = (-CUBE / 6,) * 3 + (2 * ROOT / 4,) * 2

ROWS = [
    # (-2.7 / 3 + 4.6 / 2) / 2
    Golden("grpo", 0.7, MEAN_OF_TWO),
    Golden("grpo", -0.425, MEAN_OF_TWO_SWAPPED, {}, SWAPPED),
    Golden("grpo", (-0.9 + 2.2) / 2, (-1 / 6, 0.0, -0.5 / 6, 0.0, 0.0), CAPPED),
    Golden("grpo", (-1.0 + 2.4) / 2, (-1 / 6, -1.5 / 6, -0.5 / 6, 0.0, 3 / 4), WIDE),
    # advantages of tokens: 2, -1, 0, 1, -1; losses -2, 1.5, 0, -0.75, 1.5
    Golden("grpo", 5 / 48 , (-2 / 6, 1.5 / 6, 0.0, -0.75 / 4, 1.5 / 4), {}, {"advantages": (2.0, -1.0, 0.0, 1.0, -1.0)}),
    # without an old policy all ratios are 1
    Golden("grpo", 0.5, (-1 / 6,) * 3 + (0.5,) * 2, {}, {"old_logprob": None}),
    # the middle token is not scored: (-1.5 / 2 + 2.3) / 2
    Golden(
        "grpo", 0.775, (-1 / 4, 0.0, -0.5 / 4, 0.0, 3 / 4), {},
        {"mask": (True, False, True, True, True), "advantages": (1.0, -2.0)},
    ),
    Golden("bnpo", 1.9 / 5, over(5, -1, 0, -0.5, 0, 3)),
    Golden("bnpo", 1.8 / 5, over(5, -1, -1.5, -0.5, 0, 3), WIDE | {"reduction": "batch_token_mean"}),
    Golden("bnpo", 1.9 / 10, over(10, -1, 0, -0.5, 0, 3), {"denominator": 2}),
    Golden("bnpo", 1.7 / 5, over(5, -1, 0, -0.5, 0, 0), CAPPED),
    Golden("dr_grpo", 1.9 / 8, over(8, -1, 0, -0.5, 0, 3), {"max_length": 4}),
    Golden("dr_grpo", 1.7 / 8, over(8, -1, 0, -0.5, 0, 0), {"max_length": 4, **CAPPED}),
    Golden("dr_grpo", 1.8 / 8, over(8, -1, -1.5, -0.5, 0, 3), {"max_length": 4, **WIDE}),
    # -1.28 for the second token
    Golden("dapo", 1.82 / 5, over(5, -1, 0, -0.5, 0, 3)),
    Golden("dapo", 1.9 / 8, over(8, -1, 0, -0.5, 0, 3), {"clip_high": 0.2, "denominator": 8}),
    Golden("dapo", 1.8 / 5, over(5, -1, -1.5, -0.5, 0, 3), WIDE),
    Golden("dapo", 1.62 / 5, over(5, -1, 0, -0.5, 0, 0), CAPPED),
    Golden("grpo_two_sided", 1.9 / 5, over(5, -1, 0, -0.5, 0, 3)),
    Golden("grpo_two_sided", 1.7 / 5, over(5, -1, 0, -0.5, 0, 0), CAPPED),
    Golden("grpo_two_sided", 1.8 / 5, over(5, -1, -1.5, -0.5, 0, 3), WIDE),
    Golden("ppo", 1.9 / 5, over(5, -1, 0, -0.5, 0, 3)),
    Golden("ppo", 1.8 / 5, over(5, -1, -1.5, -0.5, 0, 3), WIDE),
    Golden("ppo_dual_clip", 1.9 / 5, over(5, -1, 0, -0.5, 0, 3)),
    Golden("ppo_dual_clip", 1.7 / 5, over(5, -1, 0, -0.5, 0, 0), CAPPED),
    Golden("ppo_dual_clip", 1.8 / 5, over(5, -1, -1.5, -0.5, 0, 3), WIDE),
    # both beyond the clip on the side that has a gradient, and on the other
    Golden("gspo", (-CUBE + 2 * ROOT) / 2, GEOMETRIC),
    Golden("gspo", (0.9997 - 2.0008) / 2, (0.0,) * 5, {}, SWAPPED),
    Golden("gspo", (CUBE - 2 * ROOT) / 2, over(-1, *GEOMETRIC), {"clip_low": 0.1, "clip_high": 0.1}, SWAPPED),
    Golden("gspo", (-CUBE + 2 * 1.02) / 2, (-CUBE / 6,) * 3 + (0.0,) * 2, {"ratio_cap": 1.02}),
    Golden("gspo_token", (-CUBE + 2 * ROOT) / 2, GEOMETRIC),
    Golden("gspo_token", (CUBE - 2 * ROOT) / 2, over(-1, *GEOMETRIC), {"clip_low": 0.1, "clip_high": 0.1}, SWAPPED),
    # one advantage a token: each has its own gradient
    Golden(
        "gspo_token", (-CUBE / 3 + 2 * ROOT) / 2, (-2 * CUBE / 6, CUBE / 6, 0.0, 2 * ROOT / 4, 2 * ROOT / 4),
        {"clip_low": 0.2, "clip_high": 0.2}, {"advantages": (2.0, -1.0, 0.0, -2.0, -2.0)},
    ),
    Golden("luspo", (-3 * CUBE + 4 * ROOT) / 2, (-CUBE / 2,) * 3 + (ROOT,) * 2),
    Golden("luspo", (3 * 0.95 - 4 * 1.01) / 2, (0.0,) * 5, {"clip_low": 0.05, "clip_high": 0.01}, SWAPPED),
    Golden("luspo", (-3 * CUBE + 4.08) / 2, (-CUBE / 2,) * 3 + (0.0,) * 2, {"ratio_cap": 1.02, "clip_high": 0.01}),
    # products 0.75 and 1.125
    Golden("rloo", (-0.75 + 2.25) / 2, (-0.375,) * 3 + (1.125,) * 2),
    Golden("rloo", (0.8 - 2.25) / 2, (0.0,) * 3 + (-1.125,) * 2, {}, SWAPPED),
    Golden("rloo", (0.75 - 2.2) / 2, (0.375,) * 3 + (0.0,) * 2, {"clip_low": 0.3, "clip_high": 0.1}, SWAPPED),
    # the logarithm of 1.5 held at 0.4; of the second completion nothing is
    *(
        Golden("gmpo", (-g + 2 * ROOT) / 2, (-g / 6, 0.0, -g / 6, ROOT / 2, ROOT / 2))
        for g in [exp((0.4 - log(2)) / 3)]
    ),
    # that of 0.75 held at -0.2
    *(
        Golden("gmpo", (-g + 2 * h) / 2, (-g / 6, 0.0, -g / 6, 0.0, h / 2), {"log_clip": 0.2})
        for g, h in [(exp((0.2 - log(2)) / 3), sqrt(1.5) * exp(-0.1))]
    ),
]  # fmt: skip
