"""Hidden states as sharp as a real model's, made on the device in chunks: the same seed gives the same numbers on the same device.

Each position has K = 32 candidate tokens, drawn from a Zipf-Mandelbrot law over the vocabulary as the tokens of a text are (rank r with
weight 1 / (r + 2.7), r from 0; ranks are token ids, as in a vocabulary made by merges). Their log-probs among each other are those of
`s * standard normal`, s uniform in 0..5.5 by position, which gives certain and open positions side by side. The hidden state is the one
in the span of the candidates' weight rows that has exactly these logits, and the target is drawn from the candidates by these
probabilities. All other logits are normal, of the standard deviation |hidden| / sqrt(D), about 0.9 to 1.3. How far the candidates stand
above them, the `lift`, is found by bisection so that the entropy over the whole vocabulary is 2.25 nats on average; the target's log-prob
is then about -2.0 on average. The head has rows of independent normal numbers with variance 1 / D.

Random states beside them: normal hidden states times 3, the same head, uniform targets: logits with a standard deviation of 3.

N tokens, n tokens of a chunk, D hidden size, V vocabulary, K candidates.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CANDIDATES = 32
ZIPF_SHIFT = 2.7
SHARPEST = 5.5  # the largest s
ENTROPY = 2.25  # nats, mean over positions
CHUNK = 1024  # tokens, or rows of the head; a chunk is always made whole, so that fewer tokens are the first of more
RANDOM_SCALE = 3.0
_LIFTS = (0.0, 60.0)  # where the bisection begins
_SAMPLE = 256  # tokens it looks at


def make_upstream(N: int, device: torch.device, seed: int) -> Tensor:
    """fp32 coefficients of the tokens' log-probs, standard normal."""
    chunks = [torch.randn(CHUNK, generator=_generator(device, seed, 3, i), device=device) for i in range(0, N, CHUNK)]
    return torch.cat(chunks)[:N]


def disturb(hidden_ND: Tensor, scale: float, seed: int) -> Tensor:
    """With noise of this standard deviation, which is also that of the logits it makes: the rows of the head have length 1."""
    out_ND = torch.empty_like(hidden_ND)
    for start in range(0, hidden_ND.shape[0], CHUNK):
        noise_nD = torch.randn(
            CHUNK, hidden_ND.shape[1], generator=_generator(hidden_ND.device, seed, 4, start), device=hidden_ND.device
        )
        rows_nD = hidden_ND[start : start + CHUNK]
        out_ND[start : start + CHUNK] = rows_nD + noise_nD[: len(rows_nD)] * scale
    return out_ND


@dataclass(frozen=True)
class SharpStates:
    hidden_ND: Tensor
    targets_N: Tensor
    lift: float
    entropy: float  # means over the first _SAMPLE tokens, in fp32 from the rounded states
    target_logprob: float


def make_weight(V: int, D: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    weight_VD = torch.empty(V, D, dtype=dtype, device=device)
    for start in range(0, V, CHUNK):
        rows_nD = torch.randn(CHUNK, D, generator=_generator(device, seed, 0, start), device=device)
        weight_VD[start : start + CHUNK] = rows_nD[: V - start] / math.sqrt(D)
    return weight_VD


def make_random_states(weight_VD: Tensor, N: int, seed: int) -> tuple[Tensor, Tensor]:
    """Hidden states [N, D] in the dtype of the head and targets [N]."""
    (V, D), device = weight_VD.shape, weight_VD.device
    hidden_ND = torch.empty(N, D, dtype=weight_VD.dtype, device=device)
    targets_N = torch.empty(N, dtype=torch.int64, device=device)
    for start in range(0, N, CHUNK):
        random = _generator(device, seed, 1, start)
        hidden_nD = torch.randn(CHUNK, D, generator=random, device=device) * RANDOM_SCALE
        hidden_ND[start : start + CHUNK] = hidden_nD[: N - start]
        targets_N[start : start + CHUNK] = torch.randint(V, (CHUNK,), generator=random, device=device)[: N - start]
    return hidden_ND, targets_N


def make_sharp_states(weight_VD: Tensor, N: int, seed: int, lift: float | None = None) -> SharpStates:
    """lift: as found before for this head, or None to look for it."""
    if lift is None:
        lift = find_lift(weight_VD, seed)
    hidden_ND = torch.empty(N, weight_VD.shape[1], dtype=weight_VD.dtype, device=weight_VD.device)
    targets_N = torch.empty(N, dtype=torch.int64, device=weight_VD.device)
    for start in range(0, N, CHUNK):
        hidden_nD, targets_n = _make_chunk(weight_VD, start, seed, lift)
        hidden_ND[start : start + CHUNK] = hidden_nD[: N - start]
        targets_N[start : start + CHUNK] = targets_n[: N - start]
    return SharpStates(hidden_ND, targets_N, lift, *_measure(hidden_ND[:_SAMPLE], weight_VD, targets_N[:_SAMPLE]))


def find_lift(weight_VD: Tensor, seed: int) -> float:
    """Entropy falls as the candidates rise above the rest."""
    low, high = _LIFTS
    for _ in range(14):
        middle = (low + high) / 2
        hidden_nD, targets_n = _make_chunk(weight_VD, 0, seed, middle)
        entropy, _ = _measure(hidden_nD[:_SAMPLE], weight_VD, targets_n[:_SAMPLE])
        low, high = (middle, high) if entropy > ENTROPY else (low, middle)
    return (low + high) / 2


def _make_chunk(weight_VD: Tensor, start: int, seed: int, lift: float) -> tuple[Tensor, Tensor]:
    random = _generator(weight_VD.device, seed, 2, start)
    ids_nK, logprob_nK = _candidates(weight_VD.shape[0], random)
    noise_nK = -torch.empty_like(logprob_nK).exponential_(generator=random).log()
    targets_n = ids_nK.gather(1, (logprob_nK + noise_nK).argmax(1, keepdim=True))[:, 0]
    logits_nK = (lift + logprob_nK).clamp_min(0)
    absent_nK = logprob_nK == -math.inf
    rows_nKD = weight_VD[ids_nK].float().masked_fill_(absent_nK[..., None], 0)
    gram_nKK = rows_nKD @ rows_nKD.mT + torch.diag_embed(absent_nK.float() + 1e-3)
    share_nK = torch.linalg.solve(gram_nKK, logits_nK)
    return (share_nK[:, None] @ rows_nKD)[:, 0].to(weight_VD.dtype), targets_n


def _candidates(V: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids [n, K] and their log-probs among each other; one that came twice counts once, the other time with probability 0."""
    shape, device = (CHUNK, CANDIDATES), random.device
    uniform_nK = torch.rand(shape, generator=random, device=device, dtype=torch.float64)
    rank_nK = ZIPF_SHIFT * ((V + ZIPF_SHIFT) / ZIPF_SHIFT) ** uniform_nK - ZIPF_SHIFT
    ids_nK = rank_nK.long().clamp(0, V - 1).sort(1).values
    sharpness_n1 = torch.rand(CHUNK, 1, generator=random, device=device) * SHARPEST
    score_nK = sharpness_n1 * torch.randn(shape, generator=random, device=device)
    score_nK[:, 1:].masked_fill_(ids_nK[:, 1:] == ids_nK[:, :-1], -math.inf)
    return ids_nK, score_nK.log_softmax(1)


def _measure(hidden_nD: Tensor, weight_VD: Tensor, targets_n: Tensor) -> tuple[float, float]:
    """Mean entropy and mean log-prob of the targets."""
    entropy, logprob = 0.0, 0.0
    for part_nD, part_n in zip(hidden_nD.split(64), targets_n.split(64), strict=True):
        logprob_nV = (part_nD @ weight_VD.T).float().log_softmax(1)
        logprob += logprob_nV.gather(1, part_n[:, None]).sum().item()
        entropy -= (logprob_nV.exp() * logprob_nV).sum().item()
    return entropy / len(targets_n), logprob / len(targets_n)


def _generator(device: torch.device, seed: int, kind: int, start: int) -> torch.Generator:
    return torch.Generator(device).manual_seed((seed * 8 + kind) * (1 << 24) + start // CHUNK)
