"""The tiles of the fused Triton kernels: a pure function over a table, overridden only by what was asked for."""

from dataclasses import replace

import pytest
import torch

from isdaa_kernels.backends.triton import tile_config
from isdaa_kernels.backends.triton.aot import SHARED_LIMIT
from isdaa_kernels.backends.triton.tile_config import (
    TileConfig,
    choose_tile_config,
    family,
    load_tile_configs,
    override_key,
    save_tile_configs,
)
from isdaa_kernels.backends.triton.tune import candidates
from isdaa_kernels.dispatch import Problem

PROBLEM = Problem("cuda", torch.bfloat16, torch.bfloat16, 8192, 4096, 128256, arch="sm_90")
KINDS = ("plain", "rich", "unaligned")


@pytest.fixture(autouse=True)
def _no_overrides(monkeypatch):
    monkeypatch.setattr(tile_config, "_overrides", {})


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_has_tiles_that_fit(arch, kind):
    for kernel in ("forward", "backward"):
        tile = choose_tile_config(PROBLEM, arch, kernel, kind)
        assert tile.shared_bytes(2) <= SHARED_LIMIT[arch]
        assert 256 % tile.M == 0  # slabs are multiples of 256 tokens
        assert tile.N // tile.pieces == 64
        assert tile.tma == (arch in ("sm_90", "sm_100") and kind != "unaligned")


def test_the_number_of_tokens_has_no_say():
    for N in (1, 100, 10**6):
        assert choose_tile_config(replace(PROBLEM, N=N), "sm_90") == choose_tile_config(PROBLEM, "sm_90")


def test_relatives_and_strangers():
    assert family("sm_103") == "sm_100"
    assert family("gfx950") == "gfx942"
    assert family("sm_75") is None
    for bad in ({"arch": "sm_70"}, {"arch": "sm_90", "kernel": "sideways"}, {"arch": "sm_90", "kind": "odd"}):
        with pytest.raises(ValueError, match=f"expected one of .*, got '{list(bad.values())[-1]}'"):
            choose_tile_config(PROBLEM, **bad)


def test_tuned_tiles_are_saved_loaded_and_used_for_their_problem_alone(tmp_path):
    tuned = TileConfig(256, 128, 64, num_warps=8, num_stages=3, pieces=2, tma=True)
    key = override_key(PROBLEM, "sm_90", "forward", "plain")
    save_tile_configs(tmp_path / "tiles.json", {key: tuned})
    assert [path.name for path in tmp_path.iterdir()] == ["tiles.json"]
    before = choose_tile_config(PROBLEM, "sm_90")
    assert load_tile_configs(tmp_path / "tiles.json") == {key: tuned}
    assert choose_tile_config(PROBLEM, "sm_90") == tuned
    assert choose_tile_config(PROBLEM, "sm_90", "backward") != tuned
    assert choose_tile_config(replace(PROBLEM, V=1000), "sm_90") == before
    assert choose_tile_config(PROBLEM, "sm_100") != tuned


def test_tiles_that_no_slab_is_a_multiple_of(tmp_path):
    save_tile_configs(tmp_path / "tiles.json", {"a": TileConfig(96, 128, 64, num_warps=8, num_stages=3)})
    with pytest.raises(ValueError, match="path: expected tiles of 64, 128 or 256"):
        load_tile_configs(tmp_path / "tiles.json")
    assert tile_config._overrides == {}


@pytest.mark.parametrize("text", ["[]", "{", '{"a": {"M": 1}}', '{"a": 3}'])
def test_a_file_that_holds_no_tiles(tmp_path, text):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="path: expected tiles as save_tile_configs writes them"):
        load_tile_configs(path)
    assert tile_config._overrides == {}


def test_tuning_tries_the_table_first_and_only_what_fits():
    for arch in ("sm_90", "gfx942"):
        start = choose_tile_config(PROBLEM, arch)
        tried = list(candidates(start, arch, 2))
        assert tried[0] == start
        assert len(tried) == len(set(tried)) > 10
        assert all(tile.shared_bytes(2) <= SHARED_LIMIT[arch] for tile in tried)
        assert any(tile.specialize for tile in tried) == start.tma
