"""The picture of `bench.routed_training`: the runs overlaid, and how far each is from the exact one."""

from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from bench.picture import to_png

PANELS = (
    ("training", "loss/mean", "training: loss"),
    ("training", "margin/mean", "training: margin (nats)"),
    ("training", "weight/mean", "training: mean importance weight"),
    ("heldout", "loss/mean", "held out: loss"),
    ("heldout", "margin/mean", "held out: margin (nats)"),
    ("heldout", "accuracy/tied_frac", "held out: accuracy of the implicit reward"),
)
EXACT, ROUTED, OTHERS = "#3182bd", "#e6550d", ("0.55", "0.75")


def draw(report: dict[str, Any]) -> bytes:
    """The picture as a PNG file: exact and routed of one seed above exact runs of other seeds, and below how far from exact each is."""
    figure, grid = pyplot.subplots(3, 3, figsize=(13, 10), layout="constrained")
    for axes, (kind, name, title) in zip(grid[:2].flat, PANELS, strict=True):
        draw_overlay(axes, report["runs"], kind, name)
        axes.set_title(title, fontsize=11, loc="left")
    apart = (PANELS[0], PANELS[3], PANELS[4])
    for axes, (kind, name, title) in zip(grid[2], apart, strict=True):
        draw_distance(axes, report["runs"], kind, name)
        axes.set_title(f"{title}, distance from exact", fontsize=11, loc="left")
    for axes in grid.flat:
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = grid[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(caption(report), fontsize=11)
    return to_png(figure)


def draw_overlay(axes: Axes, runs: dict[str, Any], kind: str, name: str) -> None:
    for run, style in styles(runs):
        steps, values = points(runs[run][kind], name)
        marker = {"marker": "o", "markersize": 3.5} if kind == "heldout" else {}
        axes.plot(steps, values, **style, **marker)


def draw_distance(axes: Axes, runs: dict[str, Any], kind: str, name: str) -> None:
    """Logarithmic; where two runs do not differ there is nothing to draw."""
    first = next(iter(runs))
    steps, base = points(runs[first][kind], name)
    for run, style in styles(runs)[:-2] + styles(runs)[-1:]:
        values = [abs(a - b) or float("nan") for a, b in zip(points(runs[run][kind], name)[1], base, strict=True)]
        axes.plot(steps, values, **style, marker="o", markersize=3 if kind == "heldout" else 2)
    axes.set_yscale("log")


def styles(runs: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The runs from the lowest to the topmost: others in grey, exact, routed dashed above it."""
    exact, routed, *others = runs
    grey = [
        (run, {"color": colour, "linewidth": 1.2, "label": f"exact, seed {run.split('-')[-1]}"})
        for run, colour in zip(others, OTHERS, strict=True)
    ]
    seed = exact.split("-")[-1]
    return [
        *grey,
        (exact, {"color": EXACT, "linewidth": 2.4, "label": f"exact, seed {seed}"}),
        (routed, {"color": ROUTED, "linewidth": 1.3, "linestyle": (0, (4, 2)), "label": f"routed, seed {seed}"}),
    ]


def points(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    return [line["step"] for line in lines], [line[name] for line in lines]


def caption(report: dict[str, Any]) -> str:
    data, settings = report["data"], report["settings"]
    return (
        f"IS-DPO of {report['model']}, {settings['steps']} steps of {settings['pairs_per_step']} pairs, "
        f"{data['heldout']} pairs held out; gradient of the head exact or Routed(tolerance={report['routed']['tolerance']:g}, "
        f"block={report['routed']['block']})"
    )
