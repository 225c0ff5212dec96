"""Triton's interpreter without the work that it repeats for nothing: kernels compute and refuse the same in a fraction of the time.

What it leaves out: jitted functions that others call search all names of `triton.language` for those to interpret, though the launch has
done so; sums of integers are formed again in 64 bits for an overflow check whose verdict is dropped, as the interpreter's `debug` is off;
types and shapes are built, checked and named for each intermediate result, though there are few of them; tensors of the CPU are copied to
the CPU, in a cycle of references that keeps their memory until it is collected.
"""

from functools import cache
from types import SimpleNamespace

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

VERSION = "3.9."  # whose private names these are; the interpreter of another version stays as it is


def replacements() -> list[tuple[object, str, object]]:
    """Owner, name and what to put there."""
    core, semantic = tl.core, type(interpreter.interpreter_semantic)
    return [
        (interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False)),
        (interpreter.InterpretedFunction, "__call__", _call),
        (interpreter.GridExecutor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs)),
        (interpreter.GridExecutor, "_restore_args_dev", lambda self, *args: None),
        (interpreter, "_patch_attr", _patch_attr),
        (interpreter, "_patch_lang", _patch_once(interpreter._patch_lang)),
        (interpreter, "_get_np_dtype", _remembered(interpreter._get_np_dtype)),
        (core.block_type, "__init__", _remembered_blocks(core.block_type.__init__)),
        (core.tensor, "__init__", _tensor_init),
        (core.dtype, "__eq__", _same_first(core.dtype.__eq__)),
        (core, "_unwrap_if_constexpr", _plain_first(core._unwrap_if_constexpr)),
        (semantic, "broadcast_impl_value", _same_shape_first(semantic.broadcast_impl_value)),
    ]


def make_fast() -> None:
    if not triton.__version__.startswith(VERSION):
        return
    if interpreter.interpreter_builder.options.debug:
        raise RuntimeError(
            "Triton's interpreter: expected debug to be off, without which nobody reads its overflow checks"
        )
    for owner, name, value in replacements():
        setattr(owner, name, value)


def _call(self, *args, **kwargs):
    """Of one jitted function by another."""
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def _patch_attr(owner, name, member, builder, scope):
    def interpreted(*args, **kwargs):
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return member(*args, **kwargs)

    scope.set_attr(owner, name, interpreted)


def _patch_once(original):
    """The names that a launch interprets, sought once; those of `core` too, which the language's own jitted functions use."""
    found: list[tuple[object, str, object]] = []

    def _patch_lang(fn):
        if not found:
            scope = original(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
            found.extend((owner, name, getattr(owner, name)) for owner, name, _ in scope._changes)
            return scope
        scope = interpreter._LangPatchScope()
        for change in found:
            scope.set_attr(*change)
        return scope

    return _patch_lang


def _remembered(original):
    known: dict[str, np.dtype] = {}

    def _get_np_dtype(type_) -> np.dtype:
        if type_.name not in known:
            known[type_.name] = original(type_)
        return known[type_.name]

    return _get_np_dtype


def _remembered_blocks(original):
    known: dict[tuple, dict] = {}

    def init(self, element_ty, shape):
        found = known.get((element_ty.name, *shape)) if all(type(size) is int for size in shape) else None
        if found is None:
            original(self, element_ty, shape)
            found = known[(element_ty.name, *self.shape)] = self.__dict__.copy()
        self.__dict__.update(found)

    return init


@cache
def _shape_and_numel(shape: tuple[int, ...]) -> tuple:
    return tl.core.tuple([tl.core.constexpr(size) for size in shape]), tl.core.constexpr(int(np.prod(shape, dtype=int)))


def _tensor_init(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shape_and_numel((*type.shape,) if type.is_block() else ())


def _same_first(original):
    def equal(self, other):
        return self is other or original(self, other)

    return equal


def _plain_first(original):
    plain = {bool, int, float, str, type(None), tl.core.tensor, tl.core.dtype, tl.core.block_type, tl.core.pointer_type}

    def _unwrap_if_constexpr(o):
        return o if type(o) in plain else original(o)

    return _unwrap_if_constexpr


def _same_shape_first(original):
    def broadcast_impl_value(self, lhs, rhs):
        left, right = lhs.type, rhs.type
        if left.is_block() and right.is_block() and left.shape.values == right.shape.values:
            return lhs, rhs
        return original(self, lhs, rhs)

    return broadcast_impl_value
