"""The files of a run: report.json grows by itself (journal); this makes the rest of it."""

from pathlib import Path

from tqdm import tqdm

from bench.files import write_whole
from bench.gpu.markdown import render
from bench.gpu.measure import MEASURED, sentence
from bench.gpu.settings import Shape
from bench.gpu.tasks import CHECKS
from bench.liger_csv import write_csv


def write_report(results: dict, folder: Path) -> list[Path]:
    """report.md, liger.csv, time.png and memory.png, each whole or not at all; pictures only where matplotlib is installed."""
    content: dict[str, str | bytes] = {"liger.csv": liger_csv(results), **_pictures(results)}
    content["report.md"] = render(results)  # last: it tells of the pictures
    for name, data in content.items():
        write_whole(folder / name, data)
    return [folder / name for name in content]


def liger_csv(results: dict) -> str:
    rows = [row for row in results["rows"] if row["status"] == MEASURED and row["mode"] not in CHECKS]
    return write_csv((_csv_common(results, row), row) for row in rows)


def _csv_common(results: dict, row: dict) -> dict[str, object]:
    shape = Shape(*row["shape"])
    objective = row["objective"] if row["objective"] not in (None, "sum") else "logprob"
    extra = f'{{"V": {shape.V}, "H": {shape.D}, "dtype": "torch.bfloat16", "case": "{row["case"]}"}}'
    return {
        "kernel_name": f"linear_{objective}",
        "kernel_provider": row["provider"],
        "kernel_operation_mode": row["mode"],
        "x_name": "BT",
        "x_label": "B x T",
        "x_value": shape.N,
        "extra_benchmark_config_str": extra,
        "gpu_name": results["device"]["name"],
        "timestamp": results["date"],
        "liger_version": results["versions"].get("liger-kernel") or "",
    }


def _pictures(results: dict) -> dict[str, bytes]:
    try:
        from bench.gpu.picture import draw
    except ImportError as error:
        note = f"no pictures: {sentence(error)}"
        results["notes"] += [] if note in results["notes"] else [note]
        tqdm.write(note)
        return {}
    return draw(results)
