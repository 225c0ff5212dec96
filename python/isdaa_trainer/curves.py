"""curves.png: how a run went, from metrics.jsonl and evaluation.jsonl."""

from pathlib import Path
from typing import Any

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
)


def draw_curves(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], target: Path) -> None:
    """Six panels over the step: training as a line, held-out pairs as dots. Needs no display."""
    figure = Figure(figsize=(12, 6.5))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.05, right=0.98, bottom=0.08, top=0.95, wspace=0.2, hspace=0.32)
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        axes.plot([line["step"] for line in steps], [line[name] for line in steps], label="training", linewidth=1.2)
        # the effective size of another number of pairs would not compare
        if evaluations and name != "weight/ess":
            points = [line["step"] for line in evaluations], [line[name] for line in evaluations]
            axes.plot(*points, "o--", label="held out", markersize=4, linewidth=0.8)
            axes.legend(frameon=False)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    with whole_file(target) as path:
        figure.savefig(path, format="png", dpi=110)
