"""Axolotl on these kernels, as a plugin of its configuration:

plugins:
  - isdaa_kernels.integrations.axolotl.ISDAAPlugin
"""

from typing import Any, ClassVar, Literal

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from torch import Tensor

from isdaa_kernels import Routed
from isdaa_kernels.integrations.patching import Patch, check_kernel, check_version
from isdaa_kernels.integrations.transformers import patch_causal_lm
from isdaa_kernels.integrations.trl import make_function

TESTED = ("0.21.0",)
TESTED_TRL = ("1.14.1",)
ANY_VERSION = "isdaa_any_version: true"
# What `rl` may be: the trainers of TRL that have a fused LM head.
TRAINERS = ("dpo", "ipo", "kto")
# TRL uses its fused LM head where Liger's kernels are on; all that those would change in the model stays off.
NO_MODEL_KERNELS = dict.fromkeys(
    ("rope", "rms_norm", "layer_norm", "swiglu", "geglu", "cross_entropy", "fused_linear_cross_entropy"), False
)


class ISDAAArgs(BaseModel):
    """Keys of the configuration file.

    isdaa_kernels             false: the plugin does nothing.
    isdaa_gradient            exact, or routed: `gradient` of `linear_logprob`.
    isdaa_tolerance           of the routed gradient; none: the default of `Routed`.
    isdaa_max_workspace_mb, isdaa_backend    as in `linear_logprob`.
    isdaa_any_version         try versions of Axolotl and TRL that this was not tested with.
    """

    isdaa_kernels: bool = True
    isdaa_gradient: Literal["exact", "routed"] = "exact"
    isdaa_tolerance: float | None = None
    isdaa_max_workspace_mb: float | None = None
    isdaa_backend: str | None = None
    isdaa_any_version: bool = False


class ISDAAPlugin(BasePlugin):
    """No logits while Axolotl trains: pretraining and instruction tuning (no `rl`), and `rl: dpo`, `ipo` or `kto`.

    Without `rl` the model gets `patch_causal_lm` once it is loaded, adapters included. With it TRL's trainer is told to use its fused LM
    head (use_liger_kernel), which then is ours; the model's other kernels stay as they are unless dpo_use_liger_kernel is true in the
    configuration. Losses, references and metrics are TRL's. All of it is undone when Axolotl has unloaded the model; what a run that failed
    has left, when the next one of the process loads its own.

    Raises ImportError for versions that were not tested; ValueError for isdaa_tolerance without isdaa_gradient: routed, for settings that
    `linear_logprob` refuses and for dpo_use_liger_kernel: false; NotImplementedError for another `rl` and for reward models, which make
    their own logits.
    """

    patches: ClassVar[list[Patch]] = []  # of the process: Axolotl makes a plugin for each run

    def get_input_args(self) -> str:
        return f"{ISDAAArgs.__module__}.{ISDAAArgs.__name__}"

    def pre_model_load(self, cfg: Any) -> None:
        self.undo()  # of a run that failed; or the head, once more for the reference, which is loaded after the policy
        if not is_on(cfg):
            return
        check_version("axolotl", TESTED, bool(cfg.isdaa_any_version), option=ANY_VERSION)
        kernel = kernel_settings(cfg)
        for name in ("reward_model", "process_reward_model"):
            if getattr(cfg, name, None):
                raise NotImplementedError(f"{name}: its loss is not of log-probs; expected isdaa_kernels: false")
        if cfg.rl is None:
            return
        rl = getattr(cfg.rl, "value", cfg.rl)  # a string once the configuration is read, an enum once it is checked
        if rl not in TRAINERS:
            raise NotImplementedError(
                f"rl: expected {', '.join(TRAINERS)} or none with isdaa_kernels, got {rl!r}; its trainer makes its logits itself"
            )
        if cfg.dpo_use_liger_kernel is False:
            raise ValueError(
                "dpo_use_liger_kernel: expected true or nothing, as TRL's fused LM head is where our kernels go; got false"
            )
        check_version("trl", TESTED_TRL, bool(cfg.isdaa_any_version), option=ANY_VERSION)
        self.patches.append(patch_fused_head(kernel))

    def post_model_load(self, cfg: Any, model: Any) -> None:
        if is_on(cfg) and cfg.rl is None:
            # transformers is of the version that Axolotl asks for; the check of head and loss is what tells
            self.patches.append(patch_causal_lm(model, **kernel_settings(cfg), any_version=True))

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        if not is_on(cfg) or cfg.rl is None or cfg.dpo_use_liger_kernel:
            return None
        return {"use_liger_kernel": True, "liger_kernel_config": dict(NO_MODEL_KERNELS)}

    def post_train_unload(self, cfg: Any) -> None:
        self.undo()

    def undo(self) -> None:
        while self.patches:
            self.patches.pop().undo()


def is_on(cfg: Any) -> bool:
    return cfg.isdaa_kernels is not False


def kernel_settings(cfg: Any) -> dict[str, Any]:
    """Keyword arguments of `linear_logprob` from the configuration; ValueError for what it refuses."""
    routed = cfg.isdaa_gradient == "routed"
    if cfg.isdaa_tolerance is not None and not routed:
        raise ValueError("isdaa_tolerance: expected isdaa_gradient: routed beside it")
    tolerance = {} if cfg.isdaa_tolerance is None else {"tolerance": cfg.isdaa_tolerance}
    kernel = {"max_workspace_mb": cfg.isdaa_max_workspace_mb, "backend": cfg.isdaa_backend}
    try:
        kernel["gradient"] = Routed(**tolerance) if routed else "exact"
        check_kernel(**kernel)
    except ValueError as error:
        raise ValueError(f"isdaa_{error}") from error  # it begins with the name of the setting
    return kernel


def patch_fused_head(kernel: dict[str, Any]) -> Patch:
    """`linear_logprob` in place of the head that TRL 1.14 calls where use_liger_kernel is on: (log-probs, entropies) of labelled tokens."""
    import trl.trainer.dpo_trainer
    import trl.trainer.kto_trainer

    head = fused_head(kernel)
    return Patch(
        (trl.trainer.dpo_trainer, "_ChunkedLogProbFunction", head),
        (trl.trainer.kto_trainer, "_ChunkedLogProbFunction", head),
    )


def fused_head(kernel: dict[str, Any]) -> type:
    function = make_function(vocab_order=None, **kernel)

    class LinearLogProb:
        @staticmethod
        def apply(*arguments: Any) -> tuple[Tensor, Tensor]:
            # hidden, weight, bias, targets, temperature, chunk size, softcap, scale: those of TRL 1.16, which asks for outputs by name
            logprob, entropy, *_ = function.apply(*arguments, outputs=("entropy",))
            return logprob, entropy

    return LinearLogProb
