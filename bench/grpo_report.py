"""report.json, report.md and grpo.png of `bench.grpo`."""

import json
from pathlib import Path

from matplotlib import pyplot

from bench.files import write_whole
from bench.picture import draw_memory, draw_time, to_png

MIB = 1 << 20
MODES = ("full", "frozen head")
PARTS = ("value", "d_hidden", "d_weight")
HEADINGS = ("", "forward + backward", "20-80 %", "frozen head", "peak MiB", *(f"err {part}" for part in PARTS))


def write_report(results: dict, folder: Path) -> list[Path]:
    """Writes the files into `folder`, each whole or not at all; returns their paths. No picture where nothing was measured."""
    content = {
        "report.json": json.dumps(results, indent=1, allow_nan=False) + "\n",
        "report.md": markdown(results),
    }
    if any(not row["red"] for row in results["rows"]):
        content["grpo.png"] = draw(results)
    for name, data in content.items():
        write_whole(folder / name, data)
    return [folder / name for name in content]


def markdown(results: dict) -> str:
    about, states, settings = results["device"], results["states"], results["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version)
    lines = [
        "# The head of a GRPO step",
        "",
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads; {versions}; commit {results['commit']}; "
        f"{results['date']}.",
        f"`{' '.join(results.get('command', []))}`",
        "",
        f"Forward and backward from hidden states to their gradient and the head's, in fp32, on {states['source']}: "
        f"{states['tokens']} tokens in {states['completions']} completions, {states['scored']} scored, V = {states['vocabulary']}, "
        f"D = {states['hidden_size']}. Times are in units of one `torch.mm(hidden, weight.T, out=preallocated)` over all tokens "
        f"({results['unit_seconds']:.3f} s), run just before each call; ratio of medians of at most {settings['repeats']} runs, all "
        "contenders by turns. Peak: growth of the resident set in a process of its own beyond inputs, output and gradients. Errors: "
        "against fp64, relative, Frobenius.",
    ]
    for case in results["cases"]:
        rows = [row for row in results["rows"] if row["case"] == case["name"]]
        lines += ["", f"## {case['title']}", "", "| " + " | ".join(HEADINGS) + " |", "|---" + "|---:" * 7 + "|"]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    lines += [""] + [f"- {row['case']}, {row['contender']}: {row['red']}" for row in results["rows"] if row["red"]]
    lines += [
        f"- {row['case']}, {row['contender']}: no peak, {row['memory_error']}"
        for row in results["rows"]
        if row.get("memory_error")
    ]
    lines += [f"- missing: {name} ({reason})" for name, reason in results["missing"].items()]
    lines += [f"- {name}: {note}" for name, note in results["notes"].items()]
    return "\n".join(lines).rstrip() + "\n"


def cells(row: dict) -> list[str]:
    """One line of a table; a red row has a word and no time."""
    errors = [f"{row['error'][part]:.1e}" if row["error"].get(part) is not None else "" for part in PARTS]
    if row["red"]:
        return [row["contender"], *["red"] * 4, *errors]
    full, extra = row["full"], row["full"].get("extra_bytes")
    return [
        row["contender"],
        f"{full['units']:.2f}",
        f"{full['units_20']:.2f}-{full['units_80']:.2f}",
        f"{row['frozen head']['units']:.2f}",
        "" if extra is None else f"{extra / MIB:.0f}",
        *errors,
    ]


def draw(results: dict) -> bytes:
    """Time and peak memory of forward and backward, a row of panels a case."""
    panels = []
    for case in results["cases"]:
        rows = [row for row in results["rows"] if row["case"] == case["name"] and not row["red"]]
        bars = [
            {"title": row["contender"], "provider": row["provider"], "modes": {"full": row["full"]}} for row in rows
        ]
        panels += [(case["title"], bars)] if bars else []
    heights = [len(bars) + 1.8 for _, bars in panels]
    figure, grid = pyplot.subplots(
        len(panels),
        2,
        figsize=(13, 1 + 0.42 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for (title, bars), (time_axes, memory_axes) in zip(panels, grid, strict=True):
        draw_time(time_axes, title, bars)
        draw_memory(memory_axes, bars)
        memory_axes.set_yticklabels([])
    about, states = results["device"], results["states"]
    figure.suptitle(
        f"The head of a GRPO step, forward and backward. {states['source']}: {states['tokens']} tokens, V = {states['vocabulary']}, "
        f"D = {states['hidden_size']}, fp32; {about['cpu']}, {about['threads']} threads\norange: this project; whiskers: 20 to 80 % "
        "of the runs",
        fontsize=11,
    )
    return to_png(figure)
