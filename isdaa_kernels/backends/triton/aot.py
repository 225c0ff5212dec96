"""Compile the kernels for GPUs that are not here, and read what the compilers say of them.

    python -m isdaa_kernels.backends.triton.aot                 # the set that tests check
    python -m isdaa_kernels.backends.triton.aot --all           # every variant (some minutes)
    python -m isdaa_kernels.backends.triton.aot --arch sm_90 --out report.json

One line a variant: registers, spilled bytes, shared memory against the architecture's limit, the matrix instruction. Exit status 1 where
a variant spills, asks for too much shared memory, or misses its matrix instruction. Needs triton, no GPU.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from isdaa_kernels.backends.triton import aot_kl, aot_routed
from isdaa_kernels.backends.triton.aot_variants import (
    Variant,
    full_set,
    small_kl_set,
    small_routed_set,
    small_set,
)
from isdaa_kernels.backends.triton.shapes import CONSTANTS, KL_OPTIONS, OPTIONS
from isdaa_kernels.backends.triton.tile_config import TileConfig, choose_tile_config, heads_kind
from isdaa_kernels.dispatch import Problem

SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
INSTRUCTION = {"sm_80": "mma.sync", "sm_86": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
_MATRIX = ("linear_logprob_forward", "linear_logprob_backward", *aot_kl.PRODUCTS, *aot_routed.PRODUCTS)


@dataclass
class Report:
    variant: Variant
    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    instruction: bool  # whether the architecture's matrix instruction is there
    faults: list[str] = field(default_factory=list)


def tile_of(variant: Variant) -> TileConfig:
    dtype = aot_routed.DTYPES[variant.dtype]
    problem = Problem("cuda", dtype, dtype, 8192, 4096, 128256, arch=variant.arch)
    kernel = "backward" if variant.kernel.endswith("backward") else "forward"
    one = "unaligned" if not variant.aligned else "rich" if variant.rich else "plain"
    kind = heads_kind(kernel, variant.aligned) if variant.kernel in aot_kl.KERNELS else one
    return choose_tile_config(problem, variant.arch, kernel, kind)


def compile_variant(variant: Variant) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = variant.arch.startswith("gfx")
    target = GPUTarget("hip", variant.arch, 64) if amd else GPUTarget("cuda", int(variant.arch[3:]), 32)
    kernel, signature, constants, options = _source(variant)
    aligned = [i for i, name in enumerate(kernel.arg_names) if _divisible(name, signature[name], variant)]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=target, options=options)
    registers, spilled = _amd_usage(compiled.asm["amdgcn"]) if amd else _nvidia_usage(compiled.asm["cubin"])
    text = compiled.asm["amdgcn" if amd else "ptx"]
    report = Report(variant, registers, spilled, compiled.metadata.shared, INSTRUCTION[variant.arch] in text)
    report.faults = _faults(report)
    return report


def _faults(report: Report) -> list[str]:
    arch = report.variant.arch
    found = [f"spills {report.spilled} bytes"] if report.spilled else []
    if report.shared > SHARED_LIMIT[arch]:
        found.append(f"{report.shared} bytes of shared memory, {SHARED_LIMIT[arch]} are there")
    matrix = report.variant.kernel in _MATRIX and report.variant.dtype != "fp32"
    if matrix and not report.instruction:
        found.append(f"no {INSTRUCTION[arch]}")
    return found


def _source(variant: Variant):
    """(kernel, signature, constants, options) of a variant: types go by the names of the arguments, which are the same everywhere."""
    from isdaa_kernels.backends.triton.kernels import (
        kl_logits,
        linear_kl,
        logits,
        products,
        rest,
        routed,
        routes,
        tokens,
    )

    name = f"{variant.kernel}_kernel"
    modules = (products, logits, tokens, routes, routed, rest, linear_kl, kl_logits)
    kernel = next(getattr(module, name) for module in modules if hasattr(module, name))
    tile = tile_of(variant)
    if variant.kernel in aot_kl.KERNELS:
        return _kl_source(variant, kernel, tile)
    fused = variant.kernel.startswith("linear_logprob")
    tma = fused and tile.tma
    types = _pointers(variant)
    if tma:
        types["hidden"] = f"tensordesc<{variant.dtype}[{tile.M},{tile.K}]>"
        types["weight"] = f"tensordesc<{variant.dtype}[{tile.N},{tile.K}]>"
    shape = _tile_constants(tile, variant, tma) if fused else CONSTANTS.get(variant.kernel, {})
    routed_constants = aot_routed.constants(variant.kernel, variant.arch, variant.dtype, variant.block, variant.rich)
    constants = {**_flags(variant), **routed_constants, **shape}
    options = aot_routed.options(variant.kernel, variant.arch, variant.dtype, variant.block)
    if fused:
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    optional = _OPTIONAL | aot_routed.optional(variant.kernel)
    return _complete(variant, kernel, types, constants, optional, OPTIONS | options)


def _kl_source(variant: Variant, kernel, tile: TileConfig):
    types = _pointers(variant) | aot_kl.pointers(variant.kernel, f"*{variant.dtype}", tile, variant.dtype, tile.tma)
    constants = aot_kl.constants(
        variant.kernel, variant.direction, variant.mixture, variant.logprobs, variant.parts, variant.rich, variant.even, tile.tma, tile
    )  # fmt: skip
    return _complete(
        variant, kernel, types, constants, aot_kl.OPTIONAL, KL_OPTIONS | aot_kl.options(variant.kernel, tile)
    )


def _complete(variant: Variant, kernel, types: dict, constants: dict, optional: dict, options: dict):
    constants |= {name: None for name, flag in optional.items() if not constants.get(flag, True)}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    if variant.aligned:
        ones = ("stride_weight_d", "stride_v", "stride_d", "stride_policy_weight_d", "stride_reference_weight_d")
        constants |= {name: 1 for name in ones if name in kernel.arg_names}
    forgotten = [p.name for p in kernel.params if p.is_constexpr and p.name not in constants]
    assert not forgotten, f"{variant}: no value for {forgotten}"
    floats = aot_kl.FLOATS if variant.kernel in aot_kl.KERNELS else _FLOATS
    signature = {
        name: "constexpr" if name in constants else "fp32" if name in floats else types.get(name, "i32")
        for name in kernel.arg_names
    }
    return kernel, signature, constants, options


_FLOATS = ("logit_scale", "softcap")
_OPTIONAL = {
    "bias": "HAS_BIAS", "bias_sums": "BIAS_SUMS", "partial_entropy": "ENTROPY", "partial_total": "TOTAL", "partial_squares": "SQUARES",
    "entropy": "ENTROPY", "lse_stat": "LSE", "mean_logit": "TOTAL", "log_sum_sq": "SQUARES", "is_top1": "TOP1",
    "prob_gradient": "PROB", "log_prob_gradient": "LOG_PROB", "flat_gradient": "FLAT", "scale": "SCALED", "weight_entry": "ENTRY",
}  # fmt: skip


def _pointers(variant: Variant) -> dict[str, str]:
    own, fp32, wide = f"*{variant.dtype}", "*fp32", "*i64"
    types = dict.fromkeys(("hidden", "weight", "d_hidden", "d_weight", "bias"), own)
    types |= dict.fromkeys(("rows", "order"), wide) | dict.fromkeys(("targets", "count", "top", "starts"), "*i32")
    types |= {"partial_sum": "*fp64", "lse": "*fp64", "live": "*u8"}
    names = ("partial_max", "partial_entropy", "partial_total", "partial_squares", "target_logit", "inverse_temperature", "tokens",
             "bias_sums", "logprob", "entropy", "lse_stat", "mean_logit", "log_sum_sq", "is_top1", "sums", "weight_entry",
             "logprob_gradient", "prob_gradient", "log_prob_gradient", "flat_gradient", "scale")  # fmt: skip
    types |= dict.fromkeys(names, fp32)
    types["out"] = fp32 if variant.kernel == "token" else own
    types["logits"] = own if variant.kernel == "gradient_logits" else fp32
    return types | aot_routed.pointers(variant.kernel, own)


def _flags(variant: Variant) -> dict[str, bool]:
    flags = dict.fromkeys(("HAS_BIAS", "HAS_SOFTCAP", "BIAS_SUMS"), variant.rich)
    flags |= dict.fromkeys(("ENTROPY", "TOTAL", "SQUARES", "LSE", "TOP1", "PROB", "LOG_PROB", "FLAT"), variant.stats)
    flags |= {"SCALED": True, "TILE": True, "ENTRY": True, "GATHER": True, "TARGET": True, "LEAST": -64, "SHIFT": 0}
    if variant.kernel == "gradient_logits":  # of logits that the caller holds there is no bias
        flags |= {"TARGET": not variant.rich}
    return flags


def _tile_constants(tile: TileConfig, variant: Variant, tma: bool) -> dict:
    return {
        "TMA": tma, "EVEN_D": variant.even, "EVEN_V": variant.even, "PRECISION": "ieee", "M": tile.M, "N": tile.N,
        "K": tile.K, "GROUP": tile.group, "PIECES": tile.pieces, "FLATTEN": tile.flatten, "SPECIALIZE": tile.specialize,
    }  # fmt: skip


def _divisible(name: str, kind: str, variant: Variant) -> bool:
    if kind.startswith("*"):
        return variant.aligned or not name.endswith("weight")
    sizes = (
        "D",
        "V",
        "T",
        "begin",
        "end",
        "stride_hidden",
        "stride_weight_v",
        "stride_out",
        "stride_sums",
        "stride_n",
        "C",
        *aot_kl.SIZES,
    )
    return kind == "i32" and name in sizes and (variant.aligned or name in ("T", "stride_hidden", "stride_out"))


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def _amd_usage(assembly: str) -> tuple[int, int]:
    numbers = {
        key: int(value) for key, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", assembly)
    }
    return numbers["vgpr_count"], numbers["private_segment_fixed_size"]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m isdaa_kernels.backends.triton.aot")
    parser.add_argument("--all", action="store_true", help="every variant")
    parser.add_argument("--arch", action="append", help="only these architectures")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file of the reports")
    options = parser.parse_args(arguments)
    chosen = full_set() if options.all else small_set() + small_routed_set() + small_kl_set()
    variants = [v for v in chosen if not options.arch or v.arch in options.arch]
    reports = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for report in pool.map(compile_variant, variants):
            faults = "; ".join(report.faults) or "ok"
            print(
                f"{report.variant!s:60} {report.registers:4} registers {report.shared:7} shared  {faults}", flush=True
            )
            reports.append(report)
    if options.out:
        options.out.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")
    return 1 if any(report.faults for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
