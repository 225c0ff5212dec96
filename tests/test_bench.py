"""The benchmark's own parts on tiny problems: gate, timing, memory, report. What it finds out about kernels is no test."""

import csv
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from trainer_fixtures import make_model

from bench import gate, memory, timing
from bench.__main__ import main
from bench.contenders import BETA, BY_NAME, CONTENDERS, Contender, Row, all_rows, make_run
from bench.files import write_whole
from bench.liger_csv import CSV_COLUMNS
from bench.problem import CASES, Problem, make_problem
from bench.report import markdown, table, write_report
from bench.states import ROOT, collect_states, load_states
from bench.suite import Lab, Settings, run_suite
from isdaa_kernels import shift_targets
from isdaa_kernels.testing import dense_logprob, relative_error

TINY = Settings(states="random:16x300", tokens=48, repeats=2, memory=False)
MIB = 1 << 20


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab(TINY)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(load_states("random:16x300", 48))


def _wrong(change) -> Contender:
    """A contender of dense log-probs that `change(value)` spoils."""

    def prepare(problem):
        return lambda hidden, weight: change(dense_logprob(hidden, weight, problem.targets_N))

    return Contender("spoiled", "spoiled", prepare)


@pytest.mark.parametrize("row", all_rows(), ids=lambda row: row.title)
def test_every_contender_that_is_installed_passes_the_gate(lab: Lab, row: Row):
    """In the development environment TRL and Liger are absent; then the sentence that lists them must name the module."""
    reason = row.contender.missing()
    if reason is not None:
        assert row.contender.needs is not None
        assert row.contender.needs.split(".")[0] in reason
        return
    for mode in row.modes:
        errors, red = lab.check(row, mode)
        assert red is None
        assert max(errors.values()) < (5e-3 if row.case == "bf16 inputs" else 1e-5)


def test_truth_is_the_gradient_of_dense_logprob(problem: Problem):
    exact = problem.to(torch.float64)
    true = gate.truth(problem, chunk=7)
    dense = make_run(BY_NAME["dense PyTorch"], exact, "full")()
    for ours, theirs in zip(true, dense, strict=True):
        assert relative_error(ours, theirs) < 1e-12


def test_truth_of_the_preference_step_follows_its_formula(problem: Problem):
    exact = problem.to(torch.float64)
    weight = exact.weight_VD.clone().requires_grad_()
    hidden = exact.hidden_ND.clone().requires_grad_()
    ratio = dense_logprob(hidden, weight, exact.targets_N) - dense_logprob(
        exact.reference_hidden_ND, exact.weight_VD, exact.targets_N
    )
    chosen, rejected = ratio.view(2, 1, 24).sum(-1)
    importance = (chosen + rejected).detach().clamp(max=2.0).exp()
    loss = (importance * torch.nn.functional.softplus(-BETA * (chosen - rejected))).mean()
    loss.backward()
    true = gate.truth(exact, "is_dpo")
    assert relative_error(true.value, loss.detach()) < 1e-12
    assert relative_error(true.d_hidden_ND, hidden.grad) < 1e-12
    assert relative_error(true.d_weight_VD, weight.grad) < 1e-12


def _explode(value: torch.Tensor) -> torch.Tensor:
    raise FloatingPointError("no luck")


# a wrong value, a wrong gradient under a right value, one NaN among right values, a wrong shape, an exception
SPOILERS = {
    "value": lambda v: v * 1.001,
    "gradient": lambda v: v.detach() + 1.001 * (v - v.detach()),
    "nan": lambda v: torch.cat([v[:-1], v[-1:] * float("nan")]),
    "shape": lambda v: v[:, None],
    "exception": _explode,
}


@pytest.mark.parametrize("kind", SPOILERS)
def test_a_red_gate_gives_no_number(kind: str, tmp_path):
    results = run_suite(dataclasses.replace(TINY, memory=True), [Row(_wrong(SPOILERS[kind]))])
    [row] = results["rows"]
    assert row["red"].startswith("spoiled: ")
    assert row["modes"] == {}
    write_report(results, tmp_path)
    assert "| spoiled | 48 | red | red |  |  |  |  |  |  |  |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.csv").read_text().splitlines() == [",".join(CSV_COLUMNS)]


def test_a_value_of_the_right_numbers_in_the_wrong_shape_is_red(problem: Problem):
    true = gate.truth(problem)
    outcome = true._replace(value=true.value[None], d_hidden_ND=None, d_weight_VD=None)
    found = gate.errors(outcome, true)
    assert found["value"] == 0
    assert "shape [1, 48]" in gate.red(BY_NAME["ours"], problem, "forward", outcome, found)


def test_a_gradient_that_is_wanted_and_not_there_is_red(problem: Problem):
    true = gate.truth(problem)
    outcome = true._replace(d_weight_VD=None)
    assert "d_weight" in gate.red(BY_NAME["ours"], problem, "full", outcome, gate.errors(outcome, true))
    frozen = CASES["frozen head"](problem)
    assert gate.red(BY_NAME["ours"], frozen, "full", outcome, gate.errors(outcome, true)) is None


def test_missing_contenders_are_listed_with_the_reason():
    absent = Contender("absent", "absent", BY_NAME["ours"].prepare, "no_such_package.part:Thing")
    outdated = Contender("outdated", "outdated", BY_NAME["ours"].prepare, "torch.nn:NoSuchOptions")
    results = run_suite(TINY, [Row(absent), Row(outdated), Row(BY_NAME["ours"])])
    assert results["missing"] == {
        "absent": "ModuleNotFoundError: No module named 'no_such_package'",
        "outdated": f"torch.nn {torch.__version__} has no NoSuchOptions",
    }
    assert [row["title"] for row in results["rows"]] == ["ours"]
    for text in (markdown(results), table(results)):
        assert "missing: absent (ModuleNotFoundError: No module named 'no_such_package')" in text


def test_every_contender_has_a_row_and_a_name_of_its_own():
    assert len(BY_NAME) == len(CONTENDERS)
    assert {row.contender.name for row in all_rows()} == set(BY_NAME)
    assert len({(row.title, row.max_tokens) for row in all_rows()}) == len(all_rows())


def test_problem_fills_sequences_of_equal_length():
    problem = make_problem(load_states("random:8x50", 781))
    assert (problem.sequences, problem.length, problem.pairs, problem.tokens) == (6, 130, 3, 780)
    assert problem.cu_seqlens().tolist() == [0, 130, 260, 390, 520, 650, 780]
    assert (problem.shorter(4).sequences, problem.shorter(4).length) == (6, 4)
    with pytest.raises(ValueError, match="tokens: expected at least 2"):
        make_problem(load_states("random:8x50", 1))


@pytest.mark.parametrize("spec", ["smollm", "random:8", "random:8x", "random:axb", "8x50"])
def test_unknown_states_are_refused(spec: str):
    with pytest.raises(ValueError, match="states: expected 'smollm2' or 'random:DxV'"):
        load_states(spec, 4)


def test_more_tokens_than_there_are_are_refused():
    states = load_states("random:8x50", 10)
    with pytest.raises(ValueError, match=r"tokens: expected 1 to 10 \(random:8x50\), got 11"):
        states.first(11)


def test_collected_states_give_the_loss_of_the_model():
    model = make_model()
    sequences = [[5, 9, 17, 3], [8, 8, 100, 42, 7, 1]]
    states = collect_states(model, sequences, "tiny")
    logprob = dense_logprob(states.hidden_ND, states.weight_VD, states.targets_N)
    expected = []
    for ids in map(torch.tensor, sequences):
        logits = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        expected += [logits[i, target] for i, target in enumerate(shift_targets(ids)[:-1])]
    torch.testing.assert_close(logprob, torch.stack(expected), rtol=0, atol=2e-5)


def test_units_are_a_ratio_of_medians():
    item = timing.Timed(lambda: None, None)
    item.seconds, item.unit_seconds = [4.0, 6.0, 5.0], [1.0, 2.0, 4.0]
    figures = item.figures()
    assert figures["units"] == 2.5
    assert (figures["seconds"], figures["unit_seconds"], figures["repeats"]) == (5.0, 2.0, 3)
    ratios = torch.tensor([4.0, 3.0, 1.25], dtype=torch.float64)
    assert figures["units_20"] == pytest.approx(ratios.quantile(0.2).item())
    assert figures["units_80"] == pytest.approx(ratios.quantile(0.8).item())


def test_units_and_calls_take_turns():
    order = []

    def unit() -> None:
        order.append("u")

    calls = [timing.Timed(lambda name=name: order.append(name), unit) for name in "ab"]
    list(timing.measure_rounds(calls, repeats=3, limit_seconds=100))
    assert "".join(order) == "u" + "uaub" * 3
    assert [len(call.seconds) for call in calls] == [3, 3]


def test_slow_calls_sit_out_when_their_time_is_spent(monkeypatch):
    def unit() -> None: ...

    fast, slow = object(), object()
    monkeypatch.setattr(timing, "clock", lambda call: {id(slow): 40.0}.get(id(call), 1.0))
    calls = [timing.Timed(fast, unit), timing.Timed(slow, unit)]
    list(timing.measure_rounds(calls, repeats=5, limit_seconds=90.0))
    assert [len(call.seconds) for call in calls] == [5, 2]


def test_the_unit_is_the_product(problem: Problem):
    unit = timing.Unit(problem.hidden_ND, problem.weight_VD)
    unit()
    torch.testing.assert_close(unit.out_NV, problem.hidden_ND @ problem.weight_VD.T)


def test_peak_growth_sees_what_was_freed_and_nothing_else():
    def allocate_and_free() -> int:
        block = torch.ones(64 * MIB // 4)
        untouched = torch.empty(256 * MIB // 4)
        return block.numel() + untouched.numel()

    memory.peak_growth(lambda: None)
    _, growth = memory.peak_growth(allocate_and_free)
    assert 63 * MIB <= growth <= 67 * MIB
    _, growth = memory.peak_growth(lambda: torch.ones(1))
    assert growth <= 3 * MIB


@pytest.mark.slow
def test_memory_of_dense_and_ours_in_processes_of_their_own():
    """1000 x 8000 logits are 31 MiB: dense holds at least three such arrays in its backward, ours none."""
    jobs = {
        name: memory.Job(name, "ordinary", "full", "random:16x8000", 1000, "float32", 2)
        for name in ("dense PyTorch", "ours")
    }
    extra = {name: memory.measure_in_process(job) for name, job in jobs.items()}
    assert extra["dense PyTorch"] > 2.9 * 1000 * 8000 * 4
    assert 0 <= extra["ours"] < extra["dense PyTorch"]


@pytest.mark.slow
def test_a_process_that_fails_says_why():
    job = memory.Job("ours", "ordinary", "full", "random:16", 100, "float32", 2)
    with pytest.raises(RuntimeError, match="memory of ours: exit status 1, it said: ValueError: states"):
        memory.measure_in_process(job)


def test_a_run_leaves_whole_files(tmp_path, capsys):
    only = "^(dense PyTorch|ours|ours IS-DPO)$"
    arguments = ["--states", "random:16x300", "--tokens", "48", "--repeats", "2", "--no-memory", "--only", only]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "results.csv",
        "results.json",
        "results.md",
        "results.png",
    ]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["title"] for row in results["rows"]] == ["dense PyTorch", "ours", "ours IS-DPO"]
    for row in results["rows"]:
        assert all(figures["units"] > 0 and figures["repeats"] == 2 for figures in row["modes"].values())
    assert results["versions"]["torch"] == torch.__version__
    assert results["device"]["threads"] == torch.get_num_threads()
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    for text in (capsys.readouterr().out, (tmp_path / "results.md").read_text()):
        assert "dense PyTorch" in text
        assert "ours IS-DPO" in text


def test_csv_has_ligers_columns_and_milliseconds(tmp_path):
    results = run_suite(TINY, [Row(BY_NAME["ours"])])
    results["rows"][0]["modes"]["full"]["extra_bytes"] = 3 * MIB
    write_report(results, tmp_path)
    with open(tmp_path / "results.csv") as file:
        lines = list(csv.DictReader(file))
    found = [(line["kernel_operation_mode"], line["metric_name"], line["metric_unit"]) for line in lines]
    assert found == [("forward", "speed", "ms"), ("full", "speed", "ms"), ("full", "memory", "MB")]
    assert float(lines[1]["y_value_50"]) == pytest.approx(1e3 * results["rows"][0]["modes"]["full"]["seconds"])
    assert (float(lines[2]["y_value_50"]), lines[2]["kernel_name"], lines[2]["x_value"]) == (
        3.0,
        "linear_logprob",
        "48",
    )


def test_an_expression_that_matches_no_row_is_refused(capsys):
    assert main(["--only", "no such row"]) == 2
    assert "no row matches 'no such row'" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_whole(path, "old")
    monkeypatch.setattr("os.replace", _explode)
    with pytest.raises(TypeError):
        write_whole(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("results.json", "old")]


@pytest.mark.slow
def test_the_pytest_benchmark_suite_runs(tmp_path):
    options = [
        "--benchmark-only",
        "--states",
        "random:16x300",
        "--tokens",
        "48",
        "--repeats",
        "2",
        "-k",
        "ours-full or IS-DPO",
    ]
    command = [sys.executable, "-m", "pytest", "bench", *options, f"--benchmark-json={tmp_path / 'out.json'}"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert sorted(item["name"] for item in found) == ["bench_row[ours-full]", "bench_row[ours_IS-DPO-full]"]
    assert all(item["extra_info"]["units"] > 0 and item["stats"]["rounds"] == 2 for item in found)
