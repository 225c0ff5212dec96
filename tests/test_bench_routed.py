"""The benchmark of routed gradients on tiny problems, where shares and errors can be counted by hand."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import one_hot

from bench import gate, routed_lab, routed_suite, states
from bench.contenders import Outcome
from bench.problem import make_problem
from bench.routed import main
from bench.routed_errors import formula_outcomes, judge, rounded, to_bf16
from bench.routed_lab import NATURAL, OTHER, OWN, PREFERENCE, RANDOM, Case, Lab, Settings, all_cases
from bench.routed_picture import draw, sweep
from bench.routed_report import markdown
from bench.states import States, load_states
from bench.timing import Timed
from isdaa_kernels import Routed
from isdaa_kernels.testing import dense_logprob_from_logits, make_sample, relative_error

TINY = Settings(states="random:16x3000", tokens=96, order_tokens=40, repeats=1, memory=False)
ARGUMENTS = ["--states", "random:16x3000", "--tokens", "96", "--order-tokens", "40", "--repeats", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command from end to end: its folder and what it says there."""
    folder = tmp_path_factory.mktemp("routed")
    assert main([*ARGUMENTS, "--no-memory", "--out", str(folder)]) == 0
    return folder, json.loads((folder / "report.json").read_text())


def test_a_run_leaves_whole_files(run):
    folder, results = run
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "report.md", "routed.png"]
    assert (folder / "routed.png").read_bytes().startswith(b"\x89PNG")
    assert results["command"][:3] == ["python", "-m", "bench.routed"]
    assert results["versions"]["torch"] == torch.__version__
    assert results["accelerator"]["threads"] == torch.get_num_threads()
    assert results["settings"]["order_tokens"] == 40
    assert results["states"] == {"source": "random:16x3000", "tokens": 96, "vocabulary": 3000, "hidden_size": 16}
    assert results["memory"] is None


def test_every_case_is_measured(run):
    _, results = run
    assert len(results["rows"]) == len(all_cases(has_other=False)) == 17
    for row in results["rows"]:
        assert row["time"]["full"]["units"] > 0
        for found in (row[RANDOM], row[PREFERENCE]):
            assert 0 < found["share_hidden"] <= found["share_weight"] <= 1
            assert found["flop_formula"] == pytest.approx(1 + 2 * found["share_weight"] + found["share_hidden"])
            assert found["error"].keys() == {"d_hidden", "d_weight"}
            assert len(found["row_cosine"]) == len(found["token_error"]) == 3
    [default] = [row for row in results["rows"] if row["default"]]
    assert default["time"].keys() == {"full", "forward", "full, is_dpo"}
    assert (default["order"], default["tolerance"]) == (OWN, Routed().tolerance)
    assert [row["tolerance"] for row in sweep(results, NATURAL)] == [1e-4, 3e-4, 5e-4, 1e-3, 3e-3, 1e-2]


def test_lines_to_compare_with(run):
    """Rounding to 8 bits of mantissa is off by about 2^-9 / sqrt(3), sums of exact products in fp32 by far less."""
    _, results = run
    lines = results["reference_lines"]
    assert lines.keys() == {"ours, exact", "exact, rounded to bf16", "logits rounded to bf16", "dense PyTorch"}
    for kind in (RANDOM, PREFERENCE):
        assert max(lines["ours, exact"][kind]["error"].values()) < 2e-6
        for error in lines["exact, rounded to bf16"][kind]["error"].values():
            assert 1e-3 < error < 2.2e-3
    assert lines["ours, exact"]["time"].keys() == {"full", "forward"}
    assert lines["dense PyTorch"]["time"]["full"]["repeats"] == 1


def test_flat_probabilities_get_the_exact_gradient(run):
    _, results = run
    flat = results["flat"]
    assert flat["tokens"] == 96
    assert flat["ratio"] == pytest.approx(flat["routed_units"] / flat["exact_units"])
    assert max(flat["difference"].values()) < 1e-6


def test_the_report_says_what_the_run_was(run):
    folder, results = run
    text = (folder / "report.md").read_text()
    for part in (results["commit"], results["accelerator"]["name"], "torch " + torch.__version__, "--order-tokens 40"):
        assert part in text
    assert text.count("**routed, default**") == 2
    assert text.count("\n| routed") == 2 * (len(results["rows"]) - 1)


@pytest.mark.parametrize("drifted", [True, False])
def test_a_unit_that_drifts_is_said(run, drifted: bool):
    _, results = run
    text = markdown({**results, "unit": {**results["unit"], "first": 1.25, "last": 1.75, "drifted": drifted}})
    assert "A unit took 1.25 s when the timing began and 1.75 s when it ended" in text
    assert ("changed by more than 15 %" in text) == drifted


@pytest.mark.parametrize(("seconds", "drifted"), [((1.0, 1.14), False), ((1.0, 1.16), True), ((1.0, 0.84), True)])
def test_drift_is_judged_between_first_and_last(monkeypatch, seconds, drifted: bool):
    left = iter(seconds)
    monkeypatch.setattr(routed_suite, "unit_seconds", lambda unit, watch: next(left))
    unit = routed_suite._measure_time(Lab(replace(TINY, dense=False)), [], [], {"ours, exact": {}})
    assert (unit["first"], unit["last"], unit["drifted"]) == (*seconds, drifted)
    assert unit["least"] <= unit["median"] <= unit["most"]


def test_dense_can_be_left_out():
    lines: dict[str, dict] = {"ours, exact": {}}
    routed_suite._measure_time(Lab(replace(TINY, dense=False)), [], [], lines)
    assert lines.keys() == {"ours, exact"}


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab(TINY)


@pytest.mark.parametrize("kind", [RANDOM, PREFERENCE])
def test_tolerance_0_routes_everything_and_is_exact(lab: Lab, kind: str):
    case, true = Case(Routed(0.0), OWN), gate.truth(lab.upstream(kind))
    assert lab.shares(case, kind) == {"share_hidden": 1.0, "share_weight": 1.0}
    found = judge(lab.call(case, kind)(), true)
    assert max(found["error"].values()) < 2e-6
    assert min(found["row_cosine"]) == pytest.approx(1, abs=1e-9)
    assert max(found["token_error"]) < 1e-5


@pytest.fixture
def certain_lab(monkeypatch) -> Lab:
    """Token n is certain that a token of block n mod 8 follows, which is right, and takes all of its 128 rows for equally likely."""
    tokens, blocks, block = 72, 8, 128
    place_N = torch.arange(tokens) % blocks
    unseen_VD = torch.randn(blocks * block, 4, generator=torch.Generator().manual_seed(0))  # what no state looks at
    hidden_ND = torch.cat([100.0 * one_hot(place_N, blocks), torch.zeros(tokens, 4)], 1)
    weight_VD = torch.cat([one_hot(torch.arange(blocks).repeat_interleave(block), blocks), unseen_VD], 1)
    certain = States(hidden_ND, weight_VD, place_N * block + 3, "certain")
    monkeypatch.setattr(routed_lab, "load_states", lambda spec, tokens: certain.first(tokens))
    return Lab(replace(TINY, tokens=64, order_tokens=8))


@pytest.mark.parametrize("order", [NATURAL, OWN])
def test_certain_tokens_are_routed_to_one_block_each(certain_lab: Lab, order: str):
    """Also in an order of its own: what tells rows apart there are their logits, which are the same within a block."""
    case = Case(Routed(1e-4, row_share=0.0), order)
    assert certain_lab.shares(case, RANDOM) == {"share_hidden": 1 / 8, "share_weight": 1 / 8}
    true = gate.truth(certain_lab.upstream(RANDOM))
    found = routed_suite._counted(certain_lab, certain_lab.call(case, RANDOM), true)
    assert max(found["error"].values()) < 1e-6


def test_a_token_without_coefficient_is_routed_nowhere(certain_lab: Lab):
    certain_lab.coefficients[RANDOM][:16] = 0
    shares = certain_lab.shares(Case(Routed(1e-4, row_share=0.0), NATURAL), RANDOM)
    assert shares == {"share_hidden": 0.75 / 8, "share_weight": 0.75 / 8}


def test_an_order_is_made_from_states_that_are_not_measured(lab: Lab):
    states = load_states(TINY.states, 136)
    torch.testing.assert_close(lab.problem.hidden_ND, states.hidden_ND[:96], rtol=0, atol=0)
    torch.testing.assert_close(lab.samples[OWN], states.hidden_ND[96:], rtol=0, atol=0)
    assert lab.order(NATURAL, 128) is None
    assert lab.order(OWN, 128) is lab.order(OWN, 128)


def test_one_coefficient_a_sequence(lab: Lab):
    a_sequence = lab.coefficients[RANDOM].view(8, 12)
    assert (a_sequence == a_sequence[:, :1]).all()
    assert len(a_sequence[:, 0].unique()) == 8


def test_preference_coefficients_are_those_of_the_fp64_truth(lab: Lab):
    _, expected_N = gate.true_value(lab.problem, lab.problem.weight_VD.double(), "is_dpo", 32)
    assert relative_error(lab.coefficients[PREFERENCE], expected_N) < 1e-5
    assert (lab.coefficients[PREFERENCE] != 0).all()


def test_an_order_of_another_text_needs_the_same_head(monkeypatch):
    with pytest.raises(ValueError, match="order_states: expected states of the same head as 'random:16x3000', got"):
        Lab(replace(TINY, order_states="random:16x3000"))  # as many random states, but other ones

    first = load_states(TINY.states, 136)
    monkeypatch.setattr(routed_lab, "load_states", lambda spec, tokens: first.first(tokens))
    lab = Lab(replace(TINY, order_states="another"))
    torch.testing.assert_close(lab.samples[OTHER], first.hidden_ND[:40], rtol=0, atol=0)
    assert [case.order for case in all_cases(has_other=True)].count(OTHER) == 1


def test_errors_of_known_changes():
    random = torch.Generator().manual_seed(1)
    true = Outcome(torch.zeros(9), *(torch.randn(n, 4, generator=random, dtype=torch.float64) for n in (9, 30)))
    d_weight = true.d_weight_VD.clone()
    d_weight[:3] *= -1
    d_weight[5] *= 2
    found = judge(Outcome(true.value, 1.01 * true.d_hidden_ND, d_weight), true)
    assert found["error"]["d_hidden"] == pytest.approx(0.01)
    assert found["token_error"] == pytest.approx([0.01] * 3)
    wrong = torch.cat([2 * true.d_weight_VD[:3], true.d_weight_VD[5:6]]).norm() / true.d_weight_VD.norm()
    assert found["error"]["d_weight"] == pytest.approx(float(wrong))
    assert found["row_cosine"] == pytest.approx([-1, 1, 1])  # 3 of 30 rows are turned around


def test_formulas_for_several_upstream_gradients_are_the_truth_of_the_gate(lab: Lab):
    found = formula_outcomes(lab.problem, lab.coefficients)
    assert found.keys() == {RANDOM, PREFERENCE}
    for kind, outcome in found.items():
        for ours, theirs in zip(outcome, gate.truth(lab.upstream(kind)), strict=True):
            assert ours.dtype == torch.float64
            assert relative_error(ours, theirs) < 1e-12


def test_logits_in_bf16_have_the_gradient_of_autograd():
    problem = make_problem(load_states("random:16x300", 300))
    logits = to_bf16(problem.hidden_ND @ problem.weight_VD.T).requires_grad_()
    logprob = dense_logprob_from_logits(logits, problem.targets_N)
    logprob.backward(problem.upstream_N)
    found = formula_outcomes(problem, {RANDOM: problem.upstream_N}, torch.float32, to_bf16)[RANDOM]
    torch.testing.assert_close(found.value, logprob.detach())
    torch.testing.assert_close(found.d_hidden_ND, logits.grad @ problem.weight_VD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.d_weight_VD, logits.grad.T @ problem.hidden_ND, rtol=1e-4, atol=1e-5)


def test_outputs_in_bf16_are_the_truth_rounded():
    true = gate.truth(make_problem(load_states("random:16x300", 96)))
    found = rounded(true)
    assert (found.d_hidden_ND.dtype, found.d_weight_VD.dtype) == (torch.bfloat16, torch.bfloat16)
    assert max(judge(found, true)["error"].values()) < 2**-8


def test_calls_take_turns_with_a_unit_before_every_third():
    order = []
    items = [Timed(lambda name=name: order.append(name), lambda: order.append("u")) for name in "abcd"]
    list(routed_suite.in_rounds(items, repeats=2))
    assert "".join(order) == "uabcud" * 2
    assert [len(item.seconds) for item in items] == [len(item.unit_seconds) for item in items] == [2] * 4
    assert items[0].unit_seconds == items[1].unit_seconds == items[2].unit_seconds


def test_the_picture_has_another_texts_order(run):
    _, results = run
    other = {**next(row for row in results["rows"] if row["default"]), "order": OTHER, "default": False}
    assert draw({**results, "rows": [*results["rows"], other]}) != draw(results)


@pytest.mark.slow
def test_memory_in_processes_of_their_own():
    lab = Lab(Settings(states="random:16x8000", tokens=1000, order_tokens=64))
    found = routed_suite._measure_memory(lab)
    assert found.keys() == {"exact", "routed"}
    assert all(0 <= extra < 1000 * 8000 * 4 for extra in found.values())


class WordTokenizer:
    """A number for each word, the same as the word."""

    def __call__(self, text: str, add_special_tokens: bool):
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}


def words(count: int) -> str:
    return " ".join(map(str, range(count)))


def test_files_are_cut_into_sequences():
    """A last token alone, which has nothing to predict, is left out."""
    found = list(states._file_ids(WordTokenizer(), [words(600), words(257), words(1)], 10_000))
    assert [len(sequence) for sequence in found] == [256, 256, 88, 256]
    assert found[1] == list(range(256, 512))


@pytest.mark.parametrize(("tokens", "sequences"), [(1, 1), (255, 1), (256, 2), (510, 2), (511, 3)])
def test_no_more_sequences_than_tokens_are_wanted(tokens: int, sequences: int):
    assert len(list(states._file_ids(WordTokenizer(), [words(600), words(600)], tokens))) == sequences


@pytest.fixture
def without_model(monkeypatch, tmp_path):
    """What the model would make is random states, two for each word; gives the number of times it was asked."""
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    asked = []

    def run_model(gguf, sequences, source):
        count = sum(len(ids) - 1 for ids in sequences(WordTokenizer()))
        asked.append(count)
        sample = make_sample(count, 8, 50)
        return States(sample.hidden, sample.weight, sample.targets, source)

    monkeypatch.setattr(states, "_find_smollm2", lambda: gguf)
    monkeypatch.setattr(states, "_run_smollm2", run_model)
    monkeypatch.setattr(states, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(states, "ROOT", tmp_path)
    return SimpleNamespace(asked=asked, root=tmp_path)


def test_states_of_files_are_made_once(without_model):
    for name, count in (("a.txt", 300), ("b.md", 40)):
        (without_model.root / name).write_text(words(count))
    made = load_states("smollm2:a.txt,b.md", 100)
    assert made.source == "model.gguf on a.txt, b.md"
    assert made.hidden_ND.shape == (100, 8)
    again = load_states("smollm2:a.txt,b.md", 200)
    assert torch.equal(again.hidden_ND[:100], made.hidden_ND)
    assert without_model.asked == [255 + 43 + 39]
    (without_model.root / "b.md").write_text(words(41))
    load_states("smollm2:a.txt,b.md", 100)
    assert len(without_model.asked) == 2


def test_files_that_hold_too_few_tokens_are_refused(without_model):
    (without_model.root / "a.txt").write_text(words(40))
    with pytest.raises(ValueError, match=r"tokens: expected 1 to 39 \(model.gguf on a.txt\), got 100"):
        load_states("smollm2:a.txt", 100)


@pytest.mark.parametrize("spec", ["smollm2:", "smollm2:no_such_file.md", "smollm2:README.md,", "smollm2:tests"])
def test_files_that_are_not_there_are_refused(spec: str):
    with pytest.raises(ValueError, match="states: expected files after 'smollm2:', got "):
        load_states(spec, 4)


def test_a_spec_that_is_none_is_refused_with_all_forms():
    with pytest.raises(ValueError, match=r"'smollm2' or 'random:DxV' .* or 'smollm2:FILE\[,FILE...\]', got 'smollm3'"):
        load_states("smollm3", 4)
