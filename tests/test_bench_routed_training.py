"""The comparison of routed and exact training, on the tiny model: what it computes, and that its files hold it."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import isdaa_trainer.train as train_module
import pytest
import torch
from isdaa_trainer.data import IGNORED, pack
from isdaa_trainer.records import Example, read_examples
from isdaa_trainer.routing import Routing
from isdaa_trainer.step import pair_loss, sequence_sums
from trainer_fixtures import make_model_folder, make_records, make_tokenizer, write_jsonl

import isdaa_kernels.backends.reference.routed as definition
from bench import routed_training
from bench.routed_training import QUICK, SEEDS, Lab, Settings, choose_pairs, compare_curves, last_message, main
from bench.routed_training_bias import Pooled, Sums, first_routing, head_gradient, routed_shares, row_cosines, sketch
from bench.routed_training_paths import Place, differences, seen_words

# The CPU backend would make exact gradients of so flat a softmax.
COARSE = Settings(**QUICK, backend="reference", tolerance=0.6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    make_model_folder(folder / "model")
    write_jsonl(folder / "pairs.jsonl", make_records(20))
    return folder


def compare(folder: Path, name: str, tolerance: float) -> dict:
    """The report of a whole run of the command."""
    paths = {"data": "pairs.jsonl", "model": "model", "out": name, "work": f"{name}-work"}
    flags = [word for flag, path in paths.items() for word in (f"--{flag}", str(folder / path))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "draw_curves", lambda steps, evaluations, target: target.touch())
        assert main([*flags, "--quick", "--backend", "reference", "--tolerance", str(tolerance)]) == 0
    return json.loads((folder / name / "report.json").read_text())


@pytest.fixture(scope="module")
def zero(folder):
    return compare(folder, "zero", tolerance=0)


@pytest.fixture(scope="module")
def lab(folder):
    return Lab(COARSE, folder / "pairs.jsonl", str(folder / "model"), folder / "lab")


@pytest.fixture
def policy(lab):
    return lab.policy(lab.initial)


@pytest.fixture
def batch(lab):
    reference = torch.tensor([[-20.0, -25.0], [-30.0, -22.0], [-28.0, -40.0]], dtype=torch.float64)
    return pack(lab.data.train[:3], reference)


def test_with_tolerance_0_a_routed_run_is_the_exact_one(zero):
    for row in zero["curves"]:
        assert row["routed"] < 1e-4 * max(1, zero["runs"]["exact-0"][row["kind"]][0][row["metric"]])
    apart = {row["metric"]: row["seeds"] for row in zero["curves"] if row["kind"] == "training"}
    assert min(apart["loss/mean"]) > 1e-4
    assert zero["gradients"]["head"]["error_sum"] < 2e-6
    assert zero["gradients"]["body"]["error_sum"] < 2e-6
    assert zero["gradients"]["head"]["cosines_sum"] == pytest.approx([1, 1, 1])
    for parts in (zero["adam"]["routed"], zero["adam"]["one by one"], zero["movement"]["routed-0"]):
        assert parts["all"]["difference"] < 1e-2
    for parts in (zero["adam"]["other order"], zero["movement"]["exact-1"]):
        assert parts["all"]["difference"] > 0.1
    assert zero["adam"]["routed"]["logprob"]["difference"] < 1e-2 * zero["adam"]["routed"]["logprob"]["way"]
    assert {row["share_hidden"] for row in zero["ageing"]} == {1.0}


def test_the_report_has_all_parts_and_neither_text_nor_folders_of_the_data(zero, folder):
    assert {path.name for path in (folder / "zero").iterdir()} == {"report.json", "report.md", "curves.png"}
    assert (folder / "zero" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(zero["runs"]) == ["exact-0", "routed-0", "exact-1", "exact-2"]
    for run in zero["runs"].values():
        assert [line["step"] for line in run["training"]] == [1, 2, 3]
        assert [line["step"] for line in run["heldout"]] == [0, 1, 2, 3]
    assert zero["data"].items() >= {"file": "pairs.jsonl", "records": 20, "train": 8, "heldout": 4}.items()
    assert zero["middle_step"] == 2
    assert [(row["when"], row["order"]) for row in zero["ageing"]] == [
        (when, order) for when in ("start", "middle", "end") for order in ("before training", "fresh", "natural")
    ]
    assert {"device", "versions", "commit", "command", "date", "settings", "routed"} <= set(zero)
    for name in ("report.json", "report.md"):
        text = (folder / "zero" / name).read_text()
        assert str(folder) not in text
        assert example_words(folder).isdisjoint(text.split())
    assert "| training loss |" in (folder / "zero" / "report.md").read_text()


def example_words(folder: Path) -> set[str]:
    return {word for record in read_examples(folder / "pairs.jsonl") for word in record.chosen.split()}


def test_a_coarse_run_takes_the_exact_ones_from_the_folder_and_shows_a_difference(zero, folder, monkeypatch):
    shutil.copytree(folder / "zero-work", folder / "coarse-work")
    shutil.rmtree(folder / "coarse-work" / "routed-0")
    for run_file in (folder / "coarse-work").glob("*/run.json"):  # the paths in it are those of the first folder
        run_file.write_text(run_file.read_text().replace("zero-work", "coarse-work"))
    trained = []
    trainer = routed_training.Trainer
    monkeypatch.setattr(
        routed_training, "Trainer", lambda config, resume: trained.append(config.gradient) or trainer(config, resume)
    )
    coarse = compare(folder, "coarse", COARSE.tolerance)
    assert trained == ["routed"]
    assert coarse["runs"]["exact-1"] == zero["runs"]["exact-1"]
    assert all(row["routed"] > 0 for row in coarse["curves"] if row["metric"] in ("loss/mean", "margin/mean"))
    for part in ("head", "body"):
        assert 1e-3 < coarse["gradients"][part]["error_single"] < 1
    assert coarse["gradients"]["hidden"]["error_pooled"] > 1e-3
    assert 1e-3 < coarse["adam"]["routed"]["all"]["difference"] < 1
    assert 0 < coarse["adam"]["routed"]["logprob"]["difference"] < coarse["adam"]["routed"]["logprob"]["way"]
    assert coarse["adam"]["other order"] == zero["adam"]["other order"]
    assert all(0 < row["share_hidden"] < row["share_weight"] <= 1 for row in coarse["ageing"])


def test_a_folder_of_other_settings_is_refused(zero, folder):
    with pytest.raises(ValueError, match=r"routed_tolerance: the run in .* was started with 0.0, got 0.5"):
        compare(folder, "zero", tolerance=0.5)


def test_gradients_of_head_and_body_are_those_of_a_step(lab, policy, batch):
    config, routing = lab.config("routed"), first_routing(lab, lab.config("routed"))
    pair_loss(sequence_sums(policy, batch, config, routing), batch, config, len(batch.pairs)).loss.backward()
    hidden_ND = policy.hidden_states(batch.input_ids, batch.position_ids)
    found = head_gradient(hidden_ND, policy, batch, config, routing)
    parameters = dict(policy.model.named_parameters())
    below = torch.autograd.grad(hidden_ND, list(parameters.values()), found.hidden_ND)
    for parameter, gradient in zip(parameters.values(), below, strict=True):
        of_head = found.weight_VD if parameter is policy.head().weight else 0
        torch.testing.assert_close(gradient + of_head, parameter.grad, rtol=1e-4, atol=1e-6)


def test_shares_are_those_that_the_kernels_route(lab, policy, batch, monkeypatch):
    config, routing = lab.config("routed"), first_routing(lab, lab.config("routed"))
    routes = []
    choose = definition.choose_routes
    monkeypatch.setattr(definition, "choose_routes", lambda *given: routes.append(choose(*given)) or routes[-1])
    with torch.no_grad():
        hidden_ND = policy.hidden_states(batch.input_ids, batch.position_ids)
    exact = head_gradient(hidden_ND, policy, batch, lab.config("exact"), Routing(lab.config("exact")))
    assert routes == []
    head_gradient(hidden_ND, policy, batch, config, routing)
    [found] = routes
    shares = routed_shares(hidden_ND, policy, batch, config, routing, exact.logprob_N)
    scored = batch.targets != IGNORED
    assert shares == pytest.approx(
        [mask[:, scored].double().mean().item() for mask in (found.hidden_BN, found.weight_BN)]
    )
    assert 0 < shares[0] < shares[1] < 1


def test_sums_tell_what_averages_out_from_what_does_not():
    n, rows = 16, torch.eye(32)
    same, noise = Sums(), Sums()
    for i in range(n):
        same.add([torch.ones(32)], [torch.ones(32) * 1.25])
        noise.add([torch.ones(32)], [torch.ones(32) + rows[i] * math.sqrt(32) / 4])
    same, noise = same.figures(), noise.figures()
    for figures in (same, noise):
        assert figures["error_single"] == pytest.approx(0.25)
        assert figures["growth_gradient"] == pytest.approx(4)
        assert figures["ratio_of_noise"] == 0.25
    assert [same[key] for key in ("error_sum", "ratio", "growth_error", "bias")] == pytest.approx([0.25, 1, 4, 0.25])
    assert [noise[key] for key in ("error_sum", "ratio", "growth_error")] == pytest.approx([0.0625, 0.25, 1])
    assert noise["bias"] == pytest.approx(0, abs=1e-3)
    # random signs: the sum of 16 of them is at most 8 in 95 % of the cases; orthogonal terms do not notice
    assert same["growth_error_chance"] == pytest.approx(8 / 4)
    assert noise["growth_error_chance"] == pytest.approx(1)


def test_the_bias_of_noisy_gradients_is_found_through_the_noise():
    generator = torch.Generator().manual_seed(0)
    sums, n = Sums(), 400
    draws = torch.randn(n, 2, 64, generator=generator)
    for noise_g, noise_e in draws:
        g = 1 + noise_g
        sums.add([g], [g + 0.1 + 0.2 * noise_e])
    figures = sums.figures()
    assert figures["bias"] == pytest.approx(0.1, rel=0.05)
    error = draws[:, 1].sum(0) * 0.2 + 0.1 * n
    sampling = math.sqrt(64 * n)  # each of 64 entries has a deviation of 1
    assert figures["batches_until_bias"] == pytest.approx(1 / 0.1**2, rel=0.1)
    assert figures["growth_error"] > 2 * figures["growth_error_chance"]
    assert figures["error_by_sampling"] == pytest.approx(error.norm().item() / sampling, rel=0.03)


def test_row_cosines_by_hand():
    a = torch.tensor([[1.0, 0], [1, 0], [0, 0], [1e-30, 0], [1, 0]])
    b = torch.tensor([[1.0, 0], [1, 1], [0, 0], [1e-30, 0], [-1, 0]])
    # -1, 1 / sqrt 2, 1, 1, 1
    assert row_cosines(a, b) == pytest.approx([-1 + 0.2 * (1 + 0.5**0.5), 0.5**0.5, 1])


def test_differences_of_the_ways_by_hand():
    def place(head: list[list[float]], layer: list[float], logprob: list[float]) -> Place:
        parameters = {"head": torch.tensor(head), "layer": torch.tensor(layer, dtype=torch.float32)}
        return Place(parameters, torch.tensor([logprob], dtype=torch.float64))

    start = place([[0.0, 0], [1, 1], [0, 0]], [1, 1], [-5, -6])
    end = place([[3.0, 4], [1, 2], [0, 0]], [1, 3], [-8, -2])
    other = place([[3.0, -4], [1, 3], [0, 0]], [1, 2], [-5, -2])
    found = differences(start, end, other, torch.tensor([True, False, True]))
    assert found["seen"] == pytest.approx({"difference": 8 / 5, "cosine": -7 / 25, "rms_way": 5 / 2})
    assert found["unseen"] == pytest.approx({"difference": 1, "cosine": 1, "rms_way": 0.5**0.5})
    assert found["body"] == pytest.approx({"difference": 0.5, "cosine": 1, "rms_way": 2**0.5})
    assert found["all"]["difference"] == pytest.approx(math.sqrt(66 / 30))
    assert found["logprob"] == pytest.approx({"difference": 4.5**0.5, "way": 12.5**0.5})
    assert found["cosines"][2] == pytest.approx(1)
    nowhere = differences(start, start, other, torch.tensor([True, False, True]))
    assert nowhere["body"] == {"difference": None, "cosine": None, "rms_way": 0}


def test_seen_words_are_those_of_the_texts(lab):
    start = Place({"head": torch.zeros(200, 2)}, torch.zeros(0, 2))
    words = {word for pair in lab.data.train for word in pair.prompt + pair.chosen + pair.rejected}
    assert set(seen_words(lab.data.train, start).nonzero()[:, 0].tolist()) == words


def test_products_of_sketches_are_those_of_the_tensors():
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(200, 1000, generator=generator)
    a, b = (common + torch.randn(200, 1000, generator=generator) for _ in range(2))
    for x, y in ((a, a), (a, b)):
        assert (sketch([x]) @ sketch([y])).item() == pytest.approx((x * y).sum().item(), rel=0.1)
    noise = [torch.randn(200, 1000, generator=generator) for _ in range(2)]
    assert abs((sketch([noise[0]]) @ sketch([noise[1]])).item()) < 0.1 * 200 * 1000


def test_small_gradients_weigh_little_in_pooled_errors():
    pooled = Pooled()
    for size in (1.0, 10.0, 0.01):
        pooled.add(torch.full((4,), size + 0.01), torch.full((4,), size))
    found = pooled.figures()
    assert found["error_median"] == pytest.approx(0.01, rel=1e-3)
    assert found["error_single"] == pytest.approx(1.011 / 3, rel=1e-3)
    assert found["error_pooled"] == pytest.approx(math.sqrt(3e-4 / 101.0001), rel=1e-3)


def test_differences_of_curves_by_hand():
    def lines(value: float) -> list[dict]:
        names = {*routed_training.TRAINING, *routed_training.HELD_OUT}
        return [{"step": step} | dict.fromkeys(names, step * value) for step in (1, 2)]

    values = {"exact-0": 1.0, "routed-0": 1.5, "exact-1": 2.0, "exact-2": 4.0}
    rows = compare_curves({run: {"training": lines(value), "heldout": lines(value)} for run, value in values.items()})
    root = math.sqrt(5 / 2)
    for row in rows:
        assert row["routed"] == pytest.approx(0.5 * root)
        assert row["seeds"] == pytest.approx([root, 3 * root, 2 * root])
    assert rows[0]["pairs"] == ["exact-0 routed-0", "exact-0 exact-1", "exact-0 exact-2", "exact-1 exact-2"]
    assert len(SEEDS) == 3


def test_of_a_conversation_the_last_message_stays():
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    example = Example("x line 1", [*turns, {"role": "user", "content": "c"}], "yes", "no", (-1.0, -2.0), "train")
    found = last_message(example)
    assert found.prompt == [{"role": "system", "content": ""}, {"role": "user", "content": "c"}]
    assert found.chosen == [{"role": "assistant", "content": "yes"}]
    assert (found.behaviour, found.split) == (None, None)
    assert last_message(dataclasses.replace(example, prompt="c")) == found


def test_pairs_with_long_prompts_are_left_out_and_none_is_in_both_parts(tmp_path):
    records = make_records(12)
    records[3]["prompt"] = "w1 " * 60
    path = Path(write_jsonl(tmp_path / "pairs.jsonl", records))
    settings = Settings(heldout=4, pairs_per_step=2, pairs=5)
    count, train, heldout = choose_pairs(path, make_tokenizer(), settings)
    prompts = [record["prompt"][-1]["content"] for record in train + heldout]
    assert (count, len(train), len(heldout), len(set(prompts))) == (12, 5, 4, 9)
    assert len(choose_pairs(path, make_tokenizer(), dataclasses.replace(settings, pairs=None))[1]) == 7
    assert records[3]["prompt"] not in prompts
    with pytest.raises(ValueError, match="data: expected at least 12 pairs whose prompt has at most 56 tokens, got 11"):
        choose_pairs(path, make_tokenizer(), dataclasses.replace(settings, heldout=10))
