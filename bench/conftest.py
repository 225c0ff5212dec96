"""Options and the shared lab of `pytest bench --benchmark-only`."""

import pytest

from bench.suite import Lab, Settings


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--states", default="smollm2", help="smollm2, or random:DxV")
    group.addoption("--tokens", type=int, default=1024, help="scored tokens (default: 1024)")
    group.addoption("--repeats", type=int, default=7, help="timed runs of each call (default: 7)")


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Lab:
    option = request.config.getoption
    return Lab(Settings(option("--states"), option("--tokens"), repeats=option("--repeats")))
