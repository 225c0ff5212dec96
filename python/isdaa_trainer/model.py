"""Policy and reference: a transformers causal LM as hidden states and an LM head, so that its logits are never formed.

Letters: N tokens of a packed row, D hidden size, V vocabulary.
"""

import copy
import dataclasses
import functools
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from isdaa_kernels import LMHead
from isdaa_trainer.config import Config

# Of the two checks at load, relative to the largest entry. An attention that mixes sequences or a logit scale that is
# overlooked is off by a good part of 1; float32 rounding, in either order of summation, by about 1e-6.
CHECK_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model with what the kernels need of it: packed hidden states [N, D] and the head that would make logits."""

    model: PreTrainedModel
    tokenizer: Any
    compute_dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    def autocast(self) -> AbstractContextManager:
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=enabled)

    def hidden_states(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Last hidden states [N, D] of a packed row; both arguments [1, N], positions restart at 0 in each sequence."""
        with self.autocast():
            output = self.model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return output.last_hidden_state[0]

    def head(self) -> LMHead:
        """The head as it is now: weight [V, D] and bias [V] are the model's own parameters, with gradient."""
        projection = self.model.get_output_embeddings()
        logit_scale, softcap = head_transforms(self.model.config)
        return LMHead(projection.weight, getattr(projection, "bias", None), logit_scale, softcap)

    def save(self, folder: str | Path) -> None:
        """Model and tokenizer as transformers' from_pretrained reads them."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a folder, hub name or .gguf file; ValueError if it has no end-of-text token."""
    folder, options = locate(path)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{path}: the tokenizer has no end-of-text token")
    return tokenizer


def load_policy(config: Config, tokenizer: Any, path: str | None = None) -> Policy:
    """Policy from `path` (default: config.model), in float32 and without dropout, checked against its own logits.

    Raises ValueError if no model is there, or if head or attention of the architecture are not what the kernels assume.
    """
    model = read_model(config.model if path is None else path, config.attention).to(config.device)
    model.eval()  # dropout would move the policy off the reference, and its weights off 1, before any step
    if config.freeze_head:
        model.get_output_embeddings().requires_grad_(False)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    check_head(model)
    check_packing(Policy(model, tokenizer, torch.float32))
    return Policy(model, tokenizer, getattr(torch, config.dtype))


def locate(path: str) -> tuple[str, dict[str, str]]:
    """(folder or hub name, further arguments) for transformers' from_pretrained."""
    local = Path(path).expanduser()
    if path.endswith(".gguf"):
        if not local.is_file():
            raise ValueError(f"model: no such file: {path}")
        return str(local.parent), {"gguf_file": local.name}
    if local.is_dir() or path.startswith((".", "/", "~")):
        if not (local / "config.json").is_file():
            raise ValueError(f"model: expected a folder with config.json, a hub name or a .gguf file, got {path}")
        return str(local), {}
    return path, {}


def read_model(path: str, attention: str) -> PreTrainedModel:
    """The model in float32. That of a GGUF file is copied: transformers refuses to save what it dequantised."""
    folder, options = locate(path)
    options = {**options, "dtype": torch.float32, "attn_implementation": attention}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    if "gguf_file" not in options:
        return model
    model_config = copy.deepcopy(model.config)
    del model_config.quantization_config
    fresh = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32, attn_implementation=attention)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    return fresh


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute the layers in the backward. Only they enter training mode: what is inside them has no dropout."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"gradient_checkpointing: {type(model).__name__} has no layers that transformers can recompute"
        )
    for layer in layers:
        layer.gradient_checkpointing, layer.training = True, True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


def head_transforms(config: transformers.PretrainedConfig) -> tuple[float, float | None]:
    """(logit_scale, softcap) as Cohere, Granite and Gemma 2 name them; `check_head` notices any other."""
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return scale / divisor, getattr(config, "final_logit_softcapping", None)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raises ValueError, naming the architecture, unless hidden states and LMHead give the model's own logits."""
    name = type(model).__name__
    projection = model.get_output_embeddings()
    if projection is None or getattr(projection, "weight", None) is None:
        raise ValueError(f"{name}: expected an LM head with a weight, found none")
    input_ids = check_tokens(model, 8)
    logits = model(input_ids=input_ids, use_cache=False).logits.float()
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    ours = projection(hidden).float()
    scale, softcap = head_transforms(model.config)
    ours = ours * scale
    ours = ours if softcap is None else softcap * torch.tanh(ours / softcap)
    if ours.shape != logits.shape or not relative_difference(ours, logits) < CHECK_TOLERANCE:
        raise ValueError(
            f"{name}: its logits are not those of last_hidden_state and LMHead(logit_scale={scale}, "
            f"softcap={softcap}); this architecture is not supported"
        )


@torch.no_grad()
def check_packing(policy: Policy) -> None:
    """Raises ValueError, naming the architecture, unless a packed row gives each sequence its own hidden states."""
    input_ids = check_tokens(policy.model, 16)
    parts = (input_ids[:, :9], input_ids[:, 9:])
    positions = [torch.arange(part.shape[1], device=policy.device)[None] for part in parts]
    apart = torch.cat([policy.hidden_states(part, position) for part, position in zip(parts, positions, strict=True)])
    packed = policy.hidden_states(input_ids, torch.cat(positions, dim=1))
    if not relative_difference(packed, apart) < CHECK_TOLERANCE:
        name, attention = type(policy.model).__name__, policy.model.config._attn_implementation
        raise ValueError(
            f"{name} with attention = {attention}: a packed sequence sees its neighbours (or dropout is active in its "
            "layers); this architecture is not supported"
        )


def check_tokens(model: PreTrainedModel, length: int) -> torch.Tensor:
    """[1, length] token ids, all different where the vocabulary allows."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    return (torch.arange(length, device=model.device)[None] * 7 + 5) % vocab_size


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest |a - b| over the largest |b|; NaN if either has one."""
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
