"""What a run with `gradient = routed` carries from step to step beside the model: an order of the vocabulary and a scale.

Letters: N tokens of a packed micro-batch, D hidden size, V vocabulary, S sequences of a micro-batch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from isdaa_kernels import VocabOrder, linear_logprob, make_vocab_order
from isdaa_trainer.config import Config
from isdaa_trainer.data import IGNORED, Pair, micro_batches
from isdaa_trainer.model import Policy

ORDER_FILE = "vocab_order.pt"
SAMPLE_TOKENS = 512  # scored tokens whose hidden states an order is made from: a few hundred are enough


class Routing:
    """How the head's gradient is computed in the steps to come; in a run with exact gradients it stays empty.

    order  rows of the vocabulary whose logits move together share a block; None: as they stand in the head.
    scale  the size that routed_tolerance is a share of: mean |coefficient| of the scored tokens of the step before,
           None until a step has had one. Not the mean of a micro-batch: it would depend on how the step is cut, and
           spend full work on a micro-batch of dead pairs. Not that of the step itself, known only after all of its
           forwards. Not a bound such as beta / pairs: weights far below 1 and saturated pairs leave it behind, so that
           gradients would grow coarser as training goes on. Where two steps differ much, the second is routed
           more finely or coarsely than asked, by their ratio.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.order: VocabOrder | None = None
        self.scale: float | None = None

    def kernel_settings(self) -> dict[str, Any]:
        """Keyword arguments of `linear_logprob`, the same for all micro-batches of a step."""
        routed = self.config.routed(self.scale)
        return {} if routed is None else {"gradient": routed, "vocab_order": self.order}

    def due(self, step: int) -> bool:
        """Whether an order is to be made when `step` steps are done: before the first, and at each multiple."""
        every = self.config.vocab_order_every
        return self.config.gradient == "routed" and every > 0 and step % every == 0

    @torch.no_grad()
    def make_order(self, policy: Policy, pairs: Sequence[Pair]) -> None:
        """The order for `policy` as it is now, from the first of `pairs`: the same pairs and policy give the same."""
        hidden = []
        for batch in micro_batches(sample(pairs), self.config.max_tokens_per_micro_batch):
            batch = batch.to(policy.device)
            hidden_ND = policy.hidden_states(batch.input_ids, batch.position_ids)
            hidden.append(hidden_ND[batch.targets != IGNORED])
        self.order = make_vocab_order(policy.head().weight, torch.cat(hidden), self.config.routed().block)

    def follow(self, gradients: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Takes the scale of the next step from the one just done: for each of its micro-batches the gradient of the
        sequences' log-probs [S], which is that of each of their tokens, and the scored tokens [S].

        Where all are 0 the scale stays. In float32, as the kernels see them: what is 0 there does not count."""
        if self.config.gradient == "exact":
            return
        size_S, length_S = (torch.cat(parts) for parts in zip(*gradients, strict=True))
        size_S = size_S.float().abs().double()
        total, count = torch.stack([(size_S * length_S).sum(), ((size_S > 0) * length_S).sum().double()]).tolist()
        if count > 0:
            self.scale = total / count

    def save(self, folder: Path) -> None:
        """The order; the scale is a number of trainer.pt."""
        if self.order is not None:
            self.order.save(folder / ORDER_FILE)

    def load(self, folder: Path, scale: float | None, device: torch.device) -> None:
        """What `save` wrote, and the scale."""
        self.scale = scale
        if self.config.gradient == "routed" and self.config.vocab_order_every > 0:
            self.order = VocabOrder.load(folder / ORDER_FILE).to(device)


def sample(pairs: Sequence[Pair]) -> Sequence[Pair]:
    """The first pairs with SAMPLE_TOKENS scored tokens between them, or all."""
    scored = 0
    for index, pair in enumerate(pairs):
        if scored >= SAMPLE_TOKENS:
            return pairs[:index]
        scored += len(pair.chosen) + len(pair.rejected)
    return pairs


def check_routing(policy: Policy, config: Config) -> None:
    """ValueError or NoBackend, before any log-prob is made, where the head or the backend has no routed gradient."""
    head = policy.head()
    hidden_ND = head.weight.new_zeros(1, head.weight.shape[1], requires_grad=True)
    transforms = {"bias": head.bias, "logit_scale": head.logit_scale, "softcap": head.softcap}
    with policy.autocast():
        linear_logprob(
            hidden_ND,
            head.weight,
            torch.zeros(1, dtype=torch.int64, device=policy.device),
            **transforms,
            **Routing(config).kernel_settings(),
            **config.kernel_settings(),
        )
