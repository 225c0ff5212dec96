"""csrc/cuda compiled by the C++ compiler against tests/cuda_emulator: the kernels' own source, run on the CPU."""

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = ROOT / "tests" / "cuda_emulator"
BUILD = ROOT / "build" / "emulated"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",
    "-w",
    "-Wno-psabi",
]
FLAGS += ["-DISDAA_EMULATED", "-DISDAA_HOPPER", f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/cuda", f"-I{EMULATOR}"]
FLAGS += [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]


@cache
def emulated_module() -> ModuleType:
    """`isdaa_kernels._cuda` for tensors on the CPU. What is compiled stays in build/emulated for the next run."""
    sources = [ROOT / "csrc" / "bindings_cuda.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_object, sources))
    key = hashlib.sha256("\n".join(map(str, objects)).encode()).hexdigest()[:16]
    library = BUILD / key / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    _make(library, ["g++", "-shared", *map(str, objects)])
    spec = importlib.util.spec_from_file_location("emulated._cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_object(source: Path) -> Path:
    command = ["g++", *FLAGS, "-x", "c++", "-c", str(source)]
    seen = hashlib.sha256("\n".join(command).encode())
    headers = [
        path for folder in (ROOT / "csrc", EMULATOR) for pattern in ("*.h", "*.cuh") for path in folder.rglob(pattern)
    ]
    for path in (source, *sorted(headers)):
        seen.update(path.read_bytes())
    out = BUILD / f"{source.stem}-{seen.hexdigest()[:16]}.o"
    _make(out, command)
    return out


def _make(out: Path, command: list[str]) -> None:
    """Of several processes that want it one makes it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(f"{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            part = out.with_name(f"{out.name}.part")
            subprocess.run([*command, "-o", str(part)], check=True)
            part.replace(out)
