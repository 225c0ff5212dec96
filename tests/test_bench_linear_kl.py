"""The benchmark of linear_kl: a whole tiny run, and what keeps a wrong contender from getting a number."""

import json

import pytest
import torch

from bench import linear_kl as bench
from bench.problem import make_problem
from bench.states import load_states

TINY = ["--states", "random:16x300", "--tokens", "24", "--repeats", "2"]


@pytest.fixture
def without_trl(monkeypatch):
    monkeypatch.delitem(bench.CONTENDERS, "TRL chunked")


@pytest.mark.usefixtures("without_trl")
def test_a_whole_run(tmp_path, capsys):
    assert bench.main([*TINY, "--no-memory", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "linear_kl.json").read_text())
    assert len(results["rows"]) == 6
    for row in results["rows"]:
        assert not row["red"]
        assert max(row["error"].values()) < 1e-2
        assert all(row[mode]["units"] > 0 and row[mode]["repeats"] == 2 for mode in bench.MODES)
    assert "| ours |" in capsys.readouterr().out
    assert "| dense PyTorch |" in (tmp_path / "linear_kl.md").read_text()


@pytest.mark.usefixtures("without_trl")
def test_a_wrong_contender_gets_no_number(tmp_path, monkeypatch, capsys):
    wrong = lambda hidden, weight, problem, direction: 1.1 * bench.dense(hidden, weight, problem, direction)  # noqa: E731
    monkeypatch.setitem(bench.CONTENDERS, "dense PyTorch", wrong)
    assert bench.main([*TINY, "--no-memory", "--direction", "jsd", "--out", str(tmp_path)]) == 1
    first, _ = json.loads((tmp_path / "linear_kl.json").read_text())["rows"]
    assert first["red"]
    assert "full" not in first
    assert "| dense PyTorch | red |" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_is_measured_in_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "CONTENDERS", {"ours": bench.ours})
    assert bench.main([*TINY, "--direction", "forward", "--out", str(tmp_path)]) == 0
    [row] = json.loads((tmp_path / "linear_kl.json").read_text())["rows"]
    assert row["extra_bytes"] >= 0


def test_trl_agrees():
    problem = make_problem(load_states("random:16x300", 24))
    for direction in bench.DIRECTIONS:
        theirs, ours = (bench.make_call(name, problem, direction, "full")() for name in ("TRL chunked", "ours"))
        for a, b in zip(theirs, ours, strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)
