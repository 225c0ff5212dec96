"""Triton's interpreter without the work that it repeats for nothing. What it computes and what it refuses stay the same.

Three quarters of a launch's time are its own bookkeeping, so this is worth more than smaller problems:

- A call of one jitted function from another puts interpreted functions into `triton.language` anew, by a search through all of its names,
  though the launch has put them there.
- Each sum of integers is formed again in 64 bits for an overflow check whose verdict is dropped, since the interpreter's `debug` is off.
- Types and shapes are built, checked and named anew for each intermediate result, though there are a few of them.
"""

from functools import cache
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def make_fast() -> None:
    """Of this process, once."""
    if interpreter.interpreter_builder.options.debug:
        raise RuntimeError("Triton's interpreter: expected debug to be off, which makes its overflow checks void; got on")
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.InterpretedFunction.__call__ = _call
    interpreter._patch_lang = _patch_for_launch(interpreter._patch_lang)
    interpreter._get_np_dtype = _numpy_dtype_of(interpreter._get_np_dtype)
    tl.core.block_type.__init__ = _block_type_init(tl.core.block_type.__init__)
    tl.core.tensor.__init__ = _tensor_init


def _call(self, *args, **kwargs):
    """Of a jitted function by another, within a launch."""
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def _patch_for_launch(original):
    """`triton.language` and its `core`, whose names jitted functions of its library use, for as long as a launch runs."""
    names: list[tuple[object, str, object]] = []

    def _patch_lang(fn):
        if not names:
            scope = original(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
            names.extend((where, name, getattr(where, name)) for where, name, _ in scope._changes)
            return scope
        scope = interpreter._LangPatchScope()
        for change in names:
            scope.set_attr(*change)
        return scope

    return _patch_lang


def _numpy_dtype_of(original):
    known: dict[str, np.dtype] = {}

    def _get_np_dtype(type_) -> np.dtype:
        found = known.get(type_.name)
        if found is None:
            found = known[type_.name] = original(type_)
        return found

    return _get_np_dtype


def _block_type_init(original):
    known: dict[tuple, dict] = {}

    def __init__(self, element_ty, shape):
        found = known.get((element_ty.name, *shape)) if all(type(size) is int for size in shape) else None
        if found is None:
            original(self, element_ty, shape)
            found = known[(element_ty.name, *self.shape)] = self.__dict__.copy()
        self.__dict__.update(found)

    return __init__


@cache
def _shape_and_numel(shape: tuple[int, ...]) -> tuple:
    return tl.core.tuple([tl.core.constexpr(size) for size in shape]), tl.core.constexpr(int(np.prod(shape, dtype=int)))


def _tensor_init(self, handle, type):
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    self.shape, self.numel = _shape_and_numel(type.shape if type.is_block() else ())
