"""time.png and memory.png: bars of first problem, preference pair and two models, a curve against tokens. Needs matplotlib."""

import matplotlib

matplotlib.use("Agg")
from collections.abc import Iterable

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.gpu.markdown import curve_points
from bench.gpu.measure import MEASURED
from bench.gpu.sections import LOGPROBS, PAIRS, Section, two_model_sections
from bench.gpu.settings import PROBLEM_SETS, Shape
from bench.gpu.tasks import FORWARD, FULL, ORDINARY
from bench.picture import draw_memory, draw_time, to_png

MIB = 1 << 20
_MARKERS = "osDv^<>PX"
_PEER_COLOURS = ("#1f77b4", "#2ca02c", "#9467bd", "#17becf", "#8c564b", "#7f7f7f", "#e377c2", "#bcbd22")


def draw(results: dict) -> dict[str, bytes]:
    """File name -> PNG."""
    return {"time.png": _draw(results, "time"), "memory.png": _draw(results, "memory")}


def _draw(results: dict, kind: str) -> bytes:
    problems = PROBLEM_SETS[results["settings"]["problems"]]
    first, pair = problems.shapes[0], problems.pair
    sections = [Section(f"Log-probs, {first}", first, LOGPROBS)]
    sections += [Section(f"A pair of {pair.N // 2} tokens a side, reference forward included", pair, PAIRS)]
    beside, below = (_panels(chosen, results["rows"]) for chosen in (sections, two_model_sections(problems)))
    couples = [below[i : i + 2] for i in range(0, len(below), 2)]
    heights = [_height(panel) for panel in beside] or [6]
    curve = len(heights)
    heights += [max(map(_height, couple)) for couple in couples]
    figure = pyplot.figure(figsize=(14, max(5.5, 1.4 + 0.42 * sum(heights))), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for place, panel in enumerate(beside):
        _draw_bars(figure.add_subplot(grid[place, 0]), panel, kind)
    for row, couple in enumerate(couples, start=curve):
        for column, panel in enumerate(couple):
            _draw_bars(figure.add_subplot(grid[row, column]), panel, kind)
    _draw_curve(figure.add_subplot(grid[:curve, 1]), curve_points(results["rows"], problems), kind, first)
    figure.suptitle(_caption(results, kind), fontsize=11)
    return to_png(figure)


def _panels(sections: Iterable[Section], rows: Iterable[dict]) -> list[tuple[str, list[dict]]]:
    """Title and bars of those sections that have any."""
    panels = [(section.title, bar_rows(section.select(rows))) for section in sections]
    return [(title, bars) for title, bars in panels if bars]


def _height(panel: tuple[str, list[dict]]) -> float:
    return len(panel[1]) + 1.8


def _draw_bars(axes: Axes, panel: tuple[str, list[dict]], kind: str) -> None:
    title, rows = panel
    draw_time(axes, title, rows, "bf16") if kind == "time" else draw_memory(axes, rows, title)


def bar_rows(rows: Iterable[dict]) -> list[dict]:
    """Both modes of a contender and case as one row, forward first, in the form that `bench.picture` draws."""
    found: dict[tuple, dict] = {}
    for row in rows:
        if row["status"] != MEASURED:
            continue
        title = row["contender"] + ("" if row["case"] == ORDINARY else f", {row['case']}")
        found.setdefault(title, {"title": title, "provider": row["provider"], "modes": {}})["modes"][row["mode"]] = row
    for row in found.values():
        row["modes"] = {mode: row["modes"][mode] for mode in (FORWARD, FULL) if mode in row["modes"]}
    return list(found.values())


def _draw_curve(axes: Axes, points: dict[str, dict[int, dict]], kind: str, first: Shape) -> None:
    axes.set_title(f"Forward and backward against tokens, D = {first.D}, V = {first.V}", fontsize=11, loc="left")
    if not points:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
        axes.set_axis_off()
        return
    for place, (name, found) in enumerate(points.items()):
        tokens = sorted(found)
        own = found[tokens[0]]["provider"].startswith("isdaa")
        style = {
            "color": "#e6550d" if own else _PEER_COLOURS[place % len(_PEER_COLOURS)],
            "linewidth": 2.6 if own else 1.3,
            "zorder": 3 if own else 2,
        }
        axes.plot(
            tokens,
            [_value(found[n], kind) for n in tokens],
            marker=_MARKERS[place % len(_MARKERS)],
            markersize=5,
            label=name,
            **style,
        )
    _scale(axes, sorted({n for found in points.values() for n in found}), kind)


def _value(row: dict, kind: str) -> float:
    return 1e3 * row["seconds"] if kind == "time" else max(row["extra_bytes"] / MIB, 0.5)


def _scale(axes: Axes, tokens: list[int], kind: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, list(map(str, tokens)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_xlabel("tokens")
    axes.set_ylabel("ms" if kind == "time" else "MiB beyond inputs, output and gradients")
    axes.grid(color="0.9", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False)


def _caption(results: dict, kind: str) -> str:
    versions = results["versions"]
    what = "time in units and ms" if kind == "time" else "peak memory beyond inputs, output and gradients"
    whiskers = "; whiskers: 20 to 80 % of the runs" if kind == "time" else ""
    return (
        f"{results['device']['name']}, bf16, torch {versions.get('torch')}, triton {versions.get('triton')}: {what}\n"
        f"light: forward alone, dark: forward and backward, orange: this project{whiskers}"
    )
