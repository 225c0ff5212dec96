"""All that depends on the kind of device: time, memory, waiting, what it is. Everything else here runs on the CPU as well."""

import gc
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from bench.device import describe_device
from bench.memory import peak_growth
from bench.timing import Call, Stopwatch, clock


def make_stopwatch(device: torch.device) -> Stopwatch:
    """Seconds that a call takes on the device, its launches included."""
    return _clock_cuda if device.type == "cuda" else clock


def _clock_cuda(call: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure_peak(device: torch.device, call: Callable[[], object]) -> tuple[object, int]:
    """What `call` returns, and how many bytes more than before were allocated at the peak (on the CPU: resident)."""
    if device.type != "cuda":
        return peak_growth(call)
    release(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def release(device: torch.device) -> None:
    """Gives back what nobody holds, so that one contender's leavings do not narrow the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def is_alive(device: torch.device) -> bool:
    """False once a kernel has broken the process for good, as an illegal access does."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
    return True


@contextmanager
def forbid_waiting() -> Iterator[None]:
    """Inside, an operator of PyTorch that waits for the CUDA device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def describe_accelerator(device: torch.device) -> dict[str, object]:
    if device.type != "cuda":
        about = describe_device()
        return {"name": about["cpu"], "driver": None, "cores": about["cores"], "threads": about["threads"]}
    about = torch.cuda.get_device_properties(device)
    return {
        "name": about.name,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "memory_gib": round(about.total_memory / 2**30, 1),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None
