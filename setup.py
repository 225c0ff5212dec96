"""Builds isdaa_kernels._cpu from csrc/cpu. Needs setuptools, pybind11 and a C++17 compiler with OpenMP; no torch."""

import os
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

SOURCES = ["csrc/bindings_cpu.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]

cpu = Pybind11Extension(
    "isdaa_kernels._cpu",
    SOURCES,
    include_dirs=["csrc"],
    depends=[str(path) for path in Path("csrc").rglob("*.h")],
    cxx_std=17,
    # No -march: the instruction set is chosen at run time. No -ffast-math: infinities and NaN mean something here.
    extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"],
    extra_link_args=["-fopenmp"],
)

ParallelCompile("ISDAA_BUILD_JOBS", default=os.cpu_count() or 1).install()
setup(ext_modules=[cpu])
