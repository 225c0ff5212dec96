"""report.json and report.md of `bench.integrations`."""

import json
from pathlib import Path

from bench.files import write_whole

MIB = 1 << 20
HEADINGS = (
    "library", "ours", "tokens with a target", "before", "after", "before / after", "peak MiB before", "after", "apart",
)  # fmt: skip


def write_report(results: dict, folder: Path) -> list[Path]:
    """Writes both files into `folder`, each whole or not at all; returns their paths."""
    content = {
        "report.json": json.dumps(results, indent=1, allow_nan=False) + "\n",
        "report.md": markdown(results),
    }
    for name, text in content.items():
        write_whole(folder / name, text)
    return [folder / name for name in content]


def markdown(results: dict) -> str:
    about, states, settings = results["device"], results["states"], results["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version)
    lines = [
        "# Integrations, before and after",
        "",
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads; {versions}; commit {results['commit']}; "
        f"{results['date']}.",
        f"`{' '.join(results.get('command', []))}`",
        "",
        f"The head's part of one training step, forward and backward, through each library's own entry points, in fp32 on the states of "
        f"{states['source']}: {settings['tokens']} tokens, V = {states['vocabulary']}, D = {states['hidden_size']}. DPO runs a reference "
        "too. Times are in units of one `torch.mm(hidden, weight.T, out=preallocated)` over all tokens, run just before each call; ratio "
        f"of medians of at most {settings['repeats']} runs, before and after by turns (20-80 %). Peak: growth of the resident set in a "
        "process of its own beyond inputs, output and gradients. Apart: the largest relative difference of loss, d_hidden and d_weight.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---|---" + "|---:" * (len(HEADINGS) - 2) + "|",
        *("| " + " | ".join(cells(row)) + " |" for row in results["rows"]),
    ]
    lines += [""] + [f"- {row['case']}: {row['red']}" for row in results["rows"] if row["red"]]
    for row in results["rows"]:
        lines += [
            f"- {row[which]['memory_error']}" for which in ("before", "after") if "memory_error" in row.get(which, {})
        ]
    lines += [f"- missing: {title} ({reason})" for title, reason in results["missing"].items()]
    return "\n".join(lines).rstrip() + "\n"


def cells(row: dict) -> list[str]:
    """One line of the table; a red row has a word and no number."""
    named = [row["case"], f"`{row['integration']}`", f"{row['scored']} of {row['tokens']}"]
    if row["red"]:
        return [*named, "red", "red", *[""] * (len(HEADINGS) - 5)]
    before, after = row["before"], row["after"]
    return [
        *named,
        *(f"{f['units']:.2f} ({f['units_20']:.2f}-{f['units_80']:.2f})" for f in (before, after)),
        f"{before['seconds'] / after['seconds']:.1f}",
        *(mib(f.get("extra_bytes")) for f in (before, after)),
        f"{max(row['apart'].values()):.0e}",
    ]


def mib(value: int | None) -> str:
    return "" if value is None else f"{value / MIB:.0f}"
