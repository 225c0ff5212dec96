"""What routed gradients are off by at one policy: single micro-batches, their sum, Adam's path from there, and with older orders of the
vocabulary.

N tokens of a micro-batch, D hidden size, V vocabulary, S sequences, B blocks. g a gradient, e the error of the routed one.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from isdaa_trainer import checkpoint as disk
from isdaa_trainer.config import Config
from isdaa_trainer.data import IGNORED, MicroBatch, pack, step_order
from isdaa_trainer.model import Policy
from isdaa_trainer.routing import Routing
from isdaa_trainer.step import pair_loss, train_step
from isdaa_trainer.train import learning_rate, make_optimizer
from torch import Tensor
from tqdm import tqdm

from isdaa_kernels import linear_logprob, sequence_logprob
from isdaa_kernels.backends.reference.routed import block_logsumexp
from isdaa_kernels.routing import choose_routes

if TYPE_CHECKING:
    from bench.routed_training import Lab

QUANTILES = (0.05, 0.25, 0.5)  # of the rows' cosines
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
        self.g_squares: list[float] = []
        self.e_squares: list[float] = []

    def add(self, exact: Sequence[Tensor], routed: Sequence[Tensor]) -> None:
        error = [b - a for a, b in zip(exact, routed, strict=True)]
        self.g_squares.append(square(exact))
        self.e_squares.append(square(error))
        if not self.g:
            self.g, self.e = [t.clone() for t in exact], error
            return
        torch._foreach_add_(self.g, list(exact))
        torch._foreach_add_(self.e, error)

    def figures(self) -> dict[str, float | None]:
        """With n micro-batches as draws from one distribution: |E e|^2 is estimated without bias by the sum of e_i . e_j over i != j,
        divided by n (n - 1), so that what averages out plays no part in `bias`."""
        n, g_sum, e_sum = len(self.g_squares), square(self.g), square(self.e)
        g_total, e_total = sum(self.g_squares), sum(self.e_squares)
        mean_single = sum(math.sqrt(e / g) for e, g in zip(self.e_squares, self.g_squares, strict=True)) / n
        error_sum = math.sqrt(e_sum / g_sum)
        bias_square, mean_square = e_sum - e_total, g_sum - g_total
        standard_error = math.sqrt(max(0.0, g_total - g_sum / n) * n / max(1, n - 1))  # of the sum
        return {
            "batches": n,
            "error_single": mean_single,
            "error_sum": error_sum,
            "ratio": error_sum / mean_single if mean_single > 0 else None,
            "ratio_of_noise": 1 / math.sqrt(n),
            "growth_error": math.sqrt(e_sum / e_total) if e_total > 0 else None,  # 1: noise, sqrt n: bias
            "growth_gradient": math.sqrt(g_sum / g_total),
            "bias": math.sqrt(max(0.0, bias_square) / mean_square) if mean_square > 0 else None,
            "error_by_sampling": math.sqrt(e_sum) / standard_error if standard_error > 0 else None,
        }


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
    head, body = Sums(), Sums()
    hidden_errors, cosines, coefficients = [], [], []
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
        hidden_errors.append(relative(found[1].hidden_ND, found[0].hidden_ND))
        cosines.append(row_cosines(found[1].weight_VD, found[0].weight_VD))
        coefficients += pair_coefficients(found[0].sums_S, batch, config)
        routing.follow([(found[1].sums_S, batch.lengths)])
    return {
        "head": head.figures() | {
            "cosines_single": torch.tensor(cosines).mean(0).tolist(),
            "cosines_sum": row_cosines(head.g[0] + head.e[0], head.g[0]),
        },
        "body": body.figures(),
        "hidden": {"error_single": sum(hidden_errors) / len(hidden_errors)},
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


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def adam_paths(lab: "Lab", checkpoint: Path) -> dict[str, Any]:
    """Where Adam gets from one checkpoint, its moments included, at a constant rate, against exact: routed; exact, but one pair after the
    other, so that nothing but rounding differs; exact in another order of the pairs."""
    exact = lab.config("exact")
    ways = {
        "routed": lab.config("routed"),
        "one by one": dataclasses.replace(
            exact, max_tokens_per_micro_batch=max(pair.num_tokens for pair in lab.data.train)
        ),
        "other order": dataclasses.replace(exact, seed=exact.seed + 1),
    }
    start, end = parameters_of(lab, checkpoint), adam_path(lab, checkpoint, exact, "exact")
    paths = {name: differences(start, end, adam_path(lab, checkpoint, config, name)) for name, config in ways.items()}
    return {"steps": lab.settings.adam_steps, **paths}


def adam_path(lab: "Lab", checkpoint: Path, config: Config, title: str) -> dict[str, Tensor]:
    exact, first = lab.config("exact"), disk.step_of(checkpoint)
    policy = lab.policy(checkpoint)
    optimizer = make_optimizer(policy, config)
    disk.restore(checkpoint, policy, optimizer, Routing(exact))
    routing = first_routing(lab, config) if config.gradient == "routed" else Routing(config)
    reference = torch.load(lab.reference_file, weights_only=True)["train"]
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(first, lab.settings.steps, exact)
    for step in tqdm(range(first, first + lab.settings.adam_steps), desc=f"Adam, {title}", unit="step"):
        order = step_order(step, len(lab.data.train), config.pairs_per_step, config.seed)
        pairs = [lab.data.train[index] for index in order]
        train_step(policy, optimizer, pairs, reference[order], config, step=step + 1, routing=routing)
    return tensors_of(policy)


def movement(lab: "Lab", runs: Sequence[str]) -> dict[str, Any]:
    """The same from the first step of each run to its last, against the first of `runs`."""
    start = parameters_of(lab, lab.initial)
    first, *others = runs
    end = parameters_of(lab, lab.work / first / "model")
    return {name: differences(start, end, parameters_of(lab, lab.work / name / "model")) for name in others}


def parameters_of(lab: "Lab", folder: Path) -> dict[str, Tensor]:
    return tensors_of(lab.policy(folder))


def tensors_of(policy: Policy) -> dict[str, Tensor]:
    """The head, tied to the embedding or not, first."""
    head = policy.head().weight
    rest = {name: p.detach().cpu() for name, p in policy.model.named_parameters() if p is not head}
    return {"head": head.detach().cpu(), **rest}


def differences(
    start: dict[str, Tensor], end: dict[str, Tensor], other: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Of the way to `other` from that to `end`: relative norm and cosine, by part."""
    parts = {"head": ["head"], "body": [name for name in start if name != "head"], "all": list(start)}
    moved = {name: (end[name] - start[name], other[name] - start[name]) for name in start}
    found = {}
    for part, names in parts.items():
        apart = math.sqrt(square([moved[name][1] - moved[name][0] for name in names]))
        a, b = (math.sqrt(square([moved[name][side] for name in names])) for side in (0, 1))
        found[part] = {"difference": apart / a, "cosine": (a**2 + b**2 - apart**2) / (2 * a * b)}
    return found


def ageing(lab: "Lab", folders: dict[str, Path]) -> list[dict[str, Any]]:
    """Share routed and error of single gradients at policies of the exact run, with the order made before training and with others."""
    config, exact = lab.config("routed"), Routing(lab.config("exact"))
    rows = []
    for when, folder in {"start": lab.initial, **folders}.items():
        policy = lab.policy(folder)
        routings = dict(
            zip(ORDERS, (first_routing(lab, config), first_routing(lab, config, policy), Routing(config)), strict=True)
        )
        found: dict[str, list] = {name: [] for name in routings}
        for batch in batches(lab, lab.settings.ageing_batches, f"ageing, {when}", policy, config, *routings.values()):
            with torch.no_grad():
                hidden_ND = policy.hidden_states(batch.input_ids, batch.position_ids)
            true = head_gradient(hidden_ND, policy, batch, config, exact)
            for name, routing in routings.items():
                ours = head_gradient(hidden_ND, policy, batch, config, routing)
                errors = [relative(ours.hidden_ND, true.hidden_ND), relative(ours.weight_VD, true.weight_VD)]
                shares = routed_shares(hidden_ND, policy, batch, config, routing, true.logprob_N)
                found[name].append([*shares, *errors, *row_cosines(ours.weight_VD, true.weight_VD)])
                routing.follow([(true.sums_S, batch.lengths)])
        rows += [{"when": when, "order": name} | mean_row(values) for name, values in found.items()]
    return rows


def mean_row(values: list[list[float]]) -> dict[str, Any]:
    share_hidden, share_weight, hidden, weight, *cosines = torch.tensor(values, dtype=torch.float64).mean(0).tolist()
    return {
        "share_hidden": share_hidden, "share_weight": share_weight, "error_hidden": hidden, "error_weight": weight,
        "cosines": cosines,
    }  # fmt: skip
