"""The loop of plain_loop.py under Accelerate: any number of processes, mixed precision, gradient accumulation.

accelerate launch --mixed_precision bf16 examples/accelerate_loop.py MODEL pairs.jsonl --objective is_dpo --lr 1e-6
"""

import copy

import torch
from accelerate import Accelerator
from plain_loop import make_batch, read_arguments
from torch import nn
from torch.utils.data import DataLoader

from isdaa_kernels import linear_logprob, linear_preference_loss, shift_targets
from isdaa_kernels.integrations.transformers import lm_head


class PairLoss(nn.Module):
    """The model with its loss. What Accelerate wraps must compute both, or the gradients of the processes would not be averaged."""

    def __init__(self, model, objective, beta):
        super().__init__()
        self.model, self.options = model, {"objective": objective, "beta": beta}

    def forward(self, labels, reference_logprob, **batch):
        cu_seqlens = torch.arange(len(labels) + 1, device=labels.device) * labels.shape[1]
        return linear_preference_loss(
            self.model.base_model(**batch).last_hidden_state.flatten(0, 1),
            lm_head(self.model),
            shift_targets(labels).flatten(),
            cu_seqlens,
            reference_logprob=reference_logprob.reshape(1, -1),  # one a token
            **self.options,
        )


@torch.no_grad()
def token_logprob(model, labels, **batch):
    head = lm_head(model)
    transforms = {"bias": head.bias, "logit_scale": head.logit_scale, "softcap": head.softcap}
    hidden = model.base_model(**batch).last_hidden_state
    return linear_logprob(hidden, head.weight, shift_targets(labels), **transforms)


def train(
    model, tokenizer, pairs, *, objective="is_dpo", beta=None, lr=1e-6, pairs_per_step=4, steps=None, accelerator=None
):
    """Trains `model` in place, `pairs_per_step` pairs in each process; the loss of each step of this process."""
    accelerator = accelerator or Accelerator()
    model.eval()  # no dropout: policy and reference must agree before the first step
    reference = copy.deepcopy(model).requires_grad_(False).to(accelerator.device)
    loss_of = PairLoss(model, objective, beta)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    loader = DataLoader(pairs, pairs_per_step, collate_fn=lambda some: make_batch(tokenizer, some, "cpu"))
    loss_of, optimizer, loader = accelerator.prepare(loss_of, optimizer, loader)
    losses = []
    for batch in loader:
        if len(losses) == steps:
            break
        with accelerator.accumulate(loss_of):
            with accelerator.autocast():
                reference_logprob = token_logprob(reference, **batch)
            loss, metrics = loss_of(reference_logprob=reference_logprob, **batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(loss_of.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        accelerator.print(f"{len(losses)}: loss {losses[-1]:.4f}, accuracy {metrics['accuracy/frac']:.2f}", flush=True)
    return losses


if __name__ == "__main__":
    model, tokenizer, pairs, options = read_arguments(__doc__)
    train(model, tokenizer, pairs, **options)
