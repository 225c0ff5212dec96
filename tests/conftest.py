"""`--device`: where the tests of tests/test_device.py run. Everything else runs on the CPU, Triton's kernels in its interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of tests/test_device.py, for example cuda")


@pytest.fixture
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))
