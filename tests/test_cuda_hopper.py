"""The fused Hopper kernels, compiled for the CPU against tests/cuda_emulator, beside the formula in float64.

T tokens of a slab, D hidden size, V vocabulary, C vocabulary rows of a chunk, S slots of 64 vocabulary rows.
"""

from dataclasses import dataclass, fields, replace

import pytest
import torch
from emulated_cuda import emulated_module

DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SLOT, TILE_ROWS, TILE_COLUMNS = 64, 128, 256
PAD = 3  # rows of NaN behind each matrix

pytestmark = pytest.mark.slow


class Kernels:
    """kernels("forward", hidden=..., ...): a field of the params struct each; tensors by address, None as null."""

    def __call__(self, name: str, **arguments) -> None:
        kernel = getattr(emulated_module(), f"linear_logprob_{name}_hopper")
        kernel(0, **{field: v.data_ptr() if isinstance(v, torch.Tensor) else v or 0 for field, v in arguments.items()})


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    return Kernels()


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.bfloat16
    T: int = 128
    count: int = 1000  # of the call: more than the slab holds, unless a case says otherwise
    first: int = 0
    D: int = 64
    V: int = 256
    bias: torch.dtype | None = None
    softcap: float = 0.0
    logit_scale: float = 1.0
    temperature: bool = False
    programs: int = 3
    stats: bool = False
    # of the backward
    begin: int = 0
    end: int = 0  # 0: V
    spare: int = 0  # columns of the chunk's buffer that are not the chunk's
    bias_sums: bool = False
    rng: int = 0

    @property
    def live(self) -> int:
        return max(min(self.count - self.first, self.T), 0)

    def __str__(self) -> str:
        chosen = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(chosen).replace("torch.", "") or "default"


class Problem:
    """Inputs of a case, with NaN wherever a kernel must not look, and its logits in float64."""

    def __init__(self, case: Case):
        self.case = case
        g = torch.Generator().manual_seed(case.rng)
        self.hidden_TD = padded(torch.randn(case.T, case.D, generator=g), case.dtype)
        self.hidden_TD[case.live :] = float("nan")
        self.weight_VD = padded(torch.randn(case.V, case.D, generator=g) / case.D**0.5 * 3, case.dtype)
        self.bias_V = None if case.bias is None else torch.randn(case.V, generator=g).to(case.bias)
        self.targets_T = torch.randint(0, case.V, (case.T,), generator=g).to(torch.int32)
        self.targets_T[1] = -1
        self.inverse_T = torch.rand(case.T, generator=g) + 0.5 if case.temperature else torch.ones(case.T)
        self.count = torch.tensor([case.count], dtype=torch.int32)
        self.g = g

    def logits(self) -> torch.Tensor:
        """[live, V]"""
        return self.logits_and_slope()[0]

    def logits_and_slope(self) -> tuple[torch.Tensor, torch.Tensor]:
        case, live = self.case, self.case.live
        x = self.hidden_TD[:live].double() @ self.weight_VD.double().T
        if self.bias_V is not None:
            x = x + self.bias_V.double()
        scale = case.logit_scale * self.inverse_T[:live, None].double()
        if case.softcap:
            tanh = torch.tanh(x * case.logit_scale / case.softcap)
            return tanh * case.softcap * self.inverse_T[:live, None].double(), (1 - tanh**2) * scale
        return x * scale, scale.expand_as(x)

    def arguments(self) -> dict:
        case = self.case
        return {
            "hidden": self.hidden_TD, "weight": self.weight_VD, "dtype": DTYPE[case.dtype], "bias": self.bias_V,
            "bias_dtype": 0 if case.bias is None else DTYPE[case.bias], "targets": self.targets_T, "count": self.count,
            "first": case.first, "T": case.T, "D": case.D, "V": case.V, "stride_hidden": self.hidden_TD.stride(0),
            "stride_weight": self.weight_VD.stride(0), "logit_scale": case.logit_scale, "softcap": case.softcap,
            "programs": case.programs,
        }  # fmt: skip


def padded(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same matrix in 16 bits, its rows on 16-byte borders, among NaN."""
    rows, columns = matrix.shape
    buffer = torch.full((rows + PAD, -(-columns // 8) * 8 + 8), float("nan"), dtype=dtype)
    buffer[:rows, :columns] = matrix.to(dtype)
    assert buffer.data_ptr() % 16 == 0
    return buffer[:rows, :columns]


def run_forward(kernels: Kernels, problem: Problem) -> dict[str, torch.Tensor]:
    case = problem.case
    S = -(-case.V // TILE_COLUMNS) * 4

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)

    out = {name: empty(S, case.T) for name in ("partial_max", "partial_entropy", "partial_total", "partial_squares")}
    out["partial_sum"] = empty(S, case.T, dtype=torch.float64)
    out["target_logit"] = empty(case.T)
    tensors = dict(out)
    if not case.stats:
        tensors |= dict.fromkeys(("partial_entropy", "partial_total", "partial_squares"))
    kernels("forward", inverse_temperature=problem.inverse_T, **tensors, **problem.arguments())
    return out


# Plain, then all that a head can ask. Sizes: one step along D and several, ragged or not; a vocabulary within one slot, of one tile and
# of several; slabs of one tile, of two and of more than share a stretch of weight, begun behind the call's first token, partly live, not
# live at all; more tiles than programs and fewer.
PLAIN = [
    Case(),
    Case(dtype=torch.float16, D=200, V=600, programs=100),
    Case(T=256, count=300, first=150, D=100, V=45, programs=1),
    Case(T=256, count=129, D=328, V=513, temperature=True, logit_scale=0.7, programs=4),
    Case(T=2304, count=2200, D=16, V=520, programs=7),
    Case(count=100, first=100),
]
RICH = [
    Case(bias=torch.bfloat16, V=300, D=72),
    Case(bias=torch.bfloat16, V=700, T=256, programs=1),
    Case(dtype=torch.float16, T=256, count=200, softcap=5.0, V=600, D=128, temperature=True, programs=2),
    Case(bias=torch.float32, softcap=2.0, logit_scale=1.3, temperature=True, V=450, T=256, count=500, first=300),
]


@pytest.mark.parametrize("case", PLAIN + RICH + [replace(case, stats=True) for case in PLAIN[1:4] + RICH], ids=str)
def test_forward(kernels, case):
    problem = Problem(case)
    out = run_forward(kernels, problem)
    z = problem.logits()
    live = case.live
    S = out["partial_max"].shape[0]
    z_LSC = torch.full((live, S * SLOT), float("-inf"), dtype=torch.float64)
    z_LSC[:, : case.V] = z
    z_SLC = z_LSC.view(live, S, SLOT).transpose(0, 1)
    top_SL = z_SLC.amax(2)
    torch.testing.assert_close(out["partial_max"][:, :live].double(), top_SL, rtol=0, atol=2e-5)
    lse_SL = out["partial_max"][:, :live].double() + out["partial_sum"][:, :live].log()
    torch.testing.assert_close(lse_SL, z_SLC.logsumexp(2), rtol=0, atol=2e-5)
    target_L = problem.targets_T[:live].long()
    hit = target_L >= 0
    torch.testing.assert_close(
        out["target_logit"][:live][hit].double(),
        z.gather(1, target_L.clamp(min=0)[:, None])[:, 0][hit],
        rtol=0,
        atol=2e-5,
    )
    assert out["target_logit"][:live][~hit].isnan().all()
    if case.stats:
        inside = z_SLC > float("-inf")
        gap = torch.where(inside, z_SLC - top_SL.clamp(min=-1e300)[..., None], torch.zeros_like(z_SLC))
        e = torch.where(inside, gap.exp(), torch.zeros_like(gap))
        torch.testing.assert_close(out["partial_entropy"][:, :live].double(), (-gap * e).sum(2), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out["partial_squares"][:, :live].double(), (e * e).sum(2), rtol=1e-4, atol=1e-5)
        total = torch.where(inside, z_SLC, torch.zeros_like(z_SLC)).sum(2)
        torch.testing.assert_close(out["partial_total"][:, :live].double(), total, rtol=1e-4, atol=1e-3)
    written = {"partial_max", "partial_sum"} | (
        {"partial_entropy", "partial_squares", "partial_total"} if case.stats else set()
    )
    for name, tensor in out.items():
        assert tensor[..., live:].isnan().all(), name
        if name != "target_logit":
            assert bool(tensor[:, :live].isnan().any()) == (live > 0 and name not in written), name


def test_only_one_statistic(kernels):
    problem = Problem(Case(stats=True, V=100))
    both = run_forward(kernels, problem)
    out = torch.full_like(both["partial_squares"], float("nan"))
    others = {name: torch.empty_like(both[name]) for name in ("partial_max", "partial_sum", "target_logit")}
    kernels(
        "forward", inverse_temperature=problem.inverse_T, partial_entropy=None, partial_total=None, partial_squares=out,
        **others, **problem.arguments(),
    )  # fmt: skip
    torch.testing.assert_close(out, both["partial_squares"], rtol=0, atol=0)


def test_terms_of_one_do_not_swallow_the_others(kernels):
    """Rows of one weight that is far above the others: what is left of the probability has all its digits."""
    problem = Problem(Case(V=64))
    problem.hidden_TD[:] = 0
    problem.hidden_TD[:, 0] = 1
    problem.weight_VD[:] = 0
    problem.weight_VD[:, 0] = -18.0
    problem.weight_VD[7, 0] = 4.0
    problem.weight_VD[21, 0] = 4.0
    out = run_forward(kernels, problem)
    rest = 62 * torch.tensor(-22.0, dtype=torch.float64).exp()
    torch.testing.assert_close(out["partial_sum"][0] - 2.0, rest.expand(128), rtol=1e-5, atol=0)
    assert (out["partial_max"][0] == 4.0).all()


@pytest.mark.parametrize("rich", [False, True])
def test_infinities_and_nan_stay_where_they_are(kernels, rich):
    case = Case(bias=torch.float32 if rich else None, V=300, stats=True)
    clean, problem = Problem(case), Problem(case)
    problem.hidden_TD[77] = float("nan")
    if rich:
        for p in (clean, problem):
            p.bias_V[:64] = float("-inf")  # a slot without any probability
            p.bias_V[100] = float("-inf")
        problem.targets_T[5] = clean.targets_T[5] = 100
    expected, found = run_forward(kernels, clean), run_forward(kernels, problem)
    others = torch.arange(128) != 77
    for name in expected:
        torch.testing.assert_close(
            found[name][..., others], expected[name][..., others], rtol=0, atol=0, equal_nan=True
        )
    assert found["partial_sum"][:5, 77].isnan().all()
    if rich:
        assert (expected["partial_max"][0] == float("-inf")).all()
        assert (expected["partial_sum"][0] == 0).all()
        assert (expected["partial_entropy"][0] == 0).all()
        assert expected["target_logit"][5] == float("-inf")
        z_L = clean.logits()[:, 64:128]
        lse = expected["partial_max"][1].double() + expected["partial_sum"][1].log()
        torch.testing.assert_close(lse, z_L.logsumexp(1), rtol=0, atol=2e-5)


def run_backward(kernels, problem: Problem, log_prob: bool, flat: bool):
    """(out [T, C] and what lies beside it, its sums over rows, and what both should be)"""
    case, g = problem.case, problem.g
    end = case.end or case.V
    C, T, live = end - case.begin, case.T, case.live
    power = torch.randint(-3, 4, (T,), generator=g).float()
    scaled_TD = padded(problem.hidden_TD.float() * torch.exp2(power)[:, None], case.dtype)
    z, slope = problem.logits_and_slope()
    lse_T = torch.zeros(T, dtype=torch.float64)
    lse_T[:live] = z.logsumexp(1)
    tokens = torch.zeros(10, T)
    tokens[0], tokens[1], tokens[2] = problem.inverse_T, torch.exp2(-power), lse_T.float()
    tokens[3] = (lse_T - lse_T.float().double()).float()
    tokens[4] = torch.randn(T, generator=g)
    tokens[5] = torch.randn(T, generator=g) * log_prob
    tokens[6] = torch.randn(T, generator=g) * flat * 0.01
    tokens[7] = torch.exp2(power)
    tokens[8:] = float("nan")  # not this kernel's
    out = torch.full((T, C + case.spare), float("nan"), dtype=case.dtype)
    bias_sums = torch.full((T // TILE_ROWS, C), float("nan")) if case.bias_sums else None
    arguments = problem.arguments() | {"hidden": scaled_TD, "stride_hidden": scaled_TD.stride(0)}
    kernels(
        "backward", **arguments, tokens=tokens, out=out, bias_sums=bias_sums, begin=case.begin, end=end,
        stride_out=out.stride(0), log_prob=log_prob, flat=flat,
    )  # fmt: skip
    log_p = z - lse_T[:live, None]
    plain, log_prob_L, flat_L = (tokens[i, :live, None].double() for i in (4, 5, 6))
    expected = (log_p.exp() * (plain + log_prob_L * log_p.clamp(min=-1e300)) + flat_L) * slope
    expected = torch.where(torch.arange(case.V) == problem.targets_T[:live, None], 0.0, expected)
    wanted_TC = torch.zeros(T, C, dtype=torch.float64)
    wanted_TC[:live] = expected[:, case.begin : end]
    sums = (wanted_TC * tokens[7, :, None].double()).view(T // TILE_ROWS, TILE_ROWS, C).sum(1)
    return out, bias_sums, wanted_TC, sums


BACKWARD = [
    Case(spare=8),
    Case(dtype=torch.float16, D=200, V=600, programs=100, begin=64, end=600),
    Case(T=256, count=300, first=150, D=100, V=45, programs=1, spare=1),
    Case(T=384, count=130, D=328, V=513, temperature=True, logit_scale=0.7, programs=4, begin=1, end=500, spare=5),
    Case(T=256, count=140, V=77, spare=3, programs=5),
    Case(count=100, first=100, V=40),
    Case(bias=torch.bfloat16, V=300, D=72, bias_sums=True, spare=4),
    Case(bias=torch.bfloat16, V=700, T=256, bias_sums=True, spare=4, programs=1),
    Case(dtype=torch.float16, T=256, count=200, softcap=5.0, V=600, D=128, temperature=True, programs=2, begin=10, end=290),
    Case(bias=torch.float32, softcap=2.0, logit_scale=1.3, temperature=True, V=450, T=384, count=500, first=300, bias_sums=True,
         programs=2, begin=100, spare=2),
]  # fmt: skip


@pytest.mark.parametrize(("log_prob", "flat"), [(False, False), (True, True)], ids=["plain", "all-terms"])
@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_backward(kernels, case, log_prob, flat):
    problem = Problem(case)
    out, bias_sums, wanted_TC, sums = run_backward(kernels, problem, log_prob, flat)
    C = wanted_TC.shape[1]
    rounding = 2.0**-8 if case.dtype == torch.bfloat16 else 2.0**-11
    # The error of z goes into that of p; numbers of fp16 below 6e-5 have fewer digits.
    torch.testing.assert_close(out[:, :C].double(), wanted_TC, rtol=rounding * 1.02 + 5e-5, atol=2e-7)
    assert out[:, C:].isnan().all()
    target_T = problem.targets_T[: case.live].long() - case.begin
    here = (target_T >= 0) & (target_T < C)
    assert (out[: case.live][here].gather(1, target_T[here][:, None]) == 0).all()
    assert (out[case.live :, :C] == 0).all()
    if case.bias_sums:
        rows = -(-case.live // TILE_ROWS)
        torch.testing.assert_close(bias_sums[:rows].double(), sums[:rows], rtol=1e-4, atol=1e-4)
        assert bias_sums[rows:].isnan().all()


def test_backward_of_a_nan_row_stays_in_it(kernels):
    problem = Problem(Case(V=300))
    problem.hidden_TD[77] = float("nan")
    out, _, wanted_TC, _ = run_backward(kernels, problem, False, False)
    others = torch.arange(128) != 77
    torch.testing.assert_close(out[others].double(), wanted_TC[others], rtol=4e-3, atol=2e-7)
    target = torch.arange(300) == problem.targets_T[77]
    assert out[77, ~target].isnan().all()
    assert (out[77, target] == 0).all()


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_backward_where_a_bias_is_minus_infinity(kernels, softcap):
    problem = Problem(Case(V=300, bias=torch.float32, softcap=softcap, bias_sums=True))
    problem.bias_V[::3] = float("-inf")
    out, bias_sums, wanted_TC, sums = run_backward(kernels, problem, True, True)
    torch.testing.assert_close(out.double(), wanted_TC, rtol=4e-3, atol=2e-7)
    torch.testing.assert_close(bias_sums.double(), sums, rtol=1e-4, atol=1e-4)
    assert bool((wanted_TC[:, ::3] != 0).any()) == (softcap == 0.0)  # the flat term, where z has a slope


def test_numbers_do_not_depend_on_the_slab(kernels):
    """A token's numbers are the same to the bit wherever it stands, and however many programs there are."""
    case = Case(T=256, V=520, D=136, programs=1, stats=True)
    problem = Problem(case)
    whole = run_forward(kernels, problem)
    part = Problem(replace(case, T=128, programs=9))
    part.hidden_TD[:] = problem.hidden_TD[100:228]
    part.weight_VD[:] = problem.weight_VD
    part.targets_T[:] = problem.targets_T[100:228]
    for name, tensor in run_forward(kernels, part).items():
        torch.testing.assert_close(tensor, whole[name][..., 100:228], rtol=0, atol=0, equal_nan=True)


REFUSED = {
    "T": (130, "T: expected a multiple of 128"),
    "dtype": (0, "dtype: expected 1 or 2"),
    "stride_weight": (68, "stride_weight: expected no less than D, a multiple of 8"),
    "stride_hidden": (56, "stride_hidden: expected no less than D, a multiple of 8"),
    "hidden": (8, "hidden: expected an address of a multiple of 16 bytes"),
    "weight": (None, "weight: expected a tensor, got none"),
    "programs": (0, "programs: expected 1 or more"),
    "V": (0, "V: expected 1 to"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_refuses(kernels, field):
    value, message = REFUSED[field]
    problem = Problem(Case())
    arguments = problem.arguments() | {field: value}
    problem.arguments = lambda: arguments
    with pytest.raises(ValueError, match=f"linear_logprob_forward: {message}"):
        run_forward(kernels, problem)


def test_refuses_a_chunk_that_is_not_there(kernels):
    with pytest.raises(ValueError, match="linear_logprob_backward: end: expected no more than V, got 300"):
        run_backward(kernels, Problem(Case(end=300)), False, False)
