"""The timings through pytest-benchmark: `pytest bench --benchmark-only [--tokens 3900] [--benchmark-json FILE]`.

Each test passes the gate before it is timed; each timed call follows one unit, and `units` is among its extra information.
"""

import pytest

from bench.contenders import Row, all_rows
from bench.suite import Lab, truth_key

CELLS = [(row, mode) for row in all_rows() for mode in row.modes]
# Rows that share a truth stand together, so that each truth is made once.
CELLS.sort(key=lambda cell: truth_key(cell[0], cell[0].max_tokens or 0))


@pytest.mark.parametrize(("row", "mode"), CELLS, ids=[f"{row.title}-{mode}".replace(" ", "_") for row, mode in CELLS])
def bench_row(benchmark, lab: Lab, row: Row, mode: str) -> None:
    if (reason := row.contender.missing()) is not None:
        pytest.skip(f"missing: {reason}")
    found, red = lab.check(row, mode)
    assert red is None, red
    timed = lab.timed(row, mode)
    timed.unit()
    benchmark.group = f"{row.contender.objective or 'logprob'}, {lab.tokens(row)} tokens, {mode}"
    benchmark.pedantic(timed.measure_call, setup=timed.measure_units, rounds=lab.settings.repeats)
    figures = timed.figures()
    benchmark.extra_info.update({"tokens": lab.tokens(row), "case": row.case, **figures, "error": found})
