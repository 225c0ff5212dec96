"""What a run leaves behind: a table, results.json, results.md, results.csv in Liger's columns, and results.png."""

import json
from pathlib import Path

from bench.files import write_whole
from bench.liger_csv import write_csv
from bench.picture import draw

MIB = 1 << 20
HEADINGS = (
    "contender",
    "tokens",
    "forward",
    "fwd+bwd",
    "20-80 %",
    "n",
    "peak MiB",
    "B/token",
    "err value",
    "err d_hidden",
    "err d_weight",
)


def write_report(results: dict, folder: Path) -> list[Path]:
    """Writes the four files into `folder`, each whole or not at all; returns their paths."""
    content = {
        "results.json": json.dumps(results, indent=1, allow_nan=False) + "\n",
        "results.md": markdown(results),
        "results.csv": liger_csv(results),
        "results.png": draw(results),
    }
    for name, data in content.items():
        write_whole(folder / name, data)
    return [folder / name for name in content]


def markdown(results: dict) -> str:
    """Both tables with everything needed to read them."""
    about, states = results["device"], results["states"]
    lines = [
        "# Benchmark",
        "",
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads; torch {results['versions']['torch']}; "
        f"commit {results['commit']}; {results['date']}; {results['settings']['dtype']}.",
        f"States: {states['source']}, {states['tokens']} tokens, V = {states['vocabulary']}, D = {states['hidden_size']}.",
        "",
        "Times are in units: one `torch.mm(hidden, weight.T, out=preallocated)` in fp32 on the same shapes, run just before each timed",
        f"call; ratio of medians of n runs. {_unit_line(results)}",
        "The spread and everything after it belong to forward and backward, or to the forward where there is nothing else. Peak: growth of",
        "the resident set in a process of its own beyond inputs, output and gradients; B/token: its growth from half the tokens to all",
        "(two processes that do the same differ by 1 to 3 MiB, so a growth below about 2000 B/token is none that was seen).",
        "Errors: relative Frobenius norm against fp64 on the same inputs.",
    ]
    for preference, heading in enumerate(("Token log-probs", "Preference step, reference forward included")):
        rows = _rows(results, bool(preference))
        if rows:
            lines += ["", f"## {heading}", "", *_markdown_table(rows)]
    lines += _notes(results)
    return "\n".join(lines) + "\n"


def table(results: dict) -> str:
    """The same for a terminal, aligned."""
    lines = []
    for rows in (_rows(results, False), _rows(results, True)):
        cells = [list(HEADINGS), *map(_cells, rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        aligned = [
            [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))]
            for r in cells
        ]
        lines += ["  ".join(row).rstrip() for row in aligned] + [""] if rows else []
    return "\n".join(lines + _notes(results))


def liger_csv(results: dict) -> str:
    """Times in ms and memory in MB in Liger's columns."""
    cells = ((row, mode, figures) for row in results["rows"] for mode, figures in row["modes"].items())
    return write_csv((_csv_common(results, row, mode), figures) for row, mode, figures in cells)


def _csv_common(results: dict, row: dict, mode: str) -> dict[str, object]:
    states = results["states"]
    extra = {
        "V": states["vocabulary"],
        "H": states["hidden_size"],
        "dtype": results["settings"]["dtype"],
        "case": row["case"],
    }
    return {
        "kernel_name": f"linear_{row['objective'] or 'logprob'}",
        "kernel_provider": row["provider"],
        "kernel_operation_mode": mode,
        "x_name": "BT",
        "x_label": "B x T",
        "x_value": row["tokens"],
        "extra_benchmark_config_str": json.dumps(extra),
        "gpu_name": results["device"]["cpu"],
        "timestamp": results["date"],
        "liger_version": results["versions"]["liger-kernel"] or "",
    }


def _rows(results: dict, preference: bool) -> list[dict]:
    return [row for row in results["rows"] if (row["objective"] is not None) == preference]


def _cells(row: dict) -> list[str]:
    """One line of the table; a red row has a word and no number."""
    if row["red"]:
        return [row["title"], str(row["tokens"]), "red", "red", *[""] * (len(HEADINGS) - 4)]
    modes = row["modes"]
    main = modes.get("full", modes.get("forward"))
    extra, growth = main.get("extra_bytes"), main.get("bytes_a_token")
    return [
        row["title"],
        str(row["tokens"]),
        *(f"{modes[mode]['units']:.2f}" if mode in modes else "" for mode in ("forward", "full")),
        f"{main['units_20']:.2f}-{main['units_80']:.2f}",
        str(main["repeats"]),
        "" if extra is None else f"{extra / MIB:.0f}",
        "" if growth is None else f"{growth:.0f}",
        *(f"{main['error'][name]:.1e}" if name in main["error"] else "" for name in ("value", "d_hidden", "d_weight")),
    ]


def _markdown_table(rows: list[dict]) -> list[str]:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" + "|---:" * (len(HEADINGS) - 1) + "|"]
    return lines + ["| " + " | ".join(_cells(row)) + " |" for row in rows]


def _unit_line(results: dict) -> str:
    states = results["states"]
    complete = [row for row in results["rows"] if row["tokens"] == states["tokens"]]
    seconds = [figures["unit_seconds"] for row in complete for figures in row["modes"].values()]
    if not seconds:
        return ""
    flop = 2 * states["tokens"] * states["vocabulary"] * states["hidden_size"]
    middle = sorted(seconds)[len(seconds) // 2]
    return f"A unit took {middle:.3f} s here ({flop / middle / 1e9:.0f} GFLOP/s), {min(seconds):.3f} to {max(seconds):.3f} s by row."


def _notes(results: dict) -> list[str]:
    lines = [""]
    for row in results["rows"]:
        own = row["modes"].get("full", {}).get("own_dtype_units")
        lines += [f"- {row['title']}: {own:.2f} units of the product in its own dtype"] if own else []
        lines += [f"- red, not measured: {row['red']}"] if row["red"] else []
        lines += [f"- {f['memory_error']}" for f in row["modes"].values() if "memory_error" in f]
    notes = {row["contender"]: row["note"] for row in results["rows"] if row["note"]}
    lines += [f"- {name}: {note}" for name, note in notes.items()]
    return lines + [f"- missing: {name} ({reason})" for name, reason in results["missing"].items()]
