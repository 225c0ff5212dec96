"""`model(..., labels=...)` of a transformers causal LM without the logits: `patch_causal_lm(model)`.

B rows of T tokens, D hidden size, V vocabulary.
"""

import contextlib
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from isdaa_kernels import LMHead, Routed, VocabOrder, linear_logprob, shift_targets
from isdaa_kernels.integrations.patching import Patch, check_kernel, check_version

TESTED = ("5.23.0",)
LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels", "ignore_index")
# What a caller may mean for the loss, and transformers' own would drop without a word.
NO_OPTIONS = ("label_smoothing", "label_smoothing_factor", "class_weight", "weight", "reduction", "z_loss")
ROUTER_FACTORS = ("router_aux_loss_coef", "aux_loss_coef")  # what a model multiplies the loss of its routers by
# Of the check at patch time, relative to the largest logit and to the loss. A head transform or a term of the loss that is
# overlooked is off by a good part of 1, rounding by about 1e-6; logits of 16 bits by 1e-2.
TOLERANCE, TOLERANCE_16_BIT = 1e-3, 3e-2


def patch_causal_lm(
    model: nn.Module,
    *,
    gradient: Literal["exact"] | Routed = "exact",
    vocab_order: VocabOrder | None = None,
    max_workspace_mb: float | None = None,
    backend: str | None = None,
    check: bool = True,
    any_version: bool = False,
) -> "ModelPatch":
    """Makes `model(..., labels=...)` compute the loss from the hidden states. Equal to transformers' own

        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="mean")

    (num_items_in_batch, shift_labels and ignore_index as there), but the [B, T, V] logits are never allocated,
    targets of -100 cost no matrix work, and logits are not rounded to 16 bits. The model's own forward runs, with an
    LM head that sees the last position only, so everything else in the output is what it was; `logits` is an object
    that raises when it is used. Calls without labels, and so generation, go the original way. For this one model;
    `undo()` of the returned patch, or a `with` block, puts its forward back. A deep copy of the model is patched too,
    and has no patch of its own to undo: copy before, or after the undo, for one that is not.

    model             a transformers causal LM, or a PEFT model around one. Its parameters train as before, adapters included.
    gradient, vocab_order, max_workspace_mb, backend    as in `isdaa_kernels.linear_logprob`
    check             compare logits and loss of a few tokens with the model's own now, three to five short forwards; without it an
                      architecture that adds to its loss or changes its logits in a way of its own goes unnoticed
    any_version       try a transformers other than the tested one

    Patch before the model is wrapped (torch.compile, DDP, Accelerate), and again after its head was replaced (a call
    raises then). Raises ValueError, naming the architecture, where head or loss are not what is computed here: an LM
    head that is no plain Linear (adapters or quantisation on it), another loss than the causal one, models of images
    or sound, a check that fails; for a model that is patched already; for settings that `linear_logprob` refuses.
    Losses of routers of a mixture of experts are added as the model adds them.
    """
    check_version("transformers", TESTED, any_version)
    kernel = {
        "gradient": gradient,
        "vocab_order": vocab_order,
        "max_workspace_mb": max_workspace_mb,
        "backend": backend,
    }
    check_kernel(**kernel)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = _plain_head(model)
    _check_forward(model)
    capture = HiddenCapture(head)
    patch = ModelPatch(FusedForward(model, capture, kernel))
    if check:
        try:
            _check(model, patch.fused)
        except BaseException:
            patch.undo()
            raise
    return patch


class HiddenCapture:
    """The forward of an LM head that, during a call of `during` in the same thread, keeps what it is given and makes
    the logits of the last position only."""

    def __init__(self, head: nn.Linear) -> None:
        functools.update_wrapper(self, head.forward, updated=())
        self.head, self.original, self.call = head, head.forward, _Call()

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.call.taken is not None:
            self.call.taken.append(hidden)
            hidden = hidden[..., -1:, :]
        return self.original(hidden)

    def during(self, call: Callable[..., Any], **arguments: object) -> tuple[Any, list[Tensor]]:
        """(the result of the call, the hidden states that the head was given in it)."""
        self.call.taken = taken = []
        try:
            return call(**arguments), taken
        finally:
            self.call.taken = None


class _Call(threading.local):
    """What the call that runs in a thread has kept; a copy is one of no call."""

    taken: list[Tensor] | None = None

    def __reduce__(self) -> tuple[type, tuple]:
        return _Call, ()


class FusedForward:
    """A model's forward with the loss from hidden states; the model's own while it is not `on`. It holds its model, so
    that a deep copy of the model runs the copy."""

    def __init__(self, model: PreTrainedModel, capture: HiddenCapture, kernel: dict[str, object]) -> None:
        functools.update_wrapper(self, model.forward, updated=())  # trainers read its signature
        self.model, self.capture, self.kernel, self.original = model, capture, kernel, model.forward
        self.signature, self.on = inspect.signature(model.forward), True

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """The model's own forward within the block."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def __call__(self, *args: object, **kwargs: Any) -> Any:
        arguments = self._by_name(args, kwargs)
        labels = arguments.pop("labels", None)
        if labels is None or not self.on:
            return self.original(*args, **kwargs)
        self._check_call(arguments)
        return_dict = arguments.pop("return_dict", None)
        output, taken = self.capture.during(self.original, **arguments, return_dict=True)
        if len(taken) != 1:
            raise ValueError(f"{type(self.model).__name__}: expected one call of its LM head, counted {len(taken)}")
        loss = self._loss(taken[0], labels, output, **{name: arguments.get(name) for name in LOSS_ARGUMENTS})
        output = dataclasses.replace(output, loss=loss, logits=AbsentLogits())
        if return_dict is None:
            return_dict = self.model.config.return_dict
        return output if return_dict else output.to_tuple()

    def _by_name(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        if not args:
            return dict(kwargs)
        names = [name for name, p in self.signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def _check_call(self, arguments: dict[str, Any]) -> None:
        for name in NO_OPTIONS:
            if arguments.get(name) is not None:
                raise ValueError(f"{name}: transformers' causal loss has no such option; expected none")
        if not isinstance(keep := arguments.get("logits_to_keep", 0), int) or keep != 0:
            raise ValueError(f"logits_to_keep: expected 0 with labels, got {keep!r}")
        if _plain_head(self.model) is not self.capture.head:
            raise ValueError("model: its LM head is another than when it was patched; undo that and patch it again")

    def _loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        output: Any,
        num_items_in_batch: Tensor | int | None,
        shift_labels: Tensor | None,
        ignore_index: int | None,
    ) -> Tensor:
        ignore_index = -100 if ignore_index is None else ignore_index
        head = lm_head(self.model)
        hidden = hidden.to(head.weight.device)  # as Accelerate moves it to the head
        targets = shift_targets(labels, ignore_index=ignore_index) if shift_labels is None else shift_labels
        targets = targets.to(hidden.device).reshape(hidden.shape[:-1])
        transforms = {"bias": head.bias, "logit_scale": head.logit_scale, "softcap": head.softcap}
        logprob = linear_logprob(hidden, head.weight, targets, ignore_index=ignore_index, **transforms, **self.kernel)
        count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        count = count.to(hidden.device) if isinstance(count, Tensor) else count
        loss = (-logprob.sum(dtype=torch.float64) / count).float()
        router_loss = getattr(output, "aux_loss", None)
        if router_loss is None:
            return loss
        factors = [getattr(self.model, name) for name in ROUTER_FACTORS if hasattr(self.model, name)]
        if len(factors) != 1:
            raise ValueError(
                f"{type(self.model).__name__}: expected one of {', '.join(ROUTER_FACTORS)} for its router loss"
            )
        return loss + factors[0] * router_loss.to(loss.device)


class ModelPatch(Patch):
    """The forwards of a model and of its LM head. What was put around ours meanwhile, as Accelerate does for mixed
    precision, stays when this is undone, and runs the model's own then."""

    def __init__(self, fused: FusedForward) -> None:
        self.fused = fused
        fused.patch = self  # which lives as long as the model
        super().__init__((fused.model, "forward", fused), (fused.capture.head, "forward", fused.capture))

    def undo(self) -> None:
        self.fused.on = False
        self._put_back()


class LogitsNotMade(AttributeError):
    """Something wants the logits of a call with labels. An AttributeError, so that `hasattr` says no."""


class AbsentLogits:
    """Stands where the logits would be; any use raises `LogitsNotMade`."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise LogitsNotMade(
            "logits: patch_causal_lm computes the loss of a call with labels without them; call the model without labels, "
            "or undo the patch"
        )

    __getattr__ = __getitem__ = __setitem__ = __iter__ = __len__ = __contains__ = __array__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __float__ = __int__ = __neg__ = __abs__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __matmul__ = __rmatmul__ = _refuse
    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, *_: object, **__: object) -> NoReturn:
        cls()._refuse()


def _check_forward(model: PreTrainedModel) -> None:
    """ValueError for a model whose forward is not its own: patched already, as a copy of a patched one is, or replaced
    by another library."""
    forward = vars(model).get("forward")
    if forward is None:
        return
    ours = inspect.unwrap(forward, stop=lambda found: isinstance(found, FusedForward))
    if isinstance(ours, FusedForward) and ours.on:
        raise ValueError(f"{type(model).__name__}.forward: patched already; undo that first")
    if not hasattr(model, "_hf_hook"):
        raise ValueError(f"{type(model).__name__}: its forward was replaced by another library; patch it before that")


def _plain_head(model: nn.Module) -> nn.Linear:
    """The LM head of a causal LM with transformers' plain loss; ValueError for another model, head or loss."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: expected a transformers causal LM, not yet wrapped, got {name}")
    config = model.config
    if config.is_encoder_decoder or config.get_text_config() is not config:
        raise ValueError(f"{name}: expected a causal LM of text alone")
    if model.loss_function is not ForCausalLMLoss:
        raise ValueError(f"{name}: expected transformers' ForCausalLMLoss, found {model.loss_function}")
    return _linear_head(model)


def _linear_head(model: nn.Module) -> nn.Linear:
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if hasattr(weight, "full_tensor") or getattr(weight, "ndim", 2) != 2:
        raise NotImplementedError(f"{type(model).__name__}: an LM head in shards is not supported")
    if type(head) is not nn.Linear:
        found = f"{type(head).__module__}.{type(head).__name__}"
        raise ValueError(f"{type(model).__name__}: expected an LM head that is a plain Linear, found {found}")
    return head


def lm_head(model: PreTrainedModel) -> LMHead:
    """The head of a causal LM: its own parameters, and what its configuration says is done to the logits.

    Cohere has logit_scale, Falcon-H1 lm_head_multiplier, Granite logits_scaling (it divides, HyperCLOVA X multiplies), Gemma
    final_logit_softcapping. An architecture that does something else goes unnoticed here; `patch_causal_lm` checks. Raises
    NotImplementedError for a head in shards, ValueError for one that is no plain Linear and for a scale that is no number.
    """
    head, config = _linear_head(model), model.config
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "logits_scaling"):
        factor = getattr(config, name, None)
        if isinstance(factor, str):
            raise ValueError(f"{type(model).__name__}: {name}: expected a number, got {factor!r}")
        divides = name == "logits_scaling" and config.model_type != "hyperclovax"
        scale *= 1.0 if factor is None else 1 / factor if divides else factor
    return LMHead(head.weight, head.bias, scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def _check(model: PreTrainedModel, fused: FusedForward) -> None:
    """ValueError unless logits of the last position and loss are the model's own, on a few tokens and without
    dropout."""
    training = [module.training for module in model.modules()]
    model.eval()
    try:
        name, V = type(model).__name__, model.get_input_embeddings().weight.shape[0]
        ids = ((torch.arange(18, device=model.device) * 7 + 5) % V).view(2, 9)
        labels = torch.where(
            torch.arange(9, device=ids.device) < torch.tensor([[4], [2]], device=ids.device), -100, ids
        )
        head = lm_head(model)
        output, taken = fused.capture.during(fused.original, input_ids=ids, return_dict=True)
        logits = nn.functional.linear(taken[0][:, -1:], head.weight, head.bias).float() * head.logit_scale
        logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
        _compare(f"{name}: its logits are not those of its LM head", logits, output.logits, head.weight.dtype)
        _compare_losses(model, fused, ids, labels)
        if hasattr(model.config, "output_router_logits"):
            with contextlib.suppress(_OwnForwardFails):
                _compare_losses(model, fused, ids, labels, output_router_logits=True)
    finally:
        for module, was in zip(model.modules(), training, strict=True):
            module.training = was


class _OwnForwardFails(Exception):
    """The model cannot do what it was asked; then no patched one is asked."""


def _compare_losses(model: PreTrainedModel, fused: FusedForward, ids: Tensor, labels: Tensor, **more: bool) -> None:
    arguments = {"input_ids": ids, "labels": labels, "return_dict": True, **more}
    try:
        own = fused.original(**arguments).loss
    except Exception as error:
        if more:
            raise _OwnForwardFails from error
        raise
    name, dtype = type(model).__name__, model.get_output_embeddings().weight.dtype
    _compare(f"{name}: its loss is not the mean over the targets", fused(**arguments).loss, own, dtype)


def _compare(message: str, ours: Tensor, own: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE_16_BIT if dtype.itemsize == 2 else TOLERANCE
    error = ((ours.float() - own.float()).abs().max() / own.float().abs().max()).item()
    if ours.shape != own.shape or not error < tolerance:
        raise ValueError(f"{message} (off by {error:.1e}); this architecture is not supported")
