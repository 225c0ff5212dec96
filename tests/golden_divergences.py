"""Golden rows of objectives/divergences.py: softplus(-z) and its derivative for a margin z of deformed log-ratios, from closed forms.

At the standard pair a = 1/2, b = -1. Each row gives z, and the derivatives of z by a and by -b.
"""

from math import e, exp, log, log1p, sinh, sqrt, tanh

from objective_cases import Golden


def row(objective: str, z: float, by_a: float, by_b: float, options: dict | None = None, policy=None) -> Golden:
    inputs = {} if policy is None else {"policy": policy}
    wrong = 0.5 - 0.5 * tanh(z / 2)  # the probability given to the wrong order
    loss = log1p(exp(-z)) if z > -30 else -z
    return Golden(objective, loss, (-wrong * by_a, wrong * by_b), options or {}, inputs)


ROOT = sqrt(e)
# a = -100, b = 100 and the other way round: beyond what is exponentiated
FAR_DOWN, FAR_UP = (-112.5, 91.75), (87.5, -108.25)

ROWS = [
    # z = beta (e - 1 / sqrt(e))
    row("dpo_forward_kl", 0.1 * (e - 1 / ROOT), 0.1 / ROOT, 0.1 * e),
    row("dpo_forward_kl", 2 * (e - 1 / ROOT), 2 / ROOT, 2 * e, {"beta": 2.0}),
    # a = -100: its exponential is e^80 and constant; b = 100: e^-100 is nothing
    row("dpo_forward_kl", -0.1 * exp(80), 0.0, 0.0, policy=FAR_DOWN),
    row("dpo_forward_kl", 1e-36 * exp(80), 0.0, 0.0, {"beta": 1e-36}, FAR_UP),
    # z = beta log((1 + e) sqrt(e) / (1 + sqrt(e))) = beta (1/2 + log((1 + e) / (1 + sqrt(e))))
    row("dpo_js", 0.1 * (0.5 + log((1 + e) / (1 + ROOT))), 0.1 / (1 + ROOT), 0.1 * e / (1 + e)),
    row("dpo_js", 3 * (0.5 + log((1 + e) / (1 + ROOT))), 3 / (1 + ROOT), 3 * e / (1 + e), {"beta": 3.0}),
    # log S(-100) = -100, log S(100) = 0
    row("dpo_js", -10.0, 0.1, 0.0, policy=FAR_DOWN),
    # alpha = 1/2: z = 2 beta (e^(1/2) - e^(-1/4)) = 4 beta e^(1/8) sinh(3/8)
    row("dpo_alpha", 0.4 * exp(0.125) * sinh(0.375), 0.1 * exp(-0.25), 0.1 * ROOT),
    # the forward KL
    row("dpo_alpha", 2 * (e - 1 / ROOT), 2 / ROOT, 2 * e, {"beta": 2.0, "alpha": 1.0}),
    # chi squared: z = beta (sqrt(e) - 1 / e)
    row("dpo_alpha", 2 * (ROOT - 1 / e), 2 * ROOT, 2 / e, {"beta": 2.0, "alpha": -1.0}),
    # a = -100, b = 100 at alpha = 1/2: z = 2 beta (e^-50 - e^50), below the bound; at alpha = 1, beyond it; alpha = -1: that of b
    row("dpo_alpha", -0.4 * sinh(50), 0.1 * exp(50), 0.1 * exp(-50), policy=FAR_DOWN),
    row("dpo_alpha", -0.1 * exp(80), 0.0, 0.0, {"alpha": 1.0}, FAR_DOWN),
    row("dpo_alpha", -0.1 * exp(80), 0.0, 0.0, {"alpha": -1.0}, FAR_DOWN),
    # z = beta (3/2 + sqrt(e) - 1 / e), within the clip, beyond it, beyond another, and without one
    row("chi_po", 0.1 * (1.5 + ROOT - 1 / e), 0.1 * (1 + ROOT), 0.1 * (1 + 1 / e)),
    row("chi_po", 4.0, 0.0, 0.0, {"beta": 2.0}),
    row("chi_po", 0.2, 0.0, 0.0, {"clip_range": 0.2}),
    row("chi_po", 2 * (1.5 + ROOT - 1 / e), 2 * (1 + ROOT), 2 * (1 + 1 / e), {"beta": 2.0, "clip_range": None}),
    row("chi_po", -4.0, 0.0, 0.0, policy=FAR_DOWN),
    # gamma = 1/10, alpha = 2 in the names of the IS-DAA authors' code: phi(x) = x / 10 + e^(2 x)
    row(
        "chi_po",
        0.1 * (0.15 + 2 * exp(-0.5) * sinh(1.5)),
        0.1 * (0.1 + 2 * e),
        0.1 * (0.1 + 2 * exp(-2)),
        {"ratio_power": 2.0, "log_ratio_weight": 0.1},
    ),
    # e^100 is held at e^80, and the log-ratios alone have a gradient: z = beta (200 + e^80)
    row("chi_po", 1e-36 * (200 + exp(80)), 1e-36, 1e-36, {"beta": 1e-36, "clip_range": None}, FAR_UP),
    row("chi_po", 1.0, 0.0, 0.0, {"clip_range": (1.0,)}, FAR_UP),
]
