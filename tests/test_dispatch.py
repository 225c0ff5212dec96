"""The choice of a backend: by device, by name, and with every refusal said."""

import pytest
import torch

from isdaa_kernels import NoBackend, explain_backends
from isdaa_kernels.backends.cpu import tiles
from isdaa_kernels.dispatch import PREFERENCE, Problem, select_backend

CPU = Problem("cpu", torch.float32, torch.float32, 4, 3, 5)
CUDA = Problem("cuda", torch.float32, torch.float32, 4, 3, 5)


def test_the_accelerated_backend_comes_first():
    assert select_backend(CPU).__name__.endswith(".cpu")
    assert select_backend(CPU, "reference").__name__.endswith(".reference")


def test_a_backend_asked_for_by_name_refuses_with_its_sentence():
    with pytest.raises(NoBackend, match="backend 'cpu' refuses: takes tensors on the CPU, not on cuda"):
        select_backend(CUDA, "cpu")
    with pytest.raises(ValueError, match="backend: expected one of cpu, reference or None, got 'tpu'"):
        select_backend(CPU, "tpu")


def test_reference_never_stands_in_for_a_missing_cpu_backend(monkeypatch):
    monkeypatch.setattr(tiles, "native", None)
    monkeypatch.setattr(tiles, "missing", "no such file")
    with pytest.raises(NoBackend, match=r"the compiled part is missing \(no such file\).*backend='reference'"):
        select_backend(CPU)
    assert select_backend(CPU, "reference") is not None
    assert "not built: no such file" in explain_backends()


def test_explain_backends_has_a_line_for_each():
    lines = explain_backends(CUDA).splitlines()
    assert [line.split(":")[0] for line in lines] == list(PREFERENCE)
    assert "refuses: takes tensors on the CPU" in lines[0]
    assert lines[1].endswith("takes it")
    assert tiles.native.instruction_set() in explain_backends()
