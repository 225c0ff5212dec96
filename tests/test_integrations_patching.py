"""A patch is applied whole, once, and leaves nothing behind."""

import gc
import warnings
import weakref

import pytest
import torch

from isdaa_kernels import Routed, VocabOrder
from isdaa_kernels.integrations import patching
from isdaa_kernels.integrations.patching import Patch, check_kernel, check_version


class Owner:
    def __init__(self, **attributes):
        vars(self).update(attributes)


def test_what_is_patched_is_freed_with_its_patch():
    owner = Owner(a=1)
    alive = weakref.ref(owner)
    patch = Patch((owner, "a", 10))
    del owner, patch
    gc.collect()
    assert alive() is None


def test_undo_puts_back_what_was_there():
    owner = Owner(a=1, b=2)
    patch = Patch((owner, "a", 10), (owner, "b", 20))
    assert (owner.a, owner.b) == (10, 20)
    patch.undo()
    patch.undo()
    assert (owner.a, owner.b) == (1, 2)
    with Patch((owner, "a", 10)):
        assert owner.a == 10
    assert owner.a == 1


def test_undo_of_an_inherited_attribute_removes_it():
    class Base:
        def greet(self):
            return "hello"

    owner = Base()
    with Patch((owner, "greet", lambda: "bye")):
        assert owner.greet() == "bye"
    assert "greet" not in vars(owner)
    assert owner.greet() == "hello"


def test_a_block_that_raises_is_undone():
    owner = Owner(a=1)
    with pytest.raises(RuntimeError, match="inside"), Patch((owner, "a", 10)):
        raise RuntimeError("inside")
    assert owner.a == 1


def test_an_attribute_is_patched_once():
    owner, other = Owner(a=1, b=2), Owner(a=3)
    with Patch((owner, "a", 10)):
        with pytest.raises(ValueError, match=r"Owner\.a: patched already"):
            Patch((owner, "b", 20), (owner, "a", 11))
        assert (owner.a, owner.b) == (10, 2)
        with Patch((other, "a", 30)):
            assert other.a == 30
    with pytest.raises(ValueError, match="patched already"):
        Patch((owner, "a", 10), (owner, "a", 11))
    with Patch((owner, "a", 10)):
        pass


def test_an_attribute_that_is_not_there():
    owner = Owner(a=1)
    with pytest.raises(AttributeError, match="missing"):
        Patch((owner, "a", 10), (owner, "missing", 0))
    assert owner.a == 1


class ReadOnly:
    fixed = property(lambda self: 3)


class NoWeakReference:
    __slots__ = ("__dict__",)


@pytest.mark.parametrize(
    ("other", "attribute", "error"), [(ReadOnly(), "fixed", AttributeError), (NoWeakReference(), "b", TypeError)]
)
def test_a_patch_that_cannot_be_applied_changes_nothing(other, attribute, error):
    owner = Owner(a=1)
    vars(other)["b"] = 2
    with pytest.raises(error):
        Patch((owner, "a", 10), (other, attribute, 20))
    assert (owner.a, other.b) == (1, 2)
    Patch((owner, "a", 10)).undo()


def test_undo_leaves_what_was_put_in_place_of_ours():
    owner = Owner(a=1, b=2, c=3)
    patch = Patch((owner, "a", 10), (owner, "b", 20), (owner, "c", 30))
    owner.b = 200
    del owner.c
    with pytest.warns(RuntimeWarning, match=r"Owner\.c, Owner\.b: changed since it was patched"):
        patch.undo()
    assert vars(owner) == {"a": 1, "b": 200}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.undo()
        with Patch((owner, "b", 20)):
            owner.b = 200  # as it was
    assert owner.b == 200


def test_undo_of_an_inherited_attribute_that_is_deleted_meanwhile():
    owner = type("Child", (Owner,), {"greet": lambda self: "hello"})()
    patch = Patch((owner, "greet", lambda: "bye"))
    del owner.greet
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.undo()
    assert owner.greet() == "hello"


def test_check_kernel():
    order = VocabOrder(torch.arange(7))
    for settings in (
        {},
        {"backend": "reference", "max_workspace_mb": 64},
        {"gradient": Routed(), "vocab_order": order},
    ):
        check_kernel(**settings)
    check_kernel(backend="cuda")  # of a device that need not be here
    for settings, name in (
        ({"gradient": "fast"}, "gradient"),
        ({"backend": "nope"}, "backend"),
        ({"max_workspace_mb": -1}, "max_workspace_mb"),
        ({"vocab_order": order}, "vocab_order"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            check_kernel(**settings)


def test_check_version(monkeypatch):
    monkeypatch.setattr(patching, "version", lambda package: {"parrot": "2.1"}[package])
    check_version("parrot", ("2.0", "2.1"))
    with pytest.raises(ImportError, match=r"parrot: expected version 2\.0 or 2\.2, got 2\.1; pass any_version=True"):
        check_version("parrot", ("2.0", "2.2"))
    check_version("parrot", ("2.0",), any_version=True)
    with pytest.raises(ImportError, match="pass newest: true to try it"):
        check_version("parrot", ("2.0",), option="newest: true")


def test_a_package_that_is_not_installed():
    with pytest.raises(ImportError, match="no-such-package-anywhere"):
        check_version("no-such-package-anywhere", ("1.0",))
