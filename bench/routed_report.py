"""What a run of `bench.routed` leaves behind: report.json, report.md and routed.png."""

import json
from pathlib import Path

from bench.files import write_whole
from bench.routed_errors import ROW_QUANTILES, TOKEN_QUANTILES

MIB = 1 << 20
HEADINGS = (
    "gradient",
    "order",
    "block",
    "tolerance",
    "row share",
    "fwd+bwd",
    "20-80 %",
    "n",
    "routed for hidden",
    "routed for weight",
    "flop",
    "1 + 2 w + h",
    "d_hidden",
    "d_weight",
    "row cosine",
    "token error",
)
READING = """\
fwd+bwd: units, ratio of medians of n runs, all calls in turn; the unit, `torch.mm(hidden, weight.T, out=preallocated)` in fp32, runs
before every third of them. Routed for hidden (h), for weight (w): share of all (token, block) pairs. Flop: matrix flop in units, counted,
next to what the shares say. d_hidden, d_weight: relative Frobenius error against fp64. Row cosine: of the rows of d_weight with the true
ones, {rows} quantile (low is bad). Token error: of each token's row of d_hidden, {tokens} quantile. An order of the vocabulary is made
from {order_tokens} hidden states that are not among those measured{other}. Where it says "made exactly", so many pairs are routed that
the exact gradient takes less time, and that is what was made. Times in the second table are missing where the first has them: the work
is the same but for the shares."""
COEFFICIENTS = {
    "random": "One random coefficient for each of 8 sequences, as of a policy gradient",
    "is_dpo": "Coefficients of an IS-DPO step",
}
ABOUT = {
    "random": "Normal numbers, the same for all tokens of a sequence.",
    "is_dpo": "The gradient of the mean IS-DPO loss, beta 0.1, with respect to each token's log-prob, from the sums over the sequences of "
    "the benchmark's preference step: equal runs of about 130 tokens, chosen and rejected, under the head and under a reference with the "
    "same head and states that differ by 2 % noise.",
}


def write_report(results: dict, picture: bytes, folder: Path) -> list[Path]:
    """Writes the three files into `folder`, each whole or not at all; returns their paths."""
    content = {
        "report.json": json.dumps(results, indent=1, allow_nan=False) + "\n",
        "report.md": markdown(results),
        "routed.png": picture,
    }
    for name, data in content.items():
        write_whole(folder / name, data)
    return [folder / name for name in content]


def markdown(results: dict) -> str:
    lines = [
        "# Routed gradients",
        "",
        *_header(results),
        "",
        *_unit(results["unit"]),
        "",
        "## How to read the tables",
        "",
    ]
    lines += READING.format(
        rows=_shares(ROW_QUANTILES),
        tokens=_shares(TOKEN_QUANTILES),
        order_tokens=results["settings"]["order_tokens"],
        other=_other(results["settings"]["order_states"]),
    ).splitlines()
    for kind, heading in COEFFICIENTS.items():
        lines += ["", f"## {heading}", "", f"{ABOUT[kind]} {_sizes(results['coefficients'][kind])}", ""]
        lines += _table(results, kind)
    return "\n".join([*lines, "", "## Beside the tables", "", *_notes(results)]) + "\n"


def _header(results: dict) -> list[str]:
    about, states = results["accelerator"], results["states"]
    threads = f", {about['cores']} cores, {about['threads']} threads" if "threads" in about else ""
    return [
        f"{about['name']}{threads}, {results['device']['cpu_capability']}; torch {results['versions']['torch']}; "
        f"commit {results['commit']}; {results['date']}; {results['seconds']:.0f} s.",
        f"States: {states['source']}, {states['tokens']} tokens, V = {states['vocabulary']}, D = {states['hidden_size']}, fp32.",
        f"Command: `{' '.join(results.get('command', []))}`",
    ]


def _unit(unit: dict) -> list[str]:
    line = (
        f"A unit took {unit['first']:.3g} s when the timing began and {unit['last']:.3g} s when it ended "
        f"({unit['least']:.3g} to {unit['most']:.3g} s in between, median {unit['median']:.3g} s)."
    )
    warning = (
        "**The unit changed by more than 15 % within this run: the machine was not quiet, read the times with care.**"
    )
    return [line, warning] if unit["drifted"] else [line]


def _other(spec: str | None) -> str:
    return "" if spec is None else f' ("other text": as many of {spec})'


def _shares(shares: tuple[float, ...]) -> str:
    return "/".join(f"{100 * share:.0f}" for share in shares) + " %"


def _sizes(about: dict) -> str:
    return f"Mean size {about['mean_size']:.3g}, largest {about['max_size']:.3g}, {about['zeros']} of them 0."


def _table(results: dict, kind: str) -> list[str]:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|---" + "|---:" * (len(HEADINGS) - 2) + "|"]
    for name, line in results["reference_lines"].items():
        if kind in line or kind == "random":
            full = line.get("time", {}).get("full") if kind == "random" else None
            lines.append(_row([name, "", "", "", ""], full, line.get(kind, {})))
    for row in results["rows"]:
        full = row["time"].get("full" if kind == "random" else "full, is_dpo")
        about = [row["order"], str(row["block"]), f"{row['tolerance']:g}", f"{row['row_share']:g}"]
        name = "**routed, default**" if row["default"] else "routed"
        lines.append(_row([name + (" (made exactly)" if row[kind]["made_exact"] else ""), *about], full, row[kind]))
    return lines


def _row(first: list[str], time: dict | None, found: dict) -> str:
    errors = found.get("error", {})
    cells = ["", "", ""]
    if time:
        cells = [f"{time['units']:.2f}", f"{time['units_20']:.2f}-{time['units_80']:.2f}", str(time["repeats"])]
    cells += [f"{100 * found[name]:.1f} %" if name in found else "" for name in ("share_hidden", "share_weight")]
    cells += [f"{found[name]:.2f}" if found.get(name) else "" for name in ("flop", "flop_formula")]
    cells += [f"{errors[name]:.2e}" if name in errors else "" for name in ("d_hidden", "d_weight")]
    cells += ["/".join(f"{cosine:.3f}" for cosine in found.get("row_cosine", []))]
    cells += ["/".join(f"{error:.1e}" for error in found.get("token_error", []))]
    return "| " + " | ".join(first + cells) + " |"


def _notes(results: dict) -> list[str]:
    exact = results["reference_lines"]["ours, exact"]["time"]["forward"]
    forwards = [f"exact {exact['units']:.2f}"]
    for row in results["rows"]:
        if "forward" in row["time"]:
            forwards.append(f"routed in blocks of {row['block']} {row['time']['forward']['units']:.2f}")
    lines = [f"- Forward that a backward will follow, units: {', '.join(forwards)}."]
    if results["memory"] is not None:
        spent = results["memory"]
        lines.append(
            f"- Peak memory of forward and backward beyond inputs, output and gradients: exact {spent['exact'] / MIB:.0f} MiB, "
            f"routed by default {spent['routed'] / MIB:.0f} MiB."
        )
    flat = results["flat"]
    return [
        *lines,
        f"- Flat logits ({flat['source']}, {flat['tokens']} tokens), where every pair would be routed: {flat['routed_units']:.2f} units "
        f"against {flat['exact_units']:.2f} exact, ratio {flat['ratio']:.2f}; the gradients differ by {flat['difference']['d_hidden']:.1e} "
        f"and {flat['difference']['d_weight']:.1e}.",
    ]
