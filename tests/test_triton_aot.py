"""The Triton kernels as compilers for GPUs that are not here see them: no spills, shared memory within the limit, tensor cores in use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from isdaa_kernels.backends.triton import aot_kl, aot_routed
from isdaa_kernels.backends.triton.aot_variants import ARCHS, full_set, small_kl_set, small_routed_set, small_set

ROOT = Path(__file__).parents[1]


def test_the_small_set_is_small_and_covers_every_kernel_and_architecture():
    chosen, everything = small_set(), full_set()
    assert len(chosen) == len(set(chosen)) <= 24
    assert {v.kernel for v in chosen} == {v.kernel for v in everything} - {*aot_routed.KERNELS, *aot_kl.KERNELS}
    assert len(set(everything)) == len(everything)
    for arch in ARCHS:
        kinds = {(v.kernel, v.rich) for v in chosen if v.arch == arch}
        for kernel in ("linear_logprob_forward", "linear_logprob_backward"):
            assert {(kernel, False), (kernel, True)} <= kinds


def test_the_small_routed_set_covers_every_routed_kernel():
    chosen = small_routed_set()
    assert len(chosen) == len(set(chosen)) <= 24
    assert {v.kernel for v in chosen} == {*aot_routed.KERNELS, "finish_weight"}
    assert {v.arch for v in chosen if v.kernel == "routed_gradient"} == {*ARCHS}
    for kernel in aot_routed.KERNELS:
        assert {v.arch for v in full_set() if v.kernel == kernel} >= {*ARCHS}


def test_the_small_set_of_two_heads_covers_every_kernel_and_direction():
    chosen = small_kl_set()
    assert len(chosen) == len(set(chosen)) <= 24
    assert {v.kernel for v in chosen} == {*aot_kl.KERNELS}
    for kernel in aot_kl.PRODUCTS:
        assert {v.arch for v in chosen if v.kernel == kernel} == {*ARCHS}
        assert {(v.direction, v.mixture) for v in full_set() if v.kernel == kernel} >= {
            ("forward", False),
            ("reverse", False),
            ("jsd", False),
        }


@pytest.mark.slow
def test_compilation_without_a_gpu(tmp_path):
    """In a process of its own: what was defined under the interpreter cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "isdaa_kernels.backends.triton.aot", "--out", str(tmp_path / "report.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = json.loads((tmp_path / "report.json").read_text())
    assert len(reports) == len(small_set() + small_routed_set() + small_kl_set())
    for report in reports:
        assert report["faults"] == [], report
        assert report["spilled"] == 0
        assert 0 < report["registers"] <= 512
        if report["variant"]["kernel"].startswith(("linear_", "routed")):
            assert report["instruction"], report
            assert report["shared"] > 0
