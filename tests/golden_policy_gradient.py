"""Golden rows of objectives/policy_gradient.py, worked out by hand at `STANDARD_TOKENS`.

The first completion has A = 1 and the ratios 1, 1.5, 0.5 (product 0.75), the second A = -2 and 0.75, 1.5 (product 1.125); the
probabilities are 0.2 of the ratios. Weights of a token times its log-prob have the weight itself for a gradient.
"""

from math import exp, log, tanh

from objective_cases import RATIOS, Golden

A = (1, 1, 1, -2, -2)
LOGPROB = tuple(log(ratio / 5) for ratio in RATIOS)


def weighted(name: str, weights: tuple[float, ...], *more) -> Golden:
    """The mean over tokens of -weight logp."""
    loss = -sum(w * x for w, x in zip(weights, LOGPROB, strict=True)) / 5
    return Golden(name, loss, tuple(-w / 5 for w in weights), *more)


def gate(temperature: float, ratio: float) -> float:
    return (1 + tanh(temperature * (ratio - 1) / 2)) / 2


def sapo(positive: float, negative: float, *more) -> Golden:
    gates = [gate(positive if a > 0 else negative, ratio) for a, ratio in zip(A, RATIOS, strict=True)]
    losses = [-4 * a * g / (positive if a > 0 else negative) for a, g in zip(A, gates, strict=True)]
    slopes = [-4 * a * g * (1 - g) * ratio for a, g, ratio in zip(A, gates, RATIOS, strict=True)]
    loss = sum(losses[:3]) / 6 + sum(losses[3:]) / 4
    return Golden("sapo", loss, tuple(s / (6 if a > 0 else 4) for s, a in zip(slopes, A, strict=True)), *more)


# 0.75^2 e^(3 / 4), 1.125^3 e^(-1 / 4)
PHI, PSI = 0.5625 * exp(0.75), 1.423828125 * exp(-0.25)
# 0.75^1.5 e^0.25 and 1.125 e^(-0.5)
PHI_2, PSI_2 = 0.75**1.5 * exp(0.25), 1.125 * exp(-0.5)
OTHER = {"positive_power": 1.5, "positive_rate": 1.0, "negative_power": 1.0, "negative_rate": 4.0}

ROWS = [
    weighted("reinforce", A),
    weighted("reinforce", (1, 0, 0, 0, -2), {}, {"advantages": (1.0, 0.0, 0.0, 0.0, -2.0)}),
    weighted("cispo", (1, 1.5, 0.5, -1.5, -3)),
    weighted("cispo", (0.7, 0.7, 0.5, -1.4, -1.4), {"ratio_cap": 0.7}),
    sapo(1.0, 1.05),
    sapo(0.5, 3.0, {"positive_temperature": 0.5, "negative_temperature": 3.0}),
    weighted("vespo", (PHI, PHI, PHI, -2 * PSI, -2 * PSI)),
    weighted("vespo", (PHI_2, PHI_2, PHI_2, -2 * PSI_2, -2 * PSI_2), OTHER),
    weighted("dft", tuple(ratio / 5 for ratio in RATIOS), {}, {"advantages": None}),
    weighted("dft", tuple(ratio / 5 for ratio in RATIOS), {}, {"advantages": None, "old_logprob": None}),
]
