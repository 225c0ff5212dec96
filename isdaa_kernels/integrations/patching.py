"""Attributes of another library replaced and put back, and the versions of it that this was tested with."""

from importlib.metadata import version
from types import TracebackType
from weakref import WeakValueDictionary

# (id of the owner, attribute) -> the owner, as long as it lives
_IN_PLACE: WeakValueDictionary[tuple[int, str], object] = WeakValueDictionary()


class Patch:
    """Puts `value` in place of `owner.attribute` for each (owner, attribute, value); `undo()` puts back what was there.

    Applied on construction, all of it or nothing; `with Patch(...):` undoes it at the end of the block. Owners are modules, classes or
    objects that can be referred to weakly. Raises ValueError for an attribute that a patch holds already, AttributeError for one that is
    not there.
    """

    def __init__(self, *replacements: tuple[object, str, object]) -> None:
        keys = [(id(owner), attribute) for owner, attribute, _ in replacements]
        for (owner, attribute, _), key in zip(replacements, keys, strict=True):
            if key in _IN_PLACE or keys.count(key) > 1:
                raise ValueError(f"{_name(owner)}.{attribute}: patched already; undo that first")
            getattr(owner, attribute)
        # what an object inherits is not its own: there `undo` deletes
        self._before = [
            (owner, attribute, vars(owner).get(attribute, _MISSING)) for owner, attribute, _ in replacements
        ]
        for (owner, attribute, value), key in zip(replacements, keys, strict=True):
            setattr(owner, attribute, value)
            _IN_PLACE[key] = owner

    def undo(self) -> None:
        """Puts back what was there before; a second call does nothing."""
        while self._before:
            owner, attribute, value = self._before.pop()
            if value is _MISSING:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, value)
            _IN_PLACE.pop((id(owner), attribute), None)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


def check_version(package: str, tested: tuple[str, ...], any_version: bool = False) -> None:
    """ImportError unless the installed version of `package` is one of `tested`, or `any_version`; also where it is not installed."""
    found = version(package)
    if found not in tested and not any_version:
        raise ImportError(
            f"{package}: expected version {' or '.join(tested)}, got {found}; pass any_version=True to try it all the same"
        )


def _name(owner: object) -> str:
    return getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None) or type(owner).__name__


_MISSING = object()
