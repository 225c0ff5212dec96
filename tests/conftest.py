"""`--device`: where the tests of tests/test_device.py run. Everything else runs on the CPU."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of tests/test_device.py, for example cuda")


@pytest.fixture
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))
