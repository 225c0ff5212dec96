"""The routed backward's CUDA kernels, compiled for the CPU against tests/cuda_emulator, beside plain formulas in fp64.

N tokens of the call, L live ones at most, T tokens of a slab, C vocabulary rows of a chunk, D hidden size, B blocks of the vocabulary,
b of them in a chunk.
"""

from dataclasses import dataclass

import pytest
import torch
from emulated_cuda import emulated_module
from torch import Tensor

DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
STEP, TILE_ROWS = 128, 128  # tokens of a column of `starts`, listed tokens of a tile of routed_gradient
NAN = float("nan")

pytestmark = pytest.mark.slow
every_dtype = pytest.mark.parametrize("dtype", list(DTYPE), ids=["fp32", "fp16", "bf16"])


class Kernels:
    """kernels.route(log_mass=..., ...): a field of the params struct each; tensors by address, None as null."""

    def __getattr__(self, name: str):
        def call(**arguments) -> None:
            fields = {field: v.data_ptr() if isinstance(v, Tensor) else v or 0 for field, v in arguments.items()}
            getattr(emulated_module(), name)(0, **fields)

        return call


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    return Kernels()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, NAN if dtype.is_floating_point else -77, dtype=dtype)


def padded(rows: Tensor, dtype: torch.dtype, spare: int) -> Tensor:
    """The same rows with NaN between and behind them, `spare` numbers each."""
    buffer = poisoned(rows.shape[0], rows.shape[1] + spare, dtype=dtype)
    buffer[:, : rows.shape[1]] = rows
    return buffer[:, : rows.shape[1]]


def assert_near(found: Tensor, expected: Tensor, scale: Tensor | float, eps: float) -> None:
    """Off by eps times what the terms of each sum add up to at most; NaN where NaN is expected."""
    found, expected = found.double(), expected.double()
    assert torch.equal(found.isnan(), expected.isnan())
    excess = ((found - expected).abs() - eps * scale).nan_to_num(0.0)
    assert (excess <= 0.0).all(), f"{excess.max()} above the bound"


@dataclass
class Call:
    """A call's live tokens: rows[first + i] is token i of the slab of T, where first + i < count."""

    rows: Tensor
    count: Tensor
    first: int
    T: int
    N: int

    @property
    def live(self) -> int:
        return max(min(int(self.count) - self.first, self.T), 0)


def make_call(T: int, first: int = 0, count: int = 10**6, capacity: int | None = None, seed: int = 0) -> Call:
    capacity = first + T if capacity is None else capacity
    N = capacity + 9
    rows = torch.randperm(N, generator=generator(seed))[:capacity].contiguous()
    return Call(rows, torch.tensor([min(count, capacity)], dtype=torch.int32), first, T, N)


# ---- routes


# One, two and four slots a block; the last block has fewer. The slab ends with tokens that are not live.
@pytest.mark.parametrize(("slots", "S"), [(1, 5), (2, 5), (4, 10)])
def test_block_mass(kernels, slots, S):
    call = make_call(T=300, first=70, count=340)
    T, live, B = call.T, call.live, -(-S // slots)
    assert live == 270
    partial_max = torch.randn(S, T, generator=generator(1)) * 5
    partial_sum = torch.rand(S, T, generator=generator(2), dtype=torch.float64) + 1
    partial_max[0, 3], partial_max[:, 7] = -torch.inf, -torch.inf
    partial_max[1:, 11] = -200.0  # the whole mass in one block
    logs = (partial_max.double() + partial_sum.log())[:, :live]
    lse = poisoned(call.N, dtype=torch.float64)
    n = call.rows[call.first : call.first + live]
    lse[n] = logs.logsumexp(0)
    lse[n[7]] = 0.0
    log_mass = poisoned(B, call.N)
    kernels.block_mass(
        partial_max=partial_max, partial_sum=partial_sum, rows=call.rows, count=call.count, lse=lse, log_mass=log_mass,
        first=call.first, T=T, S=S, N=call.N, B=B, slots=slots,
    )  # fmt: skip
    expected = torch.stack([logs[b * slots : (b + 1) * slots].logsumexp(0) for b in range(B)]) - lse[n]
    found = log_mass[:, n].double()
    assert torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=2e-7)
    assert abs(found[0, 11]) < 1e-12
    others = torch.ones(call.N, dtype=torch.bool)
    others[n] = False
    assert log_mass[:, others].isnan().all()


def routes_by_formula(log_mass_BL, size_L, target_block_L, least, share, bisections):
    x_BL = torch.where(size_L > 0, log_mass_BL.exp() * size_L, 0.0)
    low, high = torch.zeros(len(x_BL), 1), x_BL.amax(1, keepdim=True)
    wanted = share * x_BL.double().sum(1, keepdim=True)
    for _ in range(bisections):
        middle = (low + high) / 2
        enough = torch.where(x_BL > middle, x_BL, 0.0).double().sum(1, keepdim=True) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    both = (x_BL > least) | (target_block_L == torch.arange(len(x_BL))[:, None])
    return torch.where(both, 2, (x_BL > low) & (share > 0)), x_BL


# 1300 tokens: several for each thread; 13000: more than are kept in shared memory.
@pytest.mark.parametrize(("L", "B"), [(1300, 5), (13000, 2)])
@pytest.mark.parametrize("by_row", [True, False])
def test_route(kernels, L, B, by_row):
    call = make_call(T=L, count=L - 40)
    live = call.live
    log_mass = torch.randn(B, call.N, generator=generator(3)) * 3 - 4
    size = torch.rand(L, generator=generator(4))
    size[::7] = 0.0
    target_block = torch.randint(0, B, (L,), generator=generator(5), dtype=torch.int32)
    target_block[::7] = -1
    log_mass[:, call.rows[::7]] = NAN  # nothing of them is looked at
    log_mass[1, call.rows] = -torch.inf  # a block without mass
    rules = torch.tensor([5.0, 0.9], dtype=torch.float64)
    route = poisoned(B, L, dtype=torch.int64).to(torch.uint8)
    kernels.route(
        log_mass=log_mass, rows=call.rows, count=call.count, size=size, target_block=target_block, rules=rules, route=route,
        N=call.N, L=L, B=B, bisections=20, by_row=by_row,
    )  # fmt: skip
    masses = log_mass[:, call.rows[:live]]
    expected, x_BL = routes_by_formula(masses, size[:live], target_block[:live], 5.0, 0.9 if by_row else 0.0, 20)
    assert torch.equal(route[:, :live].long(), expected.long())
    assert (route[:, live:] == 0).all()
    assert set(route[0].tolist()) == ({0, 1, 2} if by_row else {0, 2})
    if by_row:
        assert (torch.where(route[:, :live] > 0, x_BL, 0.0).sum(1) >= 0.8999 * x_BL.sum(1)).all()


def random_route(B: int, L: int, shares: list[float], seed: int = 0) -> Tensor:
    """uint8 [B, L]: 2 and 1 with these shares, block by block."""
    u = torch.rand(B, L, generator=generator(seed))
    share = torch.tensor(shares)[:, None]
    return torch.where(u < share, 2, torch.where(u < 1.5 * share, 1, 0)).to(torch.uint8)


@dataclass
class Lists:
    lists: Tensor
    places: Tensor
    starts: Tensor
    counts: Tensor
    ends: Tensor
    tokens: list[Tensor]  # of each block, as listed
    both: list[Tensor]  # those of hidden's gradient


def make_lists(route_bL: Tensor, first: int, T: int) -> Lists:
    """By the definition, for the blocks that are given."""
    blocks, steps = len(route_bL), -(-T // STEP)
    lists, places = poisoned(blocks, T, dtype=torch.int32), torch.full((blocks, T), -1, dtype=torch.int32)
    starts = torch.zeros(blocks, steps + 1, dtype=torch.int32)
    here = torch.zeros(blocks, T, dtype=torch.uint8)
    part = route_bL[:, first : first + T]
    here[:, : part.shape[1]] = part
    both = [(here[c] == 2).nonzero()[:, 0] for c in range(blocks)]
    tokens = [torch.cat([both[c], (here[c] == 1).nonzero()[:, 0]]) for c in range(blocks)]
    for c in range(blocks):
        lists[c, : len(tokens[c])] = tokens[c].int()
        places[c, both[c]] = torch.arange(len(both[c]), dtype=torch.int32)
        for step in range(steps + 1):
            starts[c, step] = int((both[c] < step * STEP).sum())
    counts = torch.tensor([len(t) for t in tokens], dtype=torch.int32)
    ends = ((counts + TILE_ROWS - 1) // TILE_ROWS).cumsum(0, dtype=torch.int32)
    return Lists(lists, places, starts, counts, ends, tokens, both)


# Fewer and more tokens than threads, slabs that end within the call and behind it; a block without any token, and one with all.
@pytest.mark.parametrize(("T", "first", "L"), [(300, 0, 300), (1100, 100, 1300), (700, 600, 1000), (128, 0, 500)])
def test_list_tokens(kernels, T, first, L):
    route = random_route(6, L, [0.3, 0.05, 0.0, 0.9, 1.0, 0.2])
    expected = make_lists(route[2:], first, T)
    lists, places = poisoned(4, T, dtype=torch.int32), poisoned(4, T, dtype=torch.int32)
    starts, counts = torch.empty_like(expected.starts), torch.empty_like(expected.counts)
    kernels.list_tokens(
        route=route,
        lists=lists,
        places=places,
        starts=starts,
        counts=counts,
        begin=2,
        blocks=4,
        first=first,
        T=T,
        L=L,
        step=STEP,
    )
    for name, found in (("counts", counts), ("starts", starts), ("places", places), ("lists", lists)):
        assert torch.equal(found, getattr(expected, name)), name
    assert counts.tolist()[::2] == [0, min(T, L - first)]


# ---- routed products


def make_tokens(T: int, scaled: bool) -> Tensor:
    """fp32 [10, T]: inverse temperature, 2 ** -r, lse in two parts, coefficient, ., ., 2 ** r, ., ."""
    power = 2.0 ** torch.randint(-6, 1, (T,), generator=generator(11)) if scaled else torch.ones(T)
    tokens = poisoned(10, T)
    tokens[0] = torch.rand(T, generator=generator(12)) + 0.5
    tokens[1], tokens[7] = 1 / power, power
    tokens[2] = torch.rand(T, generator=generator(13)) * 3 + 4
    tokens[3] = torch.rand(T, generator=generator(14)) * 1e-7
    tokens[4] = torch.randn(T, generator=generator(15))
    tokens[4, ::5] = 0.0
    return tokens


@dataclass(frozen=True)
class GradientCase:
    block: int = 128
    T: int = 300
    D: int = 72
    rows: int = 300  # of the chunk
    begin: int = 2  # blocks
    shares: tuple[float, ...] = (0.2, 0.0, 0.6)
    bias: torch.dtype | None = torch.float32
    bias_sums: bool = True
    first: int = 0
    spare: int = 0  # numbers behind each row of weight
    transposed: bool = False  # weight's columns lie one behind the other
    programs: int = 3


GRADIENTS = {
    "block of 64, short last one": GradientCase(64, rows=150, shares=(0.6, 0.0, 0.9), spare=8),
    "block of 128, odd rows of weight": GradientCase(spare=3, bias=torch.bfloat16),
    "block of 256, two parts, the second ragged": GradientCase(
        256, T=140, rows=420, shares=(0.4, 0.3), bias=None, first=130
    ),
    "all tokens": GradientCase(T=260, D=40, rows=128, shares=(1.0,), bias=torch.float16, programs=1),
    "columns of weight": GradientCase(64, T=100, D=20, rows=100, shares=(0.5, 0.5), transposed=True, bias_sums=False),
    "nothing": GradientCase(T=100, rows=200, shares=(0.0, 0.0)),
    "more blocks than threads": GradientCase(64, T=20, D=8, rows=64 * 260, shares=(0.2, 0.0) * 130),
}


def run_gradient(kernels, case: GradientCase, dtype: torch.dtype, nan_token: int | None = None):
    T, D, C, block, B = case.T, case.D, case.rows, case.block, case.begin + len(case.shares)
    call = make_call(T, first=case.first)
    hidden = torch.randn(T, D, generator=generator(21))
    scale = make_tokens(T, dtype == torch.float16)
    hidden = padded((hidden * scale[7][:, None]).to(dtype), dtype, -D % 8)
    weight = (torch.randn(C, D, generator=generator(22)) / D**0.5).to(dtype)
    weight = weight.T.contiguous().T if case.transposed else padded(weight, dtype, case.spare)
    bias = None if case.bias is None else torch.randn(C, generator=generator(23)).to(case.bias)
    targets = torch.randint(-1, B * block, (T,), generator=generator(24), dtype=torch.int32)
    targets[: T // 2] = case.begin * block + torch.randint(0, C, (T // 2,), generator=generator(25), dtype=torch.int32)
    log_mass = poisoned(B, call.N)
    log_mass[:, call.rows] = -torch.rand(B, len(call.rows), generator=generator(26)) * 3
    log_mass[:, call.rows[case.first + 4]] = -torch.inf
    route = random_route(len(case.shares), case.first + T, list(case.shares), seed=7)
    lists = make_lists(route, case.first, T)
    if nan_token is not None:
        hidden[nan_token] = NAN
    tiles = -(-T // TILE_ROWS)
    out, mean_sums = poisoned(len(case.shares), T, block, dtype=dtype), poisoned(tiles, C)
    bias_sums = poisoned(tiles, C) if case.bias_sums else None
    kernels.routed_gradient(
        hidden=hidden, weight=weight, dtype=DTYPE[dtype], bias=bias, bias_dtype=DTYPE[case.bias or torch.float32], targets=targets,
        tokens=scale, log_mass=log_mass, rows=call.rows, lists=lists.lists, counts=lists.counts, ends=lists.ends, out=out,
        mean_sums=mean_sums, bias_sums=bias_sums, first=case.first, T=T, D=D, N=call.N, begin=case.begin * block, C=C,
        blocks=len(case.shares), block=block, stride_hidden=hidden.stride(0), stride_weight_v=weight.stride(0),
        stride_weight_d=weight.stride(1), logit_scale=0.7, programs=case.programs,
    )  # fmt: skip
    inputs = (hidden, weight, bias, targets, scale, log_mass, call)
    return lists, inputs, (out, mean_sums, bias_sums)


def check_gradient(case: GradientCase, dtype: torch.dtype, lists: Lists, inputs, results) -> int:
    hidden, weight, bias, targets, tokens, log_mass, call = inputs
    out, mean_sums, bias_sums = results
    checked = 0
    for c, listed in enumerate(lists.tokens):
        span = slice(c * case.block, min((c + 1) * case.block, case.rows))
        of = tokens[:, listed].double()[:, :, None]
        x = hidden[listed].double() @ weight[span].double().T * of[1]
        z = (x + (0.0 if bias is None else bias[span].double())) * 0.7 * of[0]
        log_p = z - of[2] - of[3]
        share = log_mass[case.begin + c, call.rows[case.first + listed]].double()[:, None]
        mean = torch.where(share > -torch.inf, (log_p - share).exp(), 0.0)
        g = log_p.exp() * of[4] * 0.7 * of[0]
        columns = torch.arange(span.start, span.stop)
        g = torch.where(targets[listed].long()[:, None] - case.begin * case.block == columns, 0.0, g)
        width = span.stop - span.start
        assert_near(out[c, : len(listed), :width], g, g.abs() + 1e-4, EPS[dtype] + 2e-5)
        assert (out[c, : len(listed), width:] == 0).all()
        assert out[c, len(listed) :].isnan().all()
        for tile in range(-(-len(listed) // TILE_ROWS)):
            rows = slice(tile * TILE_ROWS, (tile + 1) * TILE_ROWS)
            assert_near(mean_sums[tile, span], mean[rows].sum(0), mean[rows].sum(0), 1e-4)
            if bias_sums is not None:
                terms = g[rows] * of[7][rows]
                assert_near(bias_sums[tile, span], terms.sum(0), terms.abs().sum(0) + 1e-6, 1e-4)
            checked += 1
        assert mean_sums[-(-len(listed) // TILE_ROWS) :, span].isnan().all()
    return checked


@every_dtype
@pytest.mark.parametrize("name", GRADIENTS)
def test_routed_gradient(kernels, dtype, name):
    case = GRADIENTS[name]
    lists, *results = run_gradient(kernels, case, dtype)
    assert check_gradient(case, dtype, lists, *results) == lists.ends[-1]


@every_dtype
def test_routed_gradient_does_not_depend_on_who_does_what(kernels, dtype):
    case = GradientCase(64, rows=150, shares=(0.6, 0.0, 0.9), D=40)
    results = [
        run_gradient(kernels, GradientCase(**{**case.__dict__, "programs": programs}), dtype)[2] for programs in (1, 4)
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.nan_to_num(5.0), b.nan_to_num(5.0))


@every_dtype
def test_a_nan_row_of_hidden_stays_in_its_row(kernels, dtype):
    case = GradientCase(64, T=100, rows=64, shares=(1.0,), D=40)
    lists, _, (clean, *_) = run_gradient(kernels, case, dtype)
    _, _, (out, *_) = run_gradient(kernels, case, dtype, nan_token=13)
    row = lists.tokens[0].tolist().index(13)
    others = torch.arange(100) != row
    assert torch.equal(out[0, others], clean[0, others])
    assert out[0, row].isnan().sum() >= 63  # all but the target's column


@dataclass(frozen=True)
class ProductCase:
    block: int
    T: int
    D: int
    rows: int  # of the chunk
    shares: tuple[float, ...]
    programs: int = 4
    count: int = 10**6
    first: int = 0
    skip: int = 0
    R: int = 0  # rows of sums, 0: to the chunk's end
    is_first: bool = True
    spare: int = 0
    transposed: bool = False


def make_gradient(case: ProductCase, dtype: torch.dtype, lists: Lists) -> Tensor:
    """[b, T, block]: NaN behind each list, 0 in columns behind the chunk."""
    g = poisoned(len(case.shares), case.T, case.block, dtype=dtype)
    for c, listed in enumerate(lists.tokens):
        g[c, : len(listed)] = torch.randn(len(listed), case.block, generator=generator(31 + c)).to(dtype)
        g[c, : len(listed), max(case.rows - c * case.block, 0) :] = 0.0
        if len(listed) > 2:
            g[c, 2] = 0.0  # a token with coefficient 0
    return g


WEIGHTS = {
    "blocks of 64": ProductCase(64, 200, 136, 150, (0.5, 0.0, 0.9)),
    "blocks of 128, one slab more": ProductCase(128, 150, 72, 200, (0.3, 1.0), is_first=False, spare=5),
    "blocks of 256": ProductCase(256, 90, 40, 300, (0.4, 0.4)),
    "from a block on": ProductCase(64, 100, 33, 250, (1.0, 0.2, 0.6, 0.5), skip=1, R=128),
}


@every_dtype
@pytest.mark.parametrize("name", WEIGHTS)
def test_routed_weight(kernels, dtype, name):
    case = WEIGHTS[name]
    lists = make_lists(random_route(len(case.shares), case.T, list(case.shares), seed=8), 0, case.T)
    g = make_gradient(case, dtype, lists)
    hidden = padded(torch.randn(case.T, case.D, generator=generator(41)).to(dtype), dtype, case.spare or -case.D % 8)
    R = case.R or case.rows - case.skip * case.block
    sums = poisoned(R + 2, case.D) if case.is_first else torch.randn(R + 2, case.D, generator=generator(42))
    before = sums.double().clone()
    kernels.routed_weight(
        g=g, hidden=hidden, dtype=DTYPE[dtype], lists=lists.lists, counts=lists.counts, sums=sums, skip=case.skip, T=case.T, D=case.D,
        C=case.rows, R=R, block=case.block, stride_hidden=hidden.stride(0), is_first=case.is_first,
    )  # fmt: skip
    for c in range(case.skip, len(case.shares)):
        listed, start = lists.tokens[c], (c - case.skip) * case.block
        width = min(case.block, R - start)
        if width <= 0:
            continue
        of_g, of_hidden = g[c, : len(listed), :width].double(), hidden[listed].double()
        expected, scale = of_g.T @ of_hidden, of_g.abs().T @ of_hidden.abs()
        if not case.is_first:
            expected, scale = expected + before[start : start + width], scale + before[start : start + width].abs()
        assert_near(sums[start : start + width], expected, scale, 1e-5)
    assert torch.equal(sums[R:].double().nan_to_num(7.0), before[R:].nan_to_num(7.0))


# One span a step, and longer ones; blocks that are dense in some spans and not in others, with all tokens and without any.
HIDDENS = {
    "blocks of 64": ProductCase(64, 300, 72, 250, (0.1, 0.5, 0.0, 0.2)),
    "blocks of 128, two steps a span": ProductCase(128, 400, 130, 500, (0.05, 1.0, 0.15, 0.3), spare=8),
    "blocks of 256, some tokens not live": ProductCase(256, 260, 40, 300, (0.2, 0.3), count=230, first=30),
    "odd rows": ProductCase(128, 150, 33, 200, (0.2, 0.6), programs=1, spare=2),
    "nothing dense, tiles of one list": ProductCase(64, 512, 24, 130, (0.2, 0.22, 0.1), programs=1),
    "all dense": ProductCase(64, 140, 24, 100, (1.0, 1.0), programs=1),
    "nobody live": ProductCase(64, 140, 24, 100, (0.0, 0.0), count=20, first=30),
    "more blocks than threads": ProductCase(64, 130, 8, 64 * 300, (0.1, 0.0, 0.4) * 100, programs=1),
    "columns of weight": ProductCase(64, 140, 24, 120, (0.2, 0.6), programs=1, transposed=True),
}


def run_hidden(kernels, case: ProductCase, dtype: torch.dtype, nan_token: int | None = None):
    call = make_call(case.T, first=case.first, count=case.count)
    route = random_route(len(case.shares), case.first + case.T, list(case.shares), seed=9)
    route[:, int(call.count) :] = 0
    lists = make_lists(route, case.first, case.T)
    g = make_gradient(case, dtype, lists)
    if nan_token is not None:
        g[0, lists.places[0, nan_token]] = NAN
    weight = padded(torch.randn(case.rows, case.D, generator=generator(51)).to(dtype), dtype, case.spare or -case.D % 8)
    weight = weight.T.contiguous().T if case.transposed else weight
    sums = torch.randn(case.T, case.D + 2, generator=generator(52))
    before = sums.clone()
    kernels.routed_hidden(
        g=g, weight=weight, dtype=DTYPE[dtype], count=call.count, lists=lists.lists, places=lists.places, starts=lists.starts, sums=sums,
        blocks=len(case.shares), block=case.block, first=case.first, T=case.T, D=case.D, C=case.rows, stride_weight_v=weight.stride(0),
        stride_weight_d=weight.stride(1), stride_sums=sums.stride(0), step=STEP, programs=case.programs,
    )  # fmt: skip
    return call, lists, g, weight, before, sums


@every_dtype
@pytest.mark.parametrize("name", HIDDENS)
def test_routed_hidden(kernels, dtype, name):
    case = HIDDENS[name]
    call, lists, g, weight, before, sums = run_hidden(kernels, case, dtype)
    expected, scale = before[:, : case.D].double(), before[:, : case.D].double().abs()
    for c, both in enumerate(lists.both):
        span = slice(c * case.block, min((c + 1) * case.block, case.rows))
        of_g, of_weight = g[c, : len(both), : span.stop - span.start].double(), weight[span].double()
        expected[both] += of_g @ of_weight
        scale[both] += of_g.abs() @ of_weight.abs()
    assert_near(sums[:, : case.D], expected, scale, 1e-5)
    assert torch.equal(sums[:, case.D :], before[:, case.D :])
    assert torch.equal(sums[call.live :], before[call.live :])


@every_dtype
@pytest.mark.parametrize("share", [0.2, 0.9], ids=["listed", "dense"])
def test_a_nan_row_of_the_gradient_stays_in_its_row(kernels, dtype, share):
    case = ProductCase(64, 140, 24, 128, (share, share), programs=1)
    _, lists, *_, clean = run_hidden(kernels, case, dtype)
    token = int(lists.both[0][5])
    *_, sums = run_hidden(kernels, case, dtype, nan_token=token)
    others = torch.arange(case.T) != token
    assert torch.equal(sums[others], clean[others])
    assert sums[token, : case.D].isnan().all()


# ---- what is not routed


def rest_formula(route, log_mass, tokens, call: Call, logit_scale: float, least: int) -> Tensor:
    """fp64 [B, live]"""
    live = slice(call.first, call.first + call.live)
    coefficient = (tokens[4] * tokens[0] * logit_scale).double()[: call.live]
    mass = log_mass[:, call.rows[live]].double().exp()
    return torch.where((route[:, live] < least) & (coefficient != 0), mass * coefficient, 0.0)


def make_rest(B: int, T: int, first: int, count: int):
    call = make_call(T, first=first, count=count)
    route = random_route(B, first + T, [0.2] * B, seed=10)
    log_mass = poisoned(B, call.N)
    log_mass[:, call.rows] = torch.randn(B, len(call.rows), generator=generator(61)) - 3
    tokens = make_tokens(T, False)
    log_mass[:, call.rows[first : first + T : 5]] = NAN  # tokens with coefficient 0
    arguments = {
        "route": route, "log_mass": log_mass, "rows": call.rows, "count": call.count, "tokens": tokens, "first": first, "T": T,
        "L": first + T, "N": call.N, "B": B, "logit_scale": 0.7,
    }  # fmt: skip
    return call, route, log_mass, tokens, arguments


# Two 16-bit halves hold 16 bits of a factor in bf16; in fp16 22, but none below 2^-25.
HALVES = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 4e-5}
LEAST = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}


@every_dtype
@pytest.mark.parametrize(
    ("B", "T", "D", "first", "count", "is_first"),
    [
        (70, 100, 136, 0, 10**6, True),
        (5, 150, 33, 40, 170, False),
        (64, 64, 9, 0, 1000, True),
        (3, 40, 24, 50, 40, True),
    ],
)
def test_rest_weight(kernels, dtype, B, T, D, first, count, is_first):
    call, route, log_mass, tokens, arguments = make_rest(B, T, first, count)
    hidden = padded(torch.randn(T, D, generator=generator(62)).to(dtype), dtype, -D % 8)
    sums = poisoned(B + 1, D) if is_first else torch.randn(B + 1, D, generator=generator(63))
    before = sums.double().clone()
    kernels.rest_weight(
        **arguments, hidden=hidden, hidden_dtype=DTYPE[dtype], poison=torch.zeros(1), sums=sums, D=D, stride_hidden=hidden.stride(0),
        is_first=is_first,
    )  # fmt: skip
    rest = rest_formula(route, log_mass, tokens, call, 0.7, 1)
    of_hidden = hidden[: call.live].double()
    expected, scale = rest @ of_hidden, rest.abs() @ of_hidden.abs()
    if not is_first:
        expected, scale = expected + before[:B], scale + before[:B].abs()
    scale += LEAST[dtype] / HALVES[dtype] * of_hidden.abs().sum(0)
    assert_near(sums[:B], expected, scale + 1e-9, HALVES[dtype])
    assert torch.equal(sums[B:].double().nan_to_num(7.0), before[B:].nan_to_num(7.0))


# As the bias takes it: one column, a row of `tokens`.
@pytest.mark.parametrize("is_first", [True, False])
def test_rest_weight_of_one_column(kernels, is_first):
    B, T = 7, 700
    call, route, log_mass, tokens, arguments = make_rest(B, T, 30, 600)
    tokens[7] = torch.rand(T, generator=generator(64))
    sums = torch.randn(B, 1, generator=generator(65))
    before = 0.0 if is_first else sums.double().clone()
    kernels.rest_weight(
        **arguments,
        hidden=tokens[7],
        hidden_dtype=0,
        poison=torch.zeros(1),
        sums=sums,
        D=1,
        stride_hidden=1,
        is_first=is_first,
    )
    rest = rest_formula(route, log_mass, tokens, call, 0.7, 1)
    one = tokens[7, : call.live, None].double()
    assert_near(sums, rest @ one + before, rest.abs() @ one + 1, 1e-5)


@pytest.mark.parametrize("D", [1, 24])
def test_poison_reaches_every_sum(kernels, D):
    *_, arguments = make_rest(5, 40, 0, 40)
    sums, poison = torch.zeros(5, D), torch.tensor([NAN])
    for is_first, poisoned_sums in ((False, 0), (True, 5 * D)):
        kernels.rest_weight(
            **arguments,
            hidden=torch.ones(40, D),
            hidden_dtype=0,
            poison=poison,
            sums=sums,
            D=D,
            stride_hidden=D,
            is_first=is_first,
        )
        assert sums.isnan().sum() == poisoned_sums


@every_dtype
@pytest.mark.parametrize(
    ("B", "T", "D", "first", "count"),
    [(70, 100, 136, 0, 10**6), (5, 150, 33, 40, 170), (33, 64, 20, 0, 64), (3, 40, 24, 50, 40)],
)
def test_rest_hidden(kernels, dtype, B, T, D, first, count):
    call, route, log_mass, tokens, arguments = make_rest(B, T, first, count)
    mean = torch.randn(B, D, generator=generator(66))
    sums = torch.randn(T, D + 1, generator=generator(67))
    before = sums.clone()
    kernels.rest_hidden(**arguments, mean=mean, sums=sums, dtype=DTYPE[dtype], D=D, stride_sums=sums.stride(0))
    rest = rest_formula(route, log_mass, tokens, call, 0.7, 2)
    live = call.live
    expected = before[:live, :D].double() + rest.T @ mean.double()
    scale = before[:live, :D].abs().double() + rest.abs().T @ mean.abs().double()
    scale += LEAST[dtype] / HALVES[dtype] * (mean.abs().sum(0) + rest.abs().sum(0)[:, None])
    assert_near(sums[:live, :D], expected, scale, HALVES[dtype])
    assert torch.equal(sums[live:], before[live:])
    assert torch.equal(sums[:, D:], before[:, D:])


@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("bias", [True, False])
def test_block_sums(kernels, block, bias):
    C, rows = 2 * block + 40, 128
    counts = torch.tensor([3 * rows + 1, 0, 2 * rows], dtype=torch.int32)
    tiles = torch.tensor([4, 0, 2])
    mean_sums, bias_sums = poisoned(5, C), poisoned(5, C)
    for c in range(3):
        span = slice(c * block, min((c + 1) * block, C))
        mean_sums[: tiles[c], span] = torch.rand(tiles[c], span.stop - span.start, generator=generator(71 + c))
        bias_sums[: tiles[c], span] = torch.randn(tiles[c], span.stop - span.start, generator=generator(75 + c))
    mean, of_bias = poisoned(C), poisoned(C) if bias else None
    for is_first, is_last in ((True, False), (False, False), (False, True)):
        kernels.block_sums(
            mean_sums=mean_sums, bias_sums=bias_sums if bias else None, counts=counts, mean=mean, bias=of_bias, C=C, block=block,
            rows=rows, is_first=is_first, is_last=is_last,
        )  # fmt: skip
    for c in range(3):
        span = slice(c * block, min((c + 1) * block, C))
        total = 3 * mean_sums[: tiles[c], span].double().sum(0)
        width = span.stop - span.start
        expected = total / total.sum() if tiles[c] else torch.full((width,), 1 / width)
        torch.testing.assert_close(mean[span].double(), expected.double(), rtol=2e-6, atol=0)
        if bias:
            torch.testing.assert_close(
                of_bias[span].double(), 3 * bias_sums[: tiles[c], span].double().sum(0), rtol=0, atol=1e-5
            )


@every_dtype
@pytest.mark.parametrize(
    ("block", "D", "spare", "transposed"),
    [(64, 40, 8, False), (128, 33, 0, False), (256, 2100, 4, False), (64, 20, 0, True)],
)
def test_block_mean(kernels, dtype, block, D, spare, transposed):
    C = block + 30
    weight = padded(torch.randn(C, D, generator=generator(81)).to(dtype), dtype, spare)
    weight = weight.T.contiguous().T if transposed else weight
    mean, out = torch.rand(C, generator=generator(82)), poisoned(3, D)
    kernels.block_mean(
        weight=weight, weight_dtype=DTYPE[dtype], mean=mean, out=out, D=D, C=C, block=block, stride_weight_v=weight.stride(0),
        stride_weight_d=weight.stride(1),
    )  # fmt: skip
    terms = weight.double() * mean[:, None].double()
    expected = torch.stack([terms[:block].sum(0), terms[block:].sum(0)])
    assert_near(out[:2], expected, torch.stack([terms[:block].abs().sum(0), terms[block:].abs().sum(0)]), 1e-5)
    assert out[2].isnan().all()


@pytest.mark.parametrize(
    ("kernel", "changes", "message"),
    [
        ("block_mean", {"block": 32}, "block_mean: block: expected 64, 128 or 256, got 32"),
        ("block_mean", {"weight_dtype": 5}, "block_mean: weight_dtype: expected 0, 1 or 2, got 5"),
        ("block_mean", {"out": None}, "block_mean: out: expected a tensor, got none"),
        ("list_tokens", {"step": 64}, "list_tokens: step: expected 128, got 64"),
        ("list_tokens", {"first": 40}, "list_tokens: first: expected a live token's index, got 40"),
    ],
)
def test_bad_arguments_are_named(kernels, kernel, changes, message):
    some = torch.zeros(4096)
    arguments = {
        "block_mean": dict(weight=some, weight_dtype=0, mean=some, out=some, D=4, C=64, block=64, stride_weight_v=4, stride_weight_d=1),
        "list_tokens": dict(
            route=some, lists=some, places=some, starts=some, counts=some, begin=0, blocks=1, first=0, T=40, L=40, step=128
        ),
    }[kernel]  # fmt: skip
    with pytest.raises(ValueError, match=message):
        getattr(kernels, kernel)(**{**arguments, **changes})
