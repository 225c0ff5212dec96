"""What operators share: names of statistics in a schema, what a backward keeps, the error of a second derivative."""

from torch import Tensor

from isdaa_kernels.stats import DIFFERENTIABLE, StatsRequest

SECOND = "isdaa_kernels: {} has no second derivative; detach its gradient, or use dense PyTorch where create_graph=True is needed"


def names_of(stats: str) -> tuple[str, ...]:
    return tuple(stats.split(",")) if stats else ()


def request_of(stats: str, detached: str, top_k: int) -> StatsRequest:
    """The rows named in `stats`, whose gradients the backward takes, then those named in `detached`."""
    without = names_of(detached)
    return StatsRequest((*names_of(stats), *without), top_k, without)


def no_second_derivative(ctx, *grads):
    raise RuntimeError(SECOND.format(ctx.public_name))


def save_numbers(ctx, logprob, stats, *others) -> tuple[Tensor, ...]:
    """Copies of [N] numbers, so that the caller may write to what was returned; of the statistics, the rows of `ctx.stats`."""
    names = names_of(ctx.stats)
    differentiable = any(name in DIFFERENTIABLE for name in names)
    ctx.mark_non_differentiable(*others, *(() if differentiable else (stats,)))
    ctx.set_materialize_grads(False)  # or autograd makes zeros as large as the kept logits
    return logprob.detach().clone(), stats.detach()[: len(names) if differentiable else 0].clone(), *others
