"""Files of preference records -> examples of one form, whichever of the usual forms they are written in.

Accepted, in .json (a list), .jsonl (one a line) and .parquet (one a row):
- {"prompt", "chosen", "rejected"}, each a string or a list of {"role", "content"};
- {"chosen", "rejected"} as whole conversations: the messages they share at the start are the prompt;
- ShareGPT: {"conversations": [{"from", "value"}, ...], "chosen": {"from", "value"}, "rejected": {...}}.
Optional columns: `chosen_logprob` and `rejected_logprob` (sums under the policy that wrote the answers), `split`.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Message = dict[str, str]

SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SPLITS = {"train": "train", "heldout": "heldout", "test": "heldout", "eval": "heldout", "validation": "heldout"}


@dataclasses.dataclass(frozen=True)
class Example:
    """One preference as text: prompt and completions are strings, or lists of messages."""

    source: str  # "pairs.jsonl line 37"
    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    behaviour: tuple[float, float] | None = None
    split: str | None = None  # "train", "heldout", or None where the file has no such column


def read_examples(path: str | Path) -> list[Example]:
    """All records of a file; ValueError names the file and the line (or record) that is broken."""
    examples = [example_from_record(record, source) for source, record in read_records(Path(path))]
    if not examples:
        raise ValueError(f"{path}: no records")
    for name in ("behaviour", "split"):
        if len({getattr(example, name) is None for example in examples}) > 1:
            first = next(example for example in examples if getattr(example, name) is None)
            column = "split" if name == "split" else "chosen_logprob and rejected_logprob"
            raise ValueError(f"{first.source}: {column} missing, though other records have it")
    return examples


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(source, record) of every record of a .json, .jsonl or .parquet file."""
    if not path.is_file():
        raise ValueError(f"no such data file: {path}")
    readers = {".json": read_json, ".jsonl": read_jsonl, ".parquet": read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"{path}: expected one of {', '.join(readers)}")
    return readers[path.suffix](path)


def read_json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name}: broken JSON: {error}") from None
    if not isinstance(records, list):
        raise ValueError(f"{path.name}: expected a list of records, got a {type(records).__name__}")
    for number, record in enumerate(records, start=1):
        yield f"{path.name} record {number}", record


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    # split at line feeds only: str.splitlines would also split inside strings, at U+2028
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path.name} line {number}", json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path.name} line {number}: broken JSON: {error}") from None


def read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path.name}: reading parquet needs pyarrow; pip install pyarrow") from None
    for number, record in enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1):
        yield f"{path.name} row {number}", record


def example_from_record(record: Any, source: str) -> Example:
    """One record in any accepted form as an Example; ValueError starts with `source`."""
    if not isinstance(record, dict):
        raise ValueError(f"{source}: expected an object, got a {type(record).__name__}")
    for key in ("chosen", "rejected"):
        if record.get(key) is None:
            raise ValueError(f"{source}: missing key {key}")
    prompt, chosen, rejected = find_parts(record, source)
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        contents = [text] if isinstance(text, str) else [message["content"] for message in text]
        if not any(content.strip() for content in contents):
            raise ValueError(f"{source}: {name}: the completion is empty")
    if chosen == rejected:
        raise ValueError(f"{source}: chosen and rejected are identical")
    return Example(source, prompt, chosen, rejected, find_behaviour(record, source), find_split(record, source))


def find_parts(record: dict[str, Any], source: str) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected): three strings, or three lists of messages."""
    chosen, rejected = (as_text(record[key], source, key) for key in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(f"{source}: chosen and rejected: expected both strings or both messages")
    key = "conversations" if "conversations" in record else "prompt"
    prompt = None if record.get(key) is None else as_text(record[key], source, key)
    if isinstance(prompt, list) and isinstance(chosen, str):
        return prompt, [{"role": "assistant", "content": chosen}], [{"role": "assistant", "content": rejected}]
    if isinstance(chosen, str):
        if prompt is None:
            raise ValueError(f"{source}: missing key prompt")
        return prompt, chosen, rejected
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if prompt is None or chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        return split_shared_start(chosen, rejected, source)
    return prompt, chosen, rejected


def split_shared_start(chosen: list[Message], rejected: list[Message], source: str) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected) of two whole conversations: the prompt is what they share at the start."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if chosen == rejected:
        raise ValueError(f"{source}: chosen and rejected are identical")
    if shared == 0:
        raise ValueError(f"{source}: missing key prompt, and chosen and rejected share no message at the start")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def as_text(value: Any, source: str, key: str) -> str | list[Message]:
    """A string as it is; one message or a list of them, in either spelling, as a list of {"role", "content"}."""
    if isinstance(value, str):
        return value
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise ValueError(f"{source}: {key}: expected a string or messages, got a {type(value).__name__}")
    return [as_message(message, source, key) for message in messages]


def as_message(message: Any, source: str, key: str) -> Message:
    if isinstance(message, dict) and isinstance(message.get("value"), str):
        if message.get("from") not in SHAREGPT_ROLES:
            raise ValueError(
                f"{source}: {key}: unknown role {message.get('from')!r}, expected {', '.join(SHAREGPT_ROLES)}"
            )
        return {"role": SHAREGPT_ROLES[message["from"]], "content": message["value"]}
    if isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str):
        return {"role": message["role"], "content": message["content"]}
    raise ValueError(
        f"{source}: {key}: expected messages with role and content, or from and value, got {message!r:.80}"
    )


def find_behaviour(record: dict[str, Any], source: str) -> tuple[float, float] | None:
    values = [record.get(key) for key in ("chosen_logprob", "rejected_logprob")]
    if values == [None, None]:
        return None
    for key, value in zip(("chosen_logprob", "rejected_logprob"), values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value > 0:
            raise ValueError(f"{source}: {key}: expected a finite log-prob <= 0, got {value!r}")
    return float(values[0]), float(values[1])


def find_split(record: dict[str, Any], source: str) -> str | None:
    split = record.get("split")
    if split is not None and split not in SPLITS:
        raise ValueError(f"{source}: split: expected one of {', '.join(SPLITS)}, got {split!r}")
    return None if split is None else SPLITS[split]
