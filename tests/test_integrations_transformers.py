"""Patched transformers models against the same models unpatched, and its Trainer with both.

B rows of T tokens.
"""

import copy
import inspect
import operator
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from trainer_fixtures import SMALL, VOCAB_SIZE, make_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from isdaa_kernels import Routed
from isdaa_kernels.integrations import transformers as integration
from isdaa_kernels.integrations.patching import Patch
from isdaa_kernels.integrations.transformers import AbsentLogits, LogitsNotMade, lm_head, patch_causal_lm
from isdaa_kernels.testing import FlopCounter, relative_error

NARROW = {"vocab_size": VOCAB_SIZE, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
OPT = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT |= {"max_position_embeddings": 64, "word_embed_proj_dim": 16, "pad_token_id": 0, "init_std": 0.2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.7}


def make_llama():
    return make_model()


def make_llama_with_bias():
    model = make_model(tie_word_embeddings=False)
    model.lm_head = nn.Linear(32, VOCAB_SIZE)
    return model


# a plain head, one of its own with a bias, soft-capped, scaled up and down, learned positions, a projection before the head, experts
MODELS = {
    "llama": make_llama,
    "llama_bias": make_llama_with_bias,
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=1.5, attention_dropout=0.1)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.3)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0)),
    "hyperclovax": lambda: HyperCLOVAXForCausalLM(HyperCLOVAXConfig(**SMALL, logits_scaling=0.4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**NARROW, initializer_range=0.2)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, **EXPERTS)),
    "mixtral_router": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, **EXPERTS, output_router_logits=True)),
}


def make(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def make_batch(B=3, T=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, VOCAB_SIZE, (B, T), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    labels = input_ids.clone()
    for row in range(B):
        labels[row, : 2 + row] = -100
        if row:
            labels[row, -row:] = -100
            attention_mask[row, -row:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def run(model, **arguments):
    """(loss, gradients by name, output)."""
    model.zero_grad()
    output = model(**arguments)
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), grads, output


def assert_equal(ours, theirs, tolerance=2e-5):
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    largest = max(grad.norm() for grad in theirs[1].values())  # some are nothing but rounding: a bias of keys
    for name, grad in ours[1].items():
        error = (grad - theirs[1][name]).norm() / theirs[1][name].norm().clamp(min=1e-2 * largest)
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_items_in_batch": 50},
        {"num_items_in_batch": torch.tensor(50)},
        {"ignore_index": 3},
        {"shift_labels": make_batch(seed=1)["labels"]},
    ],
    ids=("mean", "items", "items_tensor", "ignore_index", "shift_labels"),
)
def test_loss_and_gradients(name, more):
    model, batch = make(name), make_batch()
    if "ignore_index" in more:
        batch["labels"] = torch.where(batch["labels"] == -100, 3, batch["labels"])
    theirs = run(model, **batch, **more)
    with patch_causal_lm(model):
        assert_equal(run(model, **batch, **more), theirs)
    assert_equal(run(model, **batch, **more), theirs, 1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_lm_head(name):
    model, ids = make(name), make_batch()["input_ids"]
    head, hidden = lm_head(model), model.base_model(ids).last_hidden_state
    logits = (hidden @ head.weight.T + (0 if head.bias is None else head.bias)) * head.logit_scale
    logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    torch.testing.assert_close(logits, model(ids).logits)


def test_lm_head_refuses():
    with pytest.raises(ValueError, match="plain Linear"):
        lm_head(with_adapter_on_the_head())
    model = make("llama")
    model.config.logit_scale = "inv_sqrt_d_model"
    with pytest.raises(ValueError, match="logit_scale"):
        lm_head(model)
    model.lm_head.weight = nn.Parameter(torch.empty(0))  # as a partitioned one
    with pytest.raises(NotImplementedError, match="shards"):
        lm_head(model)


def test_router_losses_that_only_the_call_asks_for():
    model, batch = make("mixtral"), make_batch()
    theirs = run(model, **batch, output_router_logits=True)
    with patch_causal_lm(model):
        assert_equal(run(model, **batch, output_router_logits=True), theirs)
    assert theirs[0] - run(model, **batch)[0] > 0.1


def test_the_rest_of_the_output_is_the_same():
    model, batch = make("llama"), make_batch()
    asked = {"output_hidden_states": True, "use_cache": True}
    theirs = model(**batch, **asked)
    with patch_causal_lm(model):
        ours, as_tuple = model(**batch, **asked), model(**batch, **asked, return_dict=False)
    assert isinstance(ours, CausalLMOutputWithPast)
    assert list(ours) == list(theirs)
    torch.testing.assert_close(ours.hidden_states, theirs.hidden_states)
    torch.testing.assert_close(ours.past_key_values.layers[1].keys, theirs.past_key_values.layers[1].keys)
    assert ours["loss"] is ours.loss is ours[0]
    assert len(as_tuple) == len(theirs.to_tuple())
    torch.testing.assert_close(as_tuple[0], theirs.loss)


@pytest.mark.parametrize(
    "use",
    [
        lambda logits: logits.float(),
        lambda logits: logits[..., :-1, :],
        lambda logits: torch.argmax(logits, -1),
        lambda logits: logits * 2,
        list,
        len,
        bool,
        float,
        lambda logits: logits == 1,
        lambda logits: logits != 1,
        lambda logits: logits < 1,
        lambda logits: logits**2,
        lambda logits: 1 / logits,
        lambda logits: 1 in logits,
        lambda logits: operator.setitem(logits, 0, 1),
        lambda logits: torch.ones(2) - logits,
    ],
)
def test_logits_raise_when_used(use):
    model = make("llama")
    with patch_causal_lm(model):
        output = model(**make_batch())
    assert not hasattr(output.logits, "dtype")
    with pytest.raises(LogitsNotMade, match="without labels"):
        use(output.logits)
    with pytest.raises(LogitsNotMade):
        use(output["logits"])
    assert len({output.logits, AbsentLogits()}) == 2  # hashed as any object


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_calls_without_labels_go_the_original_way(name):
    model, batch = make(name), make_batch()
    prompt = {"input_ids": batch["input_ids"][:1, :5], "attention_mask": torch.ones(1, 5, dtype=torch.int64)}
    greedy = {"max_new_tokens": 6, "do_sample": False}
    logits, answer = model(batch["input_ids"]).logits, model.generate(**prompt, **greedy)
    with patch_causal_lm(model):
        assert torch.equal(model(batch["input_ids"]).logits, logits)
        assert torch.equal(model.generate(**prompt, **greedy), answer)
        assert model(batch["input_ids"], logits_to_keep=2).logits.shape[1] == 2


def test_arguments_by_position():
    model, batch = make("llama"), make_batch()
    theirs = model(batch["input_ids"], batch["attention_mask"], None, None, None, batch["labels"]).loss
    with patch_causal_lm(model):
        ours = model(batch["input_ids"], batch["attention_mask"], None, None, None, batch["labels"]).loss
    torch.testing.assert_close(ours, theirs)


def test_signature_and_undo():
    model = make("llama")
    before = inspect.signature(model.forward)
    patch = patch_causal_lm(model)
    assert isinstance(patch, Patch)
    assert inspect.signature(model.forward) == before
    with pytest.raises(ValueError, match="patched already"):
        patch_causal_lm(model)
    patch.undo()
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.lm_head)
    patch_causal_lm(model).undo()


def test_a_copy_runs_its_own_parameters():
    model, batch = make("llama"), make_batch()
    with patch_causal_lm(model):
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        loss, grads, _ = run(copied, **batch)
        assert not any(p.grad is not None for p in model.parameters())
    assert_equal((loss, grads), run(make("llama"), **batch))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("check", [True, False])
def test_a_copy_is_patched_already(duplicate, check):
    model, batch = make("llama"), make_batch()
    theirs = run(model, **batch)
    with patch_causal_lm(model):
        copied = duplicate(model)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM\.forward: patched already"):
        patch_causal_lm(copied, check=check)
    loss, grads, output = run(copied, **batch)
    assert_equal((loss, grads), theirs)
    assert isinstance(output.logits, AbsentLogits)


def test_attributes_of_the_forward_in_place_do_not_reach_ours():
    model, batch = make("llama"), make_batch()
    theirs = run(model, **batch)
    head = model.lm_head.forward

    def forward(hidden):
        return head(hidden)

    forward.head, forward.call, forward.original = "theirs", None, lambda hidden: 0 * hidden
    model.lm_head.forward = forward
    with patch_causal_lm(model):
        assert_equal(run(model, **batch), theirs)
    assert model.lm_head.forward is forward


def test_threads_share_a_patched_model():
    model, batches = make("llama"), [make_batch(seed=seed) for seed in range(3)]
    expected = [model(**batch).loss.item() for batch in batches]
    with patch_causal_lm(model), ThreadPoolExecutor(3) as pool:
        for _ in range(10):
            found = list(pool.map(lambda batch: model(**batch).loss.item(), batches))
            assert found == pytest.approx(expected, rel=1e-5)


def test_what_was_put_around_the_forward_stays_when_ours_goes():
    model, batch = make("llama"), make_batch()
    theirs = model(**batch)
    with patch_causal_lm(model):
        wrapped = model.forward = torch.autocast("cpu", torch.bfloat16, enabled=False)(model.forward)
        assert isinstance(model(**batch).logits, AbsentLogits)
        with pytest.raises(ValueError, match="patched already"):
            patch_causal_lm(model)
    assert model.forward is wrapped
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(model(**batch).logits, theirs.logits)
    with pytest.raises(ValueError, match="another library"):
        patch_causal_lm(model)


def test_frozen_parameters_stay_without_gradient():
    model, batch = make("llama_bias"), make_batch()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    theirs = run(model, **batch)
    with patch_causal_lm(model):
        assert_equal(run(model, **batch), theirs)


def test_gradient_checkpointing_and_dropout():
    model, batch = make("llama"), make_batch()
    model.gradient_checkpointing_enable()
    model.train()
    theirs = run(model, **batch)
    with patch_causal_lm(model):
        assert all(module.training for module in model.modules())  # the check has put it back
        assert_equal(run(model, **batch), theirs)


def test_autocast_and_bf16():
    model, batch = make("llama"), make_batch()
    truth = run(model, **batch)
    with patch_causal_lm(model), torch.autocast("cpu", dtype=torch.bfloat16):
        loss, grads, _ = run(model, **batch)
    assert loss.dtype == torch.float32
    assert grads.keys() == truth[1].keys()
    torch.testing.assert_close(loss, truth[0], rtol=1e-2, atol=1e-2)
    model = make("llama").bfloat16()
    theirs = model(**batch).loss.float()
    with patch_causal_lm(model):
        loss, grads, _ = run(model, **batch)
    torch.testing.assert_close(loss, theirs, rtol=1e-2, atol=1e-2)
    assert grads["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_compiled_after_the_patch():
    model, batch = make("llama"), make_batch()
    theirs = model(**batch).loss
    with patch_causal_lm(model):
        torch.testing.assert_close(torch.compile(model, backend="eager")(**batch).loss, theirs)


def test_ignored_tokens_and_logits_cost_no_matrix_work():
    model = make("llama")
    ids = torch.randint(1, VOCAB_SIZE, (1, 1024))
    labels = torch.where(torch.arange(1024) < 1000, -100, ids)
    flop = []
    for settings in ({"labels": None}, {"labels": labels}):
        with patch_causal_lm(model, backend="reference"), FlopCounter() as counted, torch.no_grad():
            model(ids, logits_to_keep=0 if settings["labels"] is not None else 1, **settings)
        flop.append(counted.flop)
    assert flop[1] - flop[0] < 2 * 300 * 32 * VOCAB_SIZE


class Wrapper(nn.Module):
    """As much of a PEFT model as the patch looks at: the causal LM is inside, and its forward is called there."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def get_base_model(self):
        return self.inner

    def forward(self, *args, **kwargs):
        return self.inner.forward(*args, **kwargs)


def test_a_model_around_the_model():
    model, batch = make("llama"), make_batch()
    theirs = run(model, **batch)
    wrapped = Wrapper(model)
    with patch_causal_lm(wrapped):
        loss, grads, output = run(wrapped, **batch)
    assert_equal((loss, {name.removeprefix("inner."): grad for name, grad in grads.items()}), theirs)
    assert not hasattr(output.logits, "dtype")


def test_kernel_settings_are_passed_on():
    model, batch = make("llama"), make_batch()
    theirs = run(model, **batch)
    for settings in ({"backend": "reference"}, {"max_workspace_mb": 1}, {"gradient": Routed(tolerance=0.0)}):
        with patch_causal_lm(model, **settings):
            assert_equal(run(model, **batch), theirs)
    with pytest.raises(ValueError, match="softcap"), patch_causal_lm(make("gemma2"), gradient=Routed()):
        pass
    with pytest.raises(ValueError, match="backend: expected one of"):
        patch_causal_lm(model, backend="nope", check=False)
    assert "forward" not in vars(model)


class ScaledForCausalLM(LlamaForCausalLM):
    """Its logits are not those of its head."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


class PenalisedForCausalLM(LlamaForCausalLM):
    """Its loss has another term."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            output["loss"] = output.loss + 0.1
        return output


class TwiceForCausalLM(LlamaForCausalLM):
    """It calls its head twice."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        self.lm_head(output.logits.new_zeros(1, 1, 32))
        return output


VISION = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}


def with_adapter_on_the_head():
    model = make("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    model.get_output_embeddings = lambda: model.lm_head
    return model


@pytest.mark.parametrize(
    ("make_refused", "match"),
    [
        (lambda: nn.Linear(3, 3), "expected a transformers causal LM"),
        (lambda: nn.DataParallel(make("llama")), "not yet wrapped"),
        (lambda: ScaledForCausalLM(LlamaConfig(**SMALL)), "ScaledForCausalLM: its logits"),
        (lambda: PenalisedForCausalLM(LlamaConfig(**SMALL)), "PenalisedForCausalLM: its loss"),
        (lambda: TwiceForCausalLM(LlamaConfig(**SMALL)), "TwiceForCausalLM: expected one call"),
        (lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL)), "ForCausalLMLoss"),
        (lambda: T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2)), "of text alone"),
        (
            lambda: LlavaForConditionalGeneration(
                LlavaConfig(vision_config=VISION, text_config={"model_type": "llama", **SMALL}, image_token_index=5)
            ),
            "of text alone",
        ),
        (with_adapter_on_the_head, "plain Linear"),
    ],
)
def test_models_that_are_refused(make_refused, match):
    model = make_refused().eval()
    with pytest.raises(ValueError, match=match):
        patch_causal_lm(model)
    assert "forward" not in vars(model)


def test_without_the_check_nothing_runs():
    model = ScaledForCausalLM(LlamaConfig(**SMALL))
    model.register_forward_pre_hook(lambda *_: pytest.fail("called"))
    patch_causal_lm(model, check=False).undo()


def test_a_forward_that_another_library_replaced_is_refused():
    model = make("llama")
    model.forward = lambda **_: None
    with pytest.raises(ValueError, match="another library"):
        patch_causal_lm(model)


def test_another_loss_is_refused():
    model = make("llama")
    model.loss_function = lambda **_: 0
    with pytest.raises(ValueError, match="ForCausalLMLoss"):
        patch_causal_lm(model)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"reduction": "none"}, "reduction"),
        ({"logits_to_keep": 3}, "logits_to_keep"),
    ],
)
def test_options_that_are_refused(more, match):
    model = make("llama")
    with patch_causal_lm(model), pytest.raises(ValueError, match=match):
        model(**make_batch(), **more)


def test_a_head_replaced_after_the_patch_is_refused():
    model = make("llama_bias")
    with patch_causal_lm(model):
        model.lm_head = nn.Linear(32, VOCAB_SIZE)
        with pytest.raises(ValueError, match="another than when it was patched"):
            model(**make_batch())


def test_an_error_in_the_forward_leaves_the_head_as_it_was():
    model, batch = make("llama"), make_batch()
    with patch_causal_lm(model):
        with pytest.raises(IndexError):
            model(input_ids=torch.full((1, 3), VOCAB_SIZE), labels=torch.zeros(1, 3, dtype=torch.int64))
        assert model(batch["input_ids"]).logits.shape == (3, 12, VOCAB_SIZE)


def test_the_version(monkeypatch):
    monkeypatch.setattr(integration, "TESTED", ("0.1",))
    with pytest.raises(ImportError, match="any_version"):
        patch_causal_lm(make("llama"))
    patch_causal_lm(make("llama"), any_version=True).undo()


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        batch = make_batch(B=1, seed=index)
        return {name: value[0] for name, value in batch.items()}


def train(folder, patched, **settings):
    model = make("llama")
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
        learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())
    patch = patch_causal_lm(model) if patched else None
    try:
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        return [*losses, trainer.evaluate()["eval_loss"]], trainer, model
    finally:
        if patch is not None:
            patch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_the_trainer_of_transformers(settings, tmp_path):
    theirs, _, their_model = train(tmp_path / "theirs", patched=False, **settings)
    ours, _, model = train(tmp_path / "ours", patched=True, **settings)
    assert len(ours) == 4
    if "bf16" in settings:
        assert ours == pytest.approx(theirs, rel=2e-2)
        return
    assert ours == pytest.approx(theirs, rel=2e-4)
    for own, other in zip(model.parameters(), their_model.parameters(), strict=True):
        assert relative_error(own, other) < 1e-3


def test_accelerate_refuses_the_absent_logits_that_compute_metrics_wants(tmp_path):
    model, asked = make("llama"), []
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model=model, args=arguments, eval_dataset=Rows(), compute_metrics=lambda _: asked.append(1) or {})
    with patch_causal_lm(model), pytest.raises(TypeError, match="AbsentLogits"):
        trainer.evaluate()
    assert not asked
    assert "eval_loss" in trainer.evaluate()
    assert asked


ON_TWO_PROCESSES = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
import torch.distributed as dist
from test_integrations_transformers import make, make_batch, nn, patch_causal_lm, run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
for name in ("llama", "llama_bias"):  # a tied head, one of its own
    alone = [run(make(name), **make_batch(seed=seed))[1] for seed in range(2)]
    expected = {name: (a + alone[1][name]) / 2 for name, a in alone[0].items()}

    model = make(name)
    patch_causal_lm(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    _, grads, _ = run(parallel, **make_batch(seed=rank))
    torch.testing.assert_close({name.removeprefix("module."): g for name, g in grads.items()}, expected, rtol=1e-4, atol=1e-6)

    model = make(name)
    patch_causal_lm(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(**make_batch(seed=rank)).loss.backward()
    grads = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-6)

model = make("llama_bias")
patch_causal_lm(model)
fully_shard(model.lm_head, mesh=mesh)
fully_shard(model, mesh=mesh)
try:
    model(**make_batch())
except NotImplementedError as error:
    assert "shards" in str(error)
else:
    raise AssertionError("a head that is in shards again after its forward")
print("done", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ddp_and_fsdp2_on_two_processes(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(ON_TWO_PROCESSES)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
        *sys.path,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2
