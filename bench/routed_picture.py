"""One picture of a run of `bench.routed`: errors against time, and the share of routed pairs against the tolerance."""

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from bench.picture import to_png

STYLES = {"natural": ("#3182bd", "o", "vocabulary as it stands"), "vocab": ("#e6550d", "s", "vocabulary in order")}
GREY = "0.45"
DENSE_FLOOR = 3


def draw(results: dict) -> bytes:
    """The picture as a PNG file."""
    figure, axes = pyplot.subplots(1, 3, figsize=(16, 6.2), layout="constrained", width_ratios=(1.15, 1.15, 1))
    axes[1].sharey(axes[0])
    for place, name in zip(axes, ("d_hidden", "d_weight"), strict=False):
        _draw_errors(place, results, name)
    _draw_shares(axes[2], results)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=6, fontsize=9.5, frameon=False)
    figure.suptitle(_caption(results), fontsize=11)
    return to_png(figure)


def sweep(results: dict, order: str) -> list[dict]:
    """The rows of one order that differ in nothing but the tolerance."""
    default = _default(results)
    rows = [row for row in results["rows"] if row["order"] == order]
    return [row for row in rows if all(row[name] == default[name] for name in ("block", "row_share"))]


def _draw_errors(axes: Axes, results: dict, name: str) -> None:
    for order, (colour, marker, label) in STYLES.items():
        rows = sweep(results, order)
        units, errors = [_units(row) for row in rows], [row["random"]["error"][name] for row in rows]
        axes.plot(units, errors, color=colour, marker=marker, markersize=6, linewidth=1.8, label=label, zorder=3)
        side = {"xytext": (8, 3), "ha": "left"} if order == "natural" else {"xytext": (-9, -8), "ha": "right"}
        for row, x, y in zip(rows, units, errors, strict=True):
            axes.annotate(f"{row['tolerance']:g}", (x, y), textcoords="offset points", fontsize=8, color=colour, **side)
    _mark_others(axes, results, name)
    axes.set_yscale("log")
    axes.set_xlim(*_limits(results))
    _mark_roundings(axes, results, name)
    _mark_times(axes, results)
    axes.set_title(f"Error of {name} against time, by tolerance", fontsize=11, loc="left")
    axes.set_xlabel("forward and backward, units (1: the product hidden @ weight.T)")
    if name == "d_hidden":
        axes.set_ylabel("relative Frobenius error against fp64")
    _finish(axes)


def _mark_others(axes: Axes, results: dict, name: str) -> None:
    """The default, and what differs from it in one thing."""
    default, colour = _default(results), STYLES["vocab"][0]
    others = [("o", f"default: Routed(), tolerance {default['tolerance']:g}", default)]
    rows = [row for row in results["rows"] if row["tolerance"] == default["tolerance"]]
    for row in rows:
        if row["order"] == "vocab" and row["block"] != default["block"]:
            others.append(("v" if row["block"] < default["block"] else "^", f"blocks of {row['block']}", row))
        if row["order"] not in STYLES:
            others.append(("D", "order made on another text", row))
    for marker, label, row in others:
        default_style = {"markersize": 15, "markeredgecolor": "black", "markerfacecolor": "none"}
        style = default_style if row["default"] else {"markersize": 7, "markerfacecolor": "white", "color": colour}
        error = row["random"]["error"][name]
        axes.plot(_units(row), error, marker=marker, linestyle="", label=label, zorder=4, **style)


def _mark_roundings(axes: Axes, results: dict, name: str) -> None:
    lines = {
        "exact, rounded to bf16": "exact gradient rounded to bf16",
        "logits rounded to bf16": "logits rounded to bf16",
    }
    for title, text in lines.items():
        error = results["reference_lines"][title]["random"]["error"][name]
        axes.axhline(error, color=GREY, linewidth=1, linestyle="--", zorder=1)
        axes.annotate(
            text, (1, error), xycoords=("axes fraction", "data"), xytext=(-2, 3), textcoords="offset points", ha="right",
            fontsize=8.5, color=GREY, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6}, zorder=2,
        )  # fmt: skip


def _mark_times(axes: Axes, results: dict) -> None:
    for place, (x, text) in enumerate(_times(results)):  # at different heights: two may nearly coincide
        axes.axvline(x, color=GREY, linewidth=1, linestyle=":", zorder=1)
        axes.annotate(
            text, (x, 0.015 + 0.25 * (place % 2)), xycoords=("data", "axes fraction"), xytext=(-3, 0), textcoords="offset points",
            rotation=90, ha="right", va="bottom", fontsize=8.5, color=GREY,
        )  # fmt: skip


def _times(results: dict) -> list[tuple[float, str]]:
    found = [(DENSE_FLOOR, "3 products: least for dense")]
    for name, text in (("ours, exact", "ours, exact"), ("dense PyTorch", "dense PyTorch")):
        if name in results["reference_lines"]:
            found.append((results["reference_lines"][name]["time"]["full"]["units"], text))
    return found


def _limits(results: dict) -> tuple[float, float]:
    units = [1.0, *map(_units, results["rows"]), *(x for x, _ in _times(results))]
    return min(units) - 0.1, max(units) + 0.25


def _default(results: dict) -> dict:
    [row] = [row for row in results["rows"] if row["default"]]
    return row


def _draw_shares(axes: Axes, results: dict) -> None:
    for order, (colour, marker, label) in STYLES.items():
        rows = sweep(results, order)
        tolerances = [row["tolerance"] for row in rows]
        for kind, what, style in (("share_weight", "for weight", "-"), ("share_hidden", "for hidden", "--")):
            shares = [row["random"][kind] for row in rows]
            axes.plot(
                tolerances, shares, color=colour, marker=marker, markersize=6, linewidth=1.8, linestyle=style,
                markerfacecolor=colour if style == "-" else "white", label=f"{label}, {what}", zorder=3,
            )  # fmt: skip
    axes.axvline(_default(results)["tolerance"], color=GREY, linewidth=1, linestyle=":", zorder=1)
    axes.annotate(
        "default", (_default(results)["tolerance"], 0.015), xycoords=("data", "axes fraction"), xytext=(4, 0),
        textcoords="offset points", va="bottom", fontsize=8.5, color=GREY,
    )  # fmt: skip
    axes.set_xscale("log")
    default = _default(results)["tolerance"]  # has a name in its place
    _plain_ticks(axes, [row["tolerance"] for row in sweep(results, "vocab") if row["tolerance"] != default])
    axes.set_ylim(0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_title(f"Routed (token, block of {_default(results)['block']}) pairs", fontsize=11, loc="left")
    axes.set_xlabel("tolerance")
    axes.set_ylabel("share of all pairs")
    _finish(axes)
    axes.legend(fontsize=8.5, frameon=False)


def _plain_ticks(axes: Axes, ticks: Sequence[float]) -> None:
    axes.set_xticks(ticks)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}".replace("e-0", "e-")))


def _finish(axes: Axes) -> None:
    axes.grid(color="0.92", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _units(row: dict) -> float:
    return row["time"]["full"]["units"]


def _caption(results: dict) -> str:
    about, states, versions = results["accelerator"], results["states"], results["versions"]
    threads = f", {about['threads']} threads" if "threads" in about else ""
    return (
        f"Routed gradients. {states['source']}: {states['tokens']} tokens, V = {states['vocabulary']}, D = {states['hidden_size']}, fp32; "
        f"{about['name']}{threads}, torch {versions['torch']}\n"
        "one random coefficient a sequence; the order of the vocabulary is made from states that are not among those measured"
    )
