"""`python -m bench.gpu_report` on the CPU and tiny problems: what goes wrong stays where it is, and what was found is kept."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import gpu_report_fakes
import pytest
import torch

from bench import gate, grpo_work
from bench.contenders import Contender, make_run
from bench.files import write_whole
from bench.gpu import device_tests, sharp, targets
from bench.gpu.accelerator import is_alive, make_stopwatch, measure_peak
from bench.gpu.contenders import find_backends, make_contenders
from bench.gpu.entry import FIRST, Entry
from bench.gpu.journal import OUT_OF_TIME, Journal, finite
from bench.gpu.lab import Lab
from bench.gpu.markdown import curve_points, render
from bench.gpu.measure import DIED, MEASURED, MISSING, NOT_RUN, RED, describe, measure, never_waits
from bench.gpu.picture import bar_rows, draw
from bench.gpu.report import write_report
from bench.gpu.sections import LOGPROBS, logprob_sections, two_model_sections
from bench.gpu.settings import PROBLEM_SETS, Settings, Shape
from bench.gpu.supervise import Supervisor
from bench.gpu.tasks import BITWISE, FORWARD, FROZEN_HEAD, FULL, NO_WAIT, Task, make_tasks
from bench.gpu.worker import FATAL, work
from bench.gpu_report import main
from bench.liger_csv import CSV_COLUMNS
from bench.states import ROOT
from bench.timing import Unit
from isdaa_kernels import linear_kl, linear_policy_loss

CPU = torch.device("cpu")
TINY = Settings("cpu", "tiny", repeats=2, gate_tokens=32)
FAKES = dataclasses.replace(TINY, contenders="gpu_report_fakes")
PROBLEMS = PROBLEM_SETS["tiny"]
FIRST_SHAPE = PROBLEMS.shapes[0]
MIB = 1 << 20


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab(TINY)


@pytest.fixture
def fakes_on_path(monkeypatch) -> None:
    paths = [str(Path(gpu_report_fakes.__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


def fake(name: str) -> Entry:
    [entry] = [entry for entry in gpu_report_fakes.make_contenders(FAKES) if entry.name == name]
    return entry


def measured(lab: Lab, name: str, mode: str = FULL, case: str = "ordinary") -> dict:
    return measure(lab, Task(FIRST_SHAPE, name, mode, case), fake(name))


# ---- the states


def test_sharp_states_are_as_sharp_as_the_docstring_says():
    weight = sharp.make_weight(8192, 512, torch.bfloat16, CPU, seed=0)
    states = sharp.make_sharp_states(weight, 256, seed=0)
    logprob = (states.hidden_ND.double() @ weight.double().T).log_softmax(1)
    entropy = -(logprob.exp() * logprob).sum(1)
    of_targets = logprob.gather(1, states.targets_N[:, None])
    assert entropy.mean().item() == pytest.approx(sharp.ENTROPY, abs=0.1)
    assert of_targets.mean().item() == pytest.approx(-2.0, abs=0.25)
    assert states.entropy == pytest.approx(entropy.mean().item(), abs=0.05)
    assert states.target_logprob == pytest.approx(of_targets.mean().item(), abs=0.05)
    assert entropy.quantile(0.1) < 0.9 < 3.2 < entropy.quantile(0.9)  # certain and open positions side by side
    top1 = (logprob.argmax(1) == states.targets_N).double().mean().item()
    assert 0.3 < top1 < 0.6


def test_targets_follow_zipf():
    """Of the law with weight 1 / (r + 2.7) the first 100 of 20000 ranks hold ln(102.7 / 2.7) / ln(20002.7 / 2.7) = 41 %."""
    weight = sharp.make_weight(20000, 32, torch.float32, CPU, seed=0)
    targets = sharp.make_sharp_states(weight, 1024, seed=0, lift=15.0).targets_N
    assert (targets < 100).double().mean().item() == pytest.approx(0.41, abs=0.06)
    assert targets.max() > 10000


def test_states_are_the_same_again_and_fewer_tokens_are_the_first_of_more():
    weight = sharp.make_weight(300, 16, torch.float32, CPU, seed=1)
    assert torch.equal(weight, sharp.make_weight(300, 16, torch.float32, CPU, seed=1))
    many, few = (sharp.make_sharp_states(weight, N, seed=1, lift=9.0) for N in (1100, 40))
    assert torch.equal(many.hidden_ND[:40], few.hidden_ND)
    assert torch.equal(many.targets_N[:40], few.targets_N)
    assert not torch.equal(many.hidden_ND[1024:1064], few.hidden_ND)
    assert torch.equal(sharp.make_upstream(1100, CPU, 1)[:40], sharp.make_upstream(40, CPU, 1))
    for more, less in zip(
        sharp.make_random_states(weight, 1100, 1), sharp.make_random_states(weight, 40, 1), strict=True
    ):
        assert torch.equal(more[:40], less)


# ---- one row


def test_a_good_contender_has_every_figure(lab: Lab):
    row = measured(lab, "dense")
    assert row["status"] == MEASURED
    assert row["repeats"] == 2
    assert row["units"] == pytest.approx(row["seconds"] / row["unit_seconds"])
    assert set(row["error"]) == {"sharp", "random"}
    for errors in row["error"].values():
        assert set(errors) == {"value", "d_hidden", "d_weight"}
        assert all(0 <= error < 5e-3 for error in errors.values())
    assert set(row["error_whole"]) == {"value", "d_hidden"}
    assert isinstance(row["extra_bytes"], int)
    assert row["states"]["entropy"] == pytest.approx(sharp.ENTROPY, abs=0.3)
    json.dumps(row, allow_nan=False)


def test_ours_tells_its_plan_and_a_frozen_head_wants_no_d_weight(lab: Lab):
    row = measured(lab, "ours (cpu)", FULL, FROZEN_HEAD)
    assert row["status"] == MEASURED
    assert "2.00 units" in row["plan"]
    assert set(row["error"]["sharp"]) == {"value", "d_hidden"}


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("wrong", RED, "wrong: value off by"),
        ("wrong late", RED, "wrong late: whole problem, as far as it was compared: value off by 5.0e-01"),
        ("raises", DIED, "FloatingPointError: no luck"),
        ("no memory", DIED, "OutOfMemoryError: out of memory. Tried to allocate 1 EiB."),
        ("absent", MISSING, "ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
@pytest.mark.parametrize("mode", [FULL, FORWARD])
def test_what_goes_wrong_has_a_sentence_and_no_time(lab: Lab, name: str, status: str, said: str, mode: str):
    row = measured(lab, name, mode)
    assert row["status"] == status
    assert row["reason"].startswith(said)
    assert not {"seconds", "units", "extra_bytes"} & set(row)


def test_same_bits_are_told_from_others(lab: Lab):
    def prepare(problem):
        def function(hidden, weight):
            noise = 1 + 1e-6 * torch.rand(problem.tokens)
            return gpu_report_fakes.dense_logprob(hidden, weight, problem.targets_N) * noise

        return function

    restless = Entry(Contender("restless", "restless", prepare), frozenset({FIRST}))
    assert measure(lab, Task(FIRST_SHAPE, "restless", BITWISE), restless)["ok"] is False
    assert measured(lab, "ours (cpu)", BITWISE)["ok"] is True
    row = measured(lab, "ours (cpu)", NO_WAIT)
    assert (row["status"], row["reason"]) == (NOT_RUN, "cpu: there is no device to wait for")


def test_a_pair_is_judged_whole(lab: Lab):
    name = "ours (cpu) IS-DPO"
    task = Task(PROBLEMS.pair, name, FULL)
    row = measure(lab, task, fake(name))
    assert row["status"] == MEASURED
    assert set(row["error_whole"]) == {"value", "d_hidden"}
    assert all(error < 5e-3 for error in row["error_whole"].values())
    problem = lab.problem(task)
    outcome = make_run(fake(name).contender, problem, FULL)()
    _, reason = lab.judge_whole(task, fake(name).contender, outcome._replace(value=outcome.value * 1.2))
    assert "value off by 2.0e-01" in reason
    wild = outcome._replace(d_weight_VD=outcome.d_weight_VD * float("inf"))
    assert "d_weight of the whole problem not finite" in lab.judge_whole(task, fake(name).contender, wild)[1]


def test_the_pair_has_log_ratios_of_about_one(lab: Lab):
    task = Task(PROBLEMS.pair, "ours (cpu) IS-DPO", FULL)
    problem = lab.problem(task)
    noise = (problem.reference_hidden_ND - problem.hidden_ND).float().std().item()
    assert noise == pytest.approx((1 / problem.length) ** 0.5, rel=0.1)
    assert (problem.sequences, problem.cu_seqlens().tolist()) == (2, [0, 32, 64])


# ---- two models

REAL = {entry.name: entry for entry in make_contenders(TINY)}
OF_TWO = [name for name, entry in REAL.items() if entry.contender.objective in ("reverse_kl", "jsd", "grpo_kl", "grpo")]


def of_two(lab: Lab, name: str, mode: str = FULL) -> dict:
    return measure(lab, Task(FIRST_SHAPE, name, mode), REAL[name])


# Liger compiles: its row is a slow test of its own. Triton is interpreted where the environment asks for it.
@pytest.mark.parametrize("name", [n for n in OF_TWO if not n.startswith(("Liger", "ours (triton)", "ours (cuda)"))])
def test_rows_of_two_models_are_right(lab: Lab, name: str):
    row = of_two(lab, name)
    assert row["status"] == MEASURED, row["reason"]
    bar = {"dense PyTorch reverse KL": 0.15}.get(name, 4e-3 if name.startswith("ours") or "GRPO" not in name else 5e-2)
    for errors in row["error"].values():
        assert set(errors) == {"value", "d_hidden", "d_weight"}
        assert all(error <= bar for error in errors.values())
    assert set(row["error_whole"]) == {"value", "d_hidden"}
    assert (row["plan"] is None) == (not name.startswith("ours"))


@pytest.mark.slow
def test_liger_takes_the_same_step(lab: Lab):
    row = of_two(lab, "Liger GRPO, k3")
    assert row["status"] == MEASURED, row["reason"]


def _other_direction(problem):
    """The rounded peer's bar is the widest."""

    def function(hidden, weight):
        log_p = (hidden @ weight.T).float().log_softmax(-1)
        log_q = (problem.reference_hidden_ND @ problem.weight_VD.T).float().log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    return function


def _another_weight(problem):
    reference = (problem.reference_hidden_ND, problem.weight_VD)
    return lambda hidden, weight: linear_kl(hidden, weight, *reference, direction="jsd", jsd_weight=0.45)


def _estimate(work):
    return grpo_work.ours()(work, grpo_work.CASES["loss"])


def _no_divergence(work):
    given = {"advantages": work.advantages_S, "old_logprob": work.old_N}
    return lambda hidden, weight: linear_policy_loss(hidden, weight, work.targets_N, work.cu_seqlens(), **given).loss


def _other_advantages(work):
    return grpo_work.trl(dataclasses.replace(work, advantages_S=work.advantages_S.flip(0)), grpo_work.CASES["loss"])


@pytest.mark.parametrize(
    ("name", "prepare"),
    [
        ("dense PyTorch reverse KL", _other_direction),
        ("TRL chunked JSD", _another_weight),
        ("ours (cpu) GRPO, exact KL", _estimate),
        ("ours (cpu) GRPO, exact KL", _no_divergence),
        ("TRL chunked GRPO, k3", _other_advantages),
    ],
)
def test_wrong_formulas_of_two_models_are_red(lab: Lab, name: str, prepare):
    wrong = dataclasses.replace(REAL[name].contender, name=f"{name}, {prepare.__name__}", prepare=prepare)
    errors, reason = lab.judge(Task(FIRST_SHAPE, wrong.name, FULL), wrong)
    assert "d_hidden off by" in reason or "value off by" in reason
    assert set(errors) == {"sharp", "random"}


@pytest.mark.parametrize("name", ["ours (cpu) reverse KL", "ours (cpu) GRPO, exact KL"])
def test_rows_of_two_models_are_judged_whole(lab: Lab, name: str):
    """With the contender's own bar: what the gate sees is right, a value or gradient of the whole problem is not."""
    task, contender = Task(FIRST_SHAPE, name, FULL), REAL[name].contender
    outcome = make_run(contender, lab.problem(task, contender.objective), FULL)()
    found, reason = lab.judge_whole(task, contender, outcome)
    assert reason is None
    assert set(found) == {"value", "d_hidden"}
    for part in ("value", "d_hidden_ND"):
        wrong = outcome._replace(**{part: getattr(outcome, part) * 1.02})
        assert f"{part.removesuffix('_ND')} off by 2." in lab.judge_whole(task, contender, wrong)[1]


def test_the_reference_is_a_little_off_and_a_step_has_numbers(lab: Lab):
    task = Task(FIRST_SHAPE, "ours (cpu) reverse KL", FULL)
    problem, work = lab.problem(task), lab.problem(task, "grpo")
    gap_NV = (problem.reference_hidden_ND - problem.hidden_ND).float() @ problem.weight_VD.float().T
    assert gap_NV.std().item() == pytest.approx(0.5, rel=0.1)
    assert gap_NV.diagonal().mean().abs() < 0.2  # noise made of the numbers that made the head would be 4 here
    assert 0.03 < lab.truth(task, "sharp", "reverse_kl").value.mean() < 0.3
    assert (work.sequences, work.length) == (8, 12)
    policy_N = gpu_report_fakes.dense_logprob(work.hidden_ND, work.weight_VD, work.targets_N)
    gap_N = (work.old_N - policy_N).abs()
    torch.testing.assert_close(gap_N, torch.where(gap_N < 0.2, 0.05, 0.4), rtol=0, atol=1e-4)
    assert 0.1 < (gap_N > 0.2).float().mean() < 0.5
    assert work.advantages_S.tolist() == pytest.approx([-1 + 3 * s / 7 for s in range(8)])
    few, many = (sharp.disturb(torch.zeros(N, 16), 0.5, 1) for N in (40, 1100))
    assert torch.equal(few, many[:40])
    assert not torch.equal(many[:40], many[1024:1064])


def test_rounded_log_probs_pass_no_clip_that_the_truth_does_not(lab: Lab):
    """On all tokens, as the whole run has them: one ratio on the other side of the clip would cost a tenth of the gradient."""
    work = lab.problem(Task(FIRST_SHAPE, "TRL chunked GRPO, k3", FULL), "grpo")
    contender = REAL["TRL chunked GRPO, k3"].contender
    found = gate.errors(make_run(contender, work, FULL)(), grpo_work.truth(work, grpo_work.CASES["loss"]))
    assert max(found.values()) < 3e-2


@pytest.mark.parametrize("mode", [FULL, BITWISE])
def test_a_backend_that_refuses_is_missing_with_its_sentence(lab: Lab, mode: str):
    [entry] = [e for e in gpu_report_fakes.make_contenders(FAKES) if e.name == "ours (cuda) reverse KL"]
    row = measure(lab, Task(FIRST_SHAPE, entry.name, mode), entry)
    assert row["status"] == MISSING
    assert row["reason"].startswith("NoBackend: backend 'cuda' refuses: ")


def test_a_scalar_peer_gets_equal_coefficients(lab: Lab):
    def prepare(problem):
        return lambda hidden, weight: -gpu_report_fakes.dense_logprob(hidden, weight, problem.targets_N).sum()

    scalar = Entry(Contender("scalar", "scalar", prepare, objective="sum"), frozenset({FIRST}))
    row = measure(lab, Task(FIRST_SHAPE, "scalar", FULL), scalar)
    assert row["status"] == MEASURED, row["reason"]
    small = lab.small(Task(FIRST_SHAPE, "scalar", FULL), "sharp")
    true = gate.truth(small, "sum")
    equal = gate.truth(dataclasses.replace(small, upstream_N=torch.full_like(small.upstream_N, -1)))
    assert true.value == -equal.value.sum()
    assert torch.equal(true.d_weight_VD, equal.d_weight_VD)


def test_the_unit_in_parts_is_the_product():
    hidden, weight = torch.randn(10, 4), torch.randn(7, 4)
    unit = Unit(hidden, weight, rows=4)
    unit()
    assert unit.out_NV.shape == (4, 7)
    torch.testing.assert_close(unit.out_NV[:2], hidden[8:] @ weight.T)


def test_the_cpu_has_a_clock_and_a_peak():
    assert 0.02 <= make_stopwatch(CPU)(lambda: time.sleep(0.02)) < 1
    block, growth = measure_peak(CPU, lambda: torch.ones(64 * MIB // 4))
    assert 60 * MIB <= growth <= 80 * MIB
    assert block.numel() == 64 * MIB // 4
    assert is_alive(CPU)


# ---- the order


def test_tasks_come_once_and_in_the_order_of_their_worth():
    entries = make_contenders(TINY)
    tasks = make_tasks(PROBLEMS, entries)
    assert len({task.key for task in tasks}) == len(tasks)
    places = {task: place for place, task in enumerate(tasks)}
    of_first = {e.name for e in entries if FIRST in e.groups}
    ordinary = [t for t in tasks if t.shape == FIRST_SHAPE and t.case == "ordinary" and t.mode in (FULL, FORWARD)]
    first = [t for t in ordinary if t.contender in of_first]
    assert tasks[: len(first)] == first
    assert {t.contender for t in first} == of_first
    best = entries[0].name
    order = [
        Task(FIRST_SHAPE, best, FULL),
        Task(FIRST_SHAPE, "TRL chunked", FULL),
        Task(FIRST_SHAPE, best, FULL, FROZEN_HEAD),
        Task(FIRST_SHAPE, best, BITWISE),
        Task(PROBLEMS.long, best, FULL),
        Task(PROBLEMS.long, f"{best}, tight", FULL),
        Task(PROBLEMS.pair, f"{best} IS-DPO", FULL),
        Task(FIRST_SHAPE, f"{best} reverse KL", FULL),
        Task(FIRST_SHAPE, f"{best} reverse KL", FORWARD),
        Task(FIRST_SHAPE, "dense PyTorch reverse KL", FORWARD),
        Task(FIRST_SHAPE, f"{best} reverse KL", BITWISE),
        Task(FIRST_SHAPE, f"{best} reverse KL", NO_WAIT),
        Task(FIRST_SHAPE, f"{best} GRPO, exact KL", FULL),
        Task(FIRST_SHAPE, "TRL chunked JSD", FULL),
        Task(FIRST_SHAPE, f"{best} GRPO, k3", FULL),
        Task(PROBLEMS.shapes[1], best, FULL),
        Task(PROBLEMS.shapes[1], "TRL chunked reverse KL", FULL),
        Task(FIRST_SHAPE, "Liger GRPO, k3", FULL),
        Task(FIRST_SHAPE._replace(N=32), best, FULL),
    ]
    assert [places[task] for task in order] == sorted(places[task] for task in order)
    assert {t.contender for t in tasks} == {entry.name for entry in entries}


def test_every_backend_that_takes_the_problem_is_a_contender():
    """Triton's interpreter is among them where the environment asks for it, but never the library's own choice."""
    names = find_backends(TINY)
    assert names[0] == "cpu"
    assert {"cpu", "reference"} <= set(names) <= {"cpu", "reference", "triton", "cuda"}
    entries = make_contenders(TINY)
    expected = {name: "isdaa" if name == "cpu" else f"isdaa_{name}" for name in names}
    for objective in (None, "reverse_kl"):
        own = [entry for entry in entries[::-1] if entry.backend and entry.contender.objective == objective]
        assert {entry.backend: entry.contender.provider for entry in own} == expected
    assert len({entry.name for entry in entries}) == len(entries)


def test_backends_that_take_a_divergence_stand_first_but_for_reference(monkeypatch):
    names, refusals = ("cuda", "triton", "reference"), {"cuda": "no"}
    monkeypatch.setattr("bench.gpu.contenders.plan", lambda *_, **__: mock.Mock(backend="cuda"))
    monkeypatch.setattr("bench.gpu.contenders.describe_backends", lambda _: [f"{name}: takes it" for name in names])
    monkeypatch.setattr("bench.gpu.contenders.refusal", lambda name, problem: refusals.get(name))
    assert find_backends(TINY) == ["cuda", "triton", "reference"]
    assert find_backends(TINY, logprobs=True) == ["triton", "cuda", "reference"]
    refusals["triton"] = "no"
    assert find_backends(TINY, logprobs=True) == ["cuda", "triton", "reference"]


def test_the_worker_stops_at_the_deadline():
    heard = []
    entries = {entry.name: entry for entry in gpu_report_fakes.make_contenders(FAKES)}
    tasks = [Task(FIRST_SHAPE, "dense", FORWARD), Task(FIRST_SHAPE, "dense", FULL)]
    assert work(FAKES, entries, tasks, time.time() - 1, heard.append) == 0
    assert [set(message) for message in heard] == [{"about"}]
    assert work(FAKES, entries, tasks[:1], time.time() + 100, heard.append) == 0
    assert [next(iter(message)) for message in heard[1:]] == ["about", "start", "row"]


# ---- whole runs


def run(tmp_path: Path, *options: str) -> tuple[int, dict]:
    base = ["--out", str(tmp_path), "--device", "cpu", "--problems", "tiny", "--repeats", "2", "--gate-tokens", "32"]
    status = main([*base, *options])
    return status, json.loads((tmp_path / "report.json").read_text())


@pytest.mark.slow
def test_a_whole_run_with_contenders_that_go_wrong(tmp_path, fakes_on_path, capsys):
    status, results = run(tmp_path, "--contenders", "gpu_report_fakes", "--row-limit", "12", "--no-tests")
    assert status == 0
    names = ["liger.csv", "memory.png", "report.json", "report.md", "time.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    rows = {row["key"]: row for row in results["rows"]}
    start = f"{FIRST_SHAPE} | "
    found = {name: rows[f"{start}{name} | ordinary | full"] for name in gpu_report_fakes.SPOILERS}
    assert {name: row["status"] for name, row in found.items()} == {
        "wrong": RED,
        "wrong late": RED,
        "raises": DIED,
        "no memory": DIED,
        "exits": DIED,
        "hangs": DIED,
    }
    assert found["exits"]["reason"] == "its process ended with status 5: a last word"
    assert found["hangs"]["reason"] == "no answer within 12 s"
    after = rows[f"{start}hangs | ordinary | forward"]
    assert (after["status"], after["reason"]) == (NOT_RUN, f"left out after {start}hangs | ordinary | full")
    assert not any("seconds" in row for row in found.values())
    for name in ("dense", "ours (cpu)", "ours (reference)"):
        assert all(
            r["status"] == MEASURED for r in rows.values() if r["contender"] == name and r["mode"] in (FULL, FORWARD)
        )
    assert results["finished"] is True
    text = (tmp_path / "report.md").read_text()
    assert "- wrong: wrong: value off by" in text
    assert "- absent: ModuleNotFoundError: No module named 'no_such_package'" in text
    assert "| faster than dense | " in text
    assert f"## Reverse KL of two models, {FIRST_SHAPE}" in text
    assert "- ours (cuda) reverse KL: NoBackend: backend 'cuda' refuses: " in text
    with open(tmp_path / "liger.csv") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == list(CSV_COLUMNS)
    assert {(line["metric_name"], line["metric_unit"]) for line in lines} == {("speed", "ms"), ("memory", "MB")}
    assert {line["kernel_provider"] for line in lines} == {"isdaa", "isdaa_reference", "isdaa_tight", "torch"}
    assert "two runs agree in every bit | yes: ours (cpu), ours (cpu) reverse KL" in capsys.readouterr().out


@pytest.mark.slow
def test_the_budget_leaves_out_what_comes_last(tmp_path, fakes_on_path, monkeypatch):
    """The hanging contender is the last but some on the first problem: what stands before it is there, what comes after is not."""
    options = ["--contenders", "gpu_report_fakes", "--no-tests", "--only", "ours|dense|hangs"]
    monkeypatch.setattr("bench.gpu.supervise.GRACE", 1.0)
    _, results = run(tmp_path, *options, "--budget", "30")
    rows = results["rows"]
    left = [row["reason"] == OUT_OF_TIME for row in rows]
    assert left == sorted(left), "a row was left out before one that ran"
    assert rows[0]["status"] == MEASURED
    assert left[-1]
    assert {row["status"] for row in rows if row["reason"] == OUT_OF_TIME} == {NOT_RUN}
    assert results["finished"] is True
    assert "out of time" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_keeps_what_it_has(tmp_path, fakes_on_path, number):
    options = ["--device", "cpu", "--problems", "tiny", "--contenders", "gpu_report_fakes", "--no-tests"]
    options += ["--repeats", "2", "--only", "ours|dense|hangs"]
    command = [sys.executable, "-m", "bench.gpu_report", "--out", str(tmp_path), *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for_a_row(tmp_path / "report.json", process)
        process.send_signal(number)
        process.wait(timeout=60)
    finally:
        process.kill()
    results = json.loads((tmp_path / "report.json").read_text())
    assert results["rows"][0]["status"] == MEASURED
    assert results["rows"][-1]["status"] == NOT_RUN
    assert results["finished"] is False
    if number == signal.SIGTERM:
        assert "interrupted" in results["notes"]
        assert "This run was cut short" in (tmp_path / "report.md").read_text()


def _wait_for_a_row(path: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and json.loads(path.read_text())["rows"][0]["status"] == MEASURED:
            return
        time.sleep(0.2)
    raise AssertionError("no row was measured")


def test_the_journal_is_whole_after_every_row(tmp_path, monkeypatch):
    tasks = [Task(FIRST_SHAPE, "dense", mode) for mode in (FULL, FORWARD)]
    rows = [describe(task, fake("dense")) for task in tasks]
    journal = Journal(tmp_path, FAKES, rows, ["command"])
    written = []
    monkeypatch.setattr(
        "bench.gpu.journal.write_whole", lambda path, text: written.append(text) or write_whole(path, text)
    )
    journal.record({"key": tasks[0].key, "status": MEASURED, "units": float("nan")})
    journal.blame(tasks[1].key, "it is gone")
    states = [[row["status"] for row in json.loads(text)["rows"]] for text in written]
    assert states == [[MEASURED, NOT_RUN], [MEASURED, DIED]]
    assert json.loads(written[-1])["rows"][0]["units"] == "nan"
    assert finite({"a": [1.0, float("inf"), (2, "x")]}) == {"a": [1.0, "inf", [2, "x"]]}


# ---- the tests of the device


def test_red_tests_are_counted_and_named(tmp_path):
    path = tmp_path / "test_something.py"
    path.write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('what', ['a b', 'c'])\n"
        "def test_red(what): assert what == 'c'\n"
        "def test_skipped(): pytest.skip('no')\n"
        "def test_broken(nothing): pass\n"
    )
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--device')\n")
    found = device_tests.run_device_tests("cpu", 120, [str(path)])
    assert (found["passed"], found["failed"], found["error"], found["skipped"]) == (1, 1, 1, 1)
    assert [name.split("::")[1] for name in found["failures"]] == ["test_red[a b]", "test_broken"]
    assert found["verdict"] == "red: exit status 1"
    assert device_tests.is_red(found)
    assert "assert 'a b' == 'c'" in found["output"]


@pytest.mark.slow
def test_tests_that_hang_are_red_with_what_they_had(tmp_path):
    path = tmp_path / "test_something.py"
    path.write_text("import time\ndef test_good(): pass\ndef test_hangs(): time.sleep(1000)\n")
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--device')\n")
    found = device_tests.run_device_tests("cpu", 15, [str(path)])
    assert found["verdict"] == "red: not done within 15 s"
    assert found["passed"] == 1


def test_without_pytest_the_report_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = device_tests.run_device_tests("cpu", 1)
    assert found["verdict"] == "pytest is not installed"
    assert not device_tests.is_red(found)
    target = targets.judge_targets([], PROBLEMS, found)[0]
    assert (target["measured"], target["met"]) == ("pytest is not installed", None)


def test_device_tests_are_found():
    assert device_tests.find_device_tests("cpu") == ["tests/test_device.py"]
    assert device_tests.find_device_tests("cuda")[0] == "tests/test_device.py"


def test_lines_of_parallel_tests_are_read_too():
    output = (
        "[gw3] [ 12%] PASSED tests/test_device.py::test_a[x y] \n[gw0] [100%] FAILED tests/test_device.py::test_b\n"
    )
    found = device_tests._result(["python"], output, "red: exit status 1", 1)
    assert (found["passed"], found["failed"], found["failures"]) == (1, 1, ["tests/test_device.py::test_b"])


def test_red_device_tests_shout_and_fail_the_run(tmp_path, monkeypatch, capsys):
    red = {"command": "python -m pytest", "verdict": "red: exit status 1", "passed": 3, "failed": 1, "error": 0}
    red |= {"skipped": 0, "failures": ["tests/test_device.py::test_x"], "tail": ["1 failed"], "output": "all of it"}
    monkeypatch.setattr("bench.gpu_report.run_device_tests", lambda *_: dict(red))
    status, results = run(tmp_path, "--only", "no such row")
    assert status == 1
    assert results["device_tests"]["failures"] == ["tests/test_device.py::test_x"]
    text = (tmp_path / "report.md").read_text()
    assert "# THE TESTS OF THE DEVICE ARE RED" in text
    assert "- failed: tests/test_device.py::test_x" in text
    assert "| red: exit status 1; 3 passed, 1 failed, 0 skipped | **NOT MET** |" in text
    assert (tmp_path / "device_tests.txt").read_text() == "all of it"
    assert "THE TESTS OF THE DEVICE ARE RED: tests/test_device.py::test_x" in capsys.readouterr().err


# ---- targets, tables, pictures from made-up figures

FULL_PROBLEMS = PROBLEM_SETS["full"]
MAIN = FULL_PROBLEMS.shapes[0]


def made_up(contender: str, provider: str, shape: Shape = MAIN, mode: str = FULL, units: float = 4.0, **more) -> dict:
    """A measured row; a unit takes 10 ms."""
    errors = {kind: {"value": 1e-5, "d_hidden": 2e-3, "d_weight": 2e-3} for kind in ("sharp", "random")}
    row = {"contender": contender, "provider": provider, "shape": list(shape), "mode": mode, "case": "ordinary"}
    row |= {
        "objective": None,
        "status": MEASURED,
        "reason": None,
        "note": "",
        "error": errors,
        "repeats": 7,
        "plan": None,
    }
    row |= {"units": units, "units_20": units * 0.98, "units_80": units * 1.03, "extra_bytes": 400 * MIB}
    row |= {"seconds": units / 100, "seconds_20": units / 102, "seconds_80": units / 98, "unit_seconds": 0.01} | more
    return row | {"key": f"{shape} | {contender} | {row['case']} | {mode}"}


def verdicts(rows: list[dict]) -> dict[str, bool | None]:
    return {t["target"]: t["met"] for t in targets.judge_targets(rows, FULL_PROBLEMS, None)}


def only(found: dict[str, bool | None], start: str) -> bool | None:
    [met] = [met for target, met in found.items() if target.startswith(start)]
    return met


def test_nothing_measured_meets_nothing():
    assert set(verdicts([]).values()) == {None}


@pytest.mark.parametrize(
    ("row", "target", "met"),
    [
        (made_up("ours", "isdaa", mode=FORWARD, units=1.3), "forward: at most 1.3", True),
        (made_up("ours", "isdaa", mode=FORWARD, units=1.31), "forward: at most 1.3", False),
        (made_up("ours", "isdaa", units=4.6), "forward and backward: at most 4.6", True),
        (made_up("ours", "isdaa", units=4.61), "forward and backward: at most 4.6", False),
        (made_up("ours", "isdaa_reference", units=9), "forward and backward: at most 4.6", None),
        (made_up("ours", "isdaa", MAIN._replace(N=1024), units=9), "forward and backward: at most 4.6", None),
        (made_up("ours", "isdaa", units=3.4, case=FROZEN_HEAD), "frozen head", True),
        (made_up("ours", "isdaa", units=3.5, case=FROZEN_HEAD), "frozen head", False),
        (made_up("ours", "isdaa", extra_bytes=512 * MIB), "peak memory", True),
        (made_up("ours", "isdaa", extra_bytes=512 * MIB + 1), "peak memory", False),
        (made_up("ours", "isdaa", FULL_PROBLEMS.shapes[1], extra_bytes=600 * MIB), "peak memory", None),
        (made_up("ours", "isdaa", objective="reverse_kl", units=9), "forward and backward: at most 4.6", None),
        (made_up("ours", "isdaa", objective="reverse_kl", extra_bytes=1024 * MIB), "reverse KL, peak memory", True),
        (made_up("ours", "isdaa", objective="reverse_kl", extra_bytes=1024 * MIB + 1), "reverse KL, peak", False),
        (made_up("ours", "isdaa", objective="jsd", extra_bytes=1), "reverse KL, peak memory", None),
        (made_up("ours", "isdaa", extra_bytes=1), "reverse KL, peak memory", None),
        (made_up("ours", "isdaa", mode=BITWISE, ok=True), "two runs agree", True),
        (made_up("ours", "isdaa", mode=BITWISE, ok=False), "two runs agree", False),
        (made_up("ours", "isdaa", mode=NO_WAIT, ok=False, reason="it waits"), "forward and backward never wait", False),
        (made_up("ours", "isdaa", mode=NO_WAIT, status=NOT_RUN, reason="cpu"), "forward and backward never wait", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_target_at_its_bar(row: dict, target: str, met: bool | None):
    assert only(verdicts([row]), target) is met


# 262144 tokens: 4 D bytes a token are 2048 MiB, 64 bytes a token are 16 MiB
@pytest.mark.parametrize(
    ("mib", "units", "met"),
    [(2560, 4.6, True), (2560, 4.7, False), (2561, 4.6, False), (528, 5.4, True), (529, 5.4, False), (528, 5.5, False)],
)
def test_the_long_run_has_two_ways_to_meet_its_target(mib: int, units: float, met: bool):
    row = made_up("ours", "isdaa", FULL_PROBLEMS.long, units=units, extra_bytes=mib * MIB)
    assert only(verdicts([row]), str(FULL_PROBLEMS.long)) is met
    hopeless = made_up("ours, tight", "isdaa_tight", FULL_PROBLEMS.long, units=9, extra_bytes=1)
    assert only(verdicts([hopeless, row]), str(FULL_PROBLEMS.long)) is met


def test_the_divergence_is_faster_than_both_peers():
    def found(trl: float | None, dense: float | None) -> dict:
        rows = [made_up("ours", "isdaa", objective="reverse_kl", units=6), made_up("other", "trl", units=1)]
        for provider, units in (("trl", trl), ("torch", dense)):
            rows += [made_up(provider, provider, objective="reverse_kl", units=units)] if units else []
        rows += [made_up("trl", "trl", mode=FORWARD, objective="reverse_kl", units=1)]
        told = targets.judge_targets(rows, FULL_PROBLEMS, None)
        return next(t for t in told if t["target"].startswith("reverse KL, forward and backward"))

    assert (found(12, 8)["met"], found(12, 8)["measured"]) == (
        True,
        "0.50 of the time of trl, 0.75 of the time of torch",
    )
    assert [found(*units)["met"] for units in ((12, 6), (5, None), (12, None), (None, None))] == [
        False,
        False,
        None,
        None,
    ]


def test_one_check_that_fails_is_named():
    rows = [made_up("ours", "isdaa", mode=BITWISE, ok=True)]
    rows += [made_up("ours reverse KL", "isdaa", mode=BITWISE, ok=False, objective="reverse_kl")]
    told = next(t for t in targets.judge_targets(rows, FULL_PROBLEMS, None) if t["target"].startswith("two runs"))
    assert (told["met"], told["measured"]) == (False, "no: ours reverse KL, they differ")


def test_one_slower_row_is_enough_to_be_slower_than_a_peer():
    other = FULL_PROBLEMS.shapes[1]
    rows = [made_up("ours", "isdaa", units=4.0), made_up("ours", "isdaa", other, units=4.0)]
    rows += [
        made_up("fast", "fast", units=5.0, objective="sum"),
        made_up("fast", "fast", other, units=3.9, objective="sum"),
    ]
    rows += [made_up("slow", "slow", units=4.01), describe(Task(MAIN, "absent", FULL), fake("absent"))]
    rows[-1] |= {"status": DIED, "reason": "it died"}
    found = {t["target"]: t for t in targets.judge_targets(rows, FULL_PROBLEMS, None)}
    assert found["faster than fast"]["met"] is False
    assert found["faster than fast"]["measured"].startswith(
        f"0.80 to 1.03 of its time in 2 rows, the largest at {other}"
    )
    assert found["faster than slow"]["met"] is True
    assert (found["faster than absent"]["met"], found["faster than absent"]["measured"]) == (None, "it died")


def test_a_pair_is_compared_with_the_same_objective():
    ours = [
        made_up(f"ours {name}", "isdaa", FULL_PROBLEMS.pair, units=u, objective=name)
        for name, u in (("dpo", 5), ("is_dpo", 9))
    ]
    peer = made_up("peer", "peer", FULL_PROBLEMS.pair, units=6, objective="dpo")
    assert verdicts([*ours, peer])["faster than peer"] is True


def test_errors_are_judged_against_dense_fp32():
    dense = made_up("dense fp32", "torch_fp32")
    for factor, met in ((1.49, True), (1.6, False)):
        errors = {kind: {part: e * factor for part, e in found.items()} for kind, found in dense["error"].items()}
        divergence = made_up("ours reverse KL", "isdaa", objective="reverse_kl")  # of an error that is not judged here
        assert only(verdicts([dense, made_up("ours", "isdaa", error=errors), divergence]), "errors") is met


def made_up_results() -> dict:
    """As a whole run leaves them: the first problem, the pair and the curve of four contenders."""
    people = (
        ("ours (triton)", "isdaa", 4.4),
        ("TRL chunked", "trl", 5.2),
        ("CCE exact", "cce_exact", 7.9),
        ("dense PyTorch", "torch", 5.6),
    )
    rows = []
    for place, (name, provider, units) in enumerate(people):
        rows += [made_up(name, provider, mode=mode, units=u) for mode, u in ((FORWARD, units / 3.5), (FULL, units))]
        rows += [made_up(name, provider, units=units - 1, case=FROZEN_HEAD, extra_bytes=50 * MIB)]
        rows += [
            made_up(f"{name} DPO", provider, FULL_PROBLEMS.pair, units=units + 1.2, objective="dpo", unit_seconds=0.08)
        ]
        for tokens in FULL_PROBLEMS.curve:
            extra = (place + 1) * 200 * MIB if provider != "torch" else tokens * MAIN.V * 12
            more = {"seconds": units * tokens / 800000, "unit_seconds": tokens / 800000, "extra_bytes": extra}
            rows += [made_up(name, provider, MAIN._replace(N=tokens), units=units, **more)] if tokens != MAIN.N else []
    for objective, units in (("reverse_kl", 6.5), ("jsd", 7), ("grpo_kl", 6.6), ("grpo", 4.4)):
        for name, provider, factor in (("ours (triton)", "isdaa", 1), ("TRL chunked", "trl", 1.6)):
            more = {"objective": objective, "units": units * factor, "extra_bytes": 900 * MIB}
            rows += [made_up(f"{name} {objective}", provider, **more)]
    rows += [made_up("ours (triton) reverse_kl", "isdaa", FULL_PROBLEMS.shapes[-1], objective="reverse_kl")]
    rows += [
        made_up(
            "dense PyTorch DPO", "torch", FULL_PROBLEMS.pair, status=DIED, reason="OutOfMemoryError: no", mode=FORWARD
        )
    ]
    about = {
        "command": [],
        "date": "2026-01-01T00:00:00+00:00",
        "commit": "abc",
        "settings": vars(Settings()),
        "seconds": 400.0,
    }
    about |= {
        "device": {"name": "NVIDIA H200", "driver": "580"},
        "versions": {"torch": "2.11.0", "triton": "3.6.0", "trl": None},
    }
    about |= {"backends": ["triton: takes it"], "device_tests": None, "rows": rows, "notes": [], "finished": True}
    return about | {"targets": targets.judge_targets(rows, FULL_PROBLEMS, None)}


def test_the_report_of_made_up_figures():
    results = made_up_results()
    text = render(results)
    assert "NVIDIA H200 (driver 580). Commit: abc; 2026-01-01T00:00:00+00:00; 400 s." in text
    assert "not installed: trl" in text
    assert "A unit took 10.00 ms (861 TFLOP/s)." in text
    line = "| ours (triton) | 1.26 | 4.40 | 4.31-4.53 | 7 | 44.0 | 400 | 400 | 1.0e-05 / 1.0e-05 | 2.0e-03 / 2.0e-03 | 2.0e-03 / 2.0e-03 |"
    assert line in text
    assert "| CCE exact, frozen head |  | 6.90 |" in text
    assert f"- dense PyTorch DPO: OutOfMemoryError: no ({FULL_PROBLEMS.pair}, ordinary, forward)" in text
    for section in two_model_sections(FULL_PROBLEMS):
        part = text.split(f"## {section.title}\n")[1].split("\n## ")[0]
        assert "Measured: " in part
        [objective] = section.objectives
        lines = [line for line in part.splitlines() if line.startswith(("| ours", "| TRL"))]
        others = section.shape != MAIN
        assert [line.split(" | ")[0] for line in lines] == [
            f"| {name} {objective}" for name in ("ours (triton)", "TRL chunked")[: 1 if others else 2]
        ]
    of_first = text.split("(tokens x hidden size x vocabulary)")[1]
    assert "reverse_kl" not in of_first
    assert "This run was cut short" not in text
    assert "This run was cut short" in render({**results, "finished": False})


def test_the_pictures_of_made_up_figures():
    results = made_up_results()
    pictures = draw(results)
    assert {name: data[:4] for name, data in pictures.items()} == {"time.png": b"\x89PNG", "memory.png": b"\x89PNG"}
    bars = bar_rows(logprob_sections(FULL_PROBLEMS)[0].select(results["rows"]))
    assert [row["title"] for row in bars[:2]] == ["ours (triton)", "ours (triton), frozen head"]
    assert list(bars[0]["modes"]) == [FORWARD, FULL]
    assert {row["objective"] for row in logprob_sections(FULL_PROBLEMS)[0].select(results["rows"])} <= set(LOGPROBS)
    points = curve_points([*results["rows"], made_up("x", "x", objective="jsd")], FULL_PROBLEMS)
    assert set(points) == {"ours (triton)", "TRL chunked", "CCE exact", "dense PyTorch"}
    assert sorted(points["TRL chunked"]) == list(FULL_PROBLEMS.curve)
    assert draw({**results, "rows": []})["time.png"].startswith(b"\x89PNG")


def test_without_matplotlib_the_rest_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bench.gpu.picture", None)
    paths = write_report(made_up_results(), tmp_path)
    assert sorted(path.name for path in paths) == ["liger.csv", "report.md"]
    assert "- no pictures: ModuleNotFoundError" in (tmp_path / "report.md").read_text()


def test_the_report_can_be_made_again_from_its_json(tmp_path, capsys):
    write_whole(tmp_path / "report.json", json.dumps(made_up_results()))
    assert main(["--out", str(tmp_path), "--render"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.json",
        "report.md",
        "liger.csv",
        "time.png",
        "memory.png",
    }
    assert "met     forward: at most 1.3 units | 1.26" in capsys.readouterr().out


# ---- what only a CUDA device does, with its functions replaced


class FakeCuda:
    """Stands for torch.cuda: events a second apart, 100 bytes held, 350 at the peak after a reset."""

    def __init__(self, monkeypatch) -> None:
        self.said: list[str] = []
        self.peak = 1000
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)
        monkeypatch.setattr(torch.cuda, "Event", self._event)
        for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda name=name: self._say(name))
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self._say)

    def _say(self, name: str) -> None:
        self.said.append(name)
        self.peak = 100 if name.startswith("reset") else self.peak

    def _event(self, enable_timing: bool) -> mock.Mock:
        event = mock.Mock(elapsed_time=lambda end: 1000.0)
        event.record.side_effect = lambda: self._say("record")
        event.synchronize.side_effect = lambda: self._say("wait")
        return event


def test_cuda_is_timed_between_events(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    assert make_stopwatch(torch.device("cuda"))(lambda: cuda._say("call")) == 1.0
    assert cuda.said == ["synchronize", "record", "call", "record", "wait"]


def test_cuda_memory_is_the_peak_since_before_the_call(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def call() -> str:
        cuda.peak = 350
        return "result"

    assert measure_peak(torch.device("cuda"), call) == ("result", 250)
    assert cuda.said[-2:] == ["reset_peak_memory_stats", "synchronize"]


def test_waiting_is_forbidden_during_the_call_alone(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    assert never_waits(lambda: cuda._say("call")) == {"ok": True, "status": MEASURED}
    assert cuda.said == ["error", "call", "default"]

    def wait() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    found = never_waits(wait)
    assert (found["ok"], found["reason"]) == (False, "RuntimeError: called a synchronizing CUDA operation")
    assert cuda.said[-1] == "default"
    with pytest.raises(RuntimeError, match="another reason"):
        never_waits(mock.Mock(side_effect=RuntimeError("another reason")))


def test_a_broken_device_ends_the_worker(monkeypatch):
    monkeypatch.setattr("bench.gpu.worker.is_alive", lambda device: False)
    heard = []
    entries = {entry.name: entry for entry in gpu_report_fakes.make_contenders(FAKES)}
    tasks = [Task(FIRST_SHAPE, name, FULL) for name in ("absent", "raises", "dense")]
    assert work(FAKES, entries, tasks, time.time() + 100, heard.append) == FATAL
    assert [message["row"]["contender"] for message in heard if "row" in message] == ["absent", "raises"]


def test_the_supervisor_goes_on_with_a_new_worker(tmp_path, monkeypatch):
    """The first breaks the device in "raises", the second loses its process in the same contender elsewhere."""
    other = PROBLEMS.shapes[1]
    tasks = [Task(FIRST_SHAPE, "raises", FULL), Task(FIRST_SHAPE, "raises", FORWARD), Task(other, "raises", FULL)]
    tasks += [Task(PROBLEMS.long, "raises", FULL), Task(FIRST_SHAPE, "dense", FULL)]
    asked = []
    died = {"key": tasks[0].key, "status": DIED, "reason": "illegal memory access"}
    scripts = [
        ([{"about": {"backends": []}}, {"start": tasks[0].key}, {"row": died}], FATAL),
        ([{"about": {"backends": []}}, {"start": tasks[2].key}], -9),
        ([{"start": tasks[4].key}, {"row": {"key": tasks[4].key, "status": MEASURED}}], 0),
    ]

    def worker(settings, keys, deadline):
        asked.append(list(keys))
        messages, status = scripts[len(asked) - 1]
        return mock.Mock(messages=lambda *_: iter(messages), end=lambda: status, last_words=lambda: "Killed")

    monkeypatch.setattr("bench.gpu.supervise.Worker", worker)
    rows = [describe(task, fake(task.contender)) for task in tasks]
    Supervisor(FAKES, Journal(tmp_path, FAKES, rows, []), tasks, time.time() + 100).run()
    keys = [task.key for task in tasks]
    assert asked == [keys, keys[2:], keys[4:]]
    assert [row["status"] for row in rows] == [DIED, NOT_RUN, DIED, NOT_RUN, MEASURED]
    assert rows[1]["reason"] == f"left out after {keys[0]}"
    assert rows[2]["reason"] == "its process ended with status -9: Killed"
    assert rows[3]["reason"] == f"left out after {keys[2]}"


def test_a_worker_that_cannot_start_ends_the_run_with_its_sentence(tmp_path, monkeypatch):
    broken = mock.Mock(messages=lambda *_: iter([]), end=lambda: 1, last_words=lambda: "ImportError: no torch")
    monkeypatch.setattr("bench.gpu.supervise.Worker", lambda *_: broken)
    tasks = [Task(FIRST_SHAPE, "dense", FULL)]
    journal = Journal(tmp_path, FAKES, [describe(tasks[0], fake("dense"))], [])
    Supervisor(FAKES, journal, tasks, time.time() + 100).run()
    assert journal.results["notes"] == [
        "the measuring process was lost between rows: its process ended with status 1: ImportError: no torch"
    ]
    [row] = journal.results["rows"]
    assert (row["status"], row["reason"]) == (NOT_RUN, journal.results["notes"][0])
