"""Preference records -> tokenised pairs -> packed micro-batches.

Letters: N tokens of a micro-batch, P its pairs, S = 2P its sequences (chosen 0..P-1, rejected P..2P-1).
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from isdaa_kernels import shift_targets
from isdaa_trainer.config import Config
from isdaa_trainer.records import Example, read_examples

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Pair:
    """One preference as token ids; both completions follow the same prompt and end with the end-of-turn token."""

    source: str  # where it came from: "pairs.jsonl line 37"
    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    behaviour: tuple[float, float] | None = None  # log-probs of (chosen, rejected) under the policy that wrote them

    @property
    def num_tokens(self) -> int:
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """P pairs packed into one row: what one forward and backward take."""

    pairs: tuple[Pair, ...]
    input_ids: torch.Tensor  # [1, N] int64
    position_ids: torch.Tensor  # [1, N] int64, from 0 in each sequence: transformers separates the sequences by it
    targets: torch.Tensor  # [N] int64, already shifted; IGNORED on prompts and on each sequence's last token
    cu_seqlens: torch.Tensor  # [S + 1] int32, where each sequence begins
    reference: torch.Tensor  # [S] float64 log-probs under the reference policy; NaN where not known yet
    behaviour: torch.Tensor | None  # [S] float64 log-probs under the behaviour policy
    lengths: torch.Tensor  # [S] int64, the scored tokens of each sequence
    num_scored: int  # tokens with a target

    def to(self, device: torch.device) -> "MicroBatch":
        """The same batch with its tensors on `device`."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **{name: value.to(device) for name, value in tensors.items()})


@dataclasses.dataclass(frozen=True)
class PreferenceData:
    """The pairs to train on and those held out, with a sentence for each thing that was changed while reading."""

    train: list[Pair]
    heldout: list[Pair]
    notes: list[str]

    def fingerprint(self) -> str:
        """Digest of every token id and behaviour log-prob, to notice data that changed before a run is resumed."""
        return hashlib.sha256(
            repr([dataclasses.astuple(pair)[1:] for pair in self.train + self.heldout]).encode()
        ).hexdigest()


def load_data(config: Config, tokenizer: Any) -> PreferenceData:
    """Reads, tokenises and splits the data of `config`; ValueError names file and line of a record that is no use."""
    train, heldout = split_examples(read_examples(config.train_data), config)
    if config.eval_data is not None:
        heldout = read_examples(config.eval_data)
    notes: list[str] = []
    if any(example.behaviour for example in train + heldout) and config.importance_weight() is None:
        notes.append(f"chosen_logprob and rejected_logprob play no part: {config.objective} is not importance weighted")
    data = PreferenceData(
        tokenize_all(train, tokenizer, config, notes), tokenize_all(heldout, tokenizer, config, notes), notes
    )
    if not data.train:
        raise ValueError(f"train_data: no pairs to train on in {config.train_data}")
    return data


def split_examples(examples: list[Example], config: Config) -> tuple[list[Example], list[Example]]:
    """(train, held out): by the column `split` where the file has it, else by `eval_fraction`."""
    if any(example.split for example in examples):
        if config.eval_data is not None or config.eval_fraction > 0:
            raise ValueError(
                f"{config.train_data} has a column split; expected neither eval_data nor eval_fraction beside it"
            )
        return [e for e in examples if e.split == "train"], [e for e in examples if e.split == "heldout"]
    num_heldout = round(config.eval_fraction * len(examples))
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(config.seed)).tolist()
    heldout = set(order[:num_heldout])
    return (
        [example for i, example in enumerate(examples) if i not in heldout],
        [example for i, example in enumerate(examples) if i in heldout],
    )


def tokenize_all(examples: list[Example], tokenizer: Any, config: Config, notes: list[str]) -> list[Pair]:
    """The pairs that fit the limits of `config`; how many were cut or left out is told in `notes`."""
    progress = tqdm(examples, desc="tokenising", unit="pair", disable=not examples)
    read = [tokenize(example, tokenizer, config) for example in progress]
    fitted = [fit(pair, config) for pair in read]
    kept = [pair for pair in fitted if pair is not None]
    num_cut = sum(pair is not None and pair is not whole for pair, whole in zip(fitted, read, strict=True))
    for number, done in ((num_cut, "truncated"), (len(read) - len(kept), "dropped")):
        if number:
            limits = f"max_prompt_length = {config.max_prompt_length}, max_length = {config.max_length} tokens"
            notes.append(f"{number} of {len(read)} pairs {done} at {limits}")
    for pair in kept:
        if pair.num_tokens > config.max_tokens_per_micro_batch:
            raise ValueError(
                f"{pair.source}: the pair has {pair.num_tokens} tokens, more than max_tokens_per_micro_batch = "
                f"{config.max_tokens_per_micro_batch}"
            )
    return kept


def fit(pair: Pair, config: Config) -> Pair | None:
    """`pair` itself if it fits the limits, else what `long_prompt` or `long_completion` asks for (None: dropped)."""
    if len(pair.prompt) > config.max_prompt_length:
        if config.long_prompt == "drop":
            return None
        raise ValueError(
            f"{pair.source}: the prompt has {len(pair.prompt)} tokens, more than max_prompt_length = "
            f"{config.max_prompt_length} (long_prompt = drop leaves it out)"
        )
    room = config.max_length - len(pair.prompt)
    longest = max(len(pair.chosen), len(pair.rejected))
    if longest <= room:
        return pair
    if config.long_completion == "error":
        raise ValueError(
            f"{pair.source}: prompt + completion have {len(pair.prompt) + longest} tokens, more than max_length = "
            f"{config.max_length} (long_completion = truncate or drop accepts it)"
        )
    if config.long_completion == "drop":
        return None
    return dataclasses.replace(pair, chosen=pair.chosen[:room], rejected=pair.rejected[:room])


def tokenize(example: Example, tokenizer: Any, config: Config) -> Pair:
    """Token ids of one example; ValueError for a prompt that is empty or whose tokens are no prefix of the whole."""
    templated = config.chat_template == "auto" and getattr(tokenizer, "chat_template", None) is not None
    encode = encode_chat if templated else encode_text
    prompt, chosen = encode(example, example.chosen, tokenizer)
    _, rejected = encode(example, example.rejected, tokenizer)
    if not prompt:
        raise ValueError(f"{example.source}: the prompt is empty")
    return Pair(example.source, tuple(prompt), tuple(chosen), tuple(rejected), example.behaviour)


def encode_chat(example: Example, completion: Any, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(prompt, completion) ids through the chat template; what follows the end-of-turn token is not scored."""
    prompt, answer = (as_messages(text, role) for text, role in ((example.prompt, "user"), (completion, "assistant")))
    options = {"tokenize": True, "return_dict": False}
    prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
    ids = tokenizer.apply_chat_template(prompt + answer, **options)
    completion_ids = after_prefix(
        prompt_ids, ids, example.source, "the chat template changes the prompt when an answer follows"
    )
    end = tokenizer.eos_token_id
    if end in completion_ids:
        # templates write white space after the end of turn, which a model never generates
        completion_ids = completion_ids[: len(completion_ids) - completion_ids[::-1].index(end)]
    return prompt_ids, completion_ids


def encode_text(example: Example, completion: Any, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(prompt, completion) ids of plain text, with the end-of-text token after the completion."""
    if not isinstance(example.prompt, str) or not isinstance(completion, str):
        raise ValueError(f"{example.source}: messages need a tokenizer with a chat template and chat_template = auto")
    prompt_ids = without_final_eos(tokenizer(example.prompt)["input_ids"], tokenizer)
    ids = without_final_eos(tokenizer(example.prompt + completion)["input_ids"], tokenizer)
    hint = "white space at the end of the prompt belongs at the start of the completion"
    return prompt_ids, [*after_prefix(prompt_ids, ids, example.source, hint), tokenizer.eos_token_id]


def as_messages(text: Any, role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)


def without_final_eos(ids: list[int], tokenizer: Any) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def after_prefix(prefix: list[int], ids: list[int], source: str, hint: str) -> list[int]:
    if ids[: len(prefix)] != prefix:
        raise ValueError(f"{source}: the tokens of the prompt are no prefix of those of prompt + completion ({hint})")
    return ids[len(prefix) :]


def pack(pairs: Sequence[Pair], reference: torch.Tensor | None = None) -> MicroBatch:
    """Packs P pairs into one row; `reference` [P, 2] float64 are their (chosen, rejected) reference log-probs."""
    sequences = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    lengths = torch.tensor([len(prompt) + len(completion) for prompt, completion in sequences])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    labels = [label for prompt, completion in sequences for label in [IGNORED] * len(prompt) + list(completion)]
    targets = shift_targets(torch.tensor(labels), cu_seqlens=cu_seqlens, ignore_index=IGNORED)
    if reference is None:
        reference = torch.full((len(pairs), 2), float("nan"), dtype=torch.float64)
    return MicroBatch(
        pairs=tuple(pairs),
        input_ids=torch.tensor([token for prompt, completion in sequences for token in prompt + completion])[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths.tolist()])[None],
        targets=targets,
        cu_seqlens=cu_seqlens,
        reference=reference.T.flatten(),
        behaviour=behaviour_logprob(pairs),
        lengths=torch.tensor([len(completion) for _, completion in sequences]),
        num_scored=sum(len(completion) for _, completion in sequences),
    )


def behaviour_logprob(pairs: Sequence[Pair]) -> torch.Tensor | None:
    """[S] float64 behaviour log-probs, None when the data has none."""
    known = [pair.behaviour for pair in pairs if pair.behaviour is not None]
    return torch.tensor(known, dtype=torch.float64).T.flatten() if known else None


def micro_batches(
    pairs: Sequence[Pair], max_tokens: int, reference: torch.Tensor | None = None
) -> Iterator[MicroBatch]:
    """Consecutive pairs, as many in each micro-batch as `max_tokens` allows; `reference` [len(pairs), 2] or None."""
    start, size = 0, 0
    for stop, pair in enumerate(pairs):
        if size + pair.num_tokens > max_tokens and stop > start:
            yield pack(pairs[start:stop], None if reference is None else reference[start:stop])
            start, size = stop, 0
        size += pair.num_tokens
    if start < len(pairs):
        yield pack(pairs[start:], None if reference is None else reference[start:])


def step_order(step: int, num_pairs: int, pairs_per_step: int, seed: int) -> list[int]:
    """Indices of the pairs of `step` (from 0): a pure function, so a resumed run needs no position but the step.

    Each epoch is one permutation drawn from (seed, epoch); its last step has what is left.
    """
    steps_per_epoch = -(-num_pairs // pairs_per_step)
    epoch, position = divmod(step, steps_per_epoch)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(num_pairs, generator=generator).tolist()
    return order[position * pairs_per_step : (position + 1) * pairs_per_step]
