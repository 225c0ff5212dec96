"""TRL's DPOTrainer with the pairwise objectives of this package; the rest is TRL's: data, reference, metrics, callbacks, PEFT, checkpoints.

Letters: S completions of a micro-batch, all chosen ones first, T tokens of a padded row after its first, R processes, M metrics.
"""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import DPOConfig, DPOTrainer

from isdaa_kernels import OBJECTIVES, BatchState, ImportanceWeight, Objective, preference_loss, sequence_logprob
from isdaa_kernels.integrations.patching import check_version
from isdaa_kernels.integrations.trl import TESTED

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # columns of TRL
BEHAVIOUR = ("behaviour_chosen_logps", "behaviour_rejected_logps")  # columns of the data set, where it has them
STATE_FILE = "objective_state.pt"
WEIGHT = "importance_"

# Settings of DPOConfig that say what the loss is, which `objective` does here, and what to take for them.
REPLACED = {
    "loss_type": "the objective that isdaa_kernels.objective_of('trl', loss_type) names",
    "loss_weights": "an objective that has both terms",
    "ld_alpha": "preference_loss by hand: objectives that weigh tokens are not supported here",
    "f_divergence_type": "objective='dpo_forward_kl', 'dpo_js', 'dpo_alpha' or their is_ forms",
    "f_alpha_divergence_coef": "objective='dpo_alpha', whose alpha is 1 - f_alpha_divergence_coef",
    "use_weighting": "objective='wpo'",
    "discopop_tau": "objective='discopop', objective_options={'mixing_temperature': ...}",
}


@dataclass
class ISDPOConfig(DPOConfig):
    """DPOConfig, and which objective takes the place of its `loss_type`. The settings that would have no effect then raise ValueError
    unless they have their defaults: loss_type, loss_weights, ld_alpha, f_divergence_type, f_alpha_divergence_coef, use_weighting,
    discopop_tau, and the importance_ ones for an objective without such a weight.

    objective          a pairwise objective of `isdaa_kernels.OBJECTIVES`, of sequences: none that weighs tokens, imitates a third
                       completion or has opponents.
    beta, label_smoothing, objective_options
                       the objective's options, by name; None: its own defaults (not DPOConfig's).
    importance_*       fields of `ImportanceWeight`; None: the objective's own.
    any_trl_version    try a version of TRL that this was not tested with.
    """

    _VALID_DICT_FIELDS: ClassVar = [*DPOConfig._VALID_DICT_FIELDS, "objective_options"]

    objective: str = "is_dpo"
    beta: float | None = None
    label_smoothing: float | None = None
    objective_options: dict[str, Any] | str | None = None
    importance_epsilon: float | None = None
    importance_mode: str | None = None
    importance_floor: float | None = None
    importance_power: float | None = None
    importance_length_exponent: float | None = None
    importance_normalize: bool | None = None
    importance_detach: bool | None = None
    any_trl_version: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_replaced()
        self.objective_settings()
        self.objective_state()

    def check_replaced(self) -> None:
        """ValueError for a setting of DPOConfig that the objective would ignore."""
        for name, instead in REPLACED.items():
            if getattr(self, name) != _default(DPOConfig, name):
                raise ValueError(f"{name}: objective={self.objective!r} would ignore it; take {instead}")

    def objective_settings(self) -> dict[str, Any]:
        """What is to be computed, as keyword arguments of `preference_loss`."""
        objective = _check_objective(self.objective)
        options = objective.call_options(**self._options())
        return {"objective": self.objective, "importance": self._importance(objective), **options}

    def objective_state(self) -> BatchState | None:
        """What the objective keeps from batch to batch, as it is before the first; None where it keeps nothing."""
        return OBJECTIVES[self.objective].make_state(**self._options())

    def metric_beta(self) -> float:
        """By what TRL multiplies log-ratios in its `rewards/` metrics: beta, or DPOConfig's default for an objective without one."""
        default = _default(DPOConfig, "beta")
        return OBJECTIVES[self.objective].defaults.get("beta", default) if self.beta is None else self.beta

    def _options(self) -> dict[str, Any]:
        """The options of the objective and settings of its state that were asked for."""
        given = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in (self.objective_options or {}).items():
            if name in given or name == "beta":
                raise ValueError(f"objective_options: {name}: expected in the setting of that name")
            given[name] = value
        return given

    def _importance(self, objective: Objective) -> Any:
        names = [field.name for field in dataclasses.fields(ImportanceWeight)]
        fields = {name: getattr(self, WEIGHT + name) for name in names}
        given = {name: value for name, value in fields.items() if value is not None}
        if given and not isinstance(objective.importance, ImportanceWeight):
            raise ValueError(
                f"{WEIGHT}{min(given)}: {objective.name!r} has no importance weight; expected an objective such as 'is_dpo'"
            )
        return dataclasses.replace(objective.importance, **given) if given else objective.importance


class ISDPOTrainer(DPOTrainer):
    """DPOTrainer whose loss is `args.objective`, with the arguments of DPOTrainer, `args` an `ISDPOConfig`. One forward of the policy and
    one of the reference, or none where `precompute_ref_log_probs`, as in DPOTrainer; sums over a completion are made in fp64.

    The behaviour policy of an importance weight is the reference, unless the data sets have the columns behaviour_chosen_logps and
    behaviour_rejected_logps: for each pair the log-prob of either completion, summed over its tokens, under the policy that wrote it.

    Metrics are TRL's, and for each micro-batch those of `isdaa_kernels.preference_loss` whose names begin with kl/, empty_pairs/ and,
    where pairs are weighted, weight/ and log_weight/: /max is the largest over processes, /count the sum, the others means; TRL averages
    over micro-batches. The mean of `importance_normalize` is that of a micro-batch and process. What an objective keeps from batch to
    batch is saved with every checkpoint, as objective_state.pt.

    An objective without a reference pays for one all the same, for TRL's metrics. Raises ValueError for columns that the objective
    would ignore, ImportError for a version of TRL that was not tested.
    """

    _tag_names: ClassVar = [*DPOTrainer._tag_names, "is-dpo"]

    def __init__(
        self,
        model,
        ref_model=None,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        *others,
        **options,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = ISDPOConfig(f"{name.split('/')[-1]}-IS-DPO")
        if not isinstance(args, ISDPOConfig):
            raise TypeError(f"args: expected an ISDPOConfig, got {type(args).__name__}")
        check_version("trl", TESTED, args.any_trl_version, option="any_trl_version=True")
        args.check_replaced()
        settings = args.objective_settings()
        self._needs = _needs(OBJECTIVES[args.objective], settings["importance"])
        self._behaviour = BEHAVIOUR if _have_behaviour(train_dataset, eval_dataset, args.objective, self._needs) else ()
        self._name, self._paper = args.objective, {}
        args.use_weighting = "log_sum_sq_prob" in self._needs  # asks TRL's head for them
        try:
            super().__init__(model, ref_model, args, data_collator, train_dataset, eval_dataset, *others, **options)
        finally:
            self.use_weighting = args.use_weighting = False
        self.beta = args.metric_beta()
        self.objective_settings, self.objective_state = settings, args.objective_state()
        self.data_collator = _WithNumbers(self.data_collator, self._behaviour)

    def _compute_loss(self, model, inputs, return_outputs):
        behaviour_S = torch.cat([inputs[name] for name in self._behaviour]) if self._behaviour else None
        inputs = _without(inputs, BEHAVIOUR)
        inputs, reference_S = self._with_reference(inputs)
        # TRL computes its own loss and metrics from these inputs and one forward of the policy, whose outputs are kept
        recorder, precomputed = _Recorder(model), self.precompute_ref_logps
        self.precompute_ref_logps = True
        try:
            found = super()._compute_loss(recorder, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        loss = self._objective_loss(recorder.outputs, inputs, reference_S, behaviour_S)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * recorder.outputs.aux_loss
        return (loss, found[1]) if return_outputs else loss

    def _with_reference(self, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """(inputs with the reference's sums as TRL makes them for its metrics, the same in fp64 [S])."""
        if self.precompute_ref_logps:
            return inputs, torch.cat([inputs[name] for name in REFERENCE])
        recorder = _Recorder(self.model if self.ref_model is None else self.ref_model)
        sums = super().compute_ref_log_probs(recorder, inputs)
        return inputs | dict(zip(REFERENCE, sums, strict=True)), _sums(recorder.outputs.log_probs, inputs)

    def _objective_loss(
        self, outputs: Any, inputs: dict[str, Tensor], reference_S: Tensor, behaviour_S: Tensor | None
    ) -> Tensor:
        needed = {}
        if "log_sum_sq_prob" in self._needs:
            needed["log_sum_sq_prob"] = _sums(outputs.log_sum_sq_probs, inputs)
        if self.objective_state is not None:
            needed["state"] = self.objective_state.to(outputs.log_probs.device).train(self.model.training)
        loss, metrics = preference_loss(
            _sums(outputs.log_probs, inputs),
            reference_S,
            lengths=_scored(inputs).sum(1),
            behaviour=behaviour_S,
            **needed,
            **self.objective_settings,
        )
        self._log_metrics(metrics)
        return loss

    def _log_metrics(self, metrics: dict[str, Tensor]) -> None:
        groups = ("kl/", "empty_pairs/")
        if self.objective_settings["importance"] is not None:
            groups += ("weight/", "log_weight/")
        metrics = {name: value for name, value in metrics.items() if name.startswith(groups)}
        values_RM = self.accelerator.gather(torch.stack([*metrics.values()])[None])
        how = {"max": torch.amax, "count": torch.sum}
        reduced = [how.get(name.split("/")[1], torch.mean)(values_RM[:, m]) for m, name in enumerate(metrics)]
        mode = "train" if self.model.training else "eval"
        for name, value in zip(metrics, torch.stack(reduced).tolist(), strict=True):
            self._metrics[mode][name].append(value)

    def compute_ref_log_probs(self, model, inputs):
        """As TRL's, summed in fp64; for `precompute_ref_log_probs`."""
        recorder = _Recorder(model)
        super().compute_ref_log_probs(recorder, _without(inputs, BEHAVIOUR))
        return _sums(recorder.outputs.log_probs, inputs).chunk(2)

    def _prepare_inputs(self, inputs):
        # the Trainer makes 16-bit numbers of all floats where DeepSpeed trains in 16 bits: sums of log-probs would be off by units
        numbers = {name: value for name, value in inputs.items() if name in (*REFERENCE, *BEHAVIOUR)}
        inputs = super()._prepare_inputs(_without(inputs, numbers))
        return inputs | {name: value.to(self.args.device) for name, value in numbers.items()}

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *BEHAVIOUR]))

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.objective_state is not None and self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            path = os.path.join(self._get_output_dir(trial=trial), folder, STATE_FILE)
            torch.save(self.objective_state.state_dict(), path)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.objective_state is not None and checkpoint is not None:
            path = os.path.join(checkpoint, STATE_FILE)
            if not os.path.isfile(path):
                raise ValueError(
                    f"resume_from_checkpoint: {self.args.objective!r} keeps numbers, and there is no {path}"
                )
            self.objective_state.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))


class _Recorder:
    """A model that keeps what its fused LM head returned."""

    def __init__(self, model: Callable) -> None:
        self.model, self.outputs = model, None

    def __call__(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return self.model(*args, **kwargs)
        self.outputs = self.model(*args, fused_lm_head=True, **kwargs)
        return self.outputs


@dataclass(frozen=True)
class _WithNumbers:
    """A collator whose batches have the sums of log-probs of their examples besides, in fp64."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    required: tuple[str, ...]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        for name in BEHAVIOUR:
            if (name in examples[0]) != (name in self.required):
                expected = "in" if name in self.required else "not in"
                raise ValueError(
                    f"{name}: expected {expected} every data set, as with those that the trainer was made with"
                )
        names = [name for name in REFERENCE if name in examples[0]]
        numbers = {
            name: torch.tensor([float(example[name]) for example in examples], dtype=torch.float64)
            for name in (*names, *self.required)
        }
        return {**self.collator(examples), **numbers}


def _scored(inputs: dict[str, Tensor]) -> Tensor:
    """bool [S, T]: the tokens of completions, as labels of the places before them."""
    return inputs["completion_mask"][:, 1:] != 0


def _sums(value: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """fp64 [S] of numbers [S, T]; prompt-learning adapters put virtual tokens before them."""
    scored_ST = _scored(inputs)
    return sequence_logprob(value[:, -scored_ST.shape[1] :], mask=scored_ST)


def _without(inputs: dict[str, Any], names: Any) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in names}


def _default(config: type, name: str) -> Any:
    found = config.__dataclass_fields__[name]
    return found.default if found.default_factory is dataclasses.MISSING else found.default_factory()


def _needs(objective: Objective, importance: Any) -> frozenset[str]:
    return objective.needs | (frozenset() if importance is None else importance.needs)


def _check_objective(name: str) -> Objective:
    """The objective of that name, or ValueError where a batch of TRL's DPOTrainer does not hold what it needs."""
    pairwise = {
        known: objective
        for known, objective in OBJECTIVES.items()
        if objective.kind == "pair"
        and objective.token_weight is None
        and _needs(objective, objective.importance) <= {"reference", "lengths", "behaviour", "log_sum_sq_prob"}
    }
    if name not in pairwise:
        raise ValueError(f"objective: expected one of {', '.join(pairwise)}, got {name!r}")
    return pairwise[name]


def _have_behaviour(
    train: Dataset | IterableDataset | None,
    evaluation: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None,
    objective: str,
    needs: frozenset[str],
) -> bool:
    """Whether the data sets have the log-probs of the policy that wrote them; ValueError where one has, and another has not."""
    named = {"train_dataset": train}
    if isinstance(evaluation, dict):
        named |= {f"eval_dataset[{key!r}]": some for key, some in evaluation.items()}
    else:
        named["eval_dataset"] = evaluation
    found = {name: _has_behaviour(some, objective, needs) for name, some in named.items() if some is not None}
    if len(set(found.values())) > 1:
        has, has_not = (next(name for name, value in found.items() if value is which) for which in (True, False))
        raise ValueError(f"{BEHAVIOUR[0]}: expected in every data set or in none, found in {has} and not in {has_not}")
    return any(found.values())


def _has_behaviour(dataset: Dataset | IterableDataset, objective: str, needs: frozenset[str]) -> bool:
    """Whether the data set has the log-probs of the policy that wrote it; ValueError for one of the two columns, or a vain pair."""
    columns = set(next(iter(dataset), ()))
    found = [name for name in BEHAVIOUR if name in columns]
    if len(found) == 1:
        raise ValueError(f"{found[0]}: expected beside it {next(name for name in BEHAVIOUR if name not in found)}")
    if found and "behaviour" not in needs:
        raise ValueError(f"{found[0]}: {objective!r} would ignore it; remove the column, or take an is_ objective")
    return bool(found)
