"""The preference set of the demo: format, sizes, lengths and the absence of a shared stock phrase."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

DATA_FILE = Path(__file__).resolve().parents[1] / "python" / "isdaa_trainer" / "demo" / "preferences.jsonl"
SPLITS = ("train", "heldout")
TEXT_KEYS = ("prompt", "chosen", "rejected")
MAX_PAIR_WORDS = 100
"""Bound on whitespace words of prompt + chosen + prompt + rejected; 100 words are about 120 tokens."""


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, str]]:
    return [json.loads(line) for line in DATA_FILE.read_text(encoding="utf-8").splitlines()]


def words(text: str) -> list[str]:
    return text.split()


def test_every_line_is_an_object_with_the_four_text_keys(pairs):
    for number, pair in enumerate(pairs, start=1):
        assert set(pair) == {*TEXT_KEYS, "split"}, f"line {number}"
        assert all(isinstance(value, str) for value in pair.values()), f"line {number}"
        assert pair["split"] in SPLITS, f"line {number}"


def test_split_sizes(pairs):
    assert len(pairs) >= 240
    sizes = Counter(pair["split"] for pair in pairs)
    assert sizes["train"] >= 195
    assert sizes["heldout"] >= 40


def test_prompts_are_unique_and_completions_differ(pairs):
    prompts = Counter(pair["prompt"].lower() for pair in pairs)
    assert [prompt for prompt, count in prompts.items() if count > 1] == []
    completions = Counter(pair[key] for pair in pairs for key in ("chosen", "rejected"))
    assert [text for text, count in completions.items() if count > 1] == []


def test_text_is_clean_ascii(pairs):
    for pair in pairs:
        for key in TEXT_KEYS:
            text = pair[key]
            assert text.isascii(), text
            assert text.isprintable(), text
            assert text == " ".join(text.split()), "leading, trailing or double spaces: " + text
            assert text[0].isupper(), text
            assert text[-1] in ".?!", text


def test_lengths_of_the_single_texts(pairs):
    for pair in pairs:
        assert 5 <= len(words(pair["prompt"])) <= 15, pair["prompt"]
        assert 14 <= len(words(pair["chosen"])) <= 32, pair["chosen"]
        assert 14 <= len(words(pair["rejected"])) <= 32, pair["rejected"]
        total = 2 * len(words(pair["prompt"])) + len(words(pair["chosen"])) + len(words(pair["rejected"]))
        assert total <= MAX_PAIR_WORDS, pair["prompt"]


@pytest.mark.parametrize("split", SPLITS)
def test_mean_lengths_of_chosen_and_rejected_agree(pairs, split):
    part = [pair for pair in pairs if pair["split"] == split]
    chosen = sum(len(words(pair["chosen"])) for pair in part)
    rejected = sum(len(words(pair["rejected"])) for pair in part)
    assert 0.9 <= chosen / rejected <= 1.1


@pytest.mark.parametrize("key", ["chosen", "rejected"])
def test_no_phrase_of_three_words_marks_a_class(pairs, key):
    counts = Counter()
    for pair in pairs:
        tokens = re.findall(r"[a-z']+|\d+", pair[key].lower())
        counts.update(set(zip(tokens, tokens[1:], tokens[2:], strict=False)))
    phrase, count = counts.most_common(1)[0]
    assert count <= 0.05 * len(pairs), f"{' '.join(phrase)!r} occurs in {count} of {len(pairs)} texts"


@pytest.mark.parametrize("marker", [r"\d", ";", ":", r"[.?!] \w"], ids=["digit", "semicolon", "colon", "two_sentences"])
def test_no_surface_mark_separates_the_classes(pairs, marker):
    shares = [sum(bool(re.search(marker, pair[key])) for pair in pairs) / len(pairs) for key in ("chosen", "rejected")]
    # 0.25 lets a mark alone reach at most (1 + 0.25) / 2 = 62.5 % correct decisions on single texts.
    assert abs(shares[0] - shares[1]) <= 0.25
