"""`python -m bench.integrations`: what each integration of `isdaa_kernels.integrations` changes, before and after on the same work.

The work is the head's part of one training step, forward and backward: from the hidden states of a batch to the loss, and back to the
gradients of the hidden states and of the head. It goes through the library's own entry points (TRL's fused head, Liger's modules,
`F.linear_cross_entropy`, a causal LM's forward) on a model without layers that gives the states; what a library does around that, it does
in both. Of each pair the one without us is called before, the one with us after.

S rows of T tokens, pairs with the chosen first, N = S * T, D hidden size, V vocabulary.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench import device, memory
from bench.contenders import BETA, FUSED, LIGER, TRL, Contender, Function, Outcome, make_run
from bench.integrations_report import write_report
from bench.problem import Problem, make_problem
from bench.states import ROOT, load_states
from bench.timing import Timed, Unit, measure_rounds
from isdaa_kernels.integrations import torch_nn
from isdaa_kernels.integrations.liger import LigerFusedLinearDPOLoss, LigerFusedLinearORPOLoss
from isdaa_kernels.testing import relative_error

IGNORED = -100
AGREEMENT = 1e-4  # of before and after: values and gradients, relative
DPO_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")  # what TRL's trainers ask of its head
SFT_OUTPUTS = ("log_probs", "entropy", "is_top1")


def head_model(problem: Problem):
    """A causal LM of transformers with a head of this size and no layers, which takes no memory of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    V, D = problem.weight_VD.shape
    none = {"num_hidden_layers": 0, "intermediate_size": 8, "num_attention_heads": 1, "max_position_embeddings": 8}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=D, tie_word_embeddings=False, **none))
    del model.lm_head.weight  # a tensor whose gradient is looked at takes its place
    return model.train()


def give(model, hidden_STD: Tensor, weight_VD: Tensor) -> None:
    """The states and the head of the next call."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    model.lm_head.weight = weight_VD
    model.model.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden_STD)


def trl_dpo(patched: bool) -> Callable[[Problem], Function]:
    def prepare(problem: Problem) -> Function:
        call = trl_call(problem, DPO_OUTPUTS, patched)
        rows = row_shape(problem)

        def function(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
            logps_S = call(hidden_ND.view(*rows, -1), weight_VD).log_probs.sum(1)
            with torch.no_grad():
                reference_STD = problem.reference_hidden_ND.view(*rows, -1)
                reference_S = call(reference_STD, problem.weight_VD).log_probs.sum(1)
            ratio_S = logps_S - reference_S
            return -F.logsigmoid(BETA * (ratio_S[: problem.pairs] - ratio_S[problem.pairs :])).mean()

        return function

    return prepare


def trl_sft(patched: bool) -> Callable[[Problem], Function]:
    def prepare(problem: Problem) -> Function:
        call, rows = trl_call(problem, SFT_OUTPUTS, patched), row_shape(problem)
        return lambda hidden_ND, weight_VD: call(hidden_ND.view(*rows, -1), weight_VD).loss

    return prepare


def trl_call(problem: Problem, outputs: tuple[str, ...], patched: bool) -> Callable[[Tensor, Tensor], object]:
    from trl.trainer.utils import add_fused_lm_head

    from isdaa_kernels.integrations.trl import patch_trl

    model, target_ST = head_model(problem), problem.targets_N.view(row_shape(problem))
    add_fused_lm_head(model, outputs=outputs)

    def call(hidden_STD: Tensor, weight_VD: Tensor) -> object:
        give(model, hidden_STD, weight_VD)
        with patch_trl() if patched else nullcontext():
            return model(input_ids=target_ST, shift_labels=target_ST, fused_lm_head=True)

    return call


def transformers_loss(patched: bool) -> Callable[[Problem], Function]:
    def prepare(problem: Problem) -> Function:
        from isdaa_kernels.integrations.transformers import patch_causal_lm

        model, rows = head_model(problem), row_shape(problem)
        target_ST = problem.targets_N.view(rows)
        if patched:
            give(model, problem.hidden_ND.view(*rows, -1), problem.weight_VD)
            patch_causal_lm(model, check=False)  # the gate compares

        def function(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
            give(model, hidden_ND.view(*rows, -1), weight_VD)
            return model(input_ids=target_ST, labels=target_ST, shift_labels=target_ST).loss

        return function

    return prepare


def liger_dpo(make: Callable[[], Callable[..., tuple]]) -> Callable[[Problem], Function]:
    """`make`: Liger's class, found when it is needed, or ours."""

    def prepare(problem: Problem) -> Function:
        loss, rows = make()(beta=BETA), row_shape(problem)
        target_ST, reference_STD = problem.targets_N.view(rows), problem.reference_hidden_ND.view(*rows, -1)

        def function(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
            hidden_STD = hidden_ND.view(*rows, -1)
            return loss(weight_VD, hidden_STD, target_ST, ref_input=reference_STD, ref_weight=problem.weight_VD)[0]

        return function

    return prepare


def liger_orpo(make: Callable[[], Callable[..., tuple]]) -> Callable[[Problem], Function]:
    def prepare(problem: Problem) -> Function:
        loss, rows = make()(beta=BETA), row_shape(problem)
        target_ST = problem.targets_N.view(rows)
        return lambda hidden_ND, weight_VD: loss(weight_VD, hidden_ND.view(*rows, -1), target_ST)[0]

    return prepare


def of_liger(name: str) -> Callable[[], Callable[..., tuple]]:
    def find() -> Callable[..., tuple]:
        import liger_kernel.chunked_loss

        return getattr(liger_kernel.chunked_loss, name)

    return find


def torch_loss(function: Callable[[], Callable[..., Tensor]]) -> Callable[[Problem], Function]:
    def prepare(problem: Problem) -> Function:
        loss = function()
        return lambda hidden_ND, weight_VD: loss(hidden_ND, weight_VD, problem.targets_N)

    return prepare


def row_shape(problem: Problem) -> tuple[int, int]:
    return problem.sequences, problem.length


@dataclass(frozen=True)
class Case:
    """One library's work without us and with us."""

    title: str
    integration: str
    before: Contender
    after: Contender

    def contender(self, which: str) -> Contender:
        return {"before": self.before, "after": self.after}[which]


def make_case(title: str, integration: str, needs: str, before: Callable, after: Callable) -> Case:
    contenders = (
        Contender(f"{title}, {which}", which, prepare, needs)
        for which, prepare in zip(WHICH, (before, after), strict=True)
    )
    return Case(title, integration, *contenders)


WHICH = ("before", "after")
CASES = (
    make_case("TRL DPO", "patch_trl", TRL, trl_dpo(False), trl_dpo(True)),
    make_case("TRL SFT", "patch_trl", TRL, trl_sft(False), trl_sft(True)),
    make_case(
        "transformers causal LM",
        "patch_causal_lm",
        "transformers:LlamaForCausalLM",
        transformers_loss(False),
        transformers_loss(True),
    ),
    make_case(
        "Liger DPO",
        "integrations.liger",
        LIGER,
        liger_dpo(of_liger("LigerFusedLinearDPOLoss")),
        liger_dpo(lambda: LigerFusedLinearDPOLoss),
    ),
    make_case(
        "Liger ORPO",
        "integrations.liger",
        LIGER,
        liger_orpo(of_liger("LigerFusedLinearORPOLoss")),
        liger_orpo(lambda: LigerFusedLinearORPOLoss),
    ),
    make_case(
        "torch linear_cross_entropy",
        "integrations.torch_nn",
        FUSED,
        torch_loss(lambda: F.linear_cross_entropy),
        torch_loss(lambda: torch_nn.linear_cross_entropy),
    ),
)
BY_TITLE = {case.title: case for case in CASES}


@dataclass(frozen=True)
class Settings:
    states: str = "smollm2"
    tokens: int = 2080
    prompts: tuple[float, ...] = (0.0, 0.5)
    repeats: int = 5
    limit_seconds: float = 60.0  # of one call over all its repeats
    memory: bool = True


@dataclass(frozen=True)
class Job:
    """One call in a process of its own."""

    title: str
    which: str
    states: str
    tokens: int
    prompt: float
    threads: int


def load_problem(states: str, tokens: int, prompt: float) -> Problem:
    """The first `prompt` share of each row has no target."""
    problem = make_problem(load_states(states, tokens))
    target_ST = problem.targets_N.view(row_shape(problem)).clone()
    target_ST[:, : int(prompt * problem.length)] = IGNORED
    return replace(problem, targets_N=target_ST.flatten())


def run_suite(settings: Settings, cases: Sequence[Case]) -> dict[str, object]:
    results: dict[str, object] = {
        "device": device.describe_device(),
        "versions": device.describe_versions(),
        "date": device.now(),
        "commit": device.describe_commit(),
        "settings": asdict(settings),
        "missing": {case.title: reason for case in cases if (reason := case.before.missing())},
        "rows": [],
    }
    jobs = [(case, prompt) for case in cases if case.title not in results["missing"] for prompt in settings.prompts]
    for case, prompt in tqdm(jobs, unit="case"):
        results["rows"].append(measure_case(settings, case, prompt))
    states = load_states(settings.states, settings.tokens)
    V, D = states.weight_VD.shape
    results["states"] = {"source": states.source, "vocabulary": V, "hidden_size": D}
    return results


def measure_case(settings: Settings, case: Case, prompt: float) -> dict[str, object]:
    """A row of the report: how far before and after are apart, and of each the time and the peak."""
    problem = load_problem(settings.states, settings.tokens, prompt)
    runs = {which: make_run(case.contender(which), problem, "full") for which in WHICH}
    row: dict[str, object] = {
        "case": case.title,
        "integration": case.integration,
        "prompt": prompt,
        "tokens": problem.tokens,
        "rows": problem.sequences,
        "scored": int((problem.targets_N != IGNORED).sum()),
        "red": None,
        "apart": {},
    }
    try:
        row["apart"] = apart(runs["before"](), runs["after"]())  # and both are warm
    except Exception as error:  # whatever a library dies of must not cost the others their figures
        return {**row, "red": f"{type(error).__name__}: {error}"}
    worst = max(row["apart"].values())
    if not worst < AGREEMENT:
        return {**row, "red": f"before and after differ by {worst:.1e}, expected below {AGREEMENT:.0e}"}
    unit = Unit(problem.hidden_ND, problem.weight_VD)
    timed = {which: Timed(run, unit) for which, run in runs.items()}
    for _ in measure_rounds(list(timed.values()), settings.repeats, settings.limit_seconds):
        pass
    for which, item in timed.items():
        row[which] = item.figures()
        if settings.memory:
            row[which] |= extra_bytes(settings, case, which, prompt)
    return row


def apart(before: Outcome, after: Outcome) -> dict[str, float]:
    """Relative differences of the two, of values and gradients."""
    names = ("value", "d_hidden", "d_weight")
    return {name: relative_error(mine, theirs) for name, mine, theirs in zip(names, after, before, strict=True)}


def extra_bytes(settings: Settings, case: Case, which: str, prompt: float) -> dict[str, object]:
    job = Job(case.title, which, settings.states, settings.tokens, prompt, torch.get_num_threads())
    try:
        extra = memory.bytes_of_process("bench.integrations", "--job", json.dumps(asdict(job)), timeout=600)
    except RuntimeError as error:
        return {"extra_bytes": None, "memory_error": f"{case.title}, {which}: {error}"}
    return {"extra_bytes": extra}


def run_job(job: Job) -> int:
    """Extra bytes at the peak of one call, beyond inputs, output and gradients."""
    torch.set_num_threads(job.threads)
    problem = load_problem(job.states, job.tokens, job.prompt)
    contender = BY_TITLE[job.title].contender(job.which)
    few = problem.shorter(min(2 * memory.WARM_TOKENS, problem.length))
    warm = few.targets_N.view(row_shape(few)).clamp(min=0)
    make_run(contender, replace(few, targets_N=warm.flatten()), "full")()
    memory.warm_blas()
    outcome, growth = memory.peak_growth(make_run(contender, problem, "full"))
    return growth - outcome.nbytes()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.integrations", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--states", default="smollm2", help="smollm2, or random:DxV (hidden size, vocabulary)")
    parser.add_argument("--tokens", type=int, default=Settings.tokens, help="tokens of the batch, prompts included")
    parser.add_argument(
        "--prompts", type=float, nargs="+", default=Settings.prompts, help="shares of each row that have no target"
    )
    parser.add_argument("--repeats", type=int, default=Settings.repeats, help="timed runs of each call")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that one call may take over all its repeats")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    parser.add_argument("--only", default="", help="regular expression: cases whose title matches")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "integrations-latest",
        help="folder of the results",
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if options.job:
        print(run_job(Job(**json.loads(options.job))))
        return 0
    torch.set_num_threads(options.threads)
    settings = Settings(
        options.states, options.tokens, tuple(options.prompts), options.repeats, options.limit, not options.no_memory
    )
    cases = [case for case in CASES if re.search(options.only, case.title)]
    if not cases:
        print(f"--only: no case matches {options.only!r}", file=sys.stderr)
        return 2
    results = run_suite(settings, cases)
    results["command"] = ["python", "-m", "bench.integrations", *arguments]
    for path in write_report(results, options.out.resolve()):
        print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    return 1 if any(row["red"] for row in results["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
