"""The drop-in for `torch.nn.functional.linear_cross_entropy` against the one of the installed torch."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from isdaa_kernels import Routed
from isdaa_kernels.integrations.torch_nn import linear_cross_entropy
from isdaa_kernels.testing import relative_error

KEYWORDS = ("reduction", "weight", "ignore_index", "label_smoothing", "options")


def make_arguments(N=23, D=16, C=61, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(C, (N,), generator=generator)
    target[::4] = -100
    return {
        "input": torch.randn(N, D, generator=generator).to(dtype),
        "linear_weight": (torch.randn(C, D, generator=generator) / 2).to(dtype),
        "target": target,
        "linear_bias": torch.randn(C, generator=generator).to(dtype),
    }


def call(function, arguments, trained=("input", "linear_weight", "linear_bias"), **settings):
    """(loss, gradients) with fresh leaves and an upstream gradient that differs from entry to entry."""
    leaves = {n: arguments[n].clone().requires_grad_() for n in trained if arguments.get(n) is not None}
    loss = function(**arguments | leaves, **settings)
    (loss * torch.linspace(0.5, 2.0, loss.numel()).to(loss.dtype).reshape(loss.shape)).sum().backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def assert_equal(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in ours[1].items():
        assert relative_error(grad, theirs[1][name]) < tolerance, name


def test_signature():
    ours, theirs = (inspect.signature(f).parameters for f in (linear_cross_entropy, F.linear_cross_entropy))
    assert {n: (p.kind, p.default) for n, p in ours.items() if n in theirs} == {
        n: (p.kind, p.default) for n, p in theirs.items()
    }
    assert set(ours) - set(theirs) == {"gradient", "vocab_order", "max_workspace_mb", "backend"}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"label_smoothing": 0.1},
        {"label_smoothing": 1.0},
        {"weight": torch.linspace(0.1, 2.0, 61)},
        {"ignore_index": 7},
    ],
    ids=lambda s: next(iter(s), "default"),
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients(reduction, settings, bias, dtype):
    arguments = make_arguments(dtype=dtype)
    if not bias:
        arguments["linear_bias"] = None
    if "ignore_index" in settings:
        arguments["target"][::4] = 7
    if "weight" in settings:
        settings = settings | {"weight": settings["weight"].to(dtype)}
    results = [
        call(f, arguments, reduction=reduction, **settings) for f in (linear_cross_entropy, F.linear_cross_entropy)
    ]
    assert_equal(*results, tolerance=1e-5 if dtype == torch.float32 else 1e-12)


# one sample without a batch; no target left; nothing at all; a vocabulary and widths that are no multiples
@pytest.mark.parametrize("shape", [(), (1,), (0,), (130,)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_shapes(shape, reduction):
    arguments = make_arguments(N=max(1, *shape, 1), D=9, C=131)
    arguments["target"] = arguments["target"][: shape[0]] if shape else torch.tensor(5)
    arguments["input"] = arguments["input"][: shape[0]] if shape else arguments["input"][0]
    ours, theirs = (call(f, arguments, reduction=reduction) for f in (linear_cross_entropy, F.linear_cross_entropy))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_the_mean_over_no_target_is_nan_as_in_torch():
    arguments = make_arguments()
    arguments["target"].fill_(-100)
    for function in (linear_cross_entropy, F.linear_cross_entropy):
        assert function(**arguments).isnan()
        assert function(**arguments, reduction="sum") == 0


@pytest.mark.parametrize("settings", [{}, {"ignore_index": 7}, {"weight": torch.linspace(0.1, 2.0, 61)}], ids=str)
def test_targets_of_a_byte(settings):
    arguments = make_arguments()
    arguments["target"] = arguments["target"].where(arguments["target"] >= 0, 7).to(torch.uint8)
    assert_equal(*(call(f, arguments, **settings) for f in (linear_cross_entropy, F.linear_cross_entropy)))


def test_leading_dimensions():
    arguments = make_arguments(N=24)
    flat = call(linear_cross_entropy, arguments)
    folded = dict(
        arguments, input=arguments["input"].unflatten(0, (4, 6)), target=arguments["target"].unflatten(0, (4, 6))
    )
    loss, grads = call(linear_cross_entropy, folded)
    assert_equal((loss, grads | {"input": grads["input"].flatten(0, 1)}), flat, 1e-7)
    assert linear_cross_entropy(**folded, reduction="none").shape == (4, 6)


def test_inputs_that_are_not_contiguous():
    arguments = make_arguments()
    strided = arguments | {name: arguments[name].T.contiguous().T for name in ("input", "linear_weight")}
    assert_equal(call(linear_cross_entropy, strided), call(linear_cross_entropy, arguments), 1e-7)


@pytest.mark.parametrize("trained", [("input",), ("linear_weight",), ("linear_bias",)], ids=str)
def test_only_what_trains_gets_a_gradient(trained):
    assert_equal(*(call(f, make_arguments(), trained) for f in (linear_cross_entropy, F.linear_cross_entropy)))


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1}, {"reduction": "sum"}], ids=str)
def test_bf16_is_nearer_the_truth(settings):
    arguments = make_arguments(N=120, D=32, C=700, dtype=torch.bfloat16)
    wide = {name: value if name == "target" else value.float() for name, value in arguments.items()}
    truth = call(F.linear_cross_entropy, wide, **settings)
    ours, theirs = (call(f, arguments, **settings) for f in (linear_cross_entropy, F.linear_cross_entropy))
    assert ours[0].dtype == torch.float32
    assert relative_error(ours[0], truth[0]) <= relative_error(theirs[0].float(), truth[0])
    for name, grad in ours[1].items():
        assert grad.dtype == torch.bfloat16
        assert relative_error(grad, truth[1][name]) <= 1.05 * relative_error(theirs[1][name], truth[1][name]), name


@pytest.mark.parametrize(
    "options",
    [
        nn.LinearCrossEntropyOptions(),
        nn.LinearCrossEntropyOptions(batch_chunk_size=5, chunking_method=None, acc_policy="accurate"),
        nn.LinearCrossEntropyOptions(allow_retain_graph=True, acc_dtype=torch.float32),
    ],
    ids=("default", "chunks", "kept"),
)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_options_change_no_number(options, reduction):
    settings = {"options": options, "reduction": reduction}
    assert_equal(*(call(f, make_arguments(), **settings) for f in (linear_cross_entropy, F.linear_cross_entropy)))


def test_autocast():
    arguments = make_arguments()
    exact = linear_cross_entropy(**arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(**arguments)
    assert loss.dtype == torch.float32
    assert loss != exact
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=1e-2)


def test_compile():
    arguments = make_arguments()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(**arguments, label_smoothing=0.1), linear_cross_entropy(**arguments, label_smoothing=0.1)
    )


def test_two_backwards_and_activation_checkpointing():
    arguments = make_arguments()
    arguments["input"].requires_grad_()
    loss = linear_cross_entropy(**arguments)
    first, again = (torch.autograd.grad(loss, arguments["input"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    within = checkpoint(
        lambda x: linear_cross_entropy(**arguments | {"input": x}), arguments["input"], use_reentrant=False
    )
    assert torch.equal(torch.autograd.grad(within, arguments["input"])[0], first)


def test_kernel_settings_are_passed_on():
    arguments = make_arguments()
    exact = call(linear_cross_entropy, arguments)
    for settings in ({"backend": "reference"}, {"max_workspace_mb": 1}, {"gradient": Routed(tolerance=0.0)}):
        assert_equal(call(linear_cross_entropy, arguments, **settings), exact)
    with pytest.raises(ValueError, match="Routed"):
        call(linear_cross_entropy, arguments, gradient=Routed(), label_smoothing=0.1)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"target": torch.rand(23, 61)}, "probabilities"),
        ({"linear_weight": torch.rand(61, 2, 16)}, "linear_weight"),
        ({"reduction": "batchmean"}, "reduction"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"label_smoothing": 0.1, "weight": torch.ones(61)}, "label_smoothing"),
        ({"weight": torch.ones(60)}, "class weights"),
        ({"weight": torch.ones(61, dtype=torch.int64)}, "class weights"),
        ({"options": nn.LinearCrossEntropyOptions(acc_dtype=torch.bfloat16)}, "acc_dtype"),
        ({"options": "hello"}, "options: expected an nn.LinearCrossEntropyOptions or None, got 'hello'"),
        ({"target": torch.zeros(23, dtype=torch.int16)}, "targets: expected int64 or int32"),
        ({"target": torch.full((23,), 61)}, "targets"),
        ({"target": torch.full((23,), 61), "weight": torch.ones(61)}, "targets"),
        ({"linear_bias": torch.ones(60)}, "bias"),
        ({"target": torch.zeros(22, dtype=torch.int64)}, "targets"),
    ],
)
def test_what_is_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        linear_cross_entropy(**make_arguments() | changes)
