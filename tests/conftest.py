"""`--device`: where the tests of tests/test_device.py run. Everything else runs on the CPU, Triton's kernels in its interpreter."""

import gc
import os
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton") is not None:
        from fast_interpreter import make_fast

        make_fast()


if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # workers that shared their threads would wait for each other
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of tests/test_device.py, for example cuda")


def pytest_ignore_collect(collection_path, config):
    """What only a GPU can run is no test without one."""
    if collection_path.name == "test_pair_loss_device.py" and config.getoption("--device") == "cpu":
        return True
    return None


def pytest_collection_finish():
    """Ten thousand tests and all that they import, which each full collection of garbage would go through."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))
