"""What a result was measured on: machine, versions, commit, time."""

import datetime
import importlib.metadata
import os
import platform
import subprocess

import torch

from bench.states import ROOT
from isdaa_kernels import explain_backends

PACKAGES = ("isdaa-kernels", "torch", "trl", "liger-kernel", "cut-cross-entropy", "triton", "transformers", "numpy")


def describe_device() -> dict[str, object]:
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "backends": explain_backends().splitlines(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def describe_versions() -> dict[str, str | None]:
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def describe_commit() -> str:
    """The commit, with "+changes" where the working tree differs; "no git checkout" outside of one."""
    head = _git("rev-parse", "HEAD")
    return "no git checkout" if head is None else head + ("+changes" if _git("status", "--porcelain") else "")


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
