"""The compiled CUDA kernels as their resource report shows them: registers, no spills, no local memory, the instructions meant."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from isdaa_kernels import explain_backends

SPEC = find_spec("isdaa_kernels._cuda")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

pytestmark = pytest.mark.skipif(SPEC is None and NVCC is None, reason="no nvcc: there is nothing compiled to look at")


@pytest.fixture(scope="module")
def library() -> Path:
    assert SPEC is not None, "nvcc is here, but isdaa_kernels._cuda was not built"
    return Path(SPEC.origin)


def cuobjdump(*arguments: str) -> str:
    tool = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def resources(library) -> dict[str, dict[str, dict[str, int]]]:
    """architecture -> kernel -> REG, STACK, SHARED, LOCAL, ..."""
    found: dict = {}
    arch = kernel = None
    for line in cuobjdump("-res-usage", str(library)).splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            kernel = match[1]
        elif "REG:" in line:
            numbers = {name: int(value) for name, value in re.findall(r"([A-Z]+)(?:\[\d\])?:(\d+)", line)}
            found.setdefault(arch, {})[kernel] = numbers
    return found


def test_every_kernel_was_built_for_every_architecture(resources):
    import isdaa_kernels._cuda as native

    archs = {f"sm_{arch}" for arch in native.archs.split(",")}
    assert set(resources) == archs
    everywhere = set.intersection(*map(set, resources.values()))
    for stem in ("fold_logits", "gradient_logits", "gather", "combine", "token", "finish_hidden", "finish_weight", "block_mass", "route",
                 "list_tokens", "routed_gradient", "routed_weight", "routed_hidden", "rest_weight", "rest_hidden", "block_sums",
                 "block_mean", "pair_loss", "linear_kl_fold", "linear_kl_combine", "linear_kl_mixture", "linear_kl_mixture_sum",
                 "linear_kl_gradient"):  # fmt: skip
        mangled = re.compile(rf"\d{stem}(_\w+)?_kernel")
        assert any(mangled.search(name) for name in everywhere), stem
    for arch in archs - {"sm_90a"}:
        assert set(resources[arch]) == everywhere, arch


def test_nothing_spills(resources):
    for arch, kernels in resources.items():
        for name, numbers in kernels.items():
            assert numbers["STACK"] == 0, (arch, name, numbers)
            assert numbers["LOCAL"] == 0, (arch, name, numbers)
            if (
                "hopper" in name
            ):  # 3 groups of 128 threads that share the file out anew, 40 + 2 * 232, take what 168 each leave
                assert numbers["REG"] == 168, (arch, name, numbers)


def instructions(library: Path, arch: str, kernels: list[str]) -> dict[str, set[str]]:
    """kernel -> the instructions in it, of those named: disassembling all of them would take half a minute."""
    found: dict = {}
    for line in cuobjdump("-sass", "-arch", arch, "-fun", ",".join(kernels), str(library)).splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            kernel = found.setdefault(match[1], set())
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@\S+ )?(\w+)", line):
            kernel.add(match[1])
    assert set(found) == set(kernels)
    return found


def test_the_instructions_meant(library, resources):
    """Tensor cores for 16-bit factors everywhere; on Hopper its own matrix instruction and bulk copies."""
    stems = ("routed_gradient", "routed_weight", "routed_hidden", "rest_weight", "rest_hidden")
    for arch in resources:
        fused = [kernel for kernel in resources[arch] if "hopper" in kernel]
        narrow = [
            kernel for kernel in resources[arch] if "bfloat16" in kernel and any(stem in kernel for stem in stems)
        ]
        kernels = instructions(library, arch, fused + narrow)
        for stem in stems:
            assert any(stem in kernel and "HMMA" in names for kernel, names in kernels.items()), (arch, stem)
        for names in kernels.values():
            assert not names & {"LDL", "STL"}, arch
        assert len(fused) == (
            16 if arch == "sm_90a" else 0
        )  # forward and backward, two dtypes, plain or rich, with or without statistics
        for kernel in fused:
            assert {"HGMMA", "UTMALDG"} <= kernels[kernel], kernel


def test_the_import_needs_no_driver_and_explains_itself(library):
    import isdaa_kernels._cuda as native

    assert not native.emulated
    assert (
        f"cuda: CUDA C++ kernels for sm_{', sm_'.join(native.archs.split(','))}; refuses: takes tensors"
        in explain_backends()
    )
    libraries = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    assert "libcudart" not in libraries
    assert "libcuda.so" not in libraries
    alone = "import importlib.util as u; "
    alone += f"s = u.spec_from_file_location('_cuda', {str(library)!r}); s.loader.exec_module(u.module_from_spec(s))"
    subprocess.run([sys.executable, "-c", alone], check=True)
