"""Try tiles on the GPU that is here and keep the fastest. Only when asked: nothing is tuned behind a user's back.

    python -m isdaa_kernels.backends.triton.tune --tokens 8192 --hidden 4096 --vocab 128256 --out tiles.json

`load_tile_configs("tiles.json")` of `isdaa_kernels.backends.triton.tile_config` uses the result in a process, for exactly that hidden
size, vocabulary, dtype, kind of head and architecture.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from isdaa_kernels.backends.triton import backward, forward, refusal
from isdaa_kernels.backends.triton.aot import SHARED_LIMIT
from isdaa_kernels.backends.triton.tile_config import (
    KERNELS,
    TileConfig,
    choose_tile_config,
    family,
    override_key,
    save_tile_configs,
    using_tile_config,
)
from isdaa_kernels.dispatch import Problem, device_arch
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.stats import StatsRequest, TokenGradient


def candidates(start: TileConfig, arch: str, itemsize: int) -> Iterator[TileConfig]:
    """Neighbours of the table's tile that fit into shared memory, the table's own first."""
    yield start
    shapes = ((128, 256, 4), (256, 128, 2), (128, 128, 2))
    choices = product(shapes, (32, 64), (2, 3, 4, 5), (4, 8), (8, 16), (False, True), (False, True), (1, 2))
    for (M, N, pieces), K, stages, warps, group, flatten, specialize, programs in choices:
        tile = replace(
            start, M=M, N=N, K=K, num_warps=warps, num_stages=stages, pieces=pieces, group=group, flatten=flatten,
            specialize=specialize, programs=programs,
        )  # fmt: skip
        fits = tile.shared_bytes(itemsize) * programs <= SHARED_LIMIT[family(arch)]
        if tile != start and fits and not (specialize and not tile.tma):
            yield tile


def measured_call(problem: Problem, kernel: str) -> Callable[[], object]:
    """The forward, or forward and backward with a frozen head, on random states."""
    device, dtype = torch.device(problem.device_type), problem.hidden_dtype
    hidden_ND = torch.randn(problem.N, problem.D, device=device).to(dtype)
    weight_VD = (torch.randn(problem.V, problem.D, device=device) / problem.D**0.5).to(dtype)
    targets_N = torch.randint(problem.V, (problem.N,), device=device)
    transform = Transform(None, 1.0, None, 1.0, None)
    inputs = (problem, hidden_ND, weight_VD, targets_N, transform, -100)
    logprob_N, _, lse_N, kept_KV = forward(*inputs, StatsRequest())
    if kernel == "forward":
        return lambda: forward(*inputs, StatsRequest())
    grad = TokenGradient(torch.ones_like(logprob_N))
    return lambda: backward(problem, grad, *inputs[1:], logprob_N, lse_N, kept_KV, need_bias=False)


def tune(problem: Problem, kernel: str) -> list[tuple[float, TileConfig]]:
    """(milliseconds, tile) of every candidate that compiles and runs, fastest first."""
    from triton.testing import do_bench

    key = override_key(problem, problem.arch, kernel, "plain")
    call, found = measured_call(problem, kernel), []
    tiles = list(
        candidates(choose_tile_config(problem, problem.arch, kernel), problem.arch, problem.hidden_dtype.itemsize)
    )
    for tile in tqdm(tiles, desc=kernel, unit="tile"):
        with using_tile_config(key, tile):
            try:
                found.append((do_bench(call, warmup=20, rep=100), tile))
            except Exception as error:  # a tile that the compiler or the device refuses is an answer too
                tqdm.write(f"{tile}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return sorted(found, key=lambda item: item[0])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m isdaa_kernels.backends.triton.tune")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--vocab", type=int, required=True)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    dtype, arch = getattr(torch, options.dtype), device_arch(torch.device("cuda"))
    problem = Problem("cuda", dtype, dtype, options.tokens, options.hidden, options.vocab, need_weight=False, arch=arch)
    reason = refusal(problem)
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    best = {}
    for kernel in KERNELS:
        ranking = tune(problem, kernel)
        for milliseconds, tile in ranking[:5]:
            print(f"{kernel}: {milliseconds:.3f} ms {tile}")
        best[override_key(problem, arch, kernel, "plain")] = ranking[0][1]
    save_tile_configs(options.out, best)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
