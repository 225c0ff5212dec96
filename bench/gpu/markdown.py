"""report.md: the targets, then every table with what is needed to read it."""

import textwrap
from collections.abc import Iterable, Sequence

from bench.gpu import sharp
from bench.gpu.measure import DIED, MEASURED, MISSING, RED
from bench.gpu.sections import LOGPROBS, Section, logprob_sections, pair_section, two_model_sections
from bench.gpu.settings import PROBLEM_SETS, ProblemSet, Shape
from bench.gpu.tasks import BITWISE, CHECKS, FORWARD, FROZEN_HEAD, FULL, NO_WAIT, ORDINARY

MIB = 1 << 20
HEADINGS = (
    "contender",
    "forward",
    "fwd+bwd",
    "20-80 %",
    "n",
    "ms",
    "MiB fwd",
    "MiB",
    "value",
    "d_hidden",
    "d_weight",
)
READING = """\
Times are in units: one `torch.mm(hidden, weight.T, out=preallocated)` in bf16 on the same shapes, run just before each timed call, both
between events of the device; ratio of medians of n runs after two to warm up. The spread, n, ms and the errors belong to forward and
backward, or to the forward where there is nothing else. MiB: peak of what the allocator gave out beyond inputs, output and gradients.
Errors: relative Frobenius norm against fp64 on the first {tokens} tokens under the whole vocabulary, sharp states / random states.
Timed are the sharp states. Nobody is timed whose values or gradients are wrong there, or on the whole problem as far as that can be
compared (log-probs, divergences and d_hidden of the first tokens, the loss of a pair or step, everything finite)."""


def render(results: dict) -> str:
    problems = PROBLEM_SETS[results["settings"]["problems"]]
    rows = results["rows"]
    lines = ["# Measured on a device", "", *_header(results), "", *_targets(results), "", *_device_tests(results)]
    lines += [
        "",
        "## How to read the tables",
        "",
        *READING.format(tokens=results["settings"]["gate_tokens"]).splitlines(),
    ]
    long = Section(f"Long run, {problems.long}", problems.long, LOGPROBS)
    for section in (*logprob_sections(problems), pair_section(problems), *two_model_sections(problems), long):
        lines += _table(section, section.select(rows))
    lines += _curve(rows, problems) + _checks(rows) + _plans(rows) + _absent(rows)
    lines += ["", "## The states", "", *(sharp.__doc__ or "").splitlines(), "", *_measured_states(rows)]
    return "\n".join([*lines, *_notes(results)]) + "\n"


def _header(results: dict) -> list[str]:
    about, versions = results["device"], results["versions"]
    extra = [f"{name} {value}" for name, value in about.items() if name != "name" and value is not None]
    installed = [f"{name} {version}" for name, version in versions.items() if version is not None]
    missing = [name for name, version in versions.items() if version is None]
    lines = [
        f"{about['name']} ({', '.join(extra)}). Commit: {results['commit']}; {results['date']}; {results['seconds']:.0f} s."
    ]
    lines += [f"{', '.join(installed)}{'; not installed: ' + ', '.join(missing) if missing else ''}.", ""]
    lines += [f"- {line}" for line in results["backends"]]
    return (
        lines
        if results["finished"]
        else [*lines, "", "**This run was cut short: what follows is what it had by then.**"]
    )


def _targets(results: dict) -> list[str]:
    words = {True: "met", False: "**NOT MET**", None: "not measured"}
    lines = ["## Targets", "", "| target | measured | |", "|---|---|---|"]
    return lines + [f"| {t['target']} | {t['measured']} | {words[t['met']]} |" for t in results["targets"]]


def _device_tests(results: dict) -> list[str]:
    tests = results["device_tests"]
    if tests is None:
        return ["## Tests of the device", "", "Not run."]
    counts = f"{tests['passed']} passed, {tests['failed']} failed, {tests['error']} errors, {tests['skipped']} skipped"
    lines = ["## Tests of the device", "", f"`{tests['command']}`: {tests['verdict']}; {counts}."]
    if str(tests["verdict"]).startswith("red"):
        lines += ["", "# THE TESTS OF THE DEVICE ARE RED: nothing below counts before they are green", ""]
        lines += [f"- failed: {name}" for name in tests["failures"]]
        lines += ["", "```", *tests["tail"], "```"]
    return lines


def _table(section: Section, rows: Sequence[dict]) -> list[str]:
    """One line a contender and case, of its two modes."""
    lines = ["", f"## {section.title}", "", *([textwrap.fill(section.text, 140), ""] if section.text else [])]
    units = [row["unit_seconds"] for row in rows if row["status"] == MEASURED]
    if not units:
        return [*lines, "Nothing was measured."]
    N, D, V = rows[0]["shape"]
    middle = sorted(units)[len(units) // 2]
    lines += [f"A unit took {1e3 * middle:.2f} ms ({2 * N * D * V / middle / 1e12:.0f} TFLOP/s).", ""]
    lines += ["| " + " | ".join(HEADINGS) + " |", "|---" + "|---:" * (len(HEADINGS) - 1) + "|"]
    for name in dict.fromkeys((row["contender"], row["case"]) for row in rows if row["status"] == MEASURED):
        modes = {row["mode"]: row for row in rows if (row["contender"], row["case"]) == name}
        lines.append(
            "| " + " | ".join(_cells(*name, {m: r for m, r in modes.items() if r["status"] == MEASURED})) + " |"
        )
    return lines


def _cells(contender: str, case: str, modes: dict[str, dict]) -> list[str]:
    main = modes.get(FULL) or modes[FORWARD]
    return [
        contender + ("" if case == ORDINARY else f", {case}"),
        *(f"{modes[mode]['units']:.2f}" if mode in modes else "" for mode in (FORWARD, FULL)),
        f"{main['units_20']:.2f}-{main['units_80']:.2f}",
        str(main["repeats"]),
        f"{1e3 * main['seconds']:.1f}",
        *(f"{modes[mode]['extra_bytes'] / MIB:.0f}" if mode in modes else "" for mode in (FORWARD, FULL)),
        *(_error(main, part) for part in ("value", "d_hidden", "d_weight")),
    ]


def _error(row: dict, part: str) -> str:
    return " / ".join(f"{errors[part]:.1e}" for errors in row["error"].values() if part in errors)


def _curve(rows: Sequence[dict], problems: ProblemSet) -> list[str]:
    """Time and memory of forward and backward against tokens, for contenders that have more than one point."""
    points = curve_points(rows, problems)
    lines = [
        "",
        f"## Against tokens, D = {problems.shapes[0].D}, V = {problems.shapes[0].V}: ms / MiB, forward and backward",
        "",
    ]
    lines += [
        "| contender | " + " | ".join(map(str, problems.curve)) + " |",
        "|---" + "|---:" * len(problems.curve) + "|",
    ]
    for name, found in points.items():
        cells = [
            f"{1e3 * found[n]['seconds']:.1f} / {found[n]['extra_bytes'] / MIB:.0f}" if n in found else ""
            for n in problems.curve
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def curve_points(rows: Iterable[dict], problems: ProblemSet) -> dict[str, dict[int, dict]]:
    """contender -> tokens -> row, of those with more than one point."""
    points: dict[str, dict[int, dict]] = {}
    first = problems.shapes[0]
    for row in rows:
        shape = Shape(*row["shape"])
        on_curve = shape[1:] == first[1:] and shape.N in problems.curve and shape != problems.pair
        if (
            on_curve
            and row["objective"] in LOGPROBS
            and (row["status"], row["mode"], row["case"]) == (MEASURED, FULL, ORDINARY)
        ):
            points.setdefault(row["contender"], {})[shape.N] = row
    return {name: found for name, found in points.items() if len(found) > 1}


def _checks(rows: Sequence[dict]) -> list[str]:
    lines = ["", "## Two runs agree in every bit; forward and backward never wait for the device", ""]
    lines += ["| contender | same bits | never waits |", "|---|---|---|"]
    checks = [row for row in rows if row["mode"] in CHECKS and row["status"] in (MEASURED, DIED)]
    for name in dict.fromkeys(row["contender"] for row in checks):
        found = {row["mode"]: row for row in checks if row["contender"] == name}
        lines.append(f"| {name} | {_verdict(found.get(BITWISE))} | {_verdict(found.get(NO_WAIT))} |")
    return lines


def _verdict(row: dict | None) -> str:
    if row is None or row.get("ok") is None:
        return "" if row is None else str(row["reason"])
    return "yes" if row["ok"] else f"no{': ' + row['reason'] if row['reason'] else ''}"


def _plans(rows: Iterable[dict]) -> list[str]:
    lines = ["", "## Plans of ours", ""]
    for row in rows:
        if row.get("plan") and row["mode"] == FULL:
            frozen = ", frozen head" if row["case"] == FROZEN_HEAD else ""
            lines.append(f"- {Shape(*row['shape'])}, {row['contender']}{frozen}: {row['plan']}")
    return lines


def _absent(rows: Sequence[dict]) -> list[str]:
    """Every row without a figure, with its reason; those that share one are one line."""
    lines = []
    for status, heading in ((RED, "Red, not timed"), (DIED, "Died"), (MISSING, "Missing"), (None, "Not run")):
        found = [row for row in rows if row["status"] == status or (status is None and row["status"] == "not run")]
        reasons: dict[tuple, list[str]] = {}
        for row in found:
            place = "" if status == MISSING else f"{Shape(*row['shape'])}, {row['case']}, {row['mode']}"
            reasons.setdefault((row["contender"], row["reason"]), []).append(place)
        if reasons:
            lines += ["", f"## {heading}", ""]
        for (name, reason), places in reasons.items():
            where = f" ({'; '.join(places)})" if any(places) else ""
            lines.append(f"- {name}: {reason or 'the run ended before it'}{where}")
    return lines


def _measured_states(rows: Iterable[dict]) -> list[str]:
    found = {str(Shape(*row["shape"])): row["states"] for row in rows if row.get("states")}
    return [
        f"- {shape}: entropy {s['entropy']:.2f}, log-prob of the target {s['target_logprob']:.2f} on average, lift {s['lift']:.2f}"
        for shape, s in found.items()
    ]


def _notes(results: dict) -> list[str]:
    notes = {row["contender"]: row["note"] for row in results["rows"] if row["note"]}
    return [
        "",
        "## Notes",
        "",
        *(f"- {n}" for n in results["notes"]),
        *(f"- {name}: {note}" for name, note in notes.items()),
    ]
