"""The kernels as calls use them, for `aot` to compile: a small set that tests check, and all."""

from dataclasses import dataclass

from isdaa_kernels.backends.gpu.call import BLOCKS
from isdaa_kernels.backends.triton import aot_kl, aot_routed
from isdaa_kernels.divergence import DIRECTIONS

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
_DTYPES = ("bf16", "fp16")


@dataclass(frozen=True)
class Variant:
    """One kernel as one kind of call uses it. `rich`: bias and softcap; `stats`: every statistic, and their gradients."""

    kernel: str
    arch: str
    dtype: str = "bf16"
    rich: bool = False
    stats: bool = False
    even: bool = True  # sizes that are multiples of the tile
    aligned: bool = True  # rows of weight on 16-byte borders
    block: int = 128  # of routed gradients
    direction: str = "reverse"  # of a divergence
    mixture: bool = False  # the second pass of jsd's forward
    logprobs: bool = False  # beside a divergence
    parts: int = 1  # of its gradient chunk

    def __str__(self) -> str:
        marks = [
            m
            for m, on in (
                ("rich", self.rich),
                ("stats", self.stats),
                ("ragged", not self.even),
                ("unaligned", not self.aligned),
                (f"block={self.block}", self.kernel in aot_routed.KERNELS),
                (self.direction, self.kernel in aot_kl.KERNELS),
                ("mixture", self.mixture),
                ("logprobs", self.logprobs),
                ("two parts", self.parts == 2),
            )
            if on
        ]
        return " ".join([self.kernel, self.arch, self.dtype, *marks])


def small_set() -> list[Variant]:
    """What CI compiles: both fused kernels at both ends of what a head can ask, and each of the others on one architecture at least."""
    fused = [
        Variant(kernel, arch, rich=rich, stats=rich)
        for arch in ARCHS
        for kernel in ("linear_logprob_forward", "linear_logprob_backward")
        for rich in (False, True)
    ]
    others = [Variant("fold_logits", "sm_90", stats=True), Variant("gradient_logits", "sm_90", stats=True)]
    others += [Variant("gradient_logits", "gfx942", rich=True), Variant("combine", "sm_90", stats=True)]
    others += [Variant("token", "gfx942", rich=True, stats=True), Variant("finish_hidden", "sm_80")]
    return [*fused, *others, Variant("finish_weight", "sm_100"), Variant("gather", "sm_80")]


def small_routed_set() -> list[Variant]:
    """The same for routed gradients: the logits' product everywhere, each of the others on one architecture at least."""
    chosen = [Variant("routed_gradient", arch, rich=True) for arch in ARCHS]
    chosen += [Variant("routed_weight", arch, rich=True) for arch in ("sm_90", "gfx942")]
    chosen += [Variant("routed_hidden", arch) for arch in ("sm_80", "sm_90")]
    chosen += [Variant("rest_weight", "sm_90"), Variant("rest_hidden", "gfx942"), Variant("rest_hidden", "sm_90")]
    chosen += [
        Variant("block_sums", "sm_90", rich=True),
        Variant("block_mean", "sm_80"),
        Variant("block_mass", "sm_100"),
    ]
    return [*chosen, Variant("route", "sm_90"), Variant("list", "gfx942"), Variant("finish_weight", "sm_90", rich=True)]


def small_kl_set() -> list[Variant]:
    """The same for `linear_kl`: both fused kernels everywhere, each direction and each of the others on one architecture at least."""
    chosen = [Variant("linear_kl_forward", arch, rich=True, direction="forward", logprobs=True) for arch in ARCHS]
    chosen += [
        Variant("linear_kl_backward", arch, rich=True, direction="jsd", logprobs=True, parts=2) for arch in ARCHS
    ]
    chosen += [Variant("linear_kl_forward", "sm_90", rich=True, direction="jsd", mixture=True)]
    chosen += [Variant("linear_kl_forward", "sm_90"), Variant("linear_kl_backward", "sm_90")]
    chosen += [Variant("kl_fold_logits", "sm_90", rich=True, direction="forward", logprobs=True)]
    chosen += [Variant("kl_fold_logits", "gfx942", direction="jsd", mixture=True)]
    chosen += [Variant("kl_gradient_logits", "sm_90", rich=True, direction="jsd", logprobs=True, parts=2)]
    chosen += [
        Variant("kl_combine", "sm_90", direction="forward", logprobs=True),
        Variant("kl_combine_mixture", "sm_80", direction="jsd"),
    ]
    return chosen


def full_set() -> list[Variant]:
    sizes = ((True, True), (False, True), (False, False))
    flags = [(rich, stats, *size) for rich in (False, True) for stats in (False, True) for size in sizes]
    fused = [
        Variant(kernel, arch, dtype, *flag)
        for arch in (*ARCHS, "sm_86")
        for kernel in ("linear_logprob_forward", "linear_logprob_backward")
        for dtype in _DTYPES
        for flag in flags
    ]
    others = [
        Variant(kernel, arch, dtype, rich, stats)
        for arch in (*ARCHS, "sm_86")
        for kernel in ("fold_logits", "gradient_logits", "combine", "token", "finish_hidden", "finish_weight", "gather")
        for dtype in _DTYPES
        for rich, stats in ((False, False), (True, True))
    ]
    heads = [v for arch in (*ARCHS, "sm_86") for v in _full_kl(arch)]
    return fused + others + heads + [v for arch in (*ARCHS, "sm_86") for v in _full_routed(arch)]


def _full_routed(arch: str) -> list[Variant]:
    products = [
        Variant(kernel, arch, dtype, rich, block=block)
        for kernel in aot_routed.PRODUCTS
        for dtype in aot_routed.DTYPES
        for rich in (False, True)
        for block in BLOCKS
    ]
    rest = [
        Variant(kernel, arch, dtype, rich)
        for kernel in ("rest_weight", "rest_hidden")
        for dtype in aot_routed.DTYPES
        for rich in (False, True)
    ]
    means = [Variant("block_mean", arch, dtype, block=block) for dtype in aot_routed.DTYPES for block in BLOCKS]
    sums = [Variant("block_sums", arch, rich=rich, block=block) for rich in (False, True) for block in BLOCKS]
    masses = [Variant("block_mass", arch, block=block) for block in BLOCKS]
    return [*products, *rest, *means, *sums, *masses, Variant("route", arch), Variant("list", arch)]


def _full_kl(arch: str) -> list[Variant]:
    chosen = [
        Variant("kl_combine", arch, direction=direction, logprobs=on)
        for direction in DIRECTIONS
        for on in (False, True)
    ]
    chosen += [Variant("kl_combine_mixture", arch, direction="jsd")]
    for kernel in (*aot_kl.PRODUCTS, "kl_fold_logits", "kl_gradient_logits"):
        passes = [(direction, False) for direction in DIRECTIONS]
        passes += [("jsd", True)] if kernel in ("linear_kl_forward", "kl_fold_logits") else []
        sizes = ((True, True), (False, True), (False, False)) if kernel in aot_kl.PRODUCTS else ((True, True),)
        chosen += [
            Variant(kernel, arch, dtype, rich, False, even, aligned, 128, direction, mixture, logprobs, parts)
            for dtype in _DTYPES
            for rich in (False, True)
            for even, aligned in sizes
            for direction, mixture in passes
            for logprobs in (False, True)
            for parts in ((1, 2) if kernel in ("linear_kl_backward", "kl_gradient_logits") else (1,))
            if not (mixture and logprobs)
        ]
    return chosen
