"""What `patch_llama_factory` puts into LLaMA-Factory's trainers, against the formulas on dense logits, and under stand-ins of its modules.

The library itself is not installed here: tests/check_llama_factory.py runs its stages with and without the patch where it is.
"""

import gc
import sys
import weakref
from contextlib import nullcontext
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from trainer_fixtures import make_model

from isdaa_kernels import Routed
from isdaa_kernels.integrations import llama_factory
from isdaa_kernels.integrations.llama_factory import (
    RowScorer,
    pair_forward,
    patch_llama_factory,
    row_forward,
    tail_weight,
)

EXACT = {"gradient": "exact"}
LABELS = torch.tensor(
    [
        [-100, -100, 5, 6, 7, 8, 1, 0, -100],
        [-100, 9, 10, 11, 1, -100, -100, -100, -100],
        [-100, -100, 12, 13, 1, -100, -100, -100, -100],
        [-100, 14, 15, 16, 17, 18, 19, 20, 1],
    ]
)


def make_trainer(loss_type: str = "sigmoid", ld_alpha: float | None = None, **arguments: object) -> SimpleNamespace:
    """What is read of a trainer of LLaMA-Factory's."""
    accelerator = SimpleNamespace(unwrap_model=lambda model: model, autocast=nullcontext)
    finetuning = dict.fromkeys(("use_dft_loss", "use_asft_loss", "use_eaft_loss"), False)
    settings = {"label_smoothing_factor": 0.0, "predict_with_generate": False}
    return SimpleNamespace(
        loss_type=loss_type,
        ld_alpha=ld_alpha,
        accelerator=accelerator,
        finetuning_args=SimpleNamespace(**{n: arguments.pop(n, v) for n, v in finetuning.items()}),
        args=SimpleNamespace(**{**settings, **arguments}),
    )


def make_batch() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 190, LABELS.shape, generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": LABELS}


def dense(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs of the labels [S, T - 1], which are scored, all logits), from the logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    label_ST = batch["labels"][:, 1:]
    logprob = logits[:, :-1].log_softmax(-1).gather(-1, label_ST.clamp(min=0)[..., None])[..., 0]
    return logprob, label_ST != -100, logits


MODELS = {
    "tied": {},
    "own head": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "simpo"])
def test_pairs_are_those_of_the_logits_with_their_gradient(changes, loss_type):
    trainer, batch = make_trainer(loss_type), make_batch()
    model, other = make_model(**changes), make_model(**changes)
    found = pair_forward(RowScorer(EXACT))(trainer, model, batch)

    logprob, scored, logits = dense(other, batch)
    sums, lengths = (logprob * scored).sum(-1), scored.sum(-1)
    means = sums / lengths
    expected = means if loss_type in ("ipo", "simpo") else sums
    for ours, theirs in (
        (torch.cat([found["chosen_logps"], found["rejected_logps"]]), expected),
        (found["chosen_logps_avg"], means[:2]),
        (found["chosen_logits"].mean(), logits[:2].mean()),
        (found["rejected_logits"].mean(), logits[2:].mean()),
    ):
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-5)
    for made in (found["chosen_logps"] - found["rejected_logps"], expected[:2] - expected[2:]):
        made.square().sum().backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    assert batch["labels"] is LABELS  # nothing of the batch was taken out


def test_ld_dpo_weighs_the_longer_completion_s_tail_and_not_the_reference_s():
    model, batch = make_model(), make_batch()
    forward = pair_forward(RowScorer(EXACT))
    logprob, scored, _ = dense(model, batch)
    # scored labels stand at 1..6 and 0..3 of the chosen, at 1..3 and 0..7 of the rejected
    weight = torch.ones_like(logprob)
    weight[0, 4:] = 0.3
    weight[3, 4:] = 0.3
    found = forward(make_trainer(ld_alpha=0.3), model, batch)
    expected = (logprob * scored * weight).sum(-1)
    logps = torch.cat([found["chosen_logps"], found["rejected_logps"]])
    torch.testing.assert_close(logps.float(), expected, rtol=1e-5, atol=1e-5)
    reference = forward(make_trainer(ld_alpha=0.3), model, batch, is_ref_model=True)
    plain = torch.cat([reference["chosen_logps"], reference["rejected_logps"]])
    torch.testing.assert_close(plain.float(), (logprob * scored).sum(-1), rtol=1e-5, atol=1e-5)


def test_tail_weight():
    scored = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [1, 0, 0, 0, 0]]).bool()
    weight = tail_weight(scored, 0.5) * scored
    assert weight.tolist() == [[0, 1, 1, 0.5, 0], [1, 0.5, 0.5, 0.5, 0.5], [0, 0, 1, 1, 0], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize("prefix", ["", "kl_"])
def test_rows_of_kto(prefix):
    model, batch = make_model(), make_batch()
    prefixed = {prefix + name: value for name, value in batch.items()} | {"kto_tags": torch.tensor([True] * 4)}
    logits, logps, means = row_forward(RowScorer(EXACT))(make_trainer(), model, prefixed, prefix)
    logprob, scored, dense_logits = dense(model, batch)
    torch.testing.assert_close(logits.float(), dense_logits.sum((1, 2)), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(logps.float(), (logprob * scored).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(means.float(), (logprob * scored).sum(-1) / scored.sum(-1), rtol=1e-4, atol=1e-5)


def test_softcap_and_scale_of_the_head():
    """Gemma's head: the logits that are logged are those after the softcap."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.5}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=2.0)).eval()
    batch = make_batch()
    found = pair_forward(RowScorer(EXACT))(make_trainer(), model, batch)
    logprob, scored, logits = dense(model, batch)
    logps = torch.cat([found["chosen_logps"], found["rejected_logps"]])
    torch.testing.assert_close(logps.float(), (logprob * scored).sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["rejected_logits"].mean().float(), logits[2:].mean(), rtol=1e-3, atol=1e-5)


def test_a_head_that_does_something_of_its_own_is_refused():
    class Scaled(type(make_model())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.5
            return output

    model = make_model()
    model.__class__ = Scaled
    with pytest.raises(ValueError, match="its logits are not those of its LM head"):
        pair_forward(RowScorer(EXACT))(make_trainer(), model, make_batch())

    class Adapted(nn.Linear):
        pass

    model = make_model()
    model.lm_head.__class__ = Adapted
    with pytest.raises(ValueError, match=r"a plain Linear, found .*Adapted"):
        pair_forward(RowScorer(EXACT))(make_trainer(), model, make_batch())


def test_the_head_is_put_back_and_generation_works():
    model, batch = make_model(), make_batch()
    pair_forward(RowScorer(EXACT))(make_trainer(), model, batch)
    assert "forward" not in vars(model.lm_head)
    assert model(input_ids=batch["input_ids"]).logits.shape == (4, 9, 200)


@pytest.fixture
def library(monkeypatch) -> dict[str, type]:
    """Stand-ins of LLaMA-Factory's modules, with the methods that are replaced."""

    class CustomDPOTrainer:
        def concatenated_forward(self, model, batch, is_ref_model=False):
            return "theirs"

    class CustomKTOTrainer:
        def forward(self, model, batch, prefix=""):
            return "theirs"

    class Trainer:
        def __init__(self, model, args, finetuning_args, accelerator):
            self.model, self.args, self.finetuning_args, self.accelerator = model, args, finetuning_args, accelerator

        def compute_loss(self, model, inputs, return_outputs=False):
            output = model(**inputs)
            return (output.loss, output) if return_outputs else output.loss

        def prediction_step(self, model, inputs, prediction_loss_only):
            with torch.no_grad():
                return self.compute_loss(model, inputs, return_outputs=True)

    class CustomSeq2SeqTrainer(Trainer):
        pass

    class CustomTrainer(Trainer):
        pass

    found = {"dpo": CustomDPOTrainer, "kto": CustomKTOTrainer, "sft": CustomSeq2SeqTrainer, "pt": CustomTrainer}
    names = ["llamafactory", "llamafactory.train", *(f"llamafactory.train.{stage}" for stage in found)]
    for name in names:
        module = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    for stage, trainer in found.items():
        module = ModuleType(f"llamafactory.train.{stage}.trainer")
        setattr(module, trainer.__name__, trainer)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("isdaa_kernels.integrations.patching.version", lambda package: "0.9.5")
    return found


def test_the_patch_replaces_and_puts_back(library):
    before = {trainer: dict(vars(trainer)) for trainer in library.values()}
    with patch_llama_factory(gradient=Routed(), max_workspace_mb=64.0):
        assert library["dpo"]().concatenated_forward.__module__ == llama_factory.__name__
        assert library["kto"]().forward.__module__ == llama_factory.__name__
        assert library["sft"].compute_loss is not library["pt"].compute_loss
        with pytest.raises(ValueError, match="patched already"):
            patch_llama_factory()
    assert {trainer: dict(vars(trainer)) for trainer in library.values()} == before


def make_library_trainer(trainer: type, model: nn.Module, **arguments: object):
    """A trainer of the stand-ins for sft and pt."""
    like = make_trainer(**{"do_train": True, **arguments})
    return trainer(model, like.args, like.finetuning_args, like.accelerator)


@pytest.mark.parametrize("stage", ["sft", "pt"])
def test_sft_trains_without_logits_and_predicts_with_them(library, stage):
    batch, model = make_batch(), make_model()
    expected = model(**batch).loss
    with patch_llama_factory():
        trainer = make_library_trainer(library[stage], model)
        for _ in range(2):
            loss, output = trainer.compute_loss(model.train(), batch, True)
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
            assert not hasattr(output.logits, "shape")
        assert trainer.prediction_step(model.eval(), batch, False)[1].logits.shape == (4, 9, 200)
        loss, output = trainer.prediction_step(model, batch, True)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        assert not hasattr(output.logits, "shape")
        assert model(input_ids=batch["input_ids"]).logits.shape == (4, 9, 200)
    assert "forward" not in vars(model)
    assert trainer.compute_loss(model, batch, True)[1].logits.shape == (4, 9, 200)


def test_sft_under_accelerate_s_autocast(library):
    """Accelerate wraps the forward after the trainer was made; the loss is then that of hidden states in bf16."""
    batch, model = make_batch(), make_model(tie_word_embeddings=False)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).loss
    with patch_llama_factory():
        trainer = make_library_trainer(library["sft"], model)
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        loss, output = trainer.compute_loss(model.train(), batch, True)
        assert not hasattr(output.logits, "shape")
        torch.testing.assert_close(loss.float(), expected.float(), rtol=1e-2, atol=1e-2)
        assert trainer.prediction_step(model.eval(), batch, False)[1].logits.shape == (4, 9, 200)


def test_models_are_freed_with_their_trainers(library):
    with patch_llama_factory() as patch:
        alive = []
        for _ in range(2):
            trainer = make_library_trainer(library["sft"], make_model())
            alive.append(weakref.ref(trainer.model))
        model = trainer.model
        del trainer
        gc.collect()
        assert [found() for found in alive] == [None, model]
        assert list(patch.losses.patches) == [id(model)]
    assert "forward" not in vars(model)


def test_a_second_trainer_of_a_model(library):
    """As for a stage after the first, when Accelerate has wrapped the forward for that."""
    batch, model = make_batch(), make_model()
    expected = model(**batch)
    with patch_llama_factory():
        make_library_trainer(library["pt"], model)
        wrapped = model.forward = torch.autocast("cpu", torch.bfloat16, enabled=False)(model.forward)
        trainer = make_library_trainer(library["sft"], model)
        loss, output = trainer.compute_loss(model.train(), batch, True)
        torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-6)
        assert not hasattr(output.logits, "shape")
        assert trainer.prediction_step(model.eval(), batch, False)[1].logits.shape == (4, 9, 200)
    assert model.forward is wrapped  # Accelerate's, and the model's own in it
    assert torch.equal(model(**batch).logits, expected.logits)
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"gradient": "fast"}, "gradient"),
        ({"backend": "nope"}, "backend"),
        ({"max_workspace_mb": 0}, "max_workspace_mb"),
    ],
)
def test_settings_that_are_refused(library, settings, name):
    before = dict(vars(library["dpo"]))
    with pytest.raises(ValueError, match=f"{name}: expected"):
        patch_llama_factory(**settings)
    assert dict(vars(library["dpo"])) == before


OPTIONS = ("use_dft_loss", "use_asft_loss", "use_eaft_loss", "label_smoothing_factor")


@pytest.mark.parametrize("option", OPTIONS)
def test_losses_that_need_logits_raise_when_the_trainer_is_made(library, option):
    with patch_llama_factory():
        with pytest.raises(ValueError, match=f"{option}: its loss is made of logits"):
            make_library_trainer(library["sft"], make_model(), **{option: 0.1})
        make_library_trainer(library["sft"], make_model(), do_train=False, **{option: 0.1})


def test_a_trainer_made_before_raises(library):
    model = make_model().train()
    trainer = make_library_trainer(library["pt"], model)
    with patch_llama_factory(), pytest.raises(ValueError, match="before this trainer was made"):
        trainer.compute_loss(model, make_batch())


def test_another_version_raises(library, monkeypatch):
    monkeypatch.setattr("isdaa_kernels.integrations.patching.version", lambda package: "0.10.0")
    with pytest.raises(
        ImportError, match=r"llamafactory: expected version 0\.9\.5, got 0\.10\.0; pass any_version=True"
    ):
        patch_llama_factory()
    patch_llama_factory(any_version=True).undo()


def test_not_installed_raises():
    with pytest.raises(metadata.PackageNotFoundError):
        patch_llama_factory()
