"""C++ kernels for matrix products and for the rows of what they make: logits exist one tile at a time.

A product sums each of its elements in one order, so a token's log-prob does not depend on its neighbours. In the backward every token's
coefficient is scaled by a power of two into [1, 2) and unscaled in the sums: tiny coefficients meet no denormal number.
N tokens, D hidden size, V vocabulary.
"""

from isdaa_kernels.backends.cpu import extension
from isdaa_kernels.backends.cpu.backward import backward
from isdaa_kernels.backends.cpu.forward import forward
from isdaa_kernels.backends.cpu.logits import backward_logits, forward_logits
from isdaa_kernels.backends.cpu.plan import make_plan
from isdaa_kernels.dispatch import Problem

__all__ = ["backward", "backward_logits", "describe", "forward", "forward_logits", "make_plan", "refusal"]


def refusal(problem: Problem) -> str | None:
    if problem.device_type != "cpu":
        return f"takes tensors on the CPU, not on {problem.device_type}"
    if extension.native is None:
        return f"the compiled part is missing ({extension.missing}); reinstall isdaa-kernels where a C++17 compiler is"
    return None


def describe() -> str:
    if extension.native is None:
        return f"not built: {extension.missing}"
    return f"C++ row kernels for {extension.native.instruction_set()}, products over panels"
