"""LLaMA-Factory's trainers on these kernels: `patch_llama_factory()`, or from the shell

    python -m isdaa_kernels.integrations.llama_factory config.yaml          in place of: llamafactory-cli train config.yaml

S rows of a batch (of pairs: the chosen first), T tokens of a row, D hidden size, V vocabulary.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor, nn

from isdaa_kernels import (
    LMHead,
    Routed,
    VocabOrder,
    linear_logprob,
    linear_logprob_stats,
    sequence_logprob,
    shift_targets,
)
from isdaa_kernels.integrations.liger import logit_sums
from isdaa_kernels.integrations.patching import Patch, check_kernel, check_version
from isdaa_kernels.integrations.transformers import HiddenCapture, ModelPatch, lm_head, patch_causal_lm

TESTED = ("0.9.5",)
IGNORED = -100  # LLaMA-Factory's, and transformers'
MEANS = ("ipo", "orpo", "simpo")  # losses of means over tokens; the others are of sums
OF_TEXT = ("input_ids", "attention_mask", "token_type_ids")
# Relative to the largest logit: a head transform that is overlooked is off by far more, rounding by less.
TOLERANCE, TOLERANCE_16_BIT = 1e-3, 3e-2


def patch_llama_factory(
    *,
    gradient: Literal["exact"] | Routed = "exact",
    vocab_order: VocabOrder | None = None,
    max_workspace_mb: float | None = None,
    backend: str | None = None,
    any_version: bool = False,
) -> Patch:
    """From here on LLaMA-Factory's stages dpo, kto, sft and pt make no logits while they train, until the `undo()` of what is returned,
    or the end of a `with patch_llama_factory():`.

    dpo and kto: policy and reference give their log-probs by `linear_logprob`, summed in fp64; everything made of these is
    LLaMA-Factory's own and so honours every setting (pref_loss, pref_beta, pref_ftx, pref_bco_weight, ld_alpha, simpo_gamma, ...).
    sft and pt: the loss of `patch_causal_lm`, in training and where an evaluation wants nothing but the loss; predictions and
    compute_accuracy are made of logits as before.

    gradient, vocab_order, max_workspace_mb, backend: as in `linear_logprob`, for every call. any_version: try it on a LLaMA-Factory
    that this was not tested with.

    Raises ImportError for such a version, ValueError where it is patched already and for settings that `linear_logprob` refuses. In
    training: ValueError, naming the option, for use_dft_loss, use_asft_loss, use_eaft_loss and label_smoothing_factor, whose losses are
    made of logits; for models of images or sound; for LM heads that are no plain Linear or do something of their own; for
    enable_liger_kernel or use_unsloth in sft and pt, whose forward has no LM head to take over. NotImplementedError for an LM head in
    shards (ZeRO-3, FSDP2).
    """
    check_version("llamafactory", TESTED, any_version)
    from llamafactory.train.dpo.trainer import CustomDPOTrainer
    from llamafactory.train.kto.trainer import CustomKTOTrainer
    from llamafactory.train.pt.trainer import CustomTrainer
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

    kernel = {
        "gradient": gradient,
        "vocab_order": vocab_order,
        "max_workspace_mb": max_workspace_mb,
        "backend": backend,
    }
    check_kernel(**kernel)
    scorer, losses = RowScorer(kernel), FusedLoss(kernel)
    return TrainersPatch(
        losses,
        (CustomDPOTrainer, "concatenated_forward", pair_forward(scorer)),
        (CustomKTOTrainer, "forward", row_forward(scorer)),
        *(
            (trainer, name, wrap(getattr(trainer, name)))
            for trainer in (CustomSeq2SeqTrainer, CustomTrainer)
            for name, wrap in (
                ("__init__", losses.init),
                ("compute_loss", losses.compute_loss),
                ("prediction_step", losses.prediction_step),
            )
        ),
    )


def pair_forward(scorer: "RowScorer") -> Callable[..., dict[str, Tensor]]:
    """CustomDPOTrainer.concatenated_forward. Its logits are means of the rows, all that is asked of them is a mean."""

    def concatenated_forward(self, model: nn.Module, batch: dict[str, Tensor], is_ref_model: bool = False):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        rows = scorer(self, model, inputs, batch["labels"], None if is_ref_model else self.ld_alpha)
        logps_S = rows.logps_S / rows.length_S if self.loss_type in MEANS else rows.logps_S
        chosen, rejected = logps_S.chunk(2)
        chosen_logits, rejected_logits = rows.logit_mean_S.chunk(2)
        return {
            "chosen_logps": chosen,
            "rejected_logps": rejected,
            "chosen_logits": chosen_logits,
            "rejected_logits": rejected_logits,
            "chosen_logps_avg": chosen if self.loss_type in MEANS else chosen / rows.length_S.chunk(2)[0],
        }

    return concatenated_forward


def row_forward(scorer: "RowScorer") -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """CustomKTOTrainer.forward. Its logits are sums of the rows, all that is asked of them is a sum."""

    def forward(self, model: nn.Module, batch: dict[str, Tensor], prefix: str = ""):
        inputs = {name: batch[prefix + name] for name in OF_TEXT if prefix + name in batch}
        rows = scorer(self, model, inputs, batch[f"{prefix}labels"], None)
        return rows.logit_mean_S * rows.logits_of_a_row, rows.logps_S, rows.logps_S / rows.length_S

    return forward


class Rows(NamedTuple):
    """Of each row: its log-prob, fp64 with gradient, how many tokens were scored, and the mean of all its logits."""

    logps_S: Tensor
    length_S: Tensor
    logit_mean_S: Tensor
    logits_of_a_row: int


class RowScorer:
    """Rows of a batch under a model, without their logits. `kernel` goes to `linear_logprob`."""

    def __init__(self, kernel: dict[str, object]) -> None:
        self.kernel = kernel
        self.checked: WeakSet[nn.Module] = WeakSet()

    def __call__(
        self, trainer: Any, model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, ld_alpha: float | None
    ) -> Rows:
        base = text_model(trainer, model)
        linear = plain_head(base)
        capture = HiddenCapture(linear)
        with Patch((linear, "forward", capture)):
            output, taken = capture.during(model, **inputs, return_dict=True, use_cache=False)
        if len(taken) != 1:
            raise ValueError(f"{type(base).__name__}: expected one call of its LM head, counted {len(taken)}")
        head = lm_head(base)
        hidden_STD = taken[0].to(head.weight.device)
        if base not in self.checked:
            with trainer.accelerator.autocast():
                check_logits(base, hidden_STD, head, output.logits)
            self.checked.add(base)
        target_ST = shift_targets(labels).to(hidden_STD.device)
        transforms = {"bias": head.bias, "logit_scale": head.logit_scale, "softcap": head.softcap}
        with trainer.accelerator.autocast():
            logprob_ST = linear_logprob(hidden_STD, head.weight, target_ST, **transforms, **self.kernel)
        scored_ST = target_ST != IGNORED
        weight_ST = None if ld_alpha is None else tail_weight(scored_ST, ld_alpha)
        logps_S = sequence_logprob(logprob_ST, mask=scored_ST, token_weight=weight_ST)
        logits_of_a_row = labels.shape[1] * head.weight.shape[0]
        return Rows(logps_S, scored_ST.sum(-1), self._logit_means(hidden_STD, head), logits_of_a_row)

    @torch.no_grad()
    def _logit_means(self, hidden_STD: Tensor, head: LMHead) -> Tensor:
        """Mean of all logits of each row, ignored tokens included, fp64 [S]. Sums of hidden states and of the head give it; a softcap
        takes a forward of the head."""
        if head.softcap is None:
            return head.logit_scale * logit_sums(hidden_STD, head) / (hidden_STD.shape[1] * head.weight.shape[0])
        zeros_ST = torch.zeros(hidden_STD.shape[:-1], dtype=torch.int64, device=hidden_STD.device)
        options = {name: self.kernel.get(name) for name in ("max_workspace_mb", "backend")}
        options |= {"bias": head.bias, "logit_scale": head.logit_scale, "softcap": head.softcap}
        _, stats = linear_logprob_stats(hidden_STD, head.weight, zeros_ST, stats=("mean_logit",), **options)
        return stats.mean_logit.mean(-1, dtype=torch.float64)


class FusedLoss:
    """The loss of stages sft and pt from hidden states, for every trainer made meanwhile."""

    def __init__(self, kernel: dict[str, object]) -> None:
        self.kernel = kernel
        self.patches: WeakValueDictionary[int, ModelPatch] = WeakValueDictionary()  # by the id of the model

    def init(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def init(trainer, *args, **kwargs):
            original(trainer, *args, **kwargs)
            if trainer.args.do_train:
                check_options(trainer)
                self.patch(text_model(trainer, trainer.model))  # before Accelerate wraps its forward

        return init

    def compute_loss(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def compute_loss(trainer, model, *args, **kwargs):
            if model.training and id(inner_model(trainer, model)) not in self.patches:
                raise ValueError("patch_llama_factory: expected before this trainer was made, not after")
            return original(trainer, model, *args, **kwargs)

        return compute_loss

    def prediction_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """With logits, where more than the loss is wanted."""

        @functools.wraps(original)
        def prediction_step(trainer, model, inputs, prediction_loss_only, *args, **kwargs):
            patch = self.patches.get(id(inner_model(trainer, model)))
            with nullcontext() if patch is None or prediction_loss_only else patch.fused.off():
                return original(trainer, model, inputs, prediction_loss_only, *args, **kwargs)

        return prediction_step

    def patch(self, model: nn.Module) -> None:
        if id(model) not in self.patches:  # else that of an earlier trainer serves this one
            # transformers is of the version that LLaMA-Factory asks for; the check of head and loss is what tells
            self.patches[id(model)] = patch_causal_lm(model, **self.kernel, any_version=True)

    def undo(self) -> None:
        for patch in list(self.patches.values()):
            patch.undo()
        self.patches.clear()


class TrainersPatch(Patch):
    """Puts back the trainers, and the models of those that were made meanwhile and still live."""

    def __init__(self, losses: FusedLoss, *replacements: tuple[object, str, object]) -> None:
        super().__init__(*replacements)
        self.losses = losses

    def undo(self) -> None:
        super().undo()
        self.losses.undo()


def check_options(trainer: Any) -> None:
    for name in ("use_dft_loss", "use_asft_loss", "use_eaft_loss"):
        if getattr(trainer.finetuning_args, name):
            raise ValueError(f"{name}: its loss is made of logits; expected False with patch_llama_factory")
    smoothing = trainer.args.label_smoothing_factor
    if smoothing:
        raise ValueError(
            f"label_smoothing_factor: its loss is made of logits; expected 0 with patch_llama_factory, got {smoothing}"
        )


def inner_model(trainer: Any, model: nn.Module) -> nn.Module:
    """The model inside of DDP, PEFT and so on."""
    model = trainer.accelerator.unwrap_model(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_model(trainer: Any, model: nn.Module) -> nn.Module:
    """The same; ValueError for one of more than text."""
    base = inner_model(trainer, model)
    config = base.config
    if config.is_encoder_decoder or config.get_text_config() is not config:
        raise ValueError(f"{type(base).__name__}: expected a causal LM of text alone with patch_llama_factory")
    return base


def plain_head(model: nn.Module) -> nn.Linear:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ValueError(
            f"{type(model).__name__}: expected an LM head that is a plain Linear, found "
            f"{type(head).__module__}.{type(head).__name__}"
        )
    return head


@torch.no_grad()
def check_logits(model: nn.Module, hidden_STD: Tensor, head: LMHead, logits_SV: Tensor) -> None:
    """ValueError unless the logits that the model made of the last position are those of its head."""
    product = nn.functional.linear(hidden_STD[:, -1:], head.weight, head.bias)
    ours, theirs = product.float() * head.logit_scale, logits_SV.to(product.device).float()
    ours = ours if head.softcap is None else head.softcap * torch.tanh(ours / head.softcap)
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not error < (TOLERANCE_16_BIT if product.dtype.itemsize == 2 else TOLERANCE):
        raise ValueError(
            f"{type(model).__name__}: its logits are not those of its LM head (off by {error:.1e}); it is not supported"
        )


def tail_weight(scored_ST: Tensor, ld_alpha: float) -> Tensor:
    """LD-DPO's, [S, T]: 1 for as many tokens as the shorter completion of the pair has, ld_alpha for those after."""
    shared_P = scored_ST.sum(-1).view(2, -1).amin(0)
    end_S = scored_ST.int().argmax(-1) + shared_P.repeat(2)
    position_T = torch.arange(scored_ST.shape[1], device=scored_ST.device)
    return torch.where(position_T < end_S[:, None], 1.0, float(ld_alpha))


def main() -> None:
    """`llamafactory-cli train` in this process, patched; the arguments are its own."""
    from llamafactory.train.tuner import run_exp

    with patch_llama_factory():
        run_exp()


if __name__ == "__main__":
    main()
