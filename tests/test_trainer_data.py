import dataclasses

import pytest
import torch
from isdaa_trainer.data import IGNORED, Pair, load_data, micro_batches, pack, step_order, tokenize
from isdaa_trainer.records import Example
from trainer_fixtures import CHAT_TEMPLATE, make_config, make_records, make_tokenizer, write_jsonl

PAD, END, UNKNOWN, SYSTEM, USER, ASSISTANT, LINE = range(7)
W = 7  # id of w0


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path, "unused")


def example(prompt="w0 w1", chosen="w2 w3", rejected="w4"):
    return Example("p.jsonl line 5", prompt, chosen, rejected)


def test_chat_template_ends_at_the_end_of_turn(config):
    pair = tokenize(example(), make_tokenizer(), config)
    assert pair.prompt == (USER, W, W + 1, END, LINE, ASSISTANT)
    assert pair.chosen == (W + 2, W + 3, END)
    assert pair.rejected == (W + 4, END)
    assert pair.source == "p.jsonl line 5"


def test_messages_and_strings_are_the_same_conversation(config):
    messages = [{"role": "user", "content": "w0 w1"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("w2 w3", "w4")]
    assert tokenize(example(messages, *answers), make_tokenizer(), config) == tokenize(
        example(), make_tokenizer(), config
    )


@pytest.mark.parametrize("how", ["no template", "chat_template=none"])
def test_plain_text_ends_with_the_end_of_text(config, how):
    tokenizer = make_tokenizer(None if how == "no template" else CHAT_TEMPLATE)
    if how != "no template":
        config = dataclasses.replace(config, chat_template="none")
    pair = tokenize(example(chosen=" w2 w3", rejected=" w4"), tokenizer, config)
    assert (pair.prompt, pair.chosen, pair.rejected) == ((W, W + 1), (W + 2, W + 3, END), (W + 4, END))


@pytest.mark.parametrize(
    ("template", "broken", "message"),
    [
        # a template that drops its generation prompt once an answer follows, as those of reasoning models do
        (CHAT_TEMPLATE + "{% if add_generation_prompt %}w9 {% endif %}", {}, "no prefix of those of prompt"),
        (None, {}, "white space at the end of the prompt belongs at the start of the completion"),
        (None, {"prompt": ""}, "the prompt is empty"),
        (None, {"prompt": [{"role": "user", "content": "w1"}]}, "messages need a tokenizer with a chat template"),
    ],
    ids=["no-prefix", "merged-words", "empty-prompt", "messages"],
)
def test_bad_prompts_name_the_record(config, template, broken, message):
    with pytest.raises(ValueError, match=message) as error:
        tokenize(example(**broken), make_tokenizer(template), config)
    assert str(error.value).startswith("p.jsonl line 5: ")


def load(tmp_path, records, tokenizer=None, **changes):
    write_jsonl(tmp_path / "pairs.jsonl", records)
    return load_data(make_config(tmp_path, "unused", **changes), tokenizer or make_tokenizer())


LONG = {"prompt": "w0", "chosen": " ".join(["w1"] * 20), "rejected": "w2"}  # 5 + 21 tokens, 5 + 2


def test_long_completions(tmp_path):
    limits = {"max_length": 16, "max_prompt_length": 8}
    data = load(tmp_path, [*make_records(2), LONG], **limits)
    assert [len(p.prompt) + len(p.chosen) for p in data.train][2] == 16
    assert data.notes == ["1 of 3 pairs truncated at max_prompt_length = 8, max_length = 16 tokens"]
    data = load(tmp_path, [*make_records(2), LONG], **limits, long_completion="drop")
    assert len(data.train) == 2
    assert data.notes == ["1 of 3 pairs dropped at max_prompt_length = 8, max_length = 16 tokens"]
    with pytest.raises(ValueError, match=r"line 3: prompt \+ completion have 26 tokens, more than max_length = 16"):
        load(tmp_path, [*make_records(2), LONG], **limits, long_completion="error")
    with pytest.raises(ValueError, match="no pairs to train on"):
        load(tmp_path, [LONG], **limits, long_completion="drop")


def test_long_prompts(tmp_path):
    records = [*make_records(2), {"prompt": "w0 w1 w2 w3 w4", "chosen": "w1", "rejected": "w2"}]
    with pytest.raises(
        ValueError, match=r"line 3: the prompt has 9 tokens, more than max_prompt_length = 8 \(long_prompt"
    ):
        load(tmp_path, records, max_prompt_length=8)
    data = load(tmp_path, records, max_prompt_length=8, long_prompt="drop")
    assert len(data.train) == 2
    assert data.notes == ["1 of 3 pairs dropped at max_prompt_length = 8, max_length = 64 tokens"]


def test_a_pair_larger_than_a_micro_batch_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: the pair has 33 tokens, more than max_tokens_per_micro_batch = 32"):
        load(tmp_path, [LONG], max_tokens_per_micro_batch=32)


def test_held_out_by_fraction_is_random_but_reproducible(tmp_path):
    records = make_records(20)
    first, again = (load(tmp_path, records, eval_fraction=0.25) for _ in range(2))
    other = load(tmp_path, records, eval_fraction=0.25, seed=1)
    assert (len(first.train), len(first.heldout)) == (15, 5)
    assert first == again
    assert {p.source for p in first.heldout} != {p.source for p in other.heldout}
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_held_out_by_column_or_file(tmp_path):
    records = make_records(6)
    column = [record | {"split": "train" if i < 4 else "test"} for i, record in enumerate(records)]
    by_column = load(tmp_path, column)
    eval_data = write_jsonl(tmp_path / "eval.jsonl", records[4:])
    by_file = load(tmp_path, records[:4], eval_data=eval_data)
    assert [p.chosen for p in by_column.heldout] == [p.chosen for p in by_file.heldout]
    assert len(by_column.train) == len(by_file.train) == 4
    with pytest.raises(ValueError, match="has a column split; expected neither eval_data nor eval_fraction"):
        load(tmp_path, column, eval_fraction=0.5)


def make_pair(prompt, chosen, rejected, behaviour=None):
    return Pair("p", *(tuple(range(10, 10 + n)) for n in (prompt, chosen, rejected)), behaviour)


def test_pack_by_hand():
    pairs = [Pair("a", (1, 2), (3, 4), (5,), (-1.0, -2.0)), Pair("b", (6,), (7,), (8, 9), (-3.0, -4.0))]
    batch = pack(pairs, torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=torch.float64))
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 6, 7, 1, 2, 5, 6, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 9, 12]
    x = IGNORED
    assert batch.targets.tolist() == [x, 3, 4, x, 7, x, x, 5, x, 8, 9, x]
    assert batch.reference.tolist() == [0.1, 0.3, 0.2, 0.4]
    assert batch.behaviour.tolist() == [-1.0, -3.0, -2.0, -4.0]
    assert batch.num_scored == 6
    assert batch.lengths.tolist() == [2, 1, 1, 2]
    assert pack(pairs[:1]).reference.isnan().all()


def test_micro_batches_keep_order_and_respect_the_limit():
    pairs = [make_pair(2, 3, 2), make_pair(2, 2, 2), make_pair(4, 4, 4), make_pair(1, 1, 1)]  # 9, 8, 16, 4 tokens
    reference = torch.arange(8, dtype=torch.float64).view(4, 2)
    batches = list(micro_batches(pairs, 17, reference))
    assert [len(batch.pairs) for batch in batches] == [2, 1, 1]
    assert [batch.input_ids.shape[1] for batch in batches] == [17, 16, 4]
    assert torch.cat([batch.reference.view(2, -1).T for batch in batches]).equal(reference)
    assert list(micro_batches([], 17)) == []


def test_step_order_covers_each_epoch_once_and_depends_on_seed_and_epoch():
    def epoch(number, seed=0):
        return [i for step in range(number * 3, number * 3 + 3) for i in step_order(step, 10, 4, seed)]

    assert [len(step_order(step, 10, 4, 0)) for step in range(4)] == [4, 4, 2, 4]
    assert sorted(epoch(0)) == sorted(epoch(1)) == list(range(10))
    assert epoch(0) == epoch(0)
    assert epoch(0) != epoch(1)
    assert epoch(0) != epoch(0, seed=1)


def test_behaviour_log_probs_reach_the_pairs_and_their_neglect_is_told(tmp_path):
    records = [record | {"chosen_logprob": -1.0, "rejected_logprob": -2.0} for record in make_records(3)]
    data = load(tmp_path, records)
    assert [pair.behaviour for pair in data.train] == [(-1.0, -2.0)] * 3
    assert data.notes == []
    (note,) = load(tmp_path, records, objective="dpo").notes
    assert note == "chosen_logprob and rejected_logprob play no part: dpo is not importance weighted"
