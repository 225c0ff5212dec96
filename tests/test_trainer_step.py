import copy
import dataclasses
import math

import pytest
import torch
from isdaa_trainer.data import micro_batches, pack, tokenize
from isdaa_trainer.model import Policy
from isdaa_trainer.records import example_from_record
from isdaa_trainer.step import NonFiniteError, evaluate, merge_metrics, pair_logprob, train_step
from torch.nn.functional import logsigmoid
from trainer_fixtures import make_config, make_model, make_records, make_tokenizer


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path, "unused", clip_grad_norm=None)


@pytest.fixture
def policy():
    return Policy(make_model(), make_tokenizer(), torch.float32)


@pytest.fixture
def reference_policy():
    return Policy(make_model(seed=1), make_tokenizer(), torch.float32)


@pytest.fixture
def pairs(config):
    records = enumerate(make_records(6), start=1)
    return [tokenize(example_from_record(r, f"p.jsonl line {i}"), make_tokenizer(), config) for i, r in records]


def dense_logprob(model, prompt, completion):
    """One sequence by itself, with its logits: what the packed kernels must equal."""
    logprob = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    positions = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return logprob[positions, list(completion)].sum()


def dense_logprobs(model, pairs):
    return torch.stack(
        [
            torch.stack(
                [dense_logprob(model, pair.prompt, pair.chosen), dense_logprob(model, pair.prompt, pair.rejected)]
            )
            for pair in pairs
        ]
    )


def test_pair_logprob_equals_dense_sequences_one_by_one(policy, pairs, config):
    got = pair_logprob(policy, pairs, config, "test")
    assert got.dtype == torch.float64
    with torch.no_grad():
        torch.testing.assert_close(got, dense_logprobs(policy.model, pairs).double(), rtol=1e-5, atol=1e-5)
    assert pair_logprob(policy, [], config, "test").shape == (0, 2)


def is_dpo(logprob, reference, behaviour, beta=0.1, epsilon=1.0):
    """The formula by hand, [P, 2] each."""
    weight = (logprob - behaviour).sum(1).clamp(max=2 * epsilon).exp().detach()
    margin = (logprob - reference)[:, 0] - (logprob - reference)[:, 1]
    return weight, margin, -(weight * logsigmoid(beta * margin))


@pytest.mark.parametrize("behaviour", [False, True], ids=["reference", "behaviour"])
def test_one_step_equals_the_formula_with_dense_logits(policy, reference_policy, pairs, config, behaviour):
    reference = pair_logprob(reference_policy, pairs, config, "test")
    written_by = reference
    if behaviour:
        written_by = reference + torch.linspace(-1, 1, 12, dtype=torch.float64).view(6, 2)
        pairs = [
            dataclasses.replace(pair, behaviour=tuple(sums))
            for pair, sums in zip(pairs, written_by.tolist(), strict=True)
        ]
    twin = copy.deepcopy(policy.model)
    weight, margin, losses = is_dpo(dense_logprobs(twin, pairs).double(), reference, written_by)
    losses.mean().backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in twin.parameters()])
    torch.optim.SGD(twin.parameters(), lr=0.1).step()

    assert len(list(micro_batches(pairs, config.max_tokens_per_micro_batch))) > 1
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.1)
    metrics = train_step(policy, optimizer, pairs, reference, config, step=1)
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), rtol=1e-4, atol=1e-6, msg=name)
        assert parameter.grad is None
    expected = {
        "loss/mean": losses.mean(),
        "margin/mean": margin.mean(),
        "accuracy/frac": (margin > 0).double().mean(),
        "weight/mean": weight.mean(),
        "weight/max": weight.max(),
        "weight/ess": weight.sum() ** 2 / weight.square().sum(),
        "grad_norm": norm,
        "tokens": torch.tensor(sum(pair.num_tokens for pair in pairs)),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), rel=1e-4), name


def test_how_a_step_is_cut_does_not_matter(policy, reference_policy, pairs, config):
    reference = pair_logprob(reference_policy, pairs, config, "test")
    config = dataclasses.replace(config, monitor_top_k=5, importance_floor=0.5)
    results = []
    for limit in (45, 10_000):
        model = copy.deepcopy(policy.model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        cut = dataclasses.replace(config, max_tokens_per_micro_batch=limit)
        metrics = train_step(dataclasses.replace(policy, model=model), optimizer, pairs, reference, cut, step=1)
        results.append((metrics, dict(model.named_parameters())))
    (metrics, parameters), (whole_metrics, whole_parameters) = results
    assert metrics == pytest.approx(whole_metrics, rel=1e-4)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, whole_parameters[name], rtol=1e-4, atol=1e-6, msg=name)


def test_monitors_of_a_step_equal_those_of_dense_logits(policy, reference_policy, pairs, config):
    """Over all tokens and completions of the step, which more than one micro-batch holds."""
    reference = pair_logprob(reference_policy, pairs, config, "test")
    mass, entropy = [], []
    with torch.no_grad():
        for pair in pairs:
            for completion in (pair.chosen, pair.rejected):
                logits = policy.model(input_ids=torch.tensor([pair.prompt + completion])).logits[0]
                p = logits[len(pair.prompt) - 1 : -1].softmax(-1).topk(5).values
                mass.append(p.sum(-1))
                entropy.append(-(p * p.log()).sum(-1))
        log_ratio = (dense_logprobs(policy.model, pairs).double() - reference).clamp(max=2)
    log_weight = (dense_logprobs(policy.model, pairs).double() - reference).sum(1)
    assert len(list(micro_batches(pairs, config.max_tokens_per_micro_batch))) > 1
    plain = train_step(policy, torch.optim.SGD(policy.model.parameters(), lr=0.0), pairs, reference, config, step=1)
    floor = math.exp(log_weight.median().item() + 1e-3)
    config = dataclasses.replace(config, monitor_top_k=5, importance_floor=min(floor, 1.0))
    metrics = train_step(policy, torch.optim.SGD(policy.model.parameters(), lr=0.0), pairs, reference, config, step=1)
    added = {"top_k_mass/mean", "top_k_entropy/mean", "weight/floored_frac"}
    assert metrics.keys() - plain.keys() == added
    assert metrics["top_k_mass/mean"] == pytest.approx(torch.cat(mass).mean().item(), rel=1e-5)
    assert metrics["top_k_entropy/mean"] == pytest.approx(torch.cat(entropy).mean().item(), rel=1e-5)
    assert metrics["kl/sqrt"] == pytest.approx((log_ratio.expm1() - log_ratio).mean().sqrt().item(), rel=1e-4)
    assert metrics["weight/floored_frac"] == (log_weight < math.log(config.importance_floor)).double().mean().item() > 0


def test_monitors_change_nothing_of_a_step(policy, reference_policy, pairs, config):
    reference = pair_logprob(reference_policy, pairs, config, "test")
    results = []
    for top_k in (None, 3):
        model = copy.deepcopy(policy.model)
        watched = dataclasses.replace(config, monitor_top_k=top_k)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train_step(dataclasses.replace(policy, model=model), optimizer, pairs, reference, watched, step=1)
        results.append(dict(model.named_parameters()))
    for name, parameter in results[0].items():
        assert torch.equal(parameter, results[1][name])


def test_the_policy_starts_as_its_own_reference(policy, pairs, config):
    reference = pair_logprob(policy, pairs, config, "test")
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    metrics = train_step(policy, optimizer, pairs, reference, config, step=1)
    assert metrics["loss/mean"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["weight/mean"] == pytest.approx(1, abs=1e-4)
    assert metrics["weight/ess"] == pytest.approx(len(pairs), abs=1e-4)


def test_the_gradient_is_clipped_to_the_norm_asked_for(policy, reference_policy, pairs, config):
    reference = pair_logprob(reference_policy, pairs, config, "test")
    before = {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
    metrics = train_step(policy, optimizer, pairs, reference, dataclasses.replace(config, clip_grad_norm=0.01), step=1)
    moved = torch.nn.utils.get_total_norm([p - before[name] for name, p in policy.model.named_parameters()])
    assert metrics["grad_norm"] > 0.1
    assert moved.item() == pytest.approx(0.01, rel=1e-2)


def test_a_frozen_head_stays(policy, pairs, config):
    policy.model.get_output_embeddings().requires_grad_(False)
    before = policy.head().weight.clone()
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    reference = pair_logprob(policy, pairs, config, "test")
    metrics = train_step(policy, torch.optim.SGD(trained, lr=0.1), pairs, reference, config, step=1)
    assert policy.head().weight.equal(before)
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize("where", ["reference", "gradient", "weights"])
def test_a_non_finite_step_is_refused_by_name_before_the_optimizer(policy, pairs, config, where):
    reference = pair_logprob(policy, pairs, config, "test")
    message = "step 12: non-finite loss; pair from p.jsonl line 3"
    if where == "reference":
        reference[2, 0] = math.nan
    if where == "gradient":  # the loss of IPO is finite at 1e19, its gradient in float32 is not
        config = dataclasses.replace(config, objective="ipo", beta=1e-2)
        embedding = policy.model.get_input_embeddings()
        only_there = set(pairs[2].prompt) - {
            token for i, p in enumerate(pairs) if i != 2 for token in p.prompt + p.chosen + p.rejected
        }
        token = next(iter(only_there))
        embedding.weight.register_hook(
            lambda grad: grad.index_fill(0, torch.tensor([token]), math.inf) if grad[token].any() else grad
        )
        message = "step 12: non-finite gradient; pair from p.jsonl line 3"
        policy.model.lm_head.weight = torch.nn.Parameter(
            embedding.weight.detach().clone()
        )  # untied: rows of other pairs stay 0
        policy.model.config.tie_word_embeddings = False
    if where == "weights":
        with torch.no_grad():
            policy.model.model.norm.weight[0] = math.nan
        message = "step 12: non-finite loss; pairs from p.jsonl line 1, p.jsonl line 2, "
    before = {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.1)
    with pytest.raises(NonFiniteError) as error:
        train_step(policy, optimizer, pairs, reference, config, step=12)
    assert str(error.value).startswith(message)
    assert not optimizer.state
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0, equal_nan=True)


def test_evaluation_by_hand(pairs, config):
    pairs = pairs[:4]
    reference = torch.tensor([[-5.0, -6], [-5, -5], [-7, -4], [-3, -9]], dtype=torch.float64)
    logprob = torch.tensor([[-4.0, -6], [-5, -5], [-7, -5], [-4, -4]], dtype=torch.float64)
    weight, _, losses = is_dpo(logprob, reference, reference)
    metrics = evaluate(logprob, reference, pairs, config)
    assert metrics["loss/mean"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert metrics["margin/mean"] == pytest.approx((1 + 0 + 1 - 6) / 4)
    assert metrics["accuracy/frac"] == 0.5
    assert metrics["accuracy/tied_frac"] == 2.5 / 4
    assert metrics["likelier/frac"] == (1 + 0.5 + 0 + 0.5) / 4
    assert metrics["weight/max"] == pytest.approx(math.exp(2))
    assert metrics["weight/mean"] == pytest.approx(weight.mean().item(), rel=1e-6)
    # log-ratios 1, 0, 0, -1 and 0, 0, -1, 5, of which the last counts as 2
    k3 = (math.e - 2 + 2 / math.e + math.exp(2) - 3) / 8
    assert metrics["kl/sqrt"] == pytest.approx(math.sqrt(k3), rel=1e-6)


def test_metrics_merge_by_their_endings():
    def part(size, mean, largest, count, ess):
        metrics = {
            "weight/mean": mean,
            "weight/max": largest,
            "weight/clipped_frac": mean,
            "x/count": count,
            "weight/ess": ess,
            "kl/sqrt": count,
        }
        return size, {name: torch.tensor(float(value)) for name, value in metrics.items()}

    # weights 1, 3 and 2, 2, 5
    merged = merge_metrics([part(2, 2, 3, 1, 16 / 10), part(3, 3, 5, 2, 81 / 33)])
    assert merged == pytest.approx(
        {
            "weight/mean": 13 / 5,
            "weight/max": 5,
            "weight/clipped_frac": 13 / 5,
            "x/count": 3,
            "weight/ess": 169 / 43,
            "kl/sqrt": math.sqrt((2 * 1 + 3 * 4) / 5),
        }
    )
    with pytest.raises(KeyError, match="median"):
        merge_metrics([(1, {"loss/median": torch.tensor(1.0), "weight/mean": torch.tensor(1.0)})])


def test_a_dead_batch_has_no_effective_samples():
    dead = {"weight/mean": torch.tensor(0.0), "weight/ess": torch.tensor(0.0)}
    assert merge_metrics([(2, dead), (1, dead)]) == {"weight/mean": 0, "weight/ess": 0}


def test_pack_is_what_a_micro_batch_of_one_holds(pairs):
    (batch,) = micro_batches(pairs[:1], 1000)
    assert batch.input_ids.equal(pack(pairs[:1]).input_ids)
