"""Problems, units and truths of a run on one device, each made once and kept while the rows need them.

N tokens, D hidden size, V vocabulary, S sequences.
"""

from collections import OrderedDict
from dataclasses import replace

import torch
from torch import Tensor

from bench import gate
from bench.contenders import Contender, Outcome, make_run
from bench.gpu.accelerator import release
from bench.gpu.settings import Settings, Shape
from bench.gpu.sharp import SharpStates, find_lift, make_random_states, make_sharp_states, make_upstream, make_weight
from bench.gpu.tasks import FROZEN_HEAD, FULL, Task
from bench.problem import Problem
from bench.timing import Unit
from isdaa_kernels.testing import relative_error

KINDS = ("sharp", "random")
UNIT_BYTES = 8 << 30  # the unit's output at most
UNIT_ROWS = 1 << 14  # what it is cut into beyond that
DTYPE = torch.bfloat16
_TRUTHS = 4
_TRUTH_CHUNK = 256  # tokens at once, in fp64


class Lab:
    def __init__(self, settings: Settings) -> None:
        self.settings, self.device = settings, torch.device(settings.device)
        self._head: tuple[tuple, Tensor, float] | None = None
        self._problem: tuple[Shape, Problem, SharpStates] | None = None
        self._unit: tuple[Shape, Unit] | None = None
        self._truths: OrderedDict[tuple, Outcome] = OrderedDict()
        self._pairs: dict[tuple, dict[str, Tensor]] = {}
        self._lifts: dict[tuple[int, int], float] = {}
        self._missing: dict[str, str | None] = {}
        self._verdicts: dict[tuple, tuple[dict, str | None]] = {}

    def missing(self, contender: Contender) -> str | None:
        """Why it cannot run here, found out once: an import that fails may take long each time."""
        if contender.name not in self._missing:
            self._missing[contender.name] = contender.missing()
        return self._missing[contender.name]

    def head(self, shape: Shape) -> tuple[Tensor, float]:
        """weight [V, D], and the lift of its sharp states."""
        key = shape[1:]
        if self._head is None or self._head[0] != key:
            self._head = self._problem = self._unit = None
            self._truths.clear()
            release(self.device)
            weight_VD = make_weight(shape.V, shape.D, DTYPE, self.device, self.settings.seed)
            if key not in self._lifts:
                self._lifts[key] = find_lift(weight_VD, self.settings.seed)
            self._head = (key, weight_VD, self._lifts[key])
        return self._head[1:]

    def problem(self, task: Task) -> Problem:
        weight_VD, lift = self.head(task.shape)
        if self._problem is None or self._problem[0] != task.shape:
            self._problem = self._unit = None
            release(self.device)
            states = make_sharp_states(weight_VD, task.shape.N, self.settings.seed, lift)
            self._problem = (
                task.shape,
                self._assemble(task.shape, states.hidden_ND, weight_VD, states.targets_N),
                states,
            )
        return replace(self._problem[1], frozen_head=task.case == FROZEN_HEAD)

    def describe_states(self) -> dict[str, float]:
        """Of the problem made last."""
        states = self._problem[2]
        return {"entropy": states.entropy, "target_logprob": states.target_logprob, "lift": states.lift}

    def unit(self, task: Task) -> Unit:
        if self._unit is None or self._unit[0] != task.shape:
            problem = self.problem(task)
            whole = task.shape.N * task.shape.V * DTYPE.itemsize <= UNIT_BYTES
            self._unit = (task.shape, Unit(problem.hidden_ND, problem.weight_VD, None if whole else UNIT_ROWS))
        return self._unit[1]

    def small(self, task: Task, kind: str) -> Problem:
        """What the gate judges: the first tokens of the problem, or as many random ones, under the whole vocabulary."""
        whole = self.problem(task)
        length = min(self.settings.gate_tokens, whole.tokens) // whole.sequences
        if kind == "sharp":
            return whole.shorter(length)
        hidden_ND, targets_N = make_random_states(whole.weight_VD, whole.sequences * length, self.settings.seed)
        shape = task.shape._replace(N=len(targets_N))
        return replace(
            self._assemble(shape, hidden_ND, whole.weight_VD, targets_N, whole.sequences), frozen_head=whole.frozen_head
        )

    def truth(self, task: Task, kind: str, objective: str | None) -> Outcome:
        """Rounded to fp32, to leave room; the last few are kept. A frozen head changes which gradients are wanted, not what they are."""
        small = self.small(task, kind)
        key = (small.tokens, small.sequences, kind, objective)
        if key not in self._truths:
            while len(self._truths) >= _TRUTHS:
                self._truths.popitem(last=False)
            exact = gate.truth(small, objective, _TRUTH_CHUNK)
            self._truths[key] = Outcome(*(part.float() if part.dim() == 2 else part for part in exact))
        self._truths.move_to_end(key)
        return self._truths[key]

    def judge(self, task: Task, contender: Contender) -> tuple[dict[str, dict[str, float]], str | None]:
        """The errors of forward and backward on both kinds of states, and why the gate is red, or None. Raises as the contender does."""
        key = (task.shape, task.case, contender.name)
        if key not in self._verdicts:
            self._verdicts[key] = self._judge(task, contender)
            release(self.device)
        return self._verdicts[key]

    def _judge(self, task: Task, contender: Contender) -> tuple[dict[str, dict[str, float]], str | None]:
        errors, reason = {}, None
        for kind in KINDS:
            small = self.small(task, kind)
            outcome = make_run(contender, small, FULL)()
            errors[kind] = gate.errors(outcome, self.truth(task, kind, contender.objective))
            said = gate.red(contender, small, FULL, outcome, errors[kind])
            reason = reason or (f"{said}, {kind} states" if said else None)
        return errors, reason

    def judge_whole(self, task: Task, contender: Contender, outcome: Outcome) -> tuple[dict[str, float], str | None]:
        """Of a run of the whole problem: the errors of what can be compared, and why it is red, or None. Everything must be finite,
        and the first tokens, or a pair's loss and first tokens, must agree with the truth."""
        parts = dict(zip(("value", "d_hidden", "d_weight"), outcome, strict=True))
        wild = [name for name, part in parts.items() if part is not None and not bool(part.isfinite().all())]
        if wild:
            return {}, f"{contender.name}: {', '.join(wild)} of the whole problem not finite"
        true, bar = self.whole_truth(task, contender.objective), gate.TOLERANCE[DTYPE]
        compared = {name: (parts[name], part) for name, part in true.items() if parts[name] is not None}
        found = {
            name: relative_error(part[: len(t)] if part.dim() else part, t) for name, (part, t) in compared.items()
        }
        wrong = [f"{name} off by {error:.1e}" for name, error in found.items() if not error <= bar]
        where = "whole problem, as far as it was compared"
        return found, f"{contender.name}: {where}: {', '.join(wrong)} (bar {bar:.0e})" if wrong else None

    def whole_truth(self, task: Task, objective: str | None) -> dict[str, Tensor]:
        """The value, but of a sum, and d_hidden of the first tokens: other tokens touch them through a pair's loss alone."""
        if objective is None or objective == "sum":
            true = self.truth(task, "sharp", objective)
            return ({"value": true.value} if objective is None else {}) | {"d_hidden": true.d_hidden_ND}
        key = (task.shape, objective)
        if key not in self._pairs:
            self._pairs[key] = self._pair_truth(task, objective)
        return self._pairs[key]

    def _pair_truth(self, task: Task, objective: str) -> dict[str, Tensor]:
        whole = self.problem(task)
        loss, upstream_N = gate.true_value(whole, whole.weight_VD.double(), objective, _TRUTH_CHUNK)
        first = replace(self.small(task, "sharp"), frozen_head=True)
        first = replace(first, upstream_N=upstream_N[: first.tokens])
        return {"value": loss, "d_hidden": gate.truth(first, None, _TRUTH_CHUNK).d_hidden_ND.float()}

    def _assemble(
        self, shape: Shape, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, sequences: int | None = None
    ) -> Problem:
        """One preference pair has reference states a little off; log-probs alone have none of their own."""
        sequences = sequences or (2 if shape == self.settings.problem_set.pair else 1)
        upstream_N = make_upstream(shape.N, self.device, self.settings.seed)
        reference_ND = _disturb(hidden_ND, self.settings.seed) if sequences == 2 else hidden_ND
        return Problem(hidden_ND, weight_VD, targets_N, upstream_N, reference_ND, sequences)


def _disturb(hidden_ND: Tensor, seed: int, rows: int = 4096) -> Tensor:
    """Noise that moves the log-ratio of a sequence of N / 2 tokens by about 1."""
    random = torch.Generator(hidden_ND.device).manual_seed(seed)
    out_ND, scale = torch.empty_like(hidden_ND), (2 / hidden_ND.shape[0]) ** 0.5
    for part_nD, out_nD in zip(hidden_ND.split(rows), out_ND.split(rows), strict=True):
        noise_nD = torch.randn(part_nD.shape, generator=random, device=part_nD.device)
        out_nD.copy_(part_nD + noise_nD * scale)
    return out_ND
