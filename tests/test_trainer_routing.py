"""Runs with `gradient = routed`: near the exact ones, the same however a step is cut, the same when resumed."""

import copy
import dataclasses
import signal
from pathlib import Path

import isdaa_trainer.step as step_module
import isdaa_trainer.train as train_module
import pytest
import torch
from isdaa_trainer.checkpoint import checkpoints
from isdaa_trainer.data import micro_batches, tokenize
from isdaa_trainer.model import Policy
from isdaa_trainer.records import example_from_record
from isdaa_trainer.routing import ORDER_FILE, SAMPLE_TOKENS, Routing, check_routing, sample
from isdaa_trainer.step import pair_logprob, train_step
from isdaa_trainer.train import InterruptedRunError, Trainer, main
from trainer_fixtures import (
    SMALL,
    VOCAB_SIZE,
    lines,
    make_config,
    make_model,
    make_model_folder,
    make_records,
    make_tokenizer,
    stop_after,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

import isdaa_kernels.backends.cpu.routed as cpu_routed
import isdaa_kernels.backends.reference.routed as definition
from isdaa_kernels import NoBackend, VocabOrder

# Coarse enough for 7 blocks of a small, flat softmax to leave something out; the default would route nearly all of it.
COARSE = {"gradient": "routed", "routed_tolerance": 0.03, "routed_block": 32, "routed_row_share": 0.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(tmp_path, model):
    """A run of 6 steps of 4 pairs with 3 pairs held out, and an order before steps 1, 3 and 5."""
    write_jsonl(tmp_path / "pairs.jsonl", make_records(15))
    return make_config(
        tmp_path, model, epochs=2, eval_fraction=0.2, warmup_steps=1, vocab_order_every=2, save_every=3, **COARSE
    )


@pytest.fixture(autouse=True)
def _quick_curves(monkeypatch):
    monkeypatch.setattr(train_module, "draw_curves", lambda steps, evaluations, target: target.touch())


@pytest.fixture
def policy():
    return Policy(make_model(), make_tokenizer(), torch.float32)


@pytest.fixture
def pairs(config):
    return [tokenize(example_from_record(record, "p"), make_tokenizer(), config) for record in make_records(6)]


@pytest.fixture
def reference(pairs, config):
    """Of another model, so that the pairs' weights differ by two orders of magnitude."""
    return pair_logprob(Policy(make_model(seed=1), make_tokenizer(), torch.float32), pairs, config, "test")


def one_step(policy, pairs, reference, config, scale, ordered=True):
    """(How far one step of size 1 along the gradient moves the parameters, the routing after it.)"""
    moved = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
    routing = Routing(config)
    routing.scale = scale
    if ordered and config.gradient == "routed":
        routing.make_order(moved, pairs)
    config = dataclasses.replace(config, clip_grad_norm=None)
    train_step(moved, torch.optim.SGD(moved.model.parameters(), lr=1.0), pairs, reference, config, 1, routing)
    steps = [a - b for a, b in zip(moved.model.parameters(), policy.model.parameters(), strict=True)]
    return torch.cat([step.detach().flatten() for step in steps]), routing


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_the_next_scale_is_the_mean_coefficient_of_the_step_by_hand(policy, pairs, reference, config):
    log_ratio = pair_logprob(policy, pairs, config, "test") - reference
    weight = log_ratio.sum(1).clamp(max=2).exp()
    coefficient = 0.1 * weight * torch.sigmoid(-0.1 * (log_ratio[:, 0] - log_ratio[:, 1])) / len(pairs)
    tokens = torch.tensor([len(pair.chosen) + len(pair.rejected) for pair in pairs])
    _, routing = one_step(policy, pairs, reference, config, scale=None)
    assert routing.scale == pytest.approx(((coefficient * tokens).sum() / tokens.sum()).item(), rel=1e-4)


def test_dead_sequences_do_not_count_and_a_dead_step_leaves_the_scale(config):
    routing = Routing(config)

    def follow(*gradients):
        routing.follow([(torch.tensor(g, dtype=torch.float64), torch.tensor([3] * len(g))) for g in gradients])
        return routing.scale

    assert follow([0.0, 0.0]) is None
    assert follow([0.5, 0.0, 1e-60], [-0.1, 0.3]) == pytest.approx(0.3)
    assert follow([1e-60, 0.0]) == pytest.approx(0.3)
    exact = Routing(make_config(Path(config.out), "m"))
    exact.follow([(torch.ones(2), torch.ones(2))])
    assert exact.scale is None
    assert exact.kernel_settings() == {}


def test_all_micro_batches_get_the_scale_of_the_step_before_and_the_order(
    policy, pairs, reference, config, monkeypatch
):
    asked = []
    kernel = step_module.linear_logprob
    monkeypatch.setattr(
        step_module,
        "linear_logprob",
        lambda *arguments, **options: asked.append(options) or kernel(*arguments, **options),
    )
    _, routing = one_step(policy, pairs, reference, config, scale=0.25)
    batches = len(list(micro_batches(pairs, config.max_tokens_per_micro_batch)))
    assert len(asked) == batches > 1
    for options in asked:
        assert options["gradient"] == config.routed(0.25)
        assert options["vocab_order"] is routing.order


def routed_pairs(policy, pairs, reference, config, limit, scale, monkeypatch):
    """How many (token, block) pairs of a step are routed in the gradient of hidden."""
    counts = []
    choose = definition.choose_routes

    def counting(*arguments):
        routes = choose(*arguments)
        counts.append(routes.hidden_BN.sum().item())
        return routes

    with monkeypatch.context() as patch:
        patch.setattr(definition, "choose_routes", counting)
        cut = dataclasses.replace(config, max_tokens_per_micro_batch=limit, backend="reference")
        one_step(policy, pairs, reference, cut, scale)
    return sum(counts), len(counts)


def test_a_step_is_routed_alike_however_it_is_cut(policy, pairs, reference, config, monkeypatch):
    whole, routing = one_step(
        policy, pairs, reference, dataclasses.replace(config, max_tokens_per_micro_batch=999), None
    )
    scale = routing.scale
    count = {
        (limit, given): routed_pairs(policy, pairs, reference, config, limit, given, monkeypatch)
        for limit in (45, 999)
        for given in (scale, None)
    }
    # 6 pairs of one micro-batch each or all in one; the mean of that one is the scale, those of the six are not
    assert count[45, scale] == (count[999, scale][0], 6)
    assert count[999, None] == count[999, scale]
    assert abs(count[45, None][0] - count[999, None][0]) > 10

    # What is left of the difference is the blocks' means, which are those of a micro-batch; it is below routing's own.
    apart, _ = one_step(policy, pairs, reference, dataclasses.replace(config, max_tokens_per_micro_batch=45), scale)
    exact_config = make_config(Path(config.out), "m", max_tokens_per_micro_batch=999)
    exact, _ = one_step(policy, pairs, reference, exact_config, None)
    assert 1e-4 < difference(whole, exact) < 0.01
    assert difference(apart, whole) < 1.5 * difference(whole, exact)
    assert difference(apart, exact) < 2 * difference(whole, exact)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vocab_order_every": 0},
        {"freeze_head": True, "gradient_checkpointing": True},
        {"objective": "dpo", "dtype": "bfloat16"},
    ],
    ids=["tied", "natural order", "frozen head", "bfloat16"],
)
def test_a_routed_run_follows_the_exact_one(config, changes, monkeypatch):
    monkeypatch.setattr(cpu_routed, "FLAT_SHARE", 1.0)  # or the tiny model's flat probabilities get the exact gradient
    config = dataclasses.replace(config, lr=1e-3, max_steps=6, **changes)
    none = dict.fromkeys(("routed_tolerance", "routed_block", "routed_row_share"))
    exact = dataclasses.replace(config, out=config.out + "-exact", gradient="exact", vocab_order_every=100, **none)
    for run in (config, exact):
        Trainer(run).train()
    losses, exact_losses = ([line["loss/mean"] for line in lines(run)] for run in (config, exact))
    # found: 0.7 % at most, of which 0.1 % is what Adam makes of rounding where a gradient is next to 0
    assert losses == pytest.approx(exact_losses, rel=0.02)
    assert max(exact_losses) / min(exact_losses) > 1.3  # there was a curve to follow
    assert losses != exact_losses
    final, exact_final = (lines(run, "evaluation.jsonl")[-1] for run in (config, exact))
    assert final["loss/mean"] == pytest.approx(exact_final["loss/mean"], rel=0.02)


def test_an_untied_head_is_trained_by_routed_gradients(config, tmp_path):
    untied = make_model_folder(tmp_path / "untied", tie_word_embeddings=False)
    run = dataclasses.replace(config, model=untied, max_steps=2)
    trainer = Trainer(run)
    before = trainer.policy.head().weight.detach().clone()
    trainer.train()
    rows = (trainer.policy.head().weight - before).abs().amax(1)
    assert (rows > 0).all()  # the means reach every row


def refreshed(config):
    found = lines(config, without=())
    assert all(line["vocab_order_seconds"] > 0 for line in found if "vocab_order_seconds" in line)
    return [line["step"] for line in found if "vocab_order_seconds" in line]


# 3: between two orders; 4: an order is due right after the checkpoint
@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(config, monkeypatch, stop):
    config = dataclasses.replace(config, save_every=None, eval_every=2)
    whole = dataclasses.replace(config, out=config.out + "-whole")
    Trainer(whole).train()
    assert refreshed(whole) == [1, 3, 5]
    trainer = Trainer(config)
    with monkeypatch.context() as patch:
        stop_after(patch, stop, signal.SIGTERM)
        with pytest.raises(InterruptedRunError):
            trainer.train()
    used = VocabOrder.load(checkpoints(Path(config.out))[-1] / ORDER_FILE).rows
    assert used.equal(trainer.routing.order.rows)

    resumed = Trainer(config, resume=True)
    assert resumed.routing.order.rows.equal(used)
    assert resumed.routing.scale == trainer.routing.scale > 0
    trainer.routing.make_order(trainer.policy, trainer.data.train)
    assert not trainer.routing.order.rows.equal(used)  # by now another: that of the checkpoint had to be read
    resumed.train()
    assert refreshed(config) == [1, 3, 5]
    assert lines(config) == lines(whole)
    assert lines(config, "evaluation.jsonl") == lines(whole, "evaluation.jsonl")
    a, b = (AutoModelForCausalLM.from_pretrained(Path(c.out) / "model").state_dict() for c in (config, whole))
    assert all(a[name].equal(b[name]) for name in b)


def test_the_natural_order_has_no_file_and_is_resumed_too(config, monkeypatch):
    config = dataclasses.replace(config, vocab_order_every=0, save_every=None)
    whole = dataclasses.replace(config, out=config.out + "-whole")
    Trainer(whole).train()
    trainer = Trainer(config)
    with monkeypatch.context() as patch:
        stop_after(patch, 3, signal.SIGTERM)
        with pytest.raises(InterruptedRunError):
            trainer.train()
    assert trainer.routing.order is None
    assert not (checkpoints(Path(config.out))[-1] / ORDER_FILE).exists()
    Trainer(config, resume=True).train()
    assert refreshed(config) == refreshed(whole) == []
    assert lines(config) == lines(whole)


def test_other_routing_is_no_resumption(config):
    config = dataclasses.replace(config, max_steps=1)
    Trainer(config).train()
    with pytest.raises(ValueError, match=r"vocab_order_every: the run in .* was started with 2, got 3"):
        Trainer(dataclasses.replace(config, vocab_order_every=3), resume=True)
    with pytest.raises(ValueError, match=r"routed_tolerance: the run in .* was started with 0\.03, got 0\.02"):
        Trainer(dataclasses.replace(config, routed_tolerance=0.02), resume=True)


def test_an_exact_run_has_no_order(config):
    exact = make_config(Path(config.out).parent, config.model, max_steps=2, save_every=2)
    Trainer(exact).train()
    assert not (checkpoints(Path(exact.out))[-1] / ORDER_FILE).exists()
    assert refreshed(exact) == []


def test_making_an_order_touches_nothing_and_is_the_same_each_time(policy, pairs, config):
    before = copy.deepcopy(policy.model.state_dict())
    random = torch.get_rng_state()
    orders = []
    for limit in (45, 999):
        routing = Routing(dataclasses.replace(config, max_tokens_per_micro_batch=limit))
        for _ in range(2):
            routing.make_order(policy, pairs)
            orders.append(routing.order.rows)
    assert orders[0].equal(orders[1])
    assert orders[2].equal(orders[3])
    assert not orders[0].equal(torch.arange(VOCAB_SIZE))
    assert torch.get_rng_state().equal(random)
    assert all(value.equal(before[name]) for name, value in policy.model.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_the_sample_is_the_first_pairs_that_are_enough(pairs):
    many = pairs * 20
    taken = sample(many)
    scored = [len(pair.chosen) + len(pair.rejected) for pair in taken]
    assert list(taken) == many[: len(taken)]
    assert sum(scored[:-1]) < SAMPLE_TOKENS <= sum(scored)
    assert sample(pairs) == pairs


def test_a_softcap_and_a_missing_backend_are_refused_at_once(config, policy, tmp_path, monkeypatch):
    gemma = Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=5.0)).eval()
    gemma.save_pretrained(tmp_path / "gemma")
    make_tokenizer().save_pretrained(tmp_path / "gemma")
    with pytest.raises(ValueError, match=r"softcap: expected None with gradient=Routed\(\.\.\.\), got 5"):
        Trainer(dataclasses.replace(config, model=str(tmp_path / "gemma"), attention="eager"))
    assert not Path(config.out).exists()
    monkeypatch.setattr("isdaa_kernels.backends.cpu.extension.native", None)
    with pytest.raises(NoBackend, match="the compiled part is missing"):
        check_routing(policy, config)


def test_the_command_trains_with_routed_gradients(config, capsys):
    names = ("model", "train_data", "out", "gradient", "routed_block", "vocab_order_every", "max_length")
    flags = [text for name in names for text in ("--" + name.replace("_", "-"), str(getattr(config, name)))]
    assert main([*flags, "--max-prompt-length", "32", "--max-steps", "3", "--pairs-per-step", "4"]) == 0
    assert refreshed(config) == [1, 3]
    assert "trained model" in capsys.readouterr().out
