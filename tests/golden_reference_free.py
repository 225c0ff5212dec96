"""Golden rows of objectives/reference_free.py, from the closed forms of loss and gradient.

At the standard pair logp_w - logp_l = -2.75, m_w = -2.4, m_l = -2.3125, so m_w - m_l = -0.0875; with gold m_g = -1.6. Reversed, chosen and
rejected change places. S is the logistic function, softplus(x) = log(1 + e^x), softplus(-x) = softplus(x) - x. What has odds is
worked out from probabilities: exp(-2.4) is p_w, and its odds p / (1 - p) are 1 / (e^2.4 - 1).
"""

from math import exp, expm1, log, log1p

from objective_cases import Golden


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def softplus(x: float) -> float:
    return log1p(exp(x))


REVERSED = {"policy": (-9.25, -12.0), "reference": (-8.25, -12.5), "lengths": (4, 5)}
GOLD = {"policy": (-12.0, -9.25, -8.0), "reference": (-12.5, -8.25, -7.0), "lengths": (5, 4, 5)}
GOLD_REVERSED = {"policy": (-9.25, -12.0, -8.0), "reference": (-8.25, -12.5, -7.0), "lengths": (4, 5, 5)}
LIKELY = {"policy": (-0.05, -2.0)}  # m_w = -0.01, m_l = -0.5
CERTAIN_CHOSEN = {"policy": (0.0, -2.0)}  # beyond the bound of m, -1e-6
CERTAIN_REJECTED = {"policy": (-12.0, 0.0)}

ODDS_W, ODDS_L = 1 / expm1(2.4), 1 / expm1(2.3125)
REST_W, REST_L = 1 - exp(-2.4), 1 - exp(-2.3125)
SHARE_L = ODDS_L / (ODDS_W + ODDS_L)  # S(o_l - o_w)
# the same at LIKELY and CERTAIN_CHOSEN; of odds 1 / (e^x - 1) the share is (e^x' - 1) / (e^x + e^x' - 2)
LIKELY_SHARE_L = expm1(0.01) / (expm1(0.01) + expm1(0.5))
CERTAIN_SHARE_L = expm1(1e-6) / (expm1(1e-6) + expm1(0.5))
CERTAIN_SHARE_W = expm1(2.4) / (expm1(2.4) + expm1(1e-6))  # at CERTAIN_REJECTED: that of the rejected one

ROWS = [
    # 1 + 2.75 + 1.2; below the margin of -3 the hinge is 0
    Golden("slic_hf", 4.95, (-1.1, 1.0)),
    Golden("slic_hf", 6.0, (-0.5, 0.0), {"margin": -3.0, "sft_weight": 0.5}),
    Golden("slic_hf", 0.25, (-1.0, 1.0), {"margin": 3.0, "sft_weight": 0.0}, REVERSED),
    # z = -0.275, -1.1; 0.9 softplus(1.1) + 0.1 softplus(-1.1) = softplus(1.1) - 0.11
    Golden("cpo", softplus(0.275) + 2.4, (-0.1 * sigmoid(0.275) - 0.2, 0.1 * sigmoid(0.275))),
    Golden(
        "cpo",
        softplus(1.1) + 1.09,
        (0.4 * (0.1 - sigmoid(1.1)) - 0.1, 0.4 * (sigmoid(1.1) - 0.1)),
        {"beta": 0.4, "label_smoothing": 0.1, "sft_weight": 0.5},
    ),
    # 1.275 + 2.4; 1 - 0.55 and, beyond the kink, 1 - 1.375, each with 0.25 * 2.3125
    Golden("cpo_hinge", 3.675, (-0.3, 0.1)),
    Golden("cpo_hinge", 1.028125, (-0.2625, 0.2), {"beta": 0.2, "sft_weight": 0.25}, REVERSED),
    Golden("cpo_hinge", 0.578125, (-0.0625, 0.0), {"beta": 0.5, "sft_weight": 0.25}, REVERSED),
    # r = -5.0875, -0.3375
    Golden("cpo_ipo", 28.28265625, (-11.175 / 5, 10.175 / 4)),
    Golden("cpo_ipo", 0.11390625, (-0.135, 0.16875), {"beta": 2.0, "sft_weight": 0.0}),
    # u = -0.675, -1.875
    Golden("simpo", softplus(0.675), (-0.4 * sigmoid(0.675), 0.5 * sigmoid(0.675))),
    Golden(
        "simpo",
        softplus(1.875) - 0.375 + 1.2,
        (2 * (0.2 - sigmoid(1.875)) - 0.1, 2.5 * (sigmoid(1.875) - 0.2)),
        {"beta": 10.0, "margin": 1.0, "label_smoothing": 0.2, "sft_weight": 0.5},
    ),
    # two pairs, each with its own options: m = -2.4, -2.3125 and -1.5, -1.6; u = -0.675 and 0.1
    Golden(
        "simpo",
        (softplus(0.675) + softplus(-0.1)) / 2,
        (-0.2 * sigmoid(0.675), -sigmoid(-0.1) / 8, 0.25 * sigmoid(0.675), sigmoid(-0.1) / 10),
        {"beta": (2.0, 1.0), "margin": (0.5, 0.0)},
        {"policy": (-12.0, -6.0, -9.25, -8.0), "reference": (-12.0, -6.0, -9.25, -8.0), "lengths": (5, 4, 4, 5)},
    ),
    # u = -0.675; 0.25, and beyond the kink 1.25, with 0.4 * 2.3125
    Golden("simpo_hinge", 1.675, (-0.4, 0.5)),
    Golden("simpo_hinge", 1.675, (-10.4 / 4, 2.0), {"beta": 10.0, "margin": 0.625, "sft_weight": 0.4}, REVERSED),
    Golden("simpo_hinge", 0.925, (-0.1, 0.0), {"beta": 20.0, "margin": 0.5, "sft_weight": 0.4}, REVERSED),
]

# AlphaPO. r = 4 (1 - e^(-m / 4)): -u = 8 (e^0.6 - e^0.578125) + 0.5. For alpha = -1 / 2 r = 2 (e^(m / 2) - 1): u = 5 (e^-1.2 - e^-1.15625).
# At m = -300 the exponent of alpha = 1 / 2 is held at 80.
BELOW = 8 * (exp(0.6) - exp(0.578125)) + 0.5
ABOVE = 5 * (exp(-1.2) - exp(-1.15625))
ROWS += [
    Golden("alphapo", softplus(BELOW), (-0.4 * exp(0.6) * sigmoid(BELOW), 0.5 * exp(0.578125) * sigmoid(BELOW))),
    Golden(
        "alphapo",
        softplus(-ABOVE) + 0.1 * ABOVE,
        (0.5 * exp(-1.2) * (sigmoid(ABOVE) - 0.9), 0.625 * exp(-1.15625) * (0.9 - sigmoid(ABOVE))),
        {"alpha": -0.5, "beta": 2.5, "margin": 0.0, "label_smoothing": 0.1},
    ),
    Golden(
        "alphapo",
        2 * (exp(80.0) - exp(1.15625)),
        (0.0, exp(1.15625) / 4),
        {"alpha": 0.5, "beta": 1.0, "margin": 0.0},
        {"policy": (-1200.0, -9.25), "lengths": (4, 4)},
    ),
]

# Odds. -LS(o_w - o_l) = log(1 + odds_l / odds_w) = -log(1 - share_l), and d/dm of the log-odds is 1 / (1 - p).
ROWS += [
    Golden(
        "orpo",
        2.4 + 0.1 * log(1 + ODDS_L / ODDS_W),
        ((-1 - 0.1 * SHARE_L / REST_W) / 5, 0.1 * SHARE_L / REST_L / 4),
    ),
    Golden(
        "orpo",
        0.005 - log(1 - LIKELY_SHARE_L),
        ((-0.5 + LIKELY_SHARE_L / expm1(-0.01)) / 5, -LIKELY_SHARE_L / expm1(-0.5) / 4),
        {"odds_weight": 1.0, "sft_weight": 0.5},
        LIKELY,
    ),
    Golden(
        "orpo", -0.1 * log(1 - CERTAIN_SHARE_L), (-0.2, -0.1 * CERTAIN_SHARE_L / expm1(-0.5) / 4), {}, CERTAIN_CHOSEN
    ),
    Golden(
        "orpo",
        2.4 + 0.1 * log(1 + expm1(2.4) / expm1(1e-6)),
        ((-1 - 0.1 * CERTAIN_SHARE_W / REST_W) / 5, 0.0),
        {},
        CERTAIN_REJECTED,
    ),
    Golden("orpo_align", log(1 + ODDS_L / ODDS_W), (-SHARE_L / REST_W / 5, SHARE_L / REST_L / 4)),
    Golden(
        "orpo_align",
        log(1 + (ODDS_L / ODDS_W) ** 2),
        (
            -2 * ODDS_L**2 / (ODDS_W**2 + ODDS_L**2) / REST_W / 5,
            2 * ODDS_L**2 / (ODDS_W**2 + ODDS_L**2) / REST_L / 4,
        ),
        {"beta": 2.0},
    ),
    # -LS(o_w) = 2.4 and -LS(-o_l) = -log(1 - p_l)
    Golden("asft", 4.8 - log(REST_L), (-0.4, ODDS_L / 4)),
    Golden("asft", 1.44 - 0.1 * log(REST_L), (-0.12, 0.1 * ODDS_L / 4), {"odds_weight": 0.1, "sft_weight": 0.5}),
    Golden("asft", 0.02 - log(1 - exp(-0.5)), (-0.4, 1 / expm1(0.5) / 4), {}, LIKELY),
    Golden("asft", 1e-6 - log(1 - exp(-0.5)), (-0.2, 1 / expm1(0.5) / 4), {}, CERTAIN_CHOSEN),
    Golden("asft", 4.8 - log(-expm1(-1e-6)), (-0.4, 0.0), {}, CERTAIN_REJECTED),
    Golden("asft_align", 2.4 - log(REST_L), (-0.2, ODDS_L / 4)),
    Golden(
        "asft_align",
        log(1 + ODDS_W**-2) + log(1 + ODDS_L**2),
        (-2 / (1 + ODDS_W**2) / REST_W / 5, 2 / (1 + ODDS_L**-2) / REST_L / 4),
        {"beta": 2.0},
    ),
]

# Gold: m_g = -1.6
ROWS += [
    # z = -0.0275, -1.1
    Golden("tpo", softplus(0.0275) + 1.6, (-0.01 * sigmoid(0.0275), 0.01 * sigmoid(0.0275), -0.2), {}, GOLD),
    Golden(
        "tpo",
        softplus(1.1) - 0.11 + 0.08,
        (0.4 * (0.1 - sigmoid(1.1)), 0.4 * (sigmoid(1.1) - 0.1), -0.01),
        {"beta": 0.4, "label_smoothing": 0.1, "sft_weight": 0.05},
        GOLD,
    ),
    Golden("tpo_hinge", 2.6275, (-0.01, 0.01, -0.2), {}, GOLD),
    Golden("tpo_hinge", 0.45 + 0.8, (-0.2, 0.2, -0.1), {"beta": 0.2, "sft_weight": 0.5}, GOLD_REVERSED),
    Golden("tpo_hinge", 0.8, (0.0, 0.0, -0.1), {"beta": 0.5, "sft_weight": 0.5}, GOLD_REVERSED),
    # r = -50.0875, -0.3375
    Golden("tpo_ipo", 2508.75765625 + 1.6, (-20.035, 25.04375, -0.2), {}, GOLD),
    Golden("tpo_ipo", 0.11390625 + 0.4, (-0.135, 0.16875, -0.05), {"beta": 2.0, "sft_weight": 0.25}, GOLD),
    # u = -0.500875, -1.775
    Golden(
        "tpo_mean",
        softplus(0.500875) + 1.6,
        (-0.002 * sigmoid(0.500875), 0.0025 * sigmoid(0.500875), -0.2),
        {},
        GOLD,
    ),
    Golden(
        "tpo_mean",
        softplus(1.775) - 0.355 + 0.08,
        (0.4 * (0.2 - sigmoid(1.775)), 0.5 * (sigmoid(1.775) - 0.2), -0.01),
        {"beta": 2.0, "margin": 1.6, "label_smoothing": 0.2, "sft_weight": 0.05},
        GOLD,
    ),
    # of two completions with e^-2.75 to 1 the chosen one has 1 / (1 + e^2.75)
    Golden(
        "mpo_maximum",
        1.6 - 1 / (1 + exp(2.75)),
        (-exp(2.75) / (1 + exp(2.75)) ** 2, exp(2.75) / (1 + exp(2.75)) ** 2, -0.2),
        {},
        GOLD,
    ),
    Golden(
        "mpo_maximum",
        0.4 - exp(2.75) / (1 + exp(2.75)),
        (-exp(2.75) / (1 + exp(2.75)) ** 2, exp(2.75) / (1 + exp(2.75)) ** 2, -0.05),
        {"sft_weight": 0.25},
        GOLD_REVERSED,
    ),
]
