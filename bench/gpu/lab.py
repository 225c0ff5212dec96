"""Problems, units and truths of a run on one device, each made once and kept while the rows need them.

N tokens, D hidden size, V vocabulary, S sequences.
"""

from collections import OrderedDict
from dataclasses import replace

import torch
from torch import Tensor

from bench import gate, grpo_work, linear_kl
from bench.contenders import DIVERGENCES, Contender, Outcome, make_run
from bench.gpu.accelerator import release
from bench.gpu.settings import Settings, Shape
from bench.gpu.sharp import (
    SharpStates,
    disturb,
    find_lift,
    make_random_states,
    make_sharp_states,
    make_upstream,
    make_weight,
)
from bench.gpu.tasks import FROZEN_HEAD, FULL, Task
from bench.gpu.two_heads import STEPS
from bench.problem import Problem
from bench.timing import Unit
from isdaa_kernels.testing import relative_error

KINDS = ("sharp", "random")
UNIT_BYTES = 8 << 30  # the unit's output at most
UNIT_ROWS = 1 << 14  # what it is cut into beyond that
DTYPE = torch.bfloat16
COMPLETIONS = 8  # of a GRPO step
DRIFT = 0.5  # standard deviation of the reference's logits about the policy's: divergences near 0.1
_TRUTHS = 4
_TRUTH_CHUNK = 256  # tokens at once, in fp64


class Lab:
    def __init__(self, settings: Settings) -> None:
        self.settings, self.device = settings, torch.device(settings.device)
        self._head: tuple[tuple, Tensor, float] | None = None
        self._problem: tuple[Shape, Problem, SharpStates] | None = None
        self._work: tuple[Shape, Problem] | None = None
        self._unit: tuple[Shape, Unit] | None = None
        self._truths: OrderedDict[tuple, Outcome] = OrderedDict()
        self._losses: dict[tuple, dict[str, Tensor]] = {}
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
            self._head = self._problem = self._work = self._unit = None
            self._truths.clear()
            release(self.device)
            weight_VD = make_weight(shape.V, shape.D, DTYPE, self.device, self.settings.seed)
            if key not in self._lifts:
                self._lifts[key] = find_lift(weight_VD, self.settings.seed)
            self._head = (key, weight_VD, self._lifts[key])
        return self._head[1:]

    def problem(self, task: Task, objective: str | None = None) -> Problem:
        """A GRPO step's is one of completions, with the numbers that the step is given."""
        problem = self._plain(task.shape)
        if objective in STEPS:
            if self._work is None or self._work[0] != task.shape:
                self._work = (task.shape, self._complete(problem))
            problem = self._work[1]
        return replace(problem, frozen_head=task.case == FROZEN_HEAD)

    def _plain(self, shape: Shape) -> Problem:
        weight_VD, lift = self.head(shape)
        if self._problem is None or self._problem[0] != shape:
            self._problem = self._work = self._unit = None
            release(self.device)
            states = make_sharp_states(weight_VD, shape.N, self.settings.seed, lift)
            self._problem = (shape, self._assemble(shape, states.hidden_ND, weight_VD, states.targets_N), states)
        return self._problem[1]

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

    def small(self, task: Task, kind: str, objective: str | None = None) -> Problem:
        """What the gate judges: the first tokens of the problem, or as many random ones, under the whole vocabulary."""
        whole = self.problem(task, objective)
        length = min(self.settings.gate_tokens, whole.tokens) // whole.sequences
        if kind == "sharp":
            return whole.shorter(length)
        hidden_ND, targets_N = make_random_states(whole.weight_VD, whole.sequences * length, self.settings.seed)
        plain = self._plain(task.shape)
        shape = task.shape._replace(N=len(targets_N))
        found = self._assemble(shape, hidden_ND, plain.weight_VD, targets_N, plain.sequences)
        found = self._complete(found) if objective in STEPS else found
        return replace(found, frozen_head=whole.frozen_head)

    def truth(self, task: Task, kind: str, objective: str | None) -> Outcome:
        """Rounded to fp32, to leave room; the last few are kept. A frozen head changes which gradients are wanted, not what they are."""
        small = self.small(task, kind, objective)
        own = (
            None if objective in (None, "sum") else task.shape
        )  # log-probs of the first tokens are those of any number of tokens
        key = (small.tokens, small.sequences, kind, objective, own)
        if key not in self._truths:
            while len(self._truths) >= _TRUTHS:
                self._truths.popitem(last=False)
            exact = _truth(small, objective)
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
            small = self.small(task, kind, contender.objective)
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
        true, bar = self.whole_truth(task, contender), gate.bar_of(contender, self.problem(task))
        compared = {name: (parts[name], part) for name, part in true.items() if parts[name] is not None}
        found = {
            name: relative_error(part[: len(t)] if part.dim() else part, t) for name, (part, t) in compared.items()
        }
        wrong = [f"{name} off by {error:.1e}" for name, error in found.items() if not error <= bar]
        where = "whole problem, as far as it was compared"
        return found, f"{contender.name}: {where}: {', '.join(wrong)} (bar {bar:.0e})" if wrong else None

    def whole_truth(self, task: Task, contender: Contender) -> dict[str, Tensor]:
        """The value, but of a sum, and d_hidden of the first tokens: other tokens touch them through a loss of all alone."""
        objective = contender.objective
        if contender.gives_tokens or objective == "sum":
            true = self.truth(task, "sharp", objective)
            return ({"value": true.value} if contender.gives_tokens else {}) | {"d_hidden": true.d_hidden_ND}
        key = (task.shape, objective)
        if key not in self._losses:
            self._losses[key] = (self._step_truth if objective in STEPS else self._pair_truth)(task, objective)
        return self._losses[key]

    def _step_truth(self, task: Task, objective: str) -> dict[str, Tensor]:
        first = self.small(task, "sharp").tokens
        true = grpo_work.truth(self.problem(task, objective), STEPS[objective], first)
        return {"value": true.value, "d_hidden": true.d_hidden_ND.float()}

    def _pair_truth(self, task: Task, objective: str) -> dict[str, Tensor]:
        whole = self.problem(task)
        loss, upstream_N = gate.true_value(whole, whole.weight_VD.double(), objective, _TRUTH_CHUNK)
        first = replace(self.small(task, "sharp"), frozen_head=True)
        first = replace(first, upstream_N=upstream_N[: first.tokens])
        return {"value": loss, "d_hidden": gate.truth(first, None, _TRUTH_CHUNK).d_hidden_ND.float()}

    def _assemble(
        self, shape: Shape, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, sequences: int | None = None
    ) -> Problem:
        """The reference's states are a little off: those of a preference pair so that the log-ratio of a sequence is about 1."""
        sequences = sequences or (2 if shape == self.settings.problem_set.pair else 1)
        upstream_N = make_upstream(shape.N, self.device, self.settings.seed)
        reference_ND = disturb(hidden_ND, (2 / shape.N) ** 0.5 if sequences == 2 else DRIFT, self.settings.seed)
        return Problem(hidden_ND, weight_VD, targets_N, upstream_N, reference_ND, sequences)

    def _complete(self, problem: Problem) -> Problem:
        """The same tokens as COMPLETIONS of equal length, with what a GRPO step is given beside them. The advantages have both signs and
        no mean near 0: a loss near 0 would make much of little errors."""
        work = grpo_work.add_numbers(replace(problem, sequences=COMPLETIONS), self.settings.seed)
        return replace(work, advantages_S=torch.linspace(-1, 2, COMPLETIONS, device=self.device))


def _truth(problem: Problem, objective: str | None) -> Outcome:
    if objective in DIVERGENCES:
        return linear_kl.truth(problem, DIVERGENCES[objective])
    if objective in STEPS:
        return grpo_work.truth(problem, STEPS[objective])
    return gate.truth(problem, objective, _TRUTH_CHUNK)
