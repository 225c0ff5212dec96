"""One picture of a run: time in units and peak memory of both tables, and what coefficients near 1e-30 do to the time."""

import io
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

MIB = 1 << 20
COLOURS = {
    (False, "forward"): "#9ecae1",
    (False, "full"): "#3182bd",
    (True, "forward"): "#fdae6b",
    (True, "full"): "#e6550d",
}


class Bar(NamedTuple):
    place: float
    height: float
    value: float
    end: float  # where its label may begin
    spread: tuple[float, float] | None
    colour: str
    text: str


def draw(results: dict) -> bytes:
    """The picture as a PNG file."""
    panels = [
        ("Token log-probs: time", _complete(results, False), results["settings"]["memory"]),
        ("Preference step, reference forward included: time", _complete(results, True), results["settings"]["memory"]),
        ("Few tokens, ordinary and with coefficients of 1e-30 (saturated): time", _few(results), False),
    ]
    panels = [panel for panel in panels if panel[1]]
    heights = [len(rows) + 1.8 for _, rows, _ in panels] or [1]
    size = (13, 1 + 0.42 * sum(heights))
    figure, grid = pyplot.subplots(
        len(heights), 2, figsize=size, height_ratios=heights, squeeze=False, layout="constrained"
    )
    for (title, rows, has_memory), (time_axes, memory_axes) in zip(panels, grid, strict=False):
        draw_time(time_axes, title, rows)
        draw_memory(memory_axes, rows) if has_memory else memory_axes.set_axis_off()
        memory_axes.set_yticklabels([])
    figure.suptitle(_caption(results), fontsize=11)
    return to_png(figure)


def to_png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
    return file.getvalue()


def _complete(results: dict, preference: bool) -> list[dict]:
    """Green rows on all tokens, but for the saturated ones: those are a matter of a ratio."""
    rows = [row for row in results["rows"] if (row["objective"] is not None) == preference and row["modes"]]
    return [row for row in rows if row["tokens"] == results["states"]["tokens"] and row["case"] != "saturated"]


def _few(results: dict) -> list[dict]:
    return [row for row in results["rows"] if row["modes"] and row["tokens"] < results["states"]["tokens"]]


def draw_time(axes: Axes, title: str, rows: list[dict], dtype: str = "fp32") -> None:
    """Bars of rows {"title", "provider", "modes": {mode: figures}}."""

    def bar(figures: dict) -> tuple[float, tuple[float, float], str]:
        return figures["units"], (figures["units_20"], figures["units_80"]), f"{figures['units']:.2f}"

    bars = _bars(rows, bar)
    logarithmic = max(b.value for b in bars) > 40  # denormal numbers make one bar 80 times longer than its neighbours
    if logarithmic:
        _logarithmic(axes, bars)
    else:
        axes.set_xlim(0, 1.1 * max(b.end for b in bars))
    _paint(axes, rows, bars)
    axes.axvline(1, color="black", linewidth=0.9, linestyle=":", zorder=3)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(
        "units, logarithmic" if logarithmic else f"units; dotted: 1, the plain product hidden @ weight.T in {dtype}"
    )


def draw_memory(axes: Axes, rows: list[dict], title: str = "Peak memory beyond inputs, output and gradients") -> None:
    def bar(figures: dict) -> tuple[float, None, str] | None:
        extra = figures.get("extra_bytes")
        return None if extra is None else (max(extra / MIB, 0.5), None, f"{extra / MIB:.0f}")

    bars = _bars(rows, bar)
    axes.set_title(title, fontsize=11, loc="left")
    if not bars:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
        axes.set_axis_off()
        return
    _logarithmic(axes, bars)
    _paint(axes, rows, bars)
    axes.set_xlabel("MiB, logarithmic")


def _bars(rows: list[dict], bar) -> list[Bar]:
    """Forward above forward and backward; a row with one mode has one bar in the middle."""
    bars = []
    for place, row in enumerate(rows):
        for mode, figures in row["modes"].items():
            found = bar(figures)
            if found is None:
                continue
            value, spread, text = found
            offset = 0 if len(row["modes"]) == 1 else {"forward": -0.2, "full": 0.2}[mode]
            colour = COLOURS[row["provider"].startswith("isdaa"), mode]
            bars.append(Bar(place + offset, 0.38, value, max((value, *(spread or ()))), spread, colour, text))
    return bars


def _logarithmic(axes: Axes, bars: list[Bar]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if max(b.end for b in bars) < 50 * min(b.value for b in bars) else (1,))
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(min(b.value for b in bars) / 2, max(b.end for b in bars) * 2)


def _paint(axes: Axes, rows: list[dict], bars: list[Bar]) -> None:
    for bar in bars:
        axes.barh(bar.place, bar.value, bar.height, color=bar.colour, zorder=2)
        axes.annotate(
            bar.text, (bar.end, bar.place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8
        )
        if bar.spread is not None:
            axes.plot(bar.spread, [bar.place] * 2, color="black", linewidth=1, marker="|", markersize=4, zorder=4)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _caption(results: dict) -> str:
    about, states = results["device"], results["states"]
    return (
        f"{states['source']}: {states['tokens']} tokens, V = {states['vocabulary']}, D = {states['hidden_size']}, "
        f"{results['settings']['dtype']}; {about['cpu']}, {about['threads']} threads, torch {results['versions']['torch']}\n"
        "light: forward alone, dark: forward and backward, orange: this project; whiskers: 20 to 80 % of the runs"
    )
