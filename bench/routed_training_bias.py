"""What routed gradients are off by at one policy: single micro-batches, their sum, and with older orders of the vocabulary.

N tokens of a micro-batch, D hidden size, V vocabulary, S sequences, B blocks. g a gradient, e the error of the routed one.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from isdaa_trainer.config import Config
from isdaa_trainer.data import IGNORED, MicroBatch, pack, step_order
from isdaa_trainer.model import Policy
from isdaa_trainer.routing import Routing
from isdaa_trainer.step import pair_loss
from torch import Tensor
from tqdm import tqdm

from isdaa_kernels import linear_logprob, sequence_logprob
from isdaa_kernels.backends.reference.routed import block_logsumexp
from isdaa_kernels.routing import choose_routes

if TYPE_CHECKING:
    from bench.routed_training import Lab

QUANTILES = (0.05, 0.25, 0.5)  # of the rows' cosines
SKETCH = 16381  # a prime: not in step with the rows of any matrix
ORDERS = ("before training", "fresh", "natural")


@dataclasses.dataclass(frozen=True)
class HeadGradient:
    hidden_ND: Tensor
    weight_VD: Tensor
    logprob_N: Tensor  # upstream
    sums_S: Tensor  # upstream


def head_gradient(
    hidden_ND: Tensor, policy: Policy, batch: MicroBatch, config: Config, routing: Routing
) -> HeadGradient:
    """Of the loss of `batch` with respect to hidden states and head alone, as a step of the trainer has it."""
    head = policy.head()
    leaf_ND, weight_VD = (tensor.detach().requires_grad_() for tensor in (hidden_ND, head.weight))
    transforms = {"bias": head.bias, "logit_scale": head.logit_scale, "softcap": head.softcap}
    settings = {"max_scored": batch.num_scored, **config.kernel_settings(), **routing.kernel_settings()}
    logprob_N = linear_logprob(leaf_ND, weight_VD, batch.targets, **transforms, **settings)
    sums_S = sequence_logprob(logprob_N, batch.cu_seqlens)
    loss = pair_loss(sums_S, batch, config, denominator=len(batch.pairs)).loss
    return HeadGradient(*torch.autograd.grad(loss, (leaf_ND, weight_VD, logprob_N, sums_S)))


@torch.no_grad()
def routed_shares(
    hidden_ND: Tensor, policy: Policy, batch: MicroBatch, config: Config, routing: Routing, upstream_N: Tensor
):
    """Shares of the (token, block) pairs that are routed in the gradients of hidden and of weight."""
    settings = routing.kernel_settings()
    routed, order = settings["gradient"], settings["vocab_order"]
    scored = batch.targets != IGNORED
    weight_VD = policy.head().weight
    rows_V = torch.arange(len(weight_VD), device=weight_VD.device) if order is None else order.rows
    z_NV = hidden_ND[scored] @ weight_VD[rows_V].T * policy.head().logit_scale
    target_N = rows_V.argsort()[batch.targets[scored]]
    routes = choose_routes(
        block_logsumexp(z_NV, routed.block), z_NV.logsumexp(1), -upstream_N[scored], target_N // routed.block, routed
    )
    return [mask_BN.float().mean().item() for mask_BN in (routes.hidden_BN, routes.weight_BN)]


class Sums:
    """g and e of one part of the parameters, summed over micro-batches."""

    def __init__(self) -> None:
        self.g: list[Tensor] = []
        self.e: list[Tensor] = []
        self.squares: list[tuple[float, float]] = []
        self.sketches: list[tuple[Tensor, Tensor]] = []

    def add(self, exact: Sequence[Tensor], routed: Sequence[Tensor]) -> None:
        error = [b - a for a, b in zip(exact, routed, strict=True)]
        self.squares.append((square(exact), square(error)))
        self.sketches.append((sketch(exact), sketch(error)))
        if not self.g:
            self.g, self.e = [t.clone() for t in exact], error
            return
        torch._foreach_add_(self.g, list(exact))
        torch._foreach_add_(self.e, error)

    def figures(self) -> dict[str, float | None]:
        """With n micro-batches as draws from one distribution: the sum of e_i . e_j over i != j, divided by n (n - 1), estimates |E e|^2
        without bias, so that what averages out plays no part in `bias`; the same for g."""
        singles = [math.sqrt(e / g) for g, e in self.squares]
        n, g_sum, e_sum = len(singles), square(self.g), square(self.e)
        g_total, e_total = (sum(squares) for squares in zip(*self.squares, strict=True))
        error_sum, spread = math.sqrt(e_sum / g_sum), max(0.0, g_total - g_sum / n)
        chance_g, chance_e = (chance_growth(torch.stack(parts)) for parts in zip(*self.sketches, strict=True))
        return {
            "batches": n,
            "error_single": statistics.mean(singles),
            "error_median": statistics.median(singles),
            "error_pooled": math.sqrt(e_total / g_total),
            "error_sum": error_sum,
            "ratio": quotient(error_sum, statistics.mean(singles)),
            "ratio_of_noise": 1 / math.sqrt(n),
            "growth_error": root(quotient(e_sum, e_total)),  # 1: noise, sqrt n: bias
            "growth_error_chance": chance_e,
            "growth_gradient": root(quotient(g_sum, g_total)),
            "growth_gradient_chance": chance_g,
            "bias": root(quotient(e_sum - e_total, g_sum - g_total)),
            "error_by_sampling": root(quotient(e_sum, spread * n / max(1, n - 1))),
            "batches_until_bias": quotient(n * spread, e_sum - e_total),
        }


def quotient(a: float, b: float) -> float | None:
    """a / b; 0 in place of a negative a, None where b is not positive."""
    return max(0.0, a) / b if b > 0 else None


def root(value: float | None) -> float | None:
    return None if value is None else math.sqrt(value)


def sketch(tensors: Sequence[Tensor]) -> Tensor:
    """float64 [SKETCH]: rows of that many entries added with random signs, the same for the same shapes, so that the products of two
    sketches are those of the tensors, on average over the signs."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(SKETCH, dtype=torch.float64)
    for tensor in tensors:
        rows = F.pad(tensor.detach().flatten(), (0, -tensor.numel() % SKETCH)).view(-1, SKETCH)
        signs = torch.randint(0, 2, (len(rows),), generator=generator) * 2.0 - 1
        total += (signs.to(rows) @ rows).double().cpu()
    return total


def chance_growth(sketches: Tensor) -> float | None:
    """Below it lies the growth of a sum whose terms have random signs, in 95 % of the cases."""
    products = sketches @ sketches.T
    signs = torch.randint(0, 2, (4000, len(products)), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    squares = ((signs.double() @ products) * signs).sum(1)
    return root(quotient(squares.quantile(0.95).item(), products.trace().item()))


def square(tensors: Sequence[Tensor]) -> float:
    return sum(norm.double().item() ** 2 for norm in torch._foreach_norm(list(tensors)))


def row_cosines(a_VD: Tensor, b_VD: Tensor) -> list[float]:
    """Quantiles of the rows' cosines; rows that are 0 in both count as 1."""
    a_VD, b_VD = a_VD.double(), b_VD.double()
    norms = a_VD.norm(dim=1) * b_VD.norm(dim=1)
    cosine_V = torch.where(norms > 0, (a_VD * b_VD).sum(1) / norms.clamp_min(1e-300), (a_VD == b_VD).all(1).double())
    return cosine_V.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()


def gradient_bias(lab: "Lab", checkpoint: Path) -> dict[str, Any]:
    """Exact and routed gradients of micro-batch after micro-batch at one policy, their coefficients and weights those of the data."""
    policy, config, exact = lab.policy(checkpoint), lab.config("routed"), Routing(lab.config("exact"))
    routing = first_routing(lab, config)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    head, body, hidden = Sums(), Sums(), Pooled()
    cosines, coefficients = [], []
    for batch in batches(lab, lab.settings.bias_batches, "gradients", policy, config, routing):
        hidden_ND = policy.hidden_states(batch.input_ids, batch.position_ids)
        found = [head_gradient(hidden_ND, policy, batch, config, way) for way in (exact, routing)]
        below = [
            [g for g in torch.autograd.grad(hidden_ND, parameters, way.hidden_ND, retain_graph=True, allow_unused=True)
             if g is not None]
            for way in found
        ]  # fmt: skip
        head.add(*([way.weight_VD] for way in found))
        body.add(*below)
        hidden.add(found[1].hidden_ND, found[0].hidden_ND)
        cosines.append(row_cosines(found[1].weight_VD, found[0].weight_VD))
        coefficients += pair_coefficients(found[0].sums_S, batch, config)
        routing.follow([(found[1].sums_S, batch.lengths)])
    return {
        "head": head.figures() | {
            "cosines_single": torch.tensor(cosines).mean(0).tolist(),
            "cosines_sum": row_cosines(head.g[0] + head.e[0], head.g[0]),
        },
        "body": body.figures(),
        "hidden": hidden.figures(),
        "coefficient": {"least": min(coefficients), "most": max(coefficients)},
    }  # fmt: skip


def pair_coefficients(upstream_S: Tensor, batch: MicroBatch, config: Config) -> list[float]:
    """|coefficient| of each pair, in units of that of a pair at the reference with importance weight 1: beta / 2 over the pairs."""
    unit = config.beta / 2 / len(batch.pairs)
    return (upstream_S[: len(batch.pairs)].abs() / unit).tolist()


def first_routing(lab: "Lab", config: Config, policy: Policy | None = None) -> Routing:
    """With the order that a routed run starts from (or that of `policy`) and no scale yet."""
    routing = Routing(config)
    routing.make_order(lab.policy(lab.initial) if policy is None else policy, lab.data.train)
    return routing


def batches(
    lab: "Lab", count: int, title: str, policy: Policy, config: Config, *routings: Routing
) -> Iterator[MicroBatch]:
    """Micro-batches of training pairs in an order of their own; the pairs before the first one set the scale of `routings`."""
    reference = torch.load(lab.reference_file, weights_only=True)["train"]
    size = lab.settings.pairs_per_batch
    for number in tqdm(range(-1, count), desc=title, unit="batch"):
        indices = step_order(number + 1, len(lab.data.train), size, seed=len(lab.data.train))
        batch = pack([lab.data.train[i] for i in indices], reference[indices]).to(policy.device)
        if number >= 0:
            yield batch
            continue
        with torch.no_grad():
            hidden_ND = policy.hidden_states(batch.input_ids, batch.position_ids)
        upstream = head_gradient(hidden_ND, policy, batch, config, Routing(lab.config("exact")))
        for routing in routings:
            routing.follow([(upstream.sums_S, batch.lengths)])


class Pooled:
    """Errors of single gradients: mean and median of the relative ones, and all together, in which small gradients weigh little."""

    def __init__(self) -> None:
        self.squares: list[tuple[float, float]] = []

    def add(self, routed: Tensor, exact: Tensor) -> None:
        self.squares.append((square([exact]), square([routed - exact])))

    def figures(self) -> dict[str, float]:
        singles = [math.sqrt(e / g) for g, e in self.squares]
        g_total, e_total = (sum(squares) for squares in zip(*self.squares, strict=True))
        return {
            "error_single": statistics.mean(singles),
            "error_median": statistics.median(singles),
            "error_pooled": math.sqrt(e_total / g_total),
        }


def ageing(lab: "Lab", folders: dict[str, Path]) -> list[dict[str, Any]]:
    """Share routed and error of single gradients at policies of the exact run, with the order made before training and with others."""
    config, exact = lab.config("routed"), Routing(lab.config("exact"))
    rows = []
    for when, folder in {"start": lab.initial, **folders}.items():
        policy = lab.policy(folder)
        routings = dict(
            zip(ORDERS, (first_routing(lab, config), first_routing(lab, config, policy), Routing(config)), strict=True)
        )
        found = {name: Aged() for name in routings}
        for batch in batches(lab, lab.settings.ageing_batches, f"ageing, {when}", policy, config, *routings.values()):
            with torch.no_grad():
                hidden_ND = policy.hidden_states(batch.input_ids, batch.position_ids)
            true = head_gradient(hidden_ND, policy, batch, config, exact)
            for name, routing in routings.items():
                ours = head_gradient(hidden_ND, policy, batch, config, routing)
                found[name].add(ours, true, routed_shares(hidden_ND, policy, batch, config, routing, true.logprob_N))
                routing.follow([(true.sums_S, batch.lengths)])
        rows += [{"when": when, "order": name} | aged.figures() for name, aged in found.items()]
    return rows


class Aged:
    """What one order does at one policy."""

    def __init__(self) -> None:
        self.hidden, self.weight, self.shares, self.cosines = Pooled(), Pooled(), [], []

    def add(self, ours: HeadGradient, true: HeadGradient, shares: list[float]) -> None:
        self.hidden.add(ours.hidden_ND, true.hidden_ND)
        self.weight.add(ours.weight_VD, true.weight_VD)
        self.shares.append(shares)
        self.cosines.append(row_cosines(ours.weight_VD, true.weight_VD))

    def figures(self) -> dict[str, Any]:
        hidden, weight = torch.tensor(self.shares).mean(0).tolist()
        errors = {"error_hidden": self.hidden.figures(), "error_weight": self.weight.figures()}
        return {
            "share_hidden": hidden,
            "share_weight": weight,
            **errors,
            "cosines": torch.tensor(self.cosines).mean(0).tolist(),
        }
