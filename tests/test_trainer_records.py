import json
import re
import sys

import pytest
from isdaa_trainer.records import example_from_record, read_examples
from trainer_fixtures import write_jsonl

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
)
SYSTEM = {"role": "system", "content": "s"}


# every accepted form -> (prompt, chosen, rejected)
@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ("q", "a", "b")),
        ({"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}, ([SYSTEM, USER], [GOOD], [BAD])),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, ([USER], [GOOD], [BAD])),
        ({"prompt": "q", "chosen": [GOOD], "rejected": [BAD]}, ([USER], [GOOD], [BAD])),
        ({"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, ([USER], [GOOD], [BAD])),
        ({"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, ([SYSTEM, USER], [GOOD], [BAD])),
        ({"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]}, ([USER], [GOOD], [BAD])),
        (
            {
                "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            ([SYSTEM, USER], [GOOD], [BAD]),
        ),
    ],
    ids=["plain", "messages", "string-answers", "string-prompt", "repeated", "whole", "null-prompt", "sharegpt"],
)
def test_forms(record, expected):
    example = example_from_record(record, "here")
    assert (example.prompt, example.chosen, example.rejected) == expected
    assert (example.source, example.behaviour, example.split) == ("here", None, None)


def test_optional_columns():
    record = {
        "prompt": "q",
        "chosen": "a",
        "rejected": "b",
        "split": "test",
        "chosen_logprob": -1,
        "rejected_logprob": -2.5,
    }
    example = example_from_record(record, "here")
    assert (example.behaviour, example.split) == ((-1.0, -2.5), "heldout")


PLAIN = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (3, "expected an object, got a int"),
        ({"prompt": "q", "chosen": "a"}, "missing key rejected"),
        ({"prompt": "q", "rejected": "b"}, "missing key chosen"),
        ({"chosen": "a", "rejected": "b"}, "missing key prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "missing key prompt, and chosen and rejected share no message"),
        (PLAIN | {"rejected": " \n"}, "rejected: the completion is empty"),
        ({"prompt": "q", "chosen": [], "rejected": [BAD]}, "chosen: the completion is empty"),
        (PLAIN | {"rejected": "a"}, "chosen and rejected are identical"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen and rejected are identical"),
        ({"chosen": [USER], "rejected": [USER, BAD]}, "chosen: the completion is empty"),
        (PLAIN | {"rejected": [BAD]}, "expected both strings or both messages"),
        (PLAIN | {"chosen": 3}, "chosen: expected a string or messages, got a int"),
        (PLAIN | {"prompt": [{"from": "robot", "value": "x"}]}, "prompt: unknown role 'robot'"),
        (PLAIN | {"prompt": [{"role": "user"}]}, "prompt: expected messages with role and content"),
        (PLAIN | {"split": "dev"}, "split: expected one of train, heldout"),
        (PLAIN | {"chosen_logprob": -1.0}, "rejected_logprob: expected a finite log-prob <= 0, got None"),
        (
            PLAIN | {"chosen_logprob": 1.0, "rejected_logprob": -1},
            "chosen_logprob: expected a finite log-prob <= 0, got 1.0",
        ),
    ],
)
def test_bad_records_name_the_place_and_the_key(record, message):
    with pytest.raises(ValueError, match=r"^pairs\.jsonl line 7: .*" + re.escape(message)):
        example_from_record(record, "pairs.jsonl line 7")


def test_the_three_file_types_give_the_same_examples(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [PLAIN | {"chosen": f"a{i}"} for i in range(3)]
    (tmp_path / "p.json").write_text(json.dumps(records))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "p.parquet")
    lines = read_examples(write_jsonl(tmp_path / "p.jsonl", records))
    for name in ("p.json", "p.parquet"):
        assert [e.chosen for e in read_examples(tmp_path / name)] == [e.chosen for e in lines] == ["a0", "a1", "a2"]
    assert lines[1].source == "p.jsonl line 2"
    assert read_examples(tmp_path / "p.json")[1].source == "p.json record 2"
    assert read_examples(tmp_path / "p.parquet")[1].source == "p.parquet row 2"


def test_a_broken_line_is_named_and_blank_lines_count(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(PLAIN) + "\n\n" + json.dumps(PLAIN)[:-5] + "\n")
    with pytest.raises(ValueError, match=r"pairs\.jsonl line 3: broken JSON"):
        read_examples(file)


def test_a_line_separator_inside_a_string_is_no_line_end(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(PLAIN | {"prompt": "one\u2028two"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_examples(file)[0].prompt == "one\u2028two"


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(json.dumps(PLAIN).encode() + b"\n" + b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2: broken JSON"):
        read_examples(file)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", "[{]", r"p\.json: broken JSON: .* line 1 column 3"),
        ("p.json", "{}", "expected a list of records, got a dict"),
        ("p.jsonl", "\n", "no records"),
        ("p.csv", "", r"expected one of \.json, \.jsonl, \.parquet"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / name)


def test_missing_file():
    with pytest.raises(ValueError, match=r"no such data file: nowhere\.jsonl"):
        read_examples("nowhere.jsonl")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "p.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        read_examples(tmp_path / "p.parquet")


@pytest.mark.parametrize(
    ("column", "named"),
    [
        ({"split": "train"}, "split"),
        ({"chosen_logprob": -1, "rejected_logprob": -1}, "chosen_logprob and rejected_logprob"),
    ],
)
def test_a_column_must_be_there_for_all_records_or_none(tmp_path, column, named):
    file = write_jsonl(tmp_path / "p.jsonl", [PLAIN | column, PLAIN])
    with pytest.raises(ValueError, match=f"line 2: {named} missing"):
        read_examples(file)
