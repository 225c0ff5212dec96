"""The choice of a backend: by device, by name, and with every refusal said."""

import re
from dataclasses import replace

import pytest
import torch

from isdaa_kernels import NoBackend, Routed, explain_backends
from isdaa_kernels.backends import triton as triton_backend
from isdaa_kernels.backends.cpu import extension as cpu_extension
from isdaa_kernels.backends.cuda import extension
from isdaa_kernels.dispatch import PREFERENCE, Problem, select_backend

CPU = Problem("cpu", torch.float32, torch.float32, 4, 3, 5)
CUDA = Problem("cuda", torch.float32, torch.float32, 4, 3, 5, arch="sm_90")


class Built:
    """As `isdaa_kernels._cuda` says of itself."""

    emulated, archs = False, "80,90a"


@pytest.fixture(autouse=True)
def _without_cuda_kernels(monkeypatch):
    """Alike whether nvcc was there or not."""
    monkeypatch.setattr(extension, "native", None)
    monkeypatch.setattr(extension, "missing", "no nvcc")


def test_the_accelerated_backend_comes_first():
    assert select_backend(CPU).__name__.endswith(".cpu")
    assert select_backend(CPU, "reference").__name__.endswith(".reference")


def test_a_backend_asked_for_by_name_refuses_with_its_sentence():
    with pytest.raises(NoBackend, match="backend 'cpu' refuses: takes tensors on the CPU, not on cuda"):
        select_backend(CUDA, "cpu")
    with pytest.raises(ValueError, match="backend: expected one of cuda, triton, cpu, reference or None, got 'tpu'"):
        select_backend(CPU, "tpu")


def test_reference_never_stands_in_for_a_missing_cpu_backend(monkeypatch):
    monkeypatch.setattr(cpu_extension, "native", None)
    monkeypatch.setattr(cpu_extension, "missing", "no such file")
    with pytest.raises(NoBackend, match=r"the compiled part is missing \(no such file\).*backend='reference'"):
        select_backend(CPU)
    assert select_backend(CPU, "reference") is not None
    assert "not built: no such file" in explain_backends()


def test_explain_backends_has_a_line_for_each():
    lines = explain_backends(CUDA).splitlines()
    assert [line.split(":")[0] for line in lines] == list(PREFERENCE)
    assert (
        lines[0]
        == "cuda: not built: no nvcc; refuses: the compiled part is missing (no nvcc); reinstall isdaa-kernels where nvcc is"
    )
    assert lines[1].endswith("takes it")
    assert "refuses: takes tensors on the CPU" in lines[2]
    assert lines[3].endswith("takes it")
    assert cpu_extension.native.instruction_set() in explain_backends()


def test_a_gpu_gets_the_compiled_kernels_where_they_were_built_for_it(monkeypatch):
    assert select_backend(CUDA).__name__.endswith(".triton")
    monkeypatch.setattr(extension, "native", Built)
    assert select_backend(CUDA).__name__.endswith(".cuda")
    assert select_backend(replace(CUDA, arch="sm_80")).__name__.endswith(".triton")
    assert select_backend(replace(CUDA, arch="sm_100")).__name__.endswith(".triton")
    assert select_backend(replace(CUDA, arch="gfx942")).__name__.endswith(".triton")
    monkeypatch.setattr(triton_backend, "triton_version", lambda: None)
    assert select_backend(replace(CUDA, arch="sm_80")).__name__.endswith(".cuda")


# What the Triton backend does not take, each with the word that must be in the sentence.
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"arch": "sm_75"}, "takes GPUs of sm_80, sm_86, .*, gfx950, not of sm_75"),
        ({"arch": "gfx1100"}, "not of gfx1100"),
        ({"arch": None}, "no GPU is visible to PyTorch"),
        ({"hidden_dtype": torch.float64}, "takes float16, bfloat16 and float32, not hidden in torch.float64"),
        ({"weight_dtype": torch.float64}, "not weight in torch.float64"),
        ({"device_type": "mps", "arch": None}, "takes tensors on NVIDIA and AMD GPUs, not on mps"),
        ({"routed": Routed(block=32)}, "routes blocks of 64, 128, 256 vocabulary rows, not of 32"),
    ],
)
def test_refusals_of_the_triton_backend(change, sentence):
    problem = replace(CUDA, **change)
    with pytest.raises(NoBackend, match=f"backend 'triton' refuses: .*{sentence}"):
        select_backend(problem, "triton")
    assert re.search(sentence, explain_backends(problem).splitlines()[1])
    if problem.device_type == "cuda":
        with pytest.raises(NoBackend, match=f"triton: .*{sentence}.*backend='reference'"):
            select_backend(problem)


@pytest.mark.parametrize(
    ("version", "sentence"),
    [(None, "triton is not installed"), ("3.3.1", "triton 3.3.1 is too old; it takes 3.4 or newer")],
)
def test_a_missing_or_old_triton(monkeypatch, version, sentence):
    monkeypatch.setattr(triton_backend, "triton_version", lambda: version)
    with pytest.raises(NoBackend, match=sentence):
        select_backend(CUDA, "triton")
    with pytest.raises(NoBackend, match=f"{sentence}.*backend='reference'"):
        select_backend(CUDA)
    assert sentence in explain_backends(CUDA)


def test_an_old_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(NoBackend, match=r"torch 2\.9\.1\+cu128 is too old; it takes 2\.10 or newer"):
        select_backend(CUDA)
