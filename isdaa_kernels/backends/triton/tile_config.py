"""Shapes of the fused kernels' tiles: a pure function of the problem and the GPU's architecture, over a table that may be overridden.

Tile shapes depend on hidden size, vocabulary, dtype and architecture only, never on the number of tokens: a token's log-prob must not
depend on its batch. M tokens and N vocabulary rows of a tile, K a step along the hidden size D.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from isdaa_kernels.dispatch import Problem

KERNELS = ("forward", "backward")


@dataclass(frozen=True)
class TileConfig:
    """One fused kernel's tile and schedule."""

    M: int
    N: int
    K: int
    num_warps: int
    num_stages: int
    pieces: int = 1  # of the tile's columns, one after the other in what follows the product: fewer registers
    group: int = 8  # rows of tiles that share a stretch of weight in the cache
    tma: bool = False  # tensor memory accelerator: aligned rows only
    flatten: bool = False  # one loop over tiles and K steps, so that a tile's epilogue overlaps the next tile's loads
    specialize: bool = False  # warps of their own for loads, products and epilogue
    programs: int = 1  # persistent programs a multiprocessor

    def shared_bytes(self, itemsize: int) -> int:
        """Of the operands in flight; what the compiler reports is checked by the compilation tests."""
        return (self.M + self.N) * self.K * itemsize * self.num_stages


# 16-bit operands. With 8 warps an accumulator of 128 x 256 takes 128 registers a thread, which leaves room for a plain head; bias and
# softcap need the room of 128 x 128. Stages fill the shared memory (163 KiB on sm_80, 227 on sm_90 and sm_100, 99 on sm_86, 64 on
# gfx942). A piece is 64 columns in every row: the slots of the partial log-sum-exps.
_PLAIN = {
    "sm_80": TileConfig(128, 256, 64, num_warps=8, num_stages=3, pieces=4),
    "sm_86": TileConfig(128, 128, 64, num_warps=8, num_stages=2, pieces=2),
    "sm_90": TileConfig(128, 256, 64, num_warps=8, num_stages=4, pieces=4, tma=True, flatten=True),
    "sm_100": TileConfig(128, 256, 64, num_warps=8, num_stages=4, pieces=4, tma=True),
    "gfx942": TileConfig(128, 128, 64, num_warps=8, num_stages=2, pieces=2),
    "interpreter": TileConfig(32, 128, 32, num_warps=4, num_stages=1, pieces=2, programs=2),
}
_RICH = _PLAIN | {
    "sm_80": TileConfig(128, 128, 64, num_warps=8, num_stages=3, pieces=2),
    "sm_90": TileConfig(128, 128, 64, num_warps=8, num_stages=4, pieces=2, tma=True, flatten=True),
    "sm_100": TileConfig(128, 128, 64, num_warps=8, num_stages=4, pieces=2, tma=True),
    "gfx942": TileConfig(128, 128, 64, num_warps=4, num_stages=2, pieces=2),
}
# Two heads: two accumulators of 128 x 128 take the registers of one of 128 x 256, and the forward's sums want twice the room that the
# gradient wants. What follows the products is made in pieces (`heads_pieces`) of one slot.
_HEADS = {
    "sm_80": TileConfig(128, 128, 64, num_warps=8, num_stages=3),
    "sm_86": TileConfig(128, 128, 64, num_warps=8, num_stages=2),
    "sm_90": TileConfig(128, 128, 64, num_warps=8, num_stages=4, tma=True),
    "sm_100": TileConfig(128, 128, 64, num_warps=8, num_stages=4, tma=True),
    "gfx942": TileConfig(128, 64, 64, num_warps=4, num_stages=2),
    "interpreter": TileConfig(32, 64, 32, num_warps=8, num_stages=1, programs=2),
}
_HEADS_FORWARD = {arch: replace(tile, N=64) if arch != "interpreter" else tile for arch, tile in _HEADS.items()}
# Rows of weight off 16-byte borders: every load is a few bytes wide and its address takes registers.
_UNALIGNED = {arch: TileConfig(128, 64, 32, num_warps=8, num_stages=2) for arch in _PLAIN}
_UNALIGNED["interpreter"] = _PLAIN["interpreter"]
_HEADS_UNALIGNED = {arch: replace(tile, M=64) if arch != "interpreter" else tile for arch, tile in _UNALIGNED.items()}
_KINDS = {
    "plain": _PLAIN,
    "rich": _RICH,
    "heads": _HEADS,
    "heads forward": _HEADS_FORWARD,
    "unaligned": _UNALIGNED,
    "heads unaligned": _HEADS_UNALIGNED,
}
_FAMILY = {
    "sm_87": "sm_80",
    "sm_89": "sm_86",
    "sm_103": "sm_100",
    "sm_110": "sm_100",
    "sm_120": "sm_86",
    "sm_121": "sm_86",
}
_FAMILY |= {"gfx90a": "gfx942", "gfx950": "gfx942"}
_overrides: dict[str, TileConfig] = {}


def heads_kind(kernel: str, aligned: bool) -> str:
    if not aligned:
        return "heads unaligned"
    return "heads forward" if kernel == "forward" else "heads"


def heads_pieces(tile: TileConfig) -> int:
    """Pieces of the columns of a tile of two heads, one after the other: fewer registers where 8 warps share them."""
    return max(1, tile.N // 32) if tile.num_warps > 4 else 1


def family(arch: str) -> str | None:
    """The row of the table that an architecture uses, or None where there is none."""
    known = _FAMILY.get(arch, arch)
    return known if known in _PLAIN else None


def arch_of(problem: Problem) -> str:
    """Row of the tables: tensors that are on no GPU are the interpreter's."""
    return problem.arch or "interpreter"


def known_archs() -> list[str]:
    return sorted(({*_PLAIN} - {"interpreter"}) | {*_FAMILY}, key=lambda name: (name[:2] != "sm", len(name), name))


def choose_tile_config(problem: Problem, arch: str, kernel: str = "forward", kind: str = "plain") -> TileConfig:
    """The tile of one fused kernel (`KERNELS`) for `arch`, as in "sm_90" or "gfx942": what `load_tile_configs` brought for exactly
    this (architecture, kernel, kind, dtype, D, V), else the table's. kind: "rich" for a head with bias or softcap, "heads" for two
    heads, "heads forward" for their log-sum-exps, "unaligned" and "heads unaligned" for a weight whose rows are not contiguous on 16-byte
    borders, else "plain". Pure apart from that. Raises ValueError for what is unknown."""
    for name, value, known in (("kernel", kernel, KERNELS), ("kind", kind, _KINDS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    row = family(arch)
    if row is None:
        raise ValueError(f"arch: expected one of {', '.join(known_archs())}, got {arch!r}")
    return _overrides.get(override_key(problem, arch, kernel, kind), _KINDS[kind][row])


def override_key(problem: Problem, arch: str, kernel: str, kind: str) -> str:
    dtype = str(problem.hidden_dtype).removeprefix("torch.")
    return f"{arch}/{kernel}/{kind}/{dtype}/D={problem.D}/V={problem.V}"


@contextmanager
def using_tile_config(key: str, tile: TileConfig) -> Iterator[None]:
    """Within the block, `tile` for the problem of `override_key`."""
    before = _overrides.get(key)
    _overrides[key] = tile
    try:
        yield
    finally:
        _overrides.pop(key)
        if before is not None:
            _overrides[key] = before


def save_tile_configs(path: str | Path, configs: dict[str, TileConfig]) -> None:
    """Write tuned tiles as JSON, whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({key: asdict(config) for key, config in configs.items()}, indent=1) + "\n")
    part.replace(path)


def load_tile_configs(path: str | Path) -> dict[str, TileConfig]:
    """Use the tiles that `save_tile_configs` wrote, in this process, wherever their problem comes up. Returns them.

    Raises ValueError for a file that holds anything else."""
    try:
        found = {key: TileConfig(**fields) for key, fields in json.loads(Path(path).read_text()).items()}
    except (TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"path: expected tiles as save_tile_configs writes them, got {path}: {error}") from None
    for key, tile in found.items():
        if tile.M not in (64, 128, 256) or tile.N not in (64, 128, 256) or tile.pieces not in (1, 2, 4):
            raise ValueError(
                f"path: expected tiles of 64, 128 or 256 by 64, 128 or 256 in 1, 2 or 4 pieces, got {key}: {tile}"
            )
    _overrides.update(found)
    return found
