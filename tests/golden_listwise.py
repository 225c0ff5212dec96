"""Golden rows of objectives/listwise.py, from the closed forms of loss and gradient.

Log-ratios are chosen so that the softmax of the policy is p = (1, 2, 3) / 6, and most rewards so that the target is a fraction too.
"""

from math import exp, log, log1p, sqrt

from objective_cases import Golden

REFERENCE = (-12.5, -8.25, -7.25)
LOG_123 = (0.0, log(2), log(3))
P = (1 / 6, 1 / 3, 1 / 2)


def three(scale: float, rewards: tuple, log_ratio: tuple = LOG_123, **others: object) -> dict:
    """A group of three completions with the log-ratios `scale` * `log_ratio`."""
    policy = tuple(reference + scale * x for reference, x in zip(REFERENCE, log_ratio, strict=True))
    return {
        "policy": policy,
        "reference": REFERENCE,
        "lengths": None,
        "rewards": rewards,
        "groups": 3,
    } | others


def two_groups(scale: float, rewards: tuple, log_ratio: tuple) -> dict:
    """The group of three, and one of the rows 4 and 3 with a place left."""
    reference = (*REFERENCE, -3.0, -4.0)
    policy = tuple(r + scale * x for r, x in zip(reference, (*LOG_123, *log_ratio), strict=True))
    groups = ((0, 1, 2), (4, 3, -1))
    return {"policy": policy, "reference": reference, "lengths": None, "rewards": rewards, "groups": groups}


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def softplus(x: float) -> float:
    return log1p(exp(x))


def reverse_kl(target: tuple, scale: float) -> tuple[float, tuple]:
    """Loss and gradient of sum_i p_i log(p_i / t_i), p as above."""
    log_quotient = [log(p / t) for p, t in zip(P, target, strict=True)]
    loss = sum(p * x for p, x in zip(P, log_quotient, strict=True))
    return loss, tuple(scale * p * (x - loss) for p, x in zip(P, log_quotient, strict=True))


def cross_entropy(target: tuple, scale: float) -> tuple[float, tuple]:
    """Loss and gradient of -sum_i t_i log p_i, p as above: t_1 log 6 + t_2 log 3 + t_3 log 2."""
    loss = target[0] * log(6) + target[1] * log(3) + target[2] * log(2)
    return loss, tuple(scale * (p - t) for p, t in zip(P, target, strict=True))


def pairs(weights: dict, log_ratio: tuple, beta: float) -> tuple[float, tuple]:
    """Loss and gradient of sum_ij w_ij softplus(-beta (a_i - a_j)), where `weights` are by (i, j)."""
    gradient = [0.0] * len(log_ratio)
    for (i, j), weight in weights.items():
        push = weight * beta * sigmoid(beta * (log_ratio[j] - log_ratio[i]))
        gradient[i] -= push
        gradient[j] += push
    loss = sum(w * softplus(-beta * (log_ratio[i] - log_ratio[j])) for (i, j), w in weights.items())
    return loss, tuple(gradient)


# targets (1, 2, 4) / 7 and, with two equal rewards, (2, 1, 1) / 4
SEVENTHS, TIED = (1 / 7, 2 / 7, 4 / 7), (1 / 2, 1 / 4, 1 / 4)
LOG_124, LOG_211 = (0.0, log(2), log(4)), (log(2), 0.0, 0.0)

# ADPO's target of the rewards 1, 2, 3, of which the standard deviation is 1: softmax(-2, 0, 2)
STANDARD_TARGET = tuple(exp(x) / (exp(-2) + 1 + exp(2)) for x in (-2, 0, 2))
ENTROPY = log(exp(-2) + 1 + exp(2)) - 2 * (STANDARD_TARGET[2] - STANDARD_TARGET[0])
ADAPTED = 0.8 * (1 - 0.5 * ENTROPY / log(3))
# of the rewards 0, 1, of which it is sqrt(1/2): the better one has S(2 / (0.4 sqrt(1/2))) at reward_temperature 0.4
OF_TWO = sigmoid(2 * sqrt(0.5) / 0.4)
UNIFORM = (1 / 3, 1 / 3, 1 / 3)

# discounts of the ranks 1 to 3
D1, D2, D3 = 1 / log(2), 1 / log(3), 1 / log(4)
# log-ratios whose ranks are 1, 3, 2, with rewards 1, 0, 2: gains 2, 1, 4
RATIOS, LABELS = (0.5, -1.0, 0.25), (1.0, 0.0, 2.0)

ROWS = [
    Golden("exo_rw", *reverse_kl(SEVENTHS, 0.5), inputs=three(2, tuple(0.5 * x for x in LOG_124))),
    Golden(
        "exo_rw",
        *reverse_kl(TIED, 0.25),
        {"beta": 0.25, "reward_temperature": 2.0},
        three(4, tuple(2 * x for x in LOG_211)),
    ),
    Golden("dpo_rw", *cross_entropy(SEVENTHS, 0.5), inputs=three(2, tuple(0.5 * x for x in LOG_124))),
    Golden(
        "dpo_rw",
        *cross_entropy(TIED, 0.25),
        {"beta": 0.25, "reward_temperature": 2.0},
        three(4, tuple(2 * x for x in LOG_211)),
    ),
    # row 4 of the second group has p = 4 / 5 and t = 1 / 3: -(log 0.8 + 2 log 0.2) / 3, and half of each for the mean of two groups
    Golden(
        "dpo_rw",
        cross_entropy(SEVENTHS, 1)[0] / 2 - (log(0.8) + 2 * log(0.2)) / 6,
        (*(x / 2 for x in cross_entropy(SEVENTHS, 1)[1]), (1 / 5 - 2 / 3) / 2, (4 / 5 - 1 / 3) / 2),
        {"beta": 1.0, "reward_temperature": 1.0},
        two_groups(1, (*LOG_124, log(2), 0.0), (0.0, log(4))),
    ),
    Golden("adpo", *cross_entropy(STANDARD_TARGET, 1 / 0.8), inputs=three(0.8, (1.0, 2.0, 3.0))),
    Golden(
        "adpo", *cross_entropy(STANDARD_TARGET, 1 / ADAPTED), {"adaptation": 0.5}, three(ADAPTED, (11.0, 12.0, 13.0))
    ),
    # equal rewards: the entropy is the largest, and the temperature would be 0
    Golden("adpo", *cross_entropy(UNIFORM, 20.0), {"adaptation": 1.0}, three(0.05, (7.0, 7.0, 7.0))),
    # two completions: p = (1, 2) / 3
    Golden(
        "adpo",
        OF_TWO * log(1.5) + (1 - OF_TWO) * log(3),
        ((OF_TWO - 2 / 3) / 0.6, (2 / 3 - OF_TWO) / 0.6),
        {"beta": 1 / 0.6, "reward_temperature": 0.4},
        {"policy": (-3.0, -5.0 + 0.6 * log(2)), "reference": (-3.0, -5.0), "rewards": (0.0, 1.0), "groups": 2},
    ),
    Golden(
        "adpo_on_policy",
        *cross_entropy(STANDARD_TARGET, 1 / 0.8),
        inputs=three(0.8, (1.0, 2.0, 3.0), reference=None, behaviour=REFERENCE),
    ),
    Golden(
        "adpo_on_policy",
        *cross_entropy(UNIFORM, 1 / (0.6 * 0.75)),
        {"beta": 1 / 0.6, "adaptation": 0.25},
        three(0.45, (0.0, 0.0, 0.0), reference=(-1.0, -2.0, -3.0), behaviour=REFERENCE),
    ),
    # softmax(-1/2, 0, 1/2)
    Golden(
        "adpo_on_policy",
        *cross_entropy(tuple(exp(x) / (exp(-0.5) + 1 + exp(0.5)) for x in (-0.5, 0, 0.5)), 1 / 0.8),
        {"reward_temperature": 2.0},
        three(0.8, (1.0, 2.0, 3.0), reference=None, behaviour=REFERENCE),
    ),
    # sum_i t_i log(t_i / p_i): log 3 / 2 + log(3 / 4) / 4 + log(1 / 2) / 4
    Golden(
        "brain", log(3) / 2 + log(0.75) / 4 + log(0.5) / 4, (1 / 6 - 1 / 2, 1 / 12, 1 / 4), inputs=three(1, LOG_211)
    ),
    # the behaviour is such that the posterior is (2, 1, 1) / 4 with rewards 1, 0, 0.5
    Golden(
        "brain",
        log(3) / 2 + log(0.75) / 4 + log(0.5) / 4,
        (1 / 6 - 1 / 2, 1 / 12, 1 / 4),
        {"reward_temperature": 0.5},
        three(0, (1.0, 0.0, 0.5))
        | {
            "behaviour": (-10.5 - log(2), -8.25, -6.25),
            "policy": (-10.5 - log(2), -8.25 + log(2), -6.25 + log(3)),
        },
    ),
    # the second is best, then the third: -log(2 / 6) - log(3 / 4)
    Golden("plackett_luce", log(4), (0.1 * 5 / 12, -0.1 * 2 / 3, 0.1 * 1 / 4), inputs=three(10, (0.2, 0.9, 0.5))),
    # second and third are equal: -log(2 / 3) - log(3 / 4)
    Golden("plackett_luce", log(2), (7 / 12, -1 / 3, -1 / 4), {"beta": 1.0}, three(1, (0.2, 0.9, 0.9))),
    # the second group is a pair: the worse one has 4 times the odds
    Golden(
        "plackett_luce",
        (log(4) + log(5)) / 2,
        (5 / 24, -1 / 3, 1 / 8, -2 / 5, 2 / 5),
        {"beta": 1.0},
        two_groups(1, (0.2, 0.9, 0.5, 4.0, 3.0), (0.0, log(4))),
    ),
    Golden(
        "lipo",
        *pairs({(2, 0): 2 * (D1 - D2), (2, 1): 3 * (D2 - D3), (0, 1): D1 - D3}, RATIOS, 0.1),
        inputs=three(1, LABELS, RATIOS),
    ),
    # policy and reference agree: ranks by reward
    Golden(
        "lipo",
        *pairs({(2, 0): 2 * (D1 - D2), (2, 1): 3 * (D1 - D3), (0, 1): D2 - D3}, (0, 0, 0), 2.0),
        {"beta": 2.0},
        three(0, LABELS),
    ),
    # 100 and 90 both count as 80: two pairs, of the ranks 1 and 2 with 3
    Golden(
        "lipo",
        *pairs({(0, 1): 2.0**80 * (D1 - D3), (2, 1): 2.0**80 * (D2 - D3)}, RATIOS, 0.1),
        inputs=three(1, (100.0, -1e4, 90.0), RATIOS),
    ),
    Golden(
        "rank_dpo",
        *pairs({(2, 0): 2 * (D1 - D2), (2, 1): 3 * (D1 - D3), (0, 1): D2 - D3}, RATIOS, 0.1),
        inputs=three(1, LABELS, RATIOS),
    ),
    # first and third share rank 1, the second has rank 3
    Golden(
        "rank_dpo",
        *pairs({(0, 1): 3 * (D1 - D3), (2, 1): 3 * (D1 - D3)}, RATIOS, 2.0),
        {"beta": 2.0},
        three(1, (2.0, 0.0, 2.0), RATIOS),
    ),
]
