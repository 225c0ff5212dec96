"""What the library promises on a device, each promise beside what was measured: pure functions of the rows of a run.

N tokens, D hidden size.
"""

from collections.abc import Iterable, Sequence
from operator import itemgetter

from bench.gpu.measure import MEASURED
from bench.gpu.settings import ProblemSet, Shape
from bench.gpu.tasks import BITWISE, FORWARD, FROZEN_HEAD, FULL, NO_WAIT, ORDINARY

MIB = 1 << 20
FORWARD_UNITS, FULL_UNITS, FROZEN_UNITS = 1.3, 4.6, 3.4
ROUTED_UNITS = 1.9
PEAK_MIB, DIVERGENCE_PEAK_MIB = 512, 1024
TWO_PASS_UNITS, TWO_PASS_TOKEN_BYTES = 5.4, 64
ERROR_RATIO, ERROR_FLOOR = 1.5, 2e-7  # against dense PyTorch with fp32 logits
OURS = "isdaa"
NOTHING = "not measured"


def judge_targets(rows: Sequence[dict], problems: ProblemSet, device_tests: dict | None) -> list[dict]:
    """[{"target", "measured", "met"}], met True, False, or None where it was not measured."""
    everything = rows
    rows = [row for row in rows if row["status"] == MEASURED or row["mode"] in (BITWISE, NO_WAIT)]
    first = problems.shapes[0]
    plain = [row for row in rows if tuple(row["shape"]) in problems.shapes and row["objective"] is None]
    divergence = [row for row in rows if tuple(row["shape"]) == first and row["objective"] == "reverse_kl"]
    divergence = [row for row in divergence if row["mode"] == FULL]
    return [
        _device_tests(device_tests),
        _units("forward", _of(plain, FORWARD), FORWARD_UNITS, first),
        _units("forward and backward", _of(plain, FULL), FULL_UNITS, first),
        _units("frozen head, forward and backward", _of(plain, FULL, FROZEN_HEAD), FROZEN_UNITS, first),
        _units(
            "routed, forward and backward",
            [row for row in _routed(plain) if tuple(row["shape"]) == first],
            ROUTED_UNITS,
            first,
        ),
        _peak("peak memory", _of(plain, FULL), first, PEAK_MIB),
        _long(rows, problems.long),
        _divergence(divergence, first),
        _peak("reverse KL, peak memory", _of(divergence, FULL), first, DIVERGENCE_PEAK_MIB),
        *_against_peers(everything),
        _check("two runs agree in every bit", rows, BITWISE),
        _check("forward and backward never wait for the device", rows, NO_WAIT),
        _errors(plain, first),
    ]


def _target(text: str, measured: str, met: bool | None) -> dict:
    return {"target": text, "measured": measured, "met": met}


def _of(rows: Iterable[dict], mode: str, case: str = ORDINARY) -> list[dict]:
    return [row for row in rows if row["provider"] == OURS and row["mode"] == mode and row["case"] == case]


def _routed(rows: Iterable[dict]) -> list[dict]:
    return [row for row in rows if row["provider"] == f"{OURS}_routed" and row["mode"] == FULL]


def _device_tests(tests: dict | None) -> dict:
    text = "the tests of the device are green"
    if tests is None or not str(tests["verdict"]).startswith(("green", "red")):
        return _target(text, NOTHING if tests is None else str(tests["verdict"]), None)
    counts = f"{tests['passed']} passed, {tests['failed'] + tests['error']} failed, {tests['skipped']} skipped"
    return _target(text, f"{tests['verdict']}; {counts}", tests["verdict"] == "green")


def _units(what: str, rows: list[dict], bar: float, first: Shape) -> dict:
    text = f"{what}: at most {bar} units"
    if not rows:
        return _target(text, NOTHING, None)
    worst = max(rows, key=lambda row: row["units"])
    said = [f"{row['units']:.2f} at {first}" for row in rows if tuple(row["shape"]) == first and row is not worst]
    said.append(f"{worst['units']:.2f} at {_name(worst)}" + (" (worst)" if len(rows) > 1 else ""))
    return _target(text, ", ".join(said), worst["units"] <= bar)


def _peak(what: str, rows: list[dict], first: Shape, bar: int) -> dict:
    text = f"{what}: at most {bar} MiB beyond inputs, output and gradients at {first}"
    sizes = [row["extra_bytes"] / MIB for row in rows if tuple(row["shape"]) == first]
    return _target(text, f"{sizes[0]:.0f} MiB", sizes[0] <= bar) if sizes else _target(text, NOTHING, None)


def _divergence(rows: list[dict], first: Shape) -> dict:
    """Against both peers; one that is faster settles it without the other."""
    text = f"reverse KL, forward and backward at {first}: faster than TRL's and dense PyTorch's"
    by_provider = {row["provider"]: row for row in rows}
    peers = [by_provider[name] for name in ("trl", "torch") if name in by_provider]
    if OURS not in by_provider or not peers:
        return _target(text, NOTHING, None)
    shares = [by_provider[OURS]["units"] / row["units"] for row in peers]
    said = [f"{share:.2f} of the time of {row['contender']}" for share, row in zip(shares, peers, strict=True)]
    met = False if max(shares) >= 1 else True if len(peers) == 2 else None
    return _target(text, ", ".join(said), met)


def _long(rows: Iterable[dict], long: Shape) -> dict:
    text = (
        f"{long}: {PEAK_MIB} MiB + 4 D bytes a token at {FULL_UNITS} units, "
        f"or {PEAK_MIB} MiB + {TWO_PASS_TOKEN_BYTES} bytes a token at {TWO_PASS_UNITS} units, at most"
    )
    ours = [row for row in rows if tuple(row["shape"]) == long and row["provider"].startswith(OURS)]
    if not ours:
        return _target(text, NOTHING, None)
    said = [f"{row['contender']}: {row['extra_bytes'] / MIB:.0f} MiB, {row['units']:.2f} units" for row in ours]
    return _target(text, "; ".join(said), any(_is_long_enough(row, long) for row in ours))


def _is_long_enough(row: dict, long: Shape) -> bool:
    for token_bytes, units in ((4 * long.D, FULL_UNITS), (TWO_PASS_TOKEN_BYTES, TWO_PASS_UNITS)):
        if row["extra_bytes"] <= PEAK_MIB * MIB + token_bytes * long.N and row["units"] <= units:
            return True
    return False


def _against_peers(rows: Sequence[dict]) -> list[dict]:
    """One target a peer, over all rows that both have: a sum of log-probs is compared with the log-probs themselves."""
    timed = [row for row in rows if row.get("units") is not None]
    ours = {_place(row): row for row in timed if row["provider"] == OURS}
    peers: dict[str, str | None] = {}
    for row in rows:
        if not row["provider"].startswith(OURS):
            peers.setdefault(row["contender"], row["reason"])
    return [_against(name, why, [r for r in timed if r["contender"] == name], ours) for name, why in peers.items()]


def _against(name: str, reason: str | None, theirs: list[dict], ours: dict[tuple, dict]) -> dict:
    shares = [(ours[_place(row)]["units"] / row["units"], row) for row in theirs if _place(row) in ours]
    if not shares:
        return _target(f"faster than {name}", reason or NOTHING, None)
    least, worst = min(shares, key=itemgetter(0)), max(shares, key=itemgetter(0))
    where = f"{_name(worst[1])}, {worst[1]['mode']}, {worst[1]['case']}"
    said = f"{least[0]:.2f} to {worst[0]:.2f} of its time in {len(shares)} rows, the largest at {where}"
    return _target(f"faster than {name}", said, worst[0] < 1)


def _place(row: dict) -> tuple:
    objective = None if row["objective"] == "sum" else row["objective"]
    return (tuple(row["shape"]), row["mode"], row["case"], objective)


def _check(text: str, rows: Iterable[dict], mode: str) -> dict:
    found = [row for row in rows if row["provider"] == OURS and row["mode"] == mode]
    seen = [row for row in found if row.get("ok") is not None]
    if not seen:
        return _target(text, (found[0]["reason"] if found else None) or NOTHING, None)
    wrong = [f"no: {row['contender']}, {row['reason'] or 'they differ'}" for row in seen if not row["ok"]]
    yes = f"yes: {', '.join(row['contender'] for row in seen)}"
    return _target(text, "; ".join(wrong) or yes, not wrong)


def _errors(rows: Iterable[dict], first: Shape) -> dict:
    text = f"errors: at most {ERROR_RATIO} times those of dense PyTorch with fp32 logits"
    rows = [row for row in rows if tuple(row["shape"]) == first and row["mode"] == FULL and row["case"] == ORDINARY]
    by_provider = {row["provider"]: row["error"] for row in rows}
    if OURS not in by_provider or "torch_fp32" not in by_provider:
        return _target(text, NOTHING, None)
    ours, dense = by_provider[OURS], by_provider["torch_fp32"]
    pairs = [(error, dense[kind][part], f"{part}, {kind}") for kind in ours for part, error in ours[kind].items()]
    met = all(error <= ERROR_RATIO * bar + ERROR_FLOOR for error, bar, _ in pairs)
    return _target(text, ", ".join(f"{error:.1e} to {bar:.1e} ({name})" for error, bar, name in pairs), met)


def _name(row: dict) -> str:
    return str(Shape(*row["shape"]))
