"""What a call for a preference loss asks for, checked before any work.

Letters: S sequences, P preference pairs, G groups of at most K completions.
"""

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from isdaa_kernels.objectives import BatchState, ImportanceWeight, Objective, Weighting, get_objective
from isdaa_kernels.objectives.objective import NEEDS, keyword_defaults
from isdaa_kernels.objectives.options import is_finite_number
from isdaa_kernels.objectives.pairwise import dpo, ipo, ipo_mean, slic
from isdaa_kernels.ops import pair_loss_backend
from isdaa_kernels.pair_loss import BASES, MODES, PairLossNumbers

# Used even by an objective that does not need them: for the metrics, to see which completions are empty, in the sums.
_ALWAYS_USED = {"reference", "lengths", "token_weight"}


@dataclass(frozen=True)
class PreferenceTerms:
    """What a call asks for, checked and in full; options that are tensors are fp64."""

    size: int  # items: pairs, completions or groups
    objective: Objective
    importance: Weighting | None
    options: dict[str, object]
    rows: Tensor | None  # [P, 2 or 3] or [G, K]
    sample_weight: Tensor | None
    denominator: float | Tensor | None
    state: BatchState | None = None

    @property
    def needs(self) -> frozenset[str]:
        return needs_of(self.objective, self.importance)

    def fused(self, device: torch.device, backend: str | None = None) -> str | None:
        """Which kernels give this loss, as `pair_loss_backend` says; None where PyTorch does."""
        base = _base_of(self.objective)
        if base is None or self.state is not None:
            return None
        if self.importance is not None and type(self.importance) is not ImportanceWeight:
            return None
        settings = [x for x in (*self.options.values(), self.denominator) if isinstance(x, Tensor)]
        if any(x.requires_grad or x.device != device for x in settings):
            return None
        return pair_loss_backend(device.type, backend)

    def by_pair(self, device: torch.device) -> Tensor | None:
        """beta, label_smoothing, sample_weight and denominator of each pair, fp64 [4, P]; None where all pairs have the same numbers."""
        weight = 1.0 if self.sample_weight is None else self.sample_weight.detach()
        denominator = max(self.size, 1) if self.denominator is None else self.denominator
        values = (self.options["beta"], self.options.get("label_smoothing", 0.0), weight, denominator)
        if not any(isinstance(value, Tensor) for value in values):
            return None
        # a number is filled in, not copied to the device, which would wait
        rows = (
            value.detach().double().reshape(-1).expand(self.size)
            if isinstance(value, Tensor)
            else torch.full((self.size,), value, dtype=torch.float64, device=device)
            for value in values
        )
        return torch.stack(list(rows))

    def numbers(self, ignore_index: int) -> PairLossNumbers:
        def number(value: float | Tensor | None) -> float:  # a tensor's are read from `by_pair`
            return 0.0 if value is None or isinstance(value, Tensor) else float(value)

        options = {name: number(self.options.get(name)) for name in ("beta", "label_smoothing")}
        options |= {"base": BASES.index(_base_of(self.objective)), "denominator": number(self.denominator)}
        options["ignore_index"] = ignore_index
        weight = self.importance
        if weight is None:
            return PairLossNumbers(**options)
        return PairLossNumbers(
            **options,
            mode=MODES.index(weight.mode),
            weighted=True,
            normalize=weight.normalize,
            detach=weight.detach,
            epsilon=float(weight.epsilon),
            floor=0.0 if weight.floor is None else float(weight.floor),
            power=float(weight.power),
            length_exponent=float(weight.length_exponent),
        )


def _base_of(objective: Objective) -> str | None:
    """The name in `BASES` of the pair loss that an objective has, with or without a weight."""
    functions = {"dpo": dpo, "ipo": ipo, "ipo_mean": ipo_mean, "slic": slic}
    return next((name for name, function in functions.items() if objective.function is function), None)


def needs_of(objective: Objective, importance: Weighting | None) -> frozenset[str]:
    """What a call must have for the objective with that weight: names of `objectives.objective.NEEDS`."""
    return objective.needs | (importance.needs if importance else frozenset())


def check_preference(
    S: int,
    device: torch.device,
    *,
    given: Set[str],
    made: Set[str] = frozenset(),
    objective: str | Objective,
    beta: float | Tensor | None = None,
    importance: Weighting | None = None,
    pairs: Tensor | None = None,
    groups: int | Tensor | None = None,
    sample_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    state: BatchState | None = None,
    **options: object,
) -> PreferenceTerms:
    """Checks what can be checked before the log-probs exist. `given`: the caller's inputs, by their names in `NEEDS`; `made`: those that
    are made for an objective that needs them."""
    objective = get_objective(objective)
    if objective.kind == "token":
        raise ValueError(
            f"objective: {objective.name!r} is a loss of tokens; expected policy_loss or linear_policy_loss for it"
        )
    importance = objective.resolve_importance(importance)
    given_options = options if beta is None else {"beta": beta, **options}
    options = objective.resolve_options(given_options)
    _check_needs(objective, importance, given, made, given_options)
    _check_state(objective, state, given_options, options)
    rows, size = _rows(objective, pairs, groups, S, device)
    _check_token_options(objective, options)
    _check_per_item(objective.kind, size, device, sample_weight=sample_weight, **options)
    check_denominator(denominator)
    options = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
    return PreferenceTerms(size, objective, importance, options, rows, sample_weight, denominator, state)


def check_sequences(S: int, device: torch.device, **tensors: Tensor | None) -> None:
    """ValueError unless each tensor that is not None is [S] (opponents [H, S]) on `device`, with a dtype of its kind."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        shape = ["H", S] if name == "opponents" else [S]
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: expected {shape}, got {tensor!r}")
        if tensor.ndim != len(shape) or tensor.shape[-1] != S or tensor.shape[0] == 0 < S:
            raise ValueError(f"{name}: expected {shape}, got {list(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected on {device}, got {tensor.device}")
        if name == "desirable" and tensor.dtype != torch.bool:
            raise ValueError(f"{name}: expected bool, got {tensor.dtype}")
        if name in ("lengths", "rewards") and (tensor.is_complex() or tensor.dtype == torch.bool):
            raise ValueError(f"{name}: expected a real dtype, got {tensor.dtype}")
        if name not in ("lengths", "desirable", "rewards") and not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")


def _check_needs(
    objective: Objective, importance: Weighting | None, given: Set[str], made: Set[str], options: Collection[str]
) -> None:
    needs = needs_of(objective, importance)
    spared = {need for option, need in objective.instead.items() if option in options}
    has = given | made | {"gold"} | ({"behaviour"} if "reference" in given else set())
    for name, meaning in NEEDS.items():
        if name in needs - spared - has:
            raise ValueError(f"{name}: expected {meaning} for {objective.name!r}, got None")
    for name in sorted(given - needs - _ALWAYS_USED):
        raise ValueError(f"{name}: {objective.name!r} would ignore it; expected None")


def _check_state(
    objective: Objective, state: BatchState | None, given_options: Collection[str], options: Mapping[str, object]
) -> None:
    if state is None:
        if objective.state_required:
            raise ValueError(f"state: expected a {objective.state.__name__} for {objective.name!r}, got None")
    elif objective.state is None:
        raise ValueError(f"state: {objective.name!r} would ignore it; expected None")
    elif not isinstance(state, objective.state):
        raise ValueError(f"state: expected a {objective.state.__name__} for {objective.name!r}, got {state!r}")
    if state is None:
        return
    for name in given_options:
        if name in state.gives:
            raise ValueError(f"{objective.name}: {name}: the state gives it; expected None")
    beta = options.get("beta")
    if "beta" not in state.gives and is_finite_number(beta) and getattr(state, "beta", beta) != beta:
        raise ValueError(f"state: expected one with the beta of the loss, {beta}, got {state.beta}")


def _check_token_options(objective: Objective, options: Mapping[str, object]) -> None:
    """Of what weighs tokens: there is no one value a pair."""
    for name in () if objective.token_weight is None else keyword_defaults(objective.token_weight):
        if isinstance(options[name], Tensor) and options[name].ndim > 0:
            raise ValueError(f"{objective.name}: {name}: expected a number, got a tensor {list(options[name].shape)}")


def _rows(
    objective: Objective, pairs: Tensor | None, groups: int | Tensor | None, S: int, device: torch.device
) -> tuple[Tensor | None, int]:
    """(rows of the items, how many items there are)."""
    for name, value, kind in (("pairs", pairs, "pair"), ("groups", groups, "group")):
        if value is not None and objective.kind != kind:
            raise ValueError(f"{name}: {objective.name!r} is a loss of a {objective.kind}; expected None")
    if objective.kind == "completion":
        return None, S
    if objective.kind == "group":
        rows = _group_rows(objective, groups, S, device)
        return rows, len(rows)
    columns = columns_of(objective)
    if pairs is not None:
        _check_rows("pairs", pairs, f"P, {columns}", S, device, least=0)
        if pairs.shape[1] != columns:
            raise ValueError(f"pairs: expected [P, {columns}] for {objective.name!r}, got {list(pairs.shape)}")
        return pairs, len(pairs)
    if S % columns:
        expected = "an even number of sequences, chosen then rejected,"
        if columns == 3:
            expected = "as many chosen, rejected and gold sequences"
        raise ValueError(f"policy: expected {expected} or pairs; got {S}")
    return None, S // columns


def columns_of(objective: Objective) -> int:
    """Completions of a pair: 3 where the loss imitates a gold one."""
    return 3 if "gold" in objective.needs else 2


def _group_rows(objective: Objective, groups: int | Tensor | None, S: int, device: torch.device) -> Tensor:
    if isinstance(groups, Tensor):
        _check_rows("groups", groups, "G, K", S, device, least=-1)
        return groups
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or S % groups:
        raise ValueError(
            f"groups: expected rows [G, K], or the size of equal groups that make up {S} sequences, for "
            f"{objective.name!r}; got {groups!r}"
        )
    return torch.arange(S, device=device).view(-1, groups)


def _check_rows(name: str, rows: Tensor, shape: str, S: int, device: torch.device, least: int) -> None:
    """ValueError unless `rows` names rows of S sequences; values are read on the CPU only, elsewhere that waits."""
    if (
        not isinstance(rows, Tensor)
        or rows.ndim != 2
        or rows.shape[1] == 0
        or rows.dtype not in (torch.int32, torch.int64)
    ):
        got = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else repr(rows)
        raise ValueError(f"{name}: expected int32 or int64 [{shape}], got {got}")
    if rows.device != device:
        raise ValueError(f"{name}: expected on {device}, got {rows.device}")
    if device.type == "cpu" and not torch.compiler.is_compiling() and ((rows < least) | (rows >= S)).any():
        raise ValueError(f"{name}: expected rows in {least}..{S - 1}, got {rows.tolist()}")


def _check_per_item(kind: str, size: int, device: torch.device, **values: object) -> None:
    for name, value in values.items():
        is_option = name != "sample_weight"
        if value is None or (is_option and not isinstance(value, Tensor)):
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor [{size}], got {value!r}")
        if value.shape != (size,) and not (is_option and value.ndim == 0):
            raise ValueError(f"{name}: expected [{size}], one value a {kind}, got {list(value.shape)}")
        if value.is_complex():
            raise ValueError(f"{name}: expected a real dtype, got {value.dtype}")
        if value.device != device:
            raise ValueError(f"{name}: expected on {device}, got {value.device}")


def check_denominator(denominator: float | Tensor | None) -> None:
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator: expected a scalar, got {list(denominator.shape)}")
    elif denominator is not None and not (is_finite_number(denominator) and denominator > 0):
        raise ValueError(f"denominator: expected a number above 0, got {denominator!r}")
