"""What a run leaves on disk, each file and folder whole or not there at all.

run.json           the settings, and a digest of the data
reference.pt       log-probs under the reference policy
metrics.jsonl      one line a step;  evaluation.jsonl  one line an evaluation
curves.png         made of the two
checkpoints/step-000120/   model and tokenizer as transformers reads them; trainer.pt: optimizer, random state, scale of
                   routed gradients, what the objective keeps; vocab_order.pt where these have an order of the vocabulary
model/             the trained model
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from isdaa_kernels import BatchState
from isdaa_trainer.config import FREE_ON_RESUME, Config
from isdaa_trainer.model import Policy
from isdaa_trainer.routing import Routing


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `target` when the block ends, and is removed if the block raises."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync(path)
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(target.parent)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write to, which takes the name `target` when the block ends, and is removed if the block raises."""
    partial = target.with_name(f".partial-{target.name}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(target.parent)


def sync(path: Path) -> None:
    """Waits until a file or folder is on disk: a rename alone may reach it before the content does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(out: Path, resume: bool) -> None:
    """ValueError unless `out` is free, or holds a run when resuming."""
    holds_run = (out / "run.json").is_file()
    if resume and not holds_run:
        raise ValueError(f"out: nothing to resume in {out}: it holds no run.json")
    if not resume and holds_run:
        raise ValueError(f"out: {out} already holds a run; go on with --resume, or choose another folder")
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: expected an empty or new folder, got {out}")


def write_run(out: Path, config: Config, data_digest: str) -> None:
    """Marks `out` as holding a run of these settings and data."""
    out.mkdir(parents=True, exist_ok=True)
    with whole_file(out / "run.json") as path:
        path.write_text(json.dumps({"config": dataclasses.asdict(config), "data": data_digest}, indent=2) + "\n")


def check_same_run(out: Path, config: Config, data_digest: str) -> None:
    """ValueError, naming the setting, if the run in `out` was started with others or on other data."""
    run = json.loads((out / "run.json").read_text())
    for name, value in dataclasses.asdict(config).items():
        if name not in FREE_ON_RESUME and run["config"].get(name) != value:
            raise ValueError(f"{name}: the run in {out} was started with {run['config'].get(name)!r}, got {value!r}")
    if run["data"] != data_digest:
        raise ValueError(f"train_data, eval_data: the pairs are not those that the run in {out} was started with")


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted((out / "checkpoints").glob("step-*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def save_checkpoint(
    out: Path,
    step: int,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    routing: Routing,
    keep: int,
    objective_state: BatchState | None = None,
) -> None:
    """Everything that the step after `step` depends on; then removes all but the newest `keep` checkpoints."""
    target = out / "checkpoints" / f"step-{step:06d}"
    if not target.exists():  # an interruption may come right after a regular checkpoint
        with whole_folder(target) as folder:
            policy.save(folder)
            routing.save(folder)
            state = {"optimizer": optimizer.state_dict(), "random": random_state(), "routed_scale": routing.scale}
            state["objective"] = None if objective_state is None else objective_state.state_dict()
            torch.save(state, folder / "trainer.pt")
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(old)


def restore(
    checkpoint: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    routing: Routing,
    objective_state: BatchState | None = None,
) -> None:
    """Optimizer, random state, routing and what the objective keeps; the model, `policy`, is read by `load_policy`."""
    state = torch.load(checkpoint / "trainer.pt", weights_only=True, map_location="cpu")
    optimizer.load_state_dict(state["optimizer"])
    if objective_state is not None:
        objective_state.load_state_dict(state["objective"])
    routing.load(checkpoint, state["routed_scale"], policy.device)
    torch.set_rng_state(state["random"]["cpu"])
    if torch.cuda.is_available() and state["random"]["cuda"]:
        torch.cuda.set_rng_state_all(state["random"]["cuda"])


def random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Adds one JSON object to a .jsonl file in a single write."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def read_lines(path: Path, last_step: int) -> list[dict[str, Any]]:
    """The objects of a .jsonl file up to `last_step`; a last line cut short by a kill does not count."""
    if not path.is_file():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [values for values in map(json.loads, whole) if values["step"] <= last_step]


def truncate_lines(path: Path, last_step: int) -> None:
    """Removes what a run wrote after `last_step`, so that each step has one line once it is done again."""
    kept = read_lines(path, last_step)
    with whole_file(path) as partial:
        partial.write_text("".join(json.dumps(values) + "\n" for values in kept), encoding="utf-8")
