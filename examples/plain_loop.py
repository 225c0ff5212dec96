"""Preference training in a plain PyTorch loop, without the logits.

    python examples/plain_loop.py HuggingFaceTB/SmolLM2-135M-Instruct pairs.jsonl --objective is_dpo --beta 0.05 --lr 1e-6

Each line of pairs.jsonl is {"prompt": "...", "chosen": "...", "rejected": "..."}.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from isdaa_kernels import linear_preference_loss, shift_targets
from isdaa_kernels.integrations.transformers import lm_head


def train(model, tokenizer, pairs, *, objective="is_dpo", beta=None, lr=1e-6, pairs_per_step=4, steps=None):
    """Trains `model` in place; the loss of each step. beta: None is the objective's own, and all that one without it takes."""
    model.eval()  # no dropout: policy and reference must agree before the first step
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for start in range(0, len(pairs), pairs_per_step)[:steps]:
        batch = make_batch(tokenizer, pairs[start : start + pairs_per_step], model.device)
        targets = shift_targets(batch.pop("labels"))  # [2P, T]: chosen rows, then the rejected ones
        cu_seqlens = torch.arange(len(targets) + 1, device=model.device) * targets.shape[1]
        hidden = model.base_model(**batch).last_hidden_state
        with torch.no_grad():
            reference_hidden = reference.base_model(**batch).last_hidden_state
        loss, metrics = linear_preference_loss(
            hidden.flatten(0, 1),
            lm_head(model),
            targets.flatten(),
            cu_seqlens,
            reference=(reference_hidden.flatten(0, 1), lm_head(reference)),
            objective=objective,
            beta=beta,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"{len(losses)}: loss {losses[-1]:.4f}, accuracy {metrics['accuracy/frac']:.2f}", flush=True)
    return losses


def make_batch(tokenizer, pairs, device):
    """input_ids, attention_mask and labels [2P, T]; labels are -100 on prompts and padding, which cost no matrix work."""
    rows = []
    for which in ("chosen", "rejected"):
        for pair in pairs:
            ids = prompt_ids(tokenizer, pair["prompt"])
            answer = tokenizer(pair[which] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
            rows.append((ids, answer))
    return pad(rows, device)


def prompt_ids(tokenizer, prompt):
    """Token ids of a prompt in the model's own chat template, where it has one."""
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(prompt, add_special_tokens=not tokenizer.chat_template)["input_ids"]


def pad(answered, device):
    """input_ids, attention_mask and labels [S, T] of token ids of (prompt, answer); labels are -100 on prompts and padding."""
    rows = [(ids + answer, [-100] * len(ids) + answer) for ids, answer in answered]
    T = max(len(ids) for ids, _ in rows)
    padded = [(ids + [0] * (T - len(ids)), labels + [-100] * (T - len(ids))) for ids, labels in rows]
    input_ids, labels = (torch.tensor(part, device=device) for part in zip(*padded, strict=True))
    lengths = torch.tensor([len(ids) for ids, _ in rows], device=device)
    mask = torch.arange(T, device=device) < lengths[:, None]
    return {"input_ids": input_ids, "attention_mask": mask.long(), "labels": labels}


def read_arguments(description, argv=None):
    """(model in fp32, tokenizer, pairs, options of `train`)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("pairs", type=Path, help="JSON lines")
    parser.add_argument("--objective", default="is_dpo")
    parser.add_argument("--beta", type=float, help="default: the objective's own")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--pairs-per-step", type=int, default=4)
    parser.add_argument("--steps", type=int)
    options = vars(parser.parse_args(argv))
    name, path = options.pop("model"), options.pop("pairs")
    pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(name), pairs, options


if __name__ == "__main__":
    model, tokenizer, pairs, options = read_arguments(__doc__)
    train(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, pairs, **options)
