"""The settings of a run: one frozen dataclass, read from a file, from flags, or from both, and checked on construction.

Every field is a key of the file, a flag of the command line and an attribute, all under one name. A file may be flat or
group its keys in the tables named in `SECTIONS`; a flag overrides the file.
"""

import argparse
import dataclasses
import difflib
import importlib.util
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal

from isdaa_kernels import OBJECTIVES, BatchState, ImportanceWeight, Routed

SECTIONS = ("model", "data", "objective", "optimizer", "run")

# Objectives of pairs that need nothing but log-probs, lengths and what the data may have: log-probs of the policy that wrote them.
TRAINABLE = tuple(
    sorted(
        name
        for name, objective in OBJECTIVES.items()
        if objective.kind == "pair"
        and objective.token_weight is None
        and objective.needs <= {"reference", "lengths"}
        and (objective.importance is None or isinstance(objective.importance, ImportanceWeight))
    )
)

# What may differ between a run and its resumption: how often something is written, and where; never what is computed.
FREE_ON_RESUME = frozenset({"out", "eval_every", "save_every", "keep_checkpoints"})


def setting(
    section: str, help: str, default: Any = dataclasses.MISSING, choices: tuple[str, ...] = (), **bounds: float
) -> Any:
    """A field of `Config`; `bounds` are `above`, `at_least`, `below`, `at_most`."""
    metadata = {"section": section, "help": help, "choices": choices, "bounds": bounds}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run; a value of the wrong type or out of range raises ValueError with its name."""

    model: str = setting("model", "model to train: local folder, hub name, or path of a .gguf file")
    reference_model: str | None = setting("model", "reference policy; none: the model as it is before training", None)
    dtype: Literal["float32", "bfloat16"] = setting(
        "model", "what forward and backward compute in (weights and optimizer stay float32)", "float32"
    )
    device: str = setting("model", "torch device", "cpu")
    attention: Literal["sdpa", "eager"] = setting("model", "attention implementation of transformers", "sdpa")
    gradient_checkpointing: bool = setting("model", "recompute the layers in the backward to save memory", False)
    freeze_head: bool = setting("model", "train neither the LM head nor, where tied to it, the embedding", False)

    train_data: str = setting("data", "preference pairs: .json, .jsonl or .parquet")
    eval_data: str | None = setting("data", "held-out pairs; instead of eval_fraction or a column `split`", None)
    eval_fraction: float = setting("data", "share of train_data to hold out", 0.0, at_least=0, below=1)
    chat_template: Literal["auto", "none"] = setting(
        "data", "auto: the tokenizer's, where it has one; none: plain text", "auto"
    )
    max_prompt_length: int = setting("data", "longest prompt, in tokens", 512, at_least=1)
    max_length: int = setting("data", "longest prompt + completion, in tokens", 1024, at_least=2)
    long_prompt: Literal["error", "drop"] = setting(
        "data", "a pair whose prompt exceeds max_prompt_length; drop: counted and printed", "error"
    )
    long_completion: Literal["error", "truncate", "drop"] = setting(
        "data", "a pair that exceeds max_length; truncate, drop: counted and printed", "truncate"
    )

    objective: str = setting("objective", "preference loss", "is_dpo", TRAINABLE)
    beta: float | None = setting("objective", "scale of the margin; none: the objective's own", None, above=0)
    label_smoothing: float | None = setting(
        "objective", "assumed share of flipped labels; none: the objective's own", None
    )
    objective_options: str | None = setting(
        "objective",
        "other options of the objective and of what it keeps, as name=number,name=number; none: their own",
        None,
    )
    epsilon: float = setting("objective", "importance weight: a pair's is at most exp(2 epsilon)", 1.0)
    importance_mode: Literal["joint", "per_completion", "none"] = setting(
        "objective", "importance weight: whether epsilon caps the pair's log-ratio or each completion's", "joint"
    )
    importance_floor: float | None = setting("objective", "importance weight: lower bound of a pair's, in (0, 1]", None)
    importance_power: float = setting("objective", "importance weight: exponent of the ratio", 1.0)
    importance_length_exponent: float = setting(
        "objective", "importance weight: log-ratios are divided by tokens ** this, in [0, 1]", 0.0
    )
    importance_normalize: bool = setting("objective", "importance weight: divide by its mean over the step", False)

    lr: float = setting("optimizer", "peak learning rate of AdamW", 1e-6, above=0)
    warmup_steps: int = setting("optimizer", "steps of linear warm-up", 0, at_least=0)
    min_lr_ratio: float = setting("optimizer", "the cosine ends at this share of lr", 0.1, at_least=0, at_most=1)
    adam_beta1: float = setting("optimizer", "decay of the first moment", 0.9, at_least=0, below=1)
    adam_beta2: float = setting("optimizer", "decay of the second moment", 0.999, at_least=0, below=1)
    adam_eps: float = setting("optimizer", "added to the root of the second moment", 1e-8, above=0)
    weight_decay: float = setting("optimizer", "of matrices; biases and norms have none", 0.0, at_least=0)
    clip_grad_norm: float | None = setting("optimizer", "largest gradient norm; none: no clipping", 1.0, above=0)

    out: str = setting("run", "output folder; must be empty or not exist, unless --resume")
    epochs: int = setting("run", "passes over the pairs", 1, at_least=1)
    max_steps: int | None = setting("run", "number of steps, whatever epochs says", None, at_least=1)
    pairs_per_step: int = setting("run", "pairs of one optimizer step", 16, at_least=1)
    max_tokens_per_micro_batch: int = setting("run", "tokens packed into one forward and backward", 4096, at_least=4)
    seed: int = setting("run", "of the order of the pairs and of the held-out share", 0, at_least=0)
    eval_every: int | None = setting(
        "run", "steps between evaluations; none: before and after training", None, at_least=1
    )
    save_every: int | None = setting("run", "steps between checkpoints; none: on interruption only", None, at_least=1)
    keep_checkpoints: int = setting("run", "how many of the newest checkpoints to keep", 1, at_least=1)
    backend: str | None = setting("run", "backend of the kernels; none: the best for the device", None)
    max_workspace_mb: float | None = setting("run", "memory of the kernels, in MiB; none: their default", None, above=0)
    monitor_top_k: int | None = setting(
        "run",
        "write the mass of the K likeliest next tokens and the entropy over them, means over the scored tokens of a step; "
        "on a GPU costs a forward of the head; none: not",
        None,
        at_least=1,
        at_most=64,
    )
    gradient: Literal["exact", "routed"] = setting(
        "run", "of the head; routed: only where the probability is, with a bound on what is left out", "exact"
    )
    routed_tolerance: float | None = setting(
        "run",
        "routed: largest share of an average token's gradient to leave out in one block of the vocabulary; the average "
        "is that of the step before, so that micro-batches are routed alike however a step is cut (in the first step: "
        f"of each micro-batch); none: {Routed.tolerance}",
        None,
    )
    routed_block: int | None = setting(
        "run", f"routed: rows of a block of the vocabulary: 32, 64, 128 or 256; none: {Routed.block}", None
    )
    routed_row_share: float | None = setting(
        "run", f"routed: share of each block's own gradient that is exact in the head; none: {Routed.row_share}", None
    )
    vocab_order_every: int = setting(
        "run",
        "routed: steps after which the vocabulary is put in a new order for the policy as it is then, first before "
        "training; 0: its natural order",
        100,
        at_least=0,
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_field(field, getattr(self, field.name))
        if self.eval_data is not None and self.eval_fraction > 0:
            raise ValueError(f"eval_fraction: expected 0 beside eval_data, got {self.eval_fraction}")
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length: expected less than max_length = {self.max_length}, got {self.max_prompt_length}"
            )
        self.preference_settings()
        self.objective_state()
        self.routed()

    def preference_settings(self) -> dict[str, Any]:
        """What `preference_loss` is to compute, as its keyword arguments."""
        options = OBJECTIVES[self.objective].call_options(**self.all_options())
        return {"objective": self.objective, "importance": self.importance_weight(), **options}

    def kernel_settings(self) -> dict[str, Any]:
        """How the kernels are to compute it, as keyword arguments of `linear_logprob`."""
        return {"max_workspace_mb": self.max_workspace_mb, "backend": self.backend}

    def all_options(self) -> dict[str, float]:
        """Options of the objective, and of what it keeps, that were asked for; the others have their defaults."""
        given = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in read_options(self.objective_options).items():
            if name in given:
                raise ValueError(f"objective_options: {name} is given twice")
            given[name] = value
        return given

    def objective_state(self) -> BatchState | None:
        """What the objective keeps from step to step, as it is before the first; None where it keeps nothing."""
        objective = OBJECTIVES[self.objective]
        seed = {"seed": self.seed} if "seed" in objective.state_settings else {}
        return objective.make_state(**{**seed, **self.all_options()})

    def importance_weight(self) -> ImportanceWeight | None:
        """How an is_ objective weighs its pairs; None for the others, which refuse importance settings."""
        if OBJECTIVES[self.objective].importance_weighted:
            return ImportanceWeight(
                epsilon=self.epsilon,
                mode=self.importance_mode,
                floor=self.importance_floor,
                power=self.importance_power,
                length_exponent=self.importance_length_exponent,
                normalize=self.importance_normalize,
            )
        for field in dataclasses.fields(self):
            of_weight = field.name == "epsilon" or field.name.startswith("importance_")
            if of_weight and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name}: {self.objective} is not importance weighted; expected is_{self.objective}"
                )
        return None

    def routed(self, scale: float | None = None) -> Routed | None:
        """How the head's gradient is routed, `scale` being the size of an average token's coefficient (None: the
        kernels take that of the micro-batch); None for exact gradients, which refuse settings of routed ones."""
        if self.gradient == "exact":
            for field in dataclasses.fields(self):
                of_routed = field.name == "vocab_order_every" or field.name.startswith("routed_")
                if of_routed and getattr(self, field.name) != field.default:
                    value = getattr(self, field.name)
                    raise ValueError(f"{field.name}: expected nothing beside gradient = exact, got {value!r}")
            return None
        given = {"tolerance": self.routed_tolerance, "block": self.routed_block, "row_share": self.routed_row_share}
        try:
            return Routed(scale=scale, **{name: value for name, value in given.items() if value is not None})
        except ValueError as error:  # begins with the name of the argument
            raise ValueError(f"routed_{error}") from None


def read_options(text: str | None) -> dict[str, float]:
    """ "name=number,name=number" as a dict; ValueError for anything else."""
    options: dict[str, float] = {}
    for part in (text or "").split(",") if text else ():
        name, equals, number = (word.strip() for word in part.partition("="))
        try:
            value = int(number) if number.lstrip("+-").isdecimal() else float(number)
        except ValueError:
            value = None
        if not equals or not name or value is None:
            raise ValueError(f"objective_options: expected name=number,name=number, got {text!r}")
        if name in options:
            raise ValueError(f"objective_options: {name} is given twice")
        options[name] = value
    return options


def check_field(field: dataclasses.Field, value: Any) -> None:
    """Raises ValueError unless `value` has the type and lies within the bounds of `field`."""
    kind, optional, choices = kind_of(field)
    if value is None and optional:
        return
    if choices and value not in choices:
        raise ValueError(
            f"{field.name}: expected one of {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}"
        )
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{field.name}: expected {kind.__name__}{' or none' if optional else ''}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{field.name}: expected a finite number, got {value!r}")
    for name, bound in field.metadata["bounds"].items():
        if not BOUNDS[name](value, bound):
            raise ValueError(f"{field.name}: expected a value {name.replace('_', ' ')} {bound}, got {value!r}")


BOUNDS = {
    "above": lambda value, bound: value > bound,
    "at_least": lambda value, bound: value >= bound,
    "below": lambda value, bound: value < bound,
    "at_most": lambda value, bound: value <= bound,
}


def kind_of(field: dataclasses.Field) -> tuple[type, bool, tuple[str, ...]]:
    """(type, whether None is allowed, the values allowed if they are listed) of a field."""
    annotation = field.type
    optional = typing.get_origin(annotation) is types.UnionType
    if optional:
        annotation = next(kind for kind in typing.get_args(annotation) if kind is not types.NoneType)
    if typing.get_origin(annotation) is Literal:
        return str, optional, typing.get_args(annotation)
    return annotation, optional, field.metadata["choices"]


def nearest(name: str, valid: typing.Iterable[str]) -> str:
    """'; did you mean X?' for the nearest valid name, or nothing when none is near."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The settings in a .json or .toml file as a flat dict; ValueError for an unknown key, naming the nearest one."""
    values: dict[str, Any] = {}
    sections = {field.name: field.metadata["section"] for field in dataclasses.fields(Config)}
    for key, value in parse_file(Path(path)).items():
        section = key if isinstance(value, dict) else None
        if section is not None and section not in SECTIONS:
            raise ValueError(f"{path}: unknown section [{key}]{nearest(key, SECTIONS)}")
        for name, setting_value in (value if section else {key: value}).items():
            if sections.get(name) is None:
                raise ValueError(f"{path}: unknown key {name}{nearest(name, sections)}")
            if section and sections[name] != section:
                raise ValueError(f"{path}: key {name} belongs to [{sections[name]}], found in [{section}]")
            if name in values:
                raise ValueError(f"{path}: key {name} is given twice")
            values[name] = setting_value
    return values


def parse_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"config: no such file: {path}")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        parse: typing.Callable[[str], Any] = json.loads
    elif path.suffix == ".toml":
        parse = toml_parser(path)
    else:
        raise ValueError(f"config: expected a .json or .toml file, got {path}")
    try:
        values = parse(text)
    except ValueError as error:  # of both parsers; it names line and column
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected an object of settings, got a {type(values).__name__}")
    return values


def toml_parser(path: Path) -> typing.Callable[[str], Any]:
    for name in ("tomllib", "tomli"):  # tomllib is in the standard library from Python 3.11 on
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name).loads
    raise ValueError(
        f"{path}: reading TOML needs Python 3.11 or the package tomli; or use the same keys in a .json file"
    )


def build_parser() -> argparse.ArgumentParser:
    """The flags: one for each field, grouped by section, beside --config and --resume."""
    parser = argparse.ArgumentParser(
        prog="isdaa-train",
        description="Train a causal language model on preference pairs with IS-DAA.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help=".json or .toml file of settings; flags override it")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    groups = {section: parser.add_argument_group(section) for section in SECTIONS}
    for field in dataclasses.fields(Config):
        add_flag(groups[field.metadata["section"]], field)
    return parser


def add_flag(group: Any, field: dataclasses.Field) -> None:
    kind, optional, choices = kind_of(field)
    default = "required" if field.default is dataclasses.MISSING else f"default: {show(field.default)}"
    options: dict[str, Any] = {"help": f"{field.metadata['help']} ({default})", "default": argparse.SUPPRESS}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = flag_type(kind, optional)
        options["metavar"] = "{" + ",".join(choices) + "}" if choices else kind.__name__.upper()
    group.add_argument("--" + field.name.replace("_", "-"), dest=field.name, **options)


def show(value: Any) -> str:
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)


def flag_type(kind: type, optional: bool) -> typing.Callable[[str], Any]:
    def parse(text: str) -> Any:
        return None if optional and text.lower() == "none" else kind(text)

    parse.__name__ = kind.__name__  # argparse names it: "invalid float value: 'x'"
    return parse


def config_from_values(values: dict[str, Any]) -> Config:
    """Config from a dict; ValueError for a required setting that is missing, or whatever Config refuses."""
    for field in dataclasses.fields(Config):
        if field.default is dataclasses.MISSING and field.name not in values:
            raise ValueError(
                f"{field.name}: required; give --{field.name.replace('_', '-')} or put it in the config file"
            )
    return Config(**values)


def parse_arguments(arguments: list[str] | None = None) -> tuple[Config, bool]:
    """(Config, resume) from the command line; the file first, then the flags over it."""
    flags = vars(build_parser().parse_args(arguments))
    path, resume = flags.pop("config"), flags.pop("resume")
    return config_from_values((read_config_file(path) if path else {}) | flags), resume
