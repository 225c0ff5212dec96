"""curves.png: how a run went, from metrics.jsonl and evaluation.jsonl."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from isdaa_trainer.checkpoint import whole_file

PANELS = (
    ("loss/mean", "loss"),
    ("margin/mean", "margin (nats)"),
    ("accuracy/frac", "accuracy of the implicit reward"),
    ("weight/mean", "mean importance weight"),
    ("weight/clipped_frac", "clipped share"),
    ("weight/ess", "effective sample size (pairs)"),
    ("kl/sqrt", "√KL to the reference (√nats)"),
)
# Drawn where a run writes them.
OPTIONAL_PANELS = (
    ("weight/floored_frac", "share at the floor"),
    ("top_k_mass/mean", "mass of the likeliest tokens"),
    ("top_k_entropy/mean", "entropy over the likeliest tokens (nats)"),
)


def draw_curves(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], target: Path) -> None:
    """Panels over the step, training as a line, held-out pairs as dots; and accuracy over √KL, where a run that over-optimises turns down.
    Needs no display."""
    panels = (*PANELS, *(panel for panel in OPTIONAL_PANELS if steps and panel[0] in steps[0]))
    columns = -(-(len(panels) + 1) // 2)
    figure = Figure(figsize=(4 * columns, 6.5))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(
        left=0.15 / columns, right=1 - 0.06 / columns, bottom=0.08, top=0.95, wspace=0.2, hspace=0.32
    )
    first, *others = figure.subplots(2, columns).flat
    for axes, (name, title) in zip((first, *others), panels, strict=False):
        axes.plot([line["step"] for line in steps], [line[name] for line in steps], label="training", linewidth=1.2)
        # the effective size of another number of pairs would not compare
        if evaluations and name != "weight/ess" and name in evaluations[0]:
            points = [line["step"] for line in evaluations], [line[name] for line in evaluations]
            axes.plot(*points, "o--", label="held out", markersize=4, linewidth=0.8)
            axes.legend(frameon=False)
        _label(axes, title, "step")
        axes.xaxis.get_major_locator().set_params(integer=True)
    draw_accuracy(others[len(panels) - 1], steps, evaluations)
    for axes in others[len(panels) :]:
        axes.set_axis_off()
    with whole_file(target) as path:
        figure.savefig(path, format="png", dpi=110)


def draw_accuracy(axes: Axes, steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> None:
    """Over the distance from the reference: every step as a dot, the evaluations in their order. Of held-out pairs a tie counts one half:
    before the first step all of them are ties."""
    axes.plot(*_points(steps, "accuracy/frac"), ".", label="training", markersize=3, alpha=0.5)
    if evaluations:
        axes.plot(*_points(evaluations, "accuracy/tied_frac"), "o--", label="held out", markersize=4, linewidth=0.8)
        axes.legend(frameon=False)
    _label(axes, "accuracy over √KL", "√KL to the reference (√nats)")


def _points(lines: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    return [line["kl/sqrt"] for line in lines], [line[name] for line in lines]


def _label(axes: Axes, title: str, over: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(over)
    axes.grid(alpha=0.3)
