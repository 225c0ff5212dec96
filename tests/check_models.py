"""A tiny model in a folder, and random words, for the scripts that compare other libraries with and without us."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 190


def make_model(folder: Path) -> None:
    """A random Llama of 2 layers, D = 32, V = 200, and a tokenizer with one token a word."""
    vocab = {word: index for index, word in enumerate(("<pad>", "<end>", "<unk>", *(f"w{i}" for i in range(WORDS))))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
    tokens = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).save_pretrained(folder)


def make_words(seed: int = 0) -> Callable[[int], str]:
    """A function of a length: that many random words."""
    random = torch.Generator().manual_seed(seed)
    return lambda length: " ".join(f"w{i}" for i in torch.randint(0, WORDS, (length,), generator=random).tolist())
