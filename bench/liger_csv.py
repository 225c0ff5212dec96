"""Rows in the columns of Liger's all_benchmark_data.csv, so that theirs can be laid over ours."""

import csv
import io
from collections.abc import Iterable, Iterator

MIB = 1 << 20
CSV_COLUMNS = (
    "kernel_name",
    "kernel_provider",
    "kernel_operation_mode",
    "metric_name",
    "metric_unit",
    "x_name",
    "x_label",
    "x_value",
    "y_value_50",
    "y_value_20",
    "y_value_80",
    "extra_benchmark_config_str",
    "gpu_name",
    "timestamp",
    "liger_version",
)


def write_csv(rows: Iterable[tuple[dict[str, object], dict]]) -> str:
    """One line a metric: time in ms where the figures hold "seconds", memory in MB where they hold "extra_bytes".

    rows: what all lines of a row have in common, by column, and its figures.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for common, figures in rows:
        for metric, unit, values in _metrics(figures):
            y = dict(zip(("y_value_50", "y_value_20", "y_value_80"), values, strict=True))
            writer.writerow({**common, "metric_name": metric, "metric_unit": unit, **y})
    return text.getvalue()


def _metrics(figures: dict) -> Iterator[tuple[str, str, tuple[float, ...]]]:
    if figures.get("seconds") is not None:
        yield "speed", "ms", tuple(1e3 * figures[name] for name in ("seconds", "seconds_20", "seconds_80"))
    if figures.get("extra_bytes") is not None:
        yield "memory", "MB", (figures["extra_bytes"] / MIB,) * 3
