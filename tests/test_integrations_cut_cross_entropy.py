"""The drop-in for `cut_cross_entropy.linear_cross_entropy` against what that says it is: PyTorch's cross entropy of fp32 logits.

The original needs a GPU and is not installed; its tests here are those of its documentation.
"""

import pytest
import torch
import torch.nn.functional as F

from isdaa_kernels import Routed
from isdaa_kernels.integrations.cut_cross_entropy import IMPLEMENTATIONS, linear_cross_entropy
from isdaa_kernels.testing import FlopCounter, relative_error


def dense(e, c, targets, bias=None, ignore_index=-100, softcap=None, reduction="mean", shift=False):
    """(loss, log-sum-exp of the logits in the shape of the targets that count)."""
    shift = int(shift)
    if shift:
        e, targets = e[..., :-shift, :], targets[..., shift:]
    z = e.to(c.dtype) @ c.T
    z = z if bias is None else z + bias
    z = z if z.dtype == torch.float64 else z.float()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(z.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction=reduction)
    loss = loss.reshape(targets.shape) if reduction == "none" else loss
    return loss, torch.where(targets == ignore_index, 0, z.logsumexp(-1))


def make_arguments(shape=(3, 11), D=16, V=61, dtype=torch.float32, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(V, shape, generator=generator)
    targets[..., ::4] = -100
    arguments = {
        "e": torch.randn(*shape, D, generator=generator).to(dtype),
        "c": (torch.randn(V, D, generator=generator) / 2).to(dtype),
        "targets": targets,
    }
    return arguments | ({"bias": torch.randn(V, generator=generator).to(dtype)} if bias else {})


def call(function, arguments, trained=("e", "c", "bias"), z_loss=0.0, **settings):
    leaves = {n: arguments[n].clone().requires_grad_() for n in trained if n in arguments}
    found = function(**arguments | leaves, **settings)
    loss, lse = found if isinstance(found, tuple) else (found, None)
    total = (loss * torch.linspace(0.5, 2.0, loss.numel()).reshape(loss.shape)).sum()
    if z_loss:
        total = total + z_loss * lse.square().sum()
    total.backward()
    values = (loss.detach(), None if lse is None else lse.detach())
    return values, {name: leaf.grad for name, leaf in leaves.items()}


def assert_equal(ours, theirs, tolerance=1e-5):
    for value, other in zip(ours[0], theirs[0], strict=True):
        if value is not None:
            torch.testing.assert_close(value, other, rtol=tolerance, atol=1e-6)
    for name, grad in ours[1].items():
        assert relative_error(grad, theirs[1][name]) < tolerance, name


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shift", [False, True, 1, 3])
@pytest.mark.parametrize("settings", [{}, {"softcap": 5.0}, {"ignore_index": 7}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(reduction, shift, settings, bias):
    arguments = make_arguments(bias=bias)
    if "ignore_index" in settings:
        arguments["targets"][..., ::4] = 7
    settings = settings | {"reduction": reduction, "shift": shift}
    ours = call(linear_cross_entropy, arguments, z_loss=0.1, return_lse=True, **settings)
    assert_equal(ours, call(dense, arguments, z_loss=0.1, **settings))
    plain = linear_cross_entropy(**arguments, **settings)
    torch.testing.assert_close(plain, ours[0][0])


# flat tokens, one token, more leading dimensions, sizes that are no multiples of a tile
@pytest.mark.parametrize("shape", [(130,), (1,), (2, 3, 5)])
def test_shapes(shape):
    arguments = make_arguments(shape, D=9, V=131)
    arguments["targets"][..., 0] = 2
    assert_equal(call(linear_cross_entropy, arguments, return_lse=True), call(dense, arguments))


def test_fp64_and_bf16():
    arguments = make_arguments(dtype=torch.float64)
    assert linear_cross_entropy(**arguments).dtype == torch.float64
    assert_equal(call(linear_cross_entropy, arguments, return_lse=True), call(dense, arguments), 1e-12)
    arguments = make_arguments(dtype=torch.bfloat16)
    wide = {name: value if name == "targets" else value.float() for name, value in arguments.items()}
    (loss, _), grads = call(linear_cross_entropy, arguments)
    truth = call(dense, wide)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, truth[0][0], rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        assert grad.dtype == torch.bfloat16
        assert relative_error(grad, truth[1][name]) < 4e-3


def test_inputs_that_are_not_contiguous_and_frozen_ones():
    arguments = make_arguments()
    whole = call(dense, arguments)
    strided = arguments | {
        "e": arguments["e"].transpose(0, 1).contiguous().transpose(0, 1),
        "c": arguments["c"].T.contiguous().T,
    }
    assert_equal(call(linear_cross_entropy, strided, return_lse=True), whole)
    for name in ("e", "c", "bias"):
        assert_equal(call(linear_cross_entropy, arguments, (name,), return_lse=True), whole)


def test_the_mean_over_no_target_is_nan_as_in_torch():
    arguments = make_arguments()
    arguments["targets"].fill_(-100)
    assert dense(**arguments)[0].isnan()
    assert linear_cross_entropy(**arguments).isnan()
    assert linear_cross_entropy(**arguments, reduction="sum") == 0


def test_shift_and_ignored_targets_cost_no_matrix_work():
    arguments = make_arguments((2, 512), D=64, V=1000, bias=False)
    arguments["targets"][:, :-64] = -100
    with FlopCounter() as counted:
        linear_cross_entropy(**arguments, shift=True, backend="reference")
    assert 0 < counted.flop <= 2 * 128 * 64 * 1000 * 1.5


@pytest.mark.parametrize("impl", [None, *IMPLEMENTATIONS])
@pytest.mark.parametrize("filter_eps", ["auto", None, 0.0])
def test_what_changes_no_number(impl, filter_eps):
    arguments = make_arguments()
    same = {"impl": impl, "filter_eps": filter_eps, "accum_e_fp32": True, "accum_c_fp32": True}
    same |= {"filter_e_grad": False, "filter_c_grad": False, "use_kahan": True}
    assert_equal(call(linear_cross_entropy, arguments, **same), call(linear_cross_entropy, arguments), 1e-9)


def test_kernel_settings_are_passed_on():
    arguments = make_arguments()
    exact = call(linear_cross_entropy, arguments)
    for settings in ({"backend": "reference"}, {"max_workspace_mb": 1}, {"gradient": Routed(tolerance=0.0)}):
        assert_equal(call(linear_cross_entropy, arguments, **settings), exact)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"filter_eps": 1e-3}, ValueError, "filter_eps"),
        ({"filter_eps": "high"}, ValueError, "filter_eps"),
        ({"impl": "fast"}, ValueError, "impl"),
        ({"reduction": "batchmean"}, ValueError, "reduction"),
        ({"shift": 11}, ValueError, "shift"),
        ({"shift": -1}, ValueError, "shift"),
        ({"shift": 1.5}, ValueError, "shift: expected True, False or a whole number, got 1.5"),
        ({"vocab_parallel_options": object()}, NotImplementedError, "vocab_parallel_options"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"gradient": Routed(), "softcap": 5.0}, ValueError, "softcap"),
    ],
)
def test_what_is_refused(settings, error, match):
    with pytest.raises(error, match=match):
        linear_cross_entropy(**make_arguments(), **settings)
