"""Runs the workers: one after the other, each with the rows that are left, until all are done or the time is up."""

import collections
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from tqdm import tqdm

from bench.gpu.journal import OUT_OF_TIME, Journal
from bench.gpu.settings import Settings
from bench.gpu.tasks import Task
from bench.gpu.worker import FATAL
from bench.states import ROOT

START_LIMIT = 180.0  # seconds for imports and the device to wake up
GRACE = 20.0  # seconds that the row under way has after the deadline
DEATHS = 2  # of its process, after which a contender is left out altogether


class Worker:
    """A process and what it says; `kill` is safe at any time."""

    def __init__(self, settings: Settings, keys: Sequence[str], deadline: float) -> None:
        asked = json.dumps({"settings": asdict(settings), "keys": list(keys), "deadline": deadline})
        command = [sys.executable, "-m", "bench.gpu.worker", asked]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._last_words: collections.deque[str] = collections.deque(maxlen=20)
        self._threads = [threading.Thread(target=read, daemon=True) for read in (self._read_lines, self._read_errors)]
        for thread in self._threads:
            thread.start()

    def messages(self, row_limit: float, deadline: float) -> Iterator[dict]:
        """Until it ends. Raises TimeoutError where nothing comes for row_limit seconds, or until GRACE after the deadline."""
        limit = START_LIMIT
        while True:
            patience = min(limit, deadline + GRACE - time.time())
            try:
                line = self._lines.get(timeout=max(patience, 0.1))
            except queue.Empty:
                late = time.time() >= deadline + GRACE
                raise TimeoutError(OUT_OF_TIME if late else f"no answer within {limit:.0f} s") from None
            if line is None:
                return
            yield json.loads(line)
            limit = row_limit

    def end(self) -> int:
        """Waits for its end; the exit status, negative for a signal."""
        status = self._process.wait()
        for thread in self._threads:
            thread.join(timeout=5)
        return status

    def last_words(self) -> str:
        words = [line.strip() for line in self._last_words if line.strip()]
        return words[-1][:300] if words else "nothing"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read_lines(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _read_errors(self) -> None:
        for line in self._process.stderr:
            self._last_words.append(line)
            sys.stderr.write(line)


class Supervisor:
    def __init__(self, settings: Settings, journal: Journal, tasks: Sequence[Task], deadline: float) -> None:
        self._settings, self._journal, self._deadline = settings, journal, deadline
        self._waiting = {task.key: task for task in tasks}
        self._deaths: collections.Counter[str] = collections.Counter()
        self._running: str | None = None
        self._why_left = OUT_OF_TIME
        self._last: Task | None = None  # whose row came last
        seldom = 0.1 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(total=len(tasks), desc="rows", unit="row", mininterval=seldom, maxinterval=seldom)

    def run(self) -> None:
        while self._waiting and time.time() < self._deadline and self._run_worker():
            pass
        self._journal.leave_out(list(self._waiting), self._why_left)
        self._bar.close()

    def _run_worker(self) -> bool:
        """False where another worker would make no sense."""
        worker, self._running = Worker(self._settings, list(self._waiting), self._deadline), None
        try:
            for message in worker.messages(self._settings.row_limit, self._deadline):
                self._take(message)
            status = worker.end()
        except TimeoutError as error:
            return self._lose(str(error))
        finally:
            worker.kill()
        if status == FATAL:
            return self._count_death(self._last)
        if status == 0:
            return False
        return self._lose(f"its process ended with status {status}: {worker.last_words()}")

    def _take(self, message: dict) -> None:
        if "about" in message:
            self._journal.set(**message["about"])
        elif "start" in message:
            self._running = message["start"]
            self._bar.set_postfix_str(self._running, refresh=sys.stderr.isatty())
        else:
            self._finish(message["row"])

    def _finish(self, row: dict) -> None:
        self._journal.record(row)
        self._last, self._running = self._waiting.pop(row["key"]), None
        self._bar.update()

    def _lose(self, reason: str) -> bool:
        """A worker is gone, with the row that it was at."""
        if self._running is None and reason != OUT_OF_TIME:
            self._why_left = f"the measuring process was lost between rows: {reason}"
            self._journal.note(self._why_left)
            return False
        if reason == OUT_OF_TIME:
            return False
        task = self._waiting.pop(self._running)
        self._journal.blame(task.key, reason)
        self._bar.update()
        return self._count_death(task)

    def _count_death(self, dead: Task) -> bool:
        """Leaves out the contender's other rows on this problem, which would end alike, and after DEATHS all of them. True: go on."""
        self._deaths[dead.contender] += 1
        enough = self._deaths[dead.contender] >= DEATHS
        keys = [
            key
            for key, task in self._waiting.items()
            if task.contender == dead.contender and (enough or task.shape == dead.shape)
        ]
        self._journal.leave_out(keys, f"left out after {dead.key}")
        for key in keys:
            self._waiting.pop(key)
        self._bar.update(len(keys))
        return True
