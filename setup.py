"""Builds isdaa_kernels._cpu from csrc/cpu and, where nvcc is, isdaa_kernels._cuda from csrc/cuda. Needs setuptools, pybind11 and a C++17
compiler with OpenMP; no torch.

ISDAA_CUDA        auto (default): with CUDA where nvcc is found; 1: nvcc must be there; 0: without
ISDAA_CUDA_ARCHS  what to compile for, as in 80,90a,100a (default: those of these three that nvcc knows)
ISDAA_BUILD_JOBS  files compiled at once (default: one a core)
"""

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ARCHS = ("80", "90a", "100a")
LEAST_NVCC = (12, 0)
JOBS = int(os.environ.get("ISDAA_BUILD_JOBS") or os.cpu_count() or 1)
HEADERS = sorted(path for pattern in ("*.h", "*.cuh") for path in Path("csrc").rglob(pattern))


def cpu_extension() -> Extension:
    return Pybind11Extension(
        "isdaa_kernels._cpu",
        ["csrc/bindings_cpu.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))],
        include_dirs=["csrc"],
        depends=[str(path) for path in HEADERS],
        cxx_std=17,
        # No -march: the instruction set is chosen at run time. No -ffast-math: infinities and NaN mean something here.
        extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"],
        extra_link_args=["-fopenmp"],
    )


def find_nvcc() -> str | None:
    wanted = os.environ.get("ISDAA_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"ISDAA_CUDA: expected 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin" if home else "", os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    found = next(filter(None, (shutil.which("nvcc", path=place) for place in places if place)), None)
    reason = "nvcc is neither under CUDA_HOME nor on PATH nor in /usr/local/cuda/bin"
    if found is not None:
        release = re.search(r"release (\d+)\.(\d+)", version_of(found))
        if release and (int(release[1]), int(release[2])) >= LEAST_NVCC:
            return found
        reason = f"{found} is older than {'.'.join(map(str, LEAST_NVCC))}"
    if wanted == "1":
        raise SystemExit(f"ISDAA_CUDA=1, but {reason}")
    print(f"without CUDA: {reason}")
    return None


@cache
def version_of(nvcc: str) -> str:
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout


def choose_archs(nvcc: str) -> list[str]:
    asked = os.environ.get("ISDAA_CUDA_ARCHS")
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    archs = asked.split(",") if asked else [arch for arch in ARCHS if _known(arch, listed)]
    for arch in archs:
        if not _known(arch, listed):
            raise SystemExit(
                f"ISDAA_CUDA_ARCHS: expected some of what {nvcc} knows ({', '.join(listed)}), got {arch!r}"
            )
    return archs


def _known(arch: str, listed: list[str]) -> bool:
    """nvcc lists 90 and means 90a too."""
    return f"sm_{arch.rstrip('a')}" in listed


class BuildExt(build_ext):
    """nvcc compiles and links _cuda. An object whose sources, headers and command are what they were is used again."""

    def build_extension(self, extension: Extension) -> None:
        if not extension.name.endswith("_cuda"):
            return super().build_extension(extension)
        nvcc, archs = extension.nvcc, extension.archs
        sources = [source for source in extension.sources if "90a" in archs or "hopper" not in source]
        with ThreadPoolExecutor(JOBS) as pool:
            objects = list(pool.map(lambda source: self.compile(nvcc, archs, source), sources))
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.call([nvcc, "-shared", "-cudart", "static", "-o", str(target), *objects])

    def compile(self, nvcc: str, archs: list[str], source: str) -> str:
        flags = [
            "-std=c++17",
            "-O3",
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
            "-diag-suppress",
            "186",
            "-Icsrc",
            "-Icsrc/cuda",
        ]
        if "90a" in archs:
            flags.append("-DISDAA_HOPPER")
        if source.endswith(".cpp"):
            includes = (sysconfig.get_paths()["include"], pybind11.get_include())
            flags += ["-x", "c++", f"-DISDAA_CUDA_ARCHS={'_'.join(archs)}", *(f"-I{path}" for path in includes)]
        else:
            flags += [
                f"-gencode=arch=compute_{arch},code=sm_{arch}"
                for arch in archs
                if "hopper" not in source or arch == "90a"
            ]
        command = [nvcc, *flags, "-c", source, "-o"]
        seen = hashlib.sha256("\n".join([*command, version_of(nvcc), pybind11.__version__]).encode())
        for path in (Path(source), *(header for header in HEADERS if header.parent.name != "cpu")):
            seen.update(path.read_bytes())
        out = Path("build", "cuda", f"{Path(source).stem}-{seen.hexdigest()[:16]}.o")
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            part = out.with_name(f"{out.name}.{os.getpid()}")
            self.call([*command, str(part)])
            part.replace(out)
        return str(out)

    def call(self, command: list[str]) -> None:
        print(" ".join(command), flush=True)
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{command[0]} failed ({error.returncode}); ISDAA_CUDA=0 builds without CUDA") from None


extensions = [cpu_extension()]
nvcc = find_nvcc()
if nvcc is not None:
    cuda = Extension(
        "isdaa_kernels._cuda", ["csrc/bindings_cuda.cpp", *sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))]
    )
    cuda.nvcc, cuda.archs = nvcc, choose_archs(nvcc)
    extensions.append(cuda)

ParallelCompile("ISDAA_BUILD_JOBS", default=JOBS).install()
setup(ext_modules=extensions, cmdclass={"build_ext": BuildExt})
