"""GRPO in a plain PyTorch loop: the model writes a group of answers to each prompt, a function rewards them, and the loss of tokens with
the exact KL to the reference comes from hidden states, without the logits.

    python examples/grpo_loop.py HuggingFaceTB/SmolLM2-135M-Instruct prompts.jsonl --reward my_rewards:brevity --lr 1e-5

Each line of prompts.jsonl is {"prompt": "..."}; the reward is a function (prompt, answer) -> float, here that of answers of 20 words.
"""

import argparse
import copy
import importlib
import json
from pathlib import Path

import torch
from plain_loop import pad, prompt_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

from isdaa_kernels import group_advantages, linear_logprob, linear_policy_loss, shift_targets
from isdaa_kernels.integrations.transformers import lm_head


def twenty_words(prompt, answer):
    return -abs(len(answer.split()) - 20) / 20


def train(model, tokenizer, prompts, reward=twenty_words, *, objective="grpo", group=8, prompts_per_step=2, updates=2, kl_weight=0.02,
          max_new_tokens=64, lr=1e-5, steps=None):  # fmt: skip
    """Trains `model` in place; the mean reward of each step. updates: optimizer steps on the answers of one step."""
    model.eval()  # no dropout: the log-probs of an update are compared with those of the policy that wrote the answers
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    means = []
    for start in range(0, len(prompts), prompts_per_step)[:steps]:
        batch, rewards = write(
            model, tokenizer, prompts[start : start + prompts_per_step], group, max_new_tokens, reward
        )
        advantages = group_advantages(rewards, group)
        targets = shift_targets(batch.pop("labels"))  # [S, T]
        cu_seqlens = torch.arange(len(targets) + 1, device=model.device) * targets.shape[1]
        with torch.no_grad():
            reference_hidden = reference.base_model(**batch).last_hidden_state.flatten(0, 1)
        old_logprob = None
        for _ in range(updates):
            hidden, head = model.base_model(**batch).last_hidden_state.flatten(0, 1), lm_head(model)
            if old_logprob is None:
                transforms = {"bias": head.bias, "logit_scale": head.logit_scale, "softcap": head.softcap}
                old_logprob = linear_logprob(
                    hidden.detach(), head.weight.detach(), targets.flatten(), **transforms
                ).detach()
            loss, metrics = linear_policy_loss(
                hidden,
                head,
                targets.flatten(),
                cu_seqlens,
                advantages=advantages,
                old_logprob=old_logprob,
                reference=(reference_hidden, lm_head(reference)),
                kl_weight=kl_weight,
                kl_direction="reverse",
                objective=objective,
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        means.append(rewards.mean().item())
        print(f"{len(means)}: reward {means[-1]:.3f}, sqrt KL {metrics['kl/sqrt']:.3f}", flush=True)
    return means


@torch.no_grad()
def write(model, tokenizer, prompts, group, max_new_tokens, reward):
    """(input_ids, attention_mask and labels [S, T] of `group` answers to each prompt, their rewards [S]); labels are -100 on prompts and
    padding, which cost no matrix work."""
    rows, rewards = [], []
    for prompt in prompts:
        ids = prompt_ids(tokenizer, prompt)
        prompts_GT = torch.tensor([ids] * group, device=model.device)
        written = model.generate(
            prompts_GT,
            attention_mask=torch.ones_like(prompts_GT),
            do_sample=True,
            top_k=0,  # answers of the policy itself, of which log-probs are taken
            top_p=1.0,
            temperature=1.0,
            repetition_penalty=1.0,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
        )
        for answer in written[:, len(ids) :].tolist():
            if tokenizer.eos_token_id in answer:
                answer = answer[: answer.index(tokenizer.eos_token_id) + 1]
            rows.append((ids, answer))
            rewards.append(float(reward(prompt, tokenizer.decode(answer, skip_special_tokens=True))))
    return pad(rows, model.device), torch.tensor(rewards, dtype=torch.float64, device=model.device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("prompts", type=Path, help="JSON lines")
    parser.add_argument("--reward", default="__main__:twenty_words", help="module:function")
    parser.add_argument("--objective", default="grpo")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompts-per-step", type=int, default=2)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--kl-weight", type=float, default=0.02)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--steps", type=int)
    options = vars(parser.parse_args())
    name, path = options.pop("model"), options.pop("prompts")
    module, function = options.pop("reward").split(":")
    prompts = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    train(
        model,
        AutoTokenizer.from_pretrained(name),
        prompts,
        getattr(importlib.import_module(module), function),
        **options,
    )
