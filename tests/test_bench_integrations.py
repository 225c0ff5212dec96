"""bench.integrations on a tiny problem: both sides of each case do the same work, and the report says what was measured."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from bench.contenders import Outcome, make_run
from bench.integrations import (
    BY_TITLE,
    CASES,
    WHICH,
    Job,
    Settings,
    apart,
    extra_bytes,
    load_problem,
    main,
    measure_case,
    run_job,
    run_suite,
)
from bench.integrations_report import markdown

TINY = Settings(states="random:16x300", tokens=48, repeats=2, memory=False)


@pytest.mark.parametrize("prompt", TINY.prompts)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_before_and_after_do_the_same_work(case, prompt):
    assert case.before.missing() is None
    row = measure_case(TINY, case, prompt)
    assert row["red"] is None
    assert set(row["apart"]) == {"value", "d_hidden", "d_weight"}
    assert row["scored"] == (48 if prompt == 0 else 24)
    assert row["before"]["repeats"] == row["after"]["repeats"] == 2


def test_after_runs_on_our_kernels_and_before_does_not(monkeypatch):
    """What each case is about: no call of ours on the one side, one at least on the other."""
    import isdaa_kernels.integrations.cross_entropy as cross_entropy
    import isdaa_kernels.integrations.liger as liger
    import isdaa_kernels.integrations.transformers as transformers
    import isdaa_kernels.integrations.trl as trl

    calls = []
    for module in (cross_entropy, liger, transformers, trl):
        for name in ("linear_logprob", "linear_logprob_stats"):
            if hasattr(module, name):
                own = getattr(module, name)
                monkeypatch.setattr(module, name, lambda *a, own=own, **k: calls.append(own) or own(*a, **k))
    problem = load_problem(TINY.states, TINY.tokens, 0.5)
    for case in CASES:
        for which in WHICH:
            calls.clear()
            make_run(case.contender(which), problem, "full")()
            assert bool(calls) == (which == "after"), case.title


def test_apart_is_relative():
    ones = Outcome(torch.ones(()), torch.ones(2, 2), torch.ones(3, 2))
    found = apart(ones, Outcome(torch.tensor(1.5), torch.ones(2, 2), 2 * torch.ones(3, 2)))
    assert found == pytest.approx({"value": 0.5, "d_hidden": 0.0, "d_weight": 1.0})


def test_a_side_that_fails_or_differs_is_red():
    case = BY_TITLE["Liger ORPO"]

    def failing(problem):
        def function(hidden_ND, weight_VD):
            raise RuntimeError("out of something")

        return function

    def other(problem):
        return lambda hidden_ND, weight_VD: (hidden_ND @ weight_VD.T).logsumexp(1).mean()

    dead = replace(case, after=replace(case.after, prepare=failing))
    assert measure_case(TINY, dead, 0.0)["red"] == "RuntimeError: out of something"
    wrong = measure_case(TINY, replace(case, after=replace(case.after, prepare=other)), 0.0)
    assert wrong["red"].startswith("before and after differ by")
    assert "before" not in wrong


def test_the_report_has_a_line_a_case_and_says_what_is_missing(tmp_path):
    case = BY_TITLE["torch linear_cross_entropy"]
    absent = replace(case, title="absent", before=replace(case.before, needs="no_such_module:name"))
    results = run_suite(TINY, [case, absent])
    text = markdown(results)
    assert "| torch linear_cross_entropy | `integrations.torch_nn` | 48 of 48 |" in text
    assert "| torch linear_cross_entropy | `integrations.torch_nn` | 24 of 48 |" in text
    assert "missing: absent (ModuleNotFoundError" in text
    red = {**results["rows"][0], "red": "it broke"}
    assert "| 48 of 48 | red | red |" in markdown({**results, "rows": [red]})
    assert json.loads(json.dumps(results)) == json.loads(json.dumps(results))


def test_memory_of_one_call():
    title = "torch linear_cross_entropy"
    job = Job(title, "after", TINY.states, TINY.tokens, 0.5, 1)
    assert abs(run_job(job)) < 1 << 30
    assert main(["--job", json.dumps(asdict(job))]) == 0
    wrong = extra_bytes(replace(TINY, states="random:0"), BY_TITLE[title], "after", 0.5)
    assert wrong["extra_bytes"] is None
    assert "states: expected" in wrong["memory_error"]


@pytest.mark.slow
def test_command(tmp_path, capsys):
    arguments = ["--states", TINY.states, "--tokens", "48", "--repeats", "1", "--prompts", "0.5", "--only", "torch"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["case"] for row in report["rows"]] == ["torch linear_cross_entropy"]
    assert report["rows"][0]["after"]["extra_bytes"] is not None
    assert (tmp_path / "report.md").read_text() == markdown(report)
    assert main(["--only", "nothing like it"]) == 2
    assert "no case matches" in capsys.readouterr().err
