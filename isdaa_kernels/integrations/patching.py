"""Attributes of another library replaced and put back, the versions of it that this was tested with, and the settings of the kernels
that take its place."""

import warnings
from contextlib import suppress
from importlib.metadata import version
from types import TracebackType
from typing import Literal
from weakref import WeakValueDictionary

import torch

from isdaa_kernels import NoBackend, Routed, VocabOrder, linear_logprob

# (id of the owner, attribute) -> the owner, as long as it lives
_IN_PLACE: WeakValueDictionary[tuple[int, str], object] = WeakValueDictionary()


class Patch:
    """Puts `value` in place of `owner.attribute` for each (owner, attribute, value); `undo()` puts back what was there.

    Applied on construction, all of it or nothing; `with Patch(...):` undoes it at the end of the block. Owners are modules, classes or
    objects that can be referred to weakly, attributes plain ones, no properties. Raises ValueError for an attribute that a patch holds
    already, AttributeError for one that is not there, TypeError for an owner that cannot be referred to weakly.
    """

    def __init__(self, *replacements: tuple[object, str, object]) -> None:
        keys = [(id(owner), attribute) for owner, attribute, _ in replacements]
        for (owner, attribute, _), key in zip(replacements, keys, strict=True):
            if key in _IN_PLACE or keys.count(key) > 1:
                raise ValueError(f"{_name(owner)}.{attribute}: patched already; undo that first")
            getattr(owner, attribute)
        # what an object inherits is not its own: there `undo` deletes
        before = [vars(owner).get(attribute, _Missing) for owner, attribute, _ in replacements]
        self._held: list[tuple[object, str, object, object]] = []
        try:
            for (owner, attribute, value), key, was in zip(replacements, keys, before, strict=True):
                _IN_PLACE[key] = owner
                self._held.append((owner, attribute, value, was))
                setattr(owner, attribute, value)
        except BaseException:
            self._put_back()
            raise

    def undo(self) -> None:
        """Puts back what was there before; a second call does nothing.

        What others have put in place of ours meanwhile, or deleted, stays as they left it, with a RuntimeWarning that names it.
        """
        left = self._put_back()
        if left:
            warnings.warn(
                f"{', '.join(left)}: changed since it was patched; left as it is, undo in the reverse order of patching",
                RuntimeWarning,
                stacklevel=2,
            )

    def _put_back(self) -> list[str]:
        """The same; names what stays instead of warning."""
        left = []
        while self._held:
            owner, attribute, value, before = self._held.pop()
            _IN_PLACE.pop((id(owner), attribute), None)
            found = vars(owner).get(attribute, _Missing)
            if found is not value:
                left += [] if found is before else [f"{_name(owner)}.{attribute}"]
            elif before is _Missing:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, before)
        return left

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


def check_version(
    package: str, tested: tuple[str, ...], any_version: bool = False, *, option: str = "any_version=True"
) -> None:
    """ImportError unless the installed version of `package` is one of `tested`, or `any_version`, which its user says by `option`; also
    where it is not installed."""
    found = version(package)
    if found not in tested and not any_version:
        raise ImportError(
            f"{package}: expected version {' or '.join(tested)}, got {found}; pass {option} to try it all the same"
        )


def check_kernel(
    *,
    gradient: Literal["exact"] | Routed = "exact",
    vocab_order: VocabOrder | None = None,
    max_workspace_mb: float | None = None,
    backend: str | None = None,
) -> None:
    """ValueError for settings that `linear_logprob` would refuse at every call. Whether a backend runs on the device of a model, and a
    workspace is large enough for it, the first call says."""
    V, device = (1, "cpu") if vocab_order is None else (len(vocab_order.rows), vocab_order.rows.device)
    nothing = torch.empty(0, 1, device=device), torch.empty(V, 1, device=device)
    targets = torch.empty(0, dtype=torch.int64, device=device)
    settings = {"gradient": gradient, "vocab_order": vocab_order, "max_workspace_mb": max_workspace_mb}
    with suppress(NoBackend):  # one for another device
        linear_logprob(*nothing, targets, backend=backend, **settings)


def _name(owner: object) -> str:
    return getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None) or type(owner).__name__


class _Missing:
    """Stands for an attribute that is not there."""
