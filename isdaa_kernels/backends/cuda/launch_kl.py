"""The kernels of `linear_kl` in the CUDA kernel set: csrc/cuda/linear_kl.h on tensors. Contracts: `backends.gpu.kl_kernels`.

T tokens of a slab, C vocabulary rows of a chunk, N tokens of the call, S slots of partial results.
"""

from isdaa_kernels.backends.cuda.extension import dtype_of, launch
from isdaa_kernels.backends.gpu.kernels import LOW_SCALE
from isdaa_kernels.divergence import DIRECTIONS


class KlKernels:
    def kl_fold_logits(
        self, *, policy, reference, inverse_temperature, tokens, targets, target_logit, count, partial, first, begin, end, direction,
        jsd_weight, **heads,
    ) -> None:  # fmt: skip
        _, S, T = partial.shape
        token = {"count": count, "partial": partial, "first": first, "begin": begin, "end": end}
        if tokens is not None:
            launch(
                "linear_kl_mixture", policy.device, policy=policy, reference=reference, stride_policy=policy.stride(0),
                stride_reference=reference.stride(0), T=T, S=S, tokens=tokens, jsd_weight=jsd_weight, **token, **_heads(**heads),
            )  # fmt: skip
            return
        names = _base_and_other(direction)
        logits = dict(zip(names, (policy, reference), strict=True))
        launch(
            "linear_kl_fold", policy.device, **logits, stride_base=logits["base"].stride(0), stride_other=logits["other"].stride(0), T=T,
            S=S, inverse_temperature=inverse_temperature, targets=targets, divergence=direction != "jsd", **token,
            **_of_each("target", names, target_logit), **_heads(*names, **heads),
        )  # fmt: skip

    def kl_gradient_logits(
        self, *, policy, reference, out, low, bias_sums, targets, tokens, live, begin, end, direction, jsd_weight, **heads,
    ) -> None:  # fmt: skip
        assert low is None or low.stride() == out.stride()
        launch(
            "linear_kl_gradient", policy.device, policy=policy, reference=reference, out=out, low=low, out_dtype=out.dtype,
            low_dtype=dtype_of(low), low_factor=1 / LOW_SCALE, targets=targets, tokens=tokens, live=live, bias_sums=bias_sums,
            T=len(policy), begin=begin, end=end, stride_policy=policy.stride(0), stride_reference=reference.stride(0),
            stride_out=out.stride(0), direction=DIRECTIONS.index(direction), jsd_weight=jsd_weight, **_heads(**heads),
        )  # fmt: skip

    def kl_combine(
        self, *, partial, rows, count, targets, target_logit, value, numbers, logprob, first, direction
    ) -> None:
        (_, S, T), names = partial.shape, _base_and_other(direction)
        launch(
            "linear_kl_combine", numbers.device, partial=partial, rows=rows, count=count, targets=targets, first=first, T=T, S=S,
            N=numbers.shape[1], divergence=None if direction == "jsd" else value, numbers=numbers, policy_is_base=names[0] == "base",
            **_of_each("target", names, target_logit), **_of_each("logprob", names, logprob),
        )  # fmt: skip

    def kl_combine_mixture(self, *, partial, rows, count, value, numbers, first, jsd_weight) -> None:
        _, S, T = partial.shape
        launch(
            "linear_kl_mixture_sum", numbers.device, partial=partial, rows=rows, count=count, divergence=value, numbers=numbers,
            first=first, T=T, S=S, N=numbers.shape[1], jsd_weight=jsd_weight,
        )  # fmt: skip


def _base_and_other(direction: str) -> tuple[str, str]:
    """What policy and reference are in a divergence."""
    return ("other", "base") if direction == "forward" else ("base", "other")


def _of_each(name: str, names: tuple[str, str], both_2T) -> dict:
    return {f"{key}_{name}": None if both_2T is None else both_2T[i] for i, key in enumerate(names)}


def _heads(policy: str = "policy", reference: str = "reference", **heads) -> dict:
    """By the names that a kernel has for the two."""
    found = {}
    for side, name in (("policy", policy), ("reference", reference)):
        bias = heads[f"{side}_bias"]
        found |= {
            f"{name}_bias": bias, f"{name}_bias_dtype": dtype_of(bias), f"{name}_scale": heads[f"{side}_scale"],
            f"{name}_softcap": heads[f"{side}_softcap"] or 0.0,
        }  # fmt: skip
    return found
