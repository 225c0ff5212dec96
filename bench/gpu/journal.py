"""The results of a run as they grow: report.json is written anew after every row, so that a run that is killed keeps what it has."""

import json
import math
import time
from pathlib import Path

from bench.device import describe_commit, now
from bench.files import write_whole
from bench.gpu.measure import DIED, NOT_RUN
from bench.gpu.settings import Settings

OUT_OF_TIME = "out of time"


class Journal:
    """`results` is what report.json holds: all rows from the beginning, those that wait with the status "not run"."""

    def __init__(self, folder: Path, settings: Settings, rows: list[dict], command: list[str]) -> None:
        self._path, self._begin = folder / "report.json", time.monotonic()
        self._rows = {row["key"]: row for row in rows}
        self.results = {
            "command": command,
            "date": now(),
            "commit": describe_commit(),
            "settings": vars(settings),
            "device": {"name": settings.device},
            "versions": {},
            "backends": [],
            "device_tests": None,
            "rows": rows,
            "targets": [],
            "notes": [],
            "finished": False,
        }

    def note(self, text: str) -> None:
        self.results["notes"].append(text)
        self.write()

    def set(self, **values: object) -> None:
        self.results.update(values)
        self.write()

    def record(self, row: dict) -> None:
        self._rows[row["key"]].update(row)
        self.write()

    def blame(self, key: str, reason: str) -> None:
        self.record({"key": key, "status": DIED, "reason": reason})

    def leave_out(self, keys: list[str], reason: str) -> None:
        for key in keys:
            self._rows[key].update(status=NOT_RUN, reason=reason)
        self.write()

    def row(self, key: str) -> dict:
        return self._rows[key]

    def write(self) -> None:
        self.results["seconds"] = round(time.monotonic() - self._begin, 1)
        write_whole(self._path, json.dumps(finite(self.results), indent=1, allow_nan=False) + "\n")


def finite(value: object) -> object:
    """Numbers that JSON has no word for become text."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
