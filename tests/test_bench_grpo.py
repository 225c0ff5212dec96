"""bench.grpo on a tiny problem: all contenders do the work that is written out, a wrong one gets no time, and the report has a line of
each."""

import json
from dataclasses import asdict, replace

import pytest

from bench import grpo
from bench.contenders import why_missing
from bench.grpo import Job, Settings, judge, main, measure_memory, run_job, run_suite
from bench.grpo_report import draw, markdown
from bench.grpo_work import BY_NAME, CASES, CONTENDERS, IGNORED, KL_WEIGHT, dense, make_run, make_work, truth
from bench.states import load_states
from isdaa_kernels import policy_loss
from isdaa_kernels.lm_head import LMHead
from isdaa_kernels.testing import dense_kl, dense_logprob, relative_error

TINY = Settings(states="random:16x300", tokens=48, padding=0.2, repeats=2, memory=False)
CHEAP = [c for c in CONTENDERS if c.name != "Liger"]  # which compiles


@pytest.fixture(scope="module")
def work():
    return make_work(load_states(TINY.states, TINY.tokens), TINY.padding)


def test_the_work(work):
    assert work.tokens == 48
    assert work.sequences == 2
    lengths = work.scored.view(work.rows).sum(1)
    assert lengths.tolist() == [24, 14]
    assert (work.targets_N[~work.scored] == IGNORED).all()
    exact_N = dense_logprob(work.reference_hidden_ND, work.weight_VD, work.targets_N)
    assert 0.01 < (work.reference_N - exact_N)[work.scored].abs().mean() < 0.3
    policy_N = dense_logprob(work.hidden_ND, work.weight_VD, work.targets_N)
    clipped = ((policy_N - work.old_N).exp() - 1).abs()[work.scored] > 0.2
    assert 0 < clipped.sum() < work.scored.sum() / 2


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_truth_is_the_loss_of_policy_loss(work, case):
    """Which the tests compare with TRL's and Liger's: here from dense fp64 log-probs, its value and gradients."""
    hidden_ND, weight_VD = (x.double().requires_grad_() for x in (work.hidden_ND, work.weight_VD))
    other = work.reference_hidden_ND.double(), work.weight_VD.double()
    logprob_N = dense_logprob(hidden_ND, weight_VD, work.targets_N)
    log_p = (hidden_ND @ weight_VD.T).log_softmax(-1)
    entropy_N = -(log_p.exp() * log_p).sum(-1)
    reference_N = dense_logprob(*other, work.targets_N) if case.reference_forward else work.reference_N
    kl = {}
    if case.full_kl:
        kl["token_kl"] = dense_kl(hidden_ND, LMHead(weight_VD), other[0], LMHead(other[1]), direction="reverse")
    loss = policy_loss(
        logprob_N, work.cu_seqlens(), mask=work.scored, advantages=work.advantages_S, old_logprob=work.old_N,
        reference_logprob=reference_N, objective="grpo", kl_weight=KL_WEIGHT, **kl,
    ).loss  # fmt: skip
    if case.entropy == "bonus":
        lengths_N = work.scored.view(work.rows).sum(1).repeat_interleave(work.length)
        loss = loss - 0.01 * (entropy_N.where(work.scored, 0) / lengths_N).sum() / work.sequences
    loss.backward()
    found = truth(work, case)
    value = found.value[0] if case.entropy == "metric" else found.value
    assert value.item() == pytest.approx(loss.item(), rel=1e-6)
    if case.entropy == "metric":
        assert found.value[1].item() == pytest.approx(entropy_N[work.scored].mean().item(), rel=1e-9)
    assert relative_error(found.d_hidden_ND, hidden_ND.grad) < 1e-6
    assert relative_error(found.d_weight_VD, weight_VD.grad) < 1e-6
    assert not found.d_hidden_ND[~work.scored].any()


# Liger compiles, so one case stands for it; the other is what a whole run does
@pytest.mark.parametrize(
    ("contender", "case"),
    [(c, CASES[name]) for c in CHEAP for name in c.cases] + [(BY_NAME["Liger"], CASES["reference"])],
    ids=lambda x: x.name,
)
def test_every_contender_does_the_work(work, contender, case):
    assert why_missing(contender.needs) is None
    row = judge(contender, work, case, truth(work, case))
    assert row["red"] is None
    assert max(row["error"].values()) < 1e-5
    frozen = make_run(contender, work, case, "frozen head")()
    assert frozen.d_weight_VD is None


def test_what_is_wrong_fails_or_is_not_installed(work):
    case, true = CASES["loss"], truth(work, CASES["loss"])

    def other(work, case):
        return lambda hidden_ND, weight_VD: 1.01 * dense(work, case)(hidden_ND, weight_VD)

    def dying(work, case):
        raise RuntimeError("out of something")

    wrong = judge(replace(BY_NAME["dense PyTorch"], prepare=other), work, case, true)
    assert wrong["red"].startswith("an error of 1.0e-02, expected at most 1e-03")
    dead = judge(replace(BY_NAME["dense PyTorch"], prepare=dying), work, case, true)
    assert dead["red"] == "RuntimeError: out of something"
    absent = replace(BY_NAME["ours"], name="absent", needs="no_such_module:name")
    results = run_suite(replace(TINY, cases=("loss",)), [replace(BY_NAME["ours"], prepare=dying), absent])
    assert results["missing"]["absent"].startswith("ModuleNotFoundError")
    text = markdown(results)
    assert "| ours | red | red | red | red |  |  |  |" in text
    assert "- missing: absent (ModuleNotFoundError" in text
    assert "- loss, ours: RuntimeError: out of something" in text


def test_a_whole_run(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "CONTENDERS", CHEAP)
    arguments = [
        "--states",
        TINY.states,
        "--tokens",
        "48",
        "--repeats",
        "2",
        "--no-memory",
        "--case",
        "loss",
        "full-kl",
    ]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [case["name"] for case in report["cases"]] == ["loss", "full-kl"]
    assert len(report["rows"]) == 6 + 3
    for row in report["rows"]:
        assert row["full"]["repeats"] == row["frozen head"]["repeats"] == 2
        assert row["full"]["units"] > 0
    text = (tmp_path / "report.md").read_text()
    assert text == markdown(report)
    ours = next(row for row in report["rows"] if row["contender"] == "ours")
    assert f"| ours | {ours['full']['units']:.2f} |" in text
    assert (tmp_path / "grpo.png").read_bytes().startswith(b"\x89PNG")
    assert draw(report).startswith(b"\x89PNG")


def test_memory_of_one_call(capsys):
    job = Job("ours", "full-kl", TINY.states, TINY.tokens, 0.2, 1)
    assert abs(run_job(job)) < 1 << 30
    assert main(["--job", json.dumps(asdict(job))]) == 0
    assert abs(int(capsys.readouterr().out)) < 1 << 30


@pytest.mark.slow
def test_memory_is_measured_in_another_process():
    row = {"contender": "ours", "case": "loss", "full": {}}
    measure_memory(row, TINY)
    assert row["full"]["extra_bytes"] > 0
    row = {"contender": "ours", "case": "loss", "full": {}}
    measure_memory(row, replace(TINY, states="random:0"))
    assert "states: expected" in row["memory_error"]
    assert "extra_bytes" not in row["full"]


def test_padding_that_leaves_nothing_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--padding", "0.5"])
    assert "--padding: expected a number in [0, 0.5), got 0.5" in capsys.readouterr().err
