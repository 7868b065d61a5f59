"""The mechanism of patching: what a patch is, how it is applied, guarded and undone. Knows nothing of any host.

Rules, each with a test (tests/patches/test_engine.py):

* Modules are never replaced, renamed or given an instance `forward`: their `__class__` is swapped for a subclass that
  keeps `__name__`, `__qualname__` and `__module__`. Checkpointing, output recorders and FSDP wrap policies, which look
  at classes and their names, see no difference. Pickles and copies of such a module are of the stock class.
* Every replacement of a computation asks `is_live()` first, so that it is stock again the moment patches are switched
  off, even where a reference to it was captured (autocast wrappers, FSDP classes).
* A patch restores only what is provably still its own.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad


class Exactness(str, Enum):
    """What a patch promises about its numbers; see the table in the README."""

    EXACT = "exact"
    REASSOCIATED = "re-associated"
    REDRAWN = "re-drawn"
    APPROXIMATE = "approximate"


class _Switch:
    """Whether replacements act. One per process: counts nested activations (enable(), a callback's train())."""

    def __init__(self) -> None:
        self.depth = 0


_SWITCH = _Switch()


def is_live() -> bool:
    """Whether replacements act at present; each asks before anything else.

    Not in transforms of torch.func, nor in forward-mode AD, which cannot see through autograd functions of ours; where
    torch.compile traces, which cannot see through the question, it is not asked.
    """
    return _SWITCH.depth > 0 and (
        torch.compiler.is_compiling()
        or not (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)
    )


def switch(on: bool) -> None:
    """Nests: replacements act while `switch(True)` has been called more often than `switch(False)`."""
    _SWITCH.depth += 1 if on else -1


class Patch(ABC):
    """One change to one object that is not ours."""

    id: str

    @abstractmethod
    def apply(self) -> None: ...

    @abstractmethod
    def revert(self) -> bool:
        """Restores what `apply` changed. False where the object was changed again since and is left as it is."""


class AttributePatch(Patch):
    """Replaces an attribute of a class, module or other object, or an entry of a dict (a function's globals)."""

    def __init__(self, id: str, owner: Any, name: str, replacement: Any):
        self.id, self._owner, self._name, self._replacement = id, owner, name, replacement
        self._original: Any = None

    def apply(self) -> None:
        self._original = self._get()
        self._set(self._replacement)

    def revert(self) -> bool:
        if self._get() is not self._replacement:
            return False
        self._set(self._original)
        return True

    def _get(self) -> Any:
        # Not getattr: on a class it would unwrap static methods and find inherited attributes.
        return (self._owner if isinstance(self._owner, dict) else vars(self._owner))[self._name]

    def _set(self, value: Any) -> None:
        if isinstance(self._owner, dict):
            self._owner[self._name] = value
        else:
            setattr(self._owner, self._name, value)


class ProcessPatch(AttributePatch):
    """A replacement for the whole process, there as long as any activation wants it."""

    def __init__(self, id: str, owner: Any, name: str, replacement: Any):
        super().__init__(id, owner, name, replacement)
        self._original, self._users = self._get(), 0
        look_like(replacement, self._original)

    def can_apply(self) -> bool:
        """Whether nobody else has replaced the attribute since."""
        return self._get() in (self._replacement, self._original)

    def apply(self) -> None:
        self._users += 1
        self._set(self._replacement)

    def revert(self) -> bool:
        self._users -= 1
        return self._users > 0 or super().revert()


class ClassSwap(Patch):
    """Swaps the class of a module, or of another object, for one made by `same_name_subclass`.

    Swaps of one module stack, and are reverted in any order.
    """

    def __init__(self, id: str, module: Any, subclass: type):
        # A weak reference: a patch must not keep a model alive that its user has dropped.
        self.id, self._module, self._subclass = id, weakref.ref(module), subclass

    def apply(self) -> None:
        module = self._module()
        if module is not None:
            ours, stock = _ours_of(type(module))
            # Over another swap that was not there when this one was made.
            is_stacked = bool(ours) and stock is _ours_of(self._subclass)[1]
            module.__class__ = _stack(stock, [*ours, _difference(self._subclass)]) if is_stacked else self._subclass

    def revert(self) -> bool:
        module = self._module()
        if module is None:
            return True
        # FSDP makes a class of its own out of ours; then the switch alone turns the replacement off.
        ours, stock = _ours_of(type(module))
        mine = _difference(self._subclass)
        if mine not in ours or stock is not _ours_of(self._subclass)[1]:
            return False
        ours.remove(mine)
        module.__class__ = _stack(stock, ours)
        return True


def once(note: Callable[[str], None]) -> Callable[..., None]:
    """`note` for what may come up in every step: `tell(text, of=text)` passes a text on if nothing was told of the same
    before.
    """
    told = set[str]()

    def tell(text: str, of: str | None = None) -> None:
        of = text if of is None else of
        if of not in told:
            told.add(of)
            note(text)

    return tell


def revert_all(patches: list[Patch]) -> list[str]:
    """Reverts in reverse order and empties the list; what is to be said of those that something else has changed."""
    notes = []
    while patches:
        patch = patches.pop()
        if not patch.revert():
            notes.append(f"{patch.id} was changed by something else since; left as it is, acting as stock")
    return notes


def look_like(replacement: Any, stock: Any) -> None:
    """Gives a replacement the name, documentation and signature of what it replaces; hosts read signatures.

    Not functools.wraps: accelerate unwinds every `__wrapped__` and would drop the replacement.
    """
    replacement.__signature__ = inspect.signature(stock)
    for attribute in ("__name__", "__qualname__", "__doc__", "__module__"):
        setattr(replacement, attribute, getattr(stock, attribute))


def forward_of(cls: type) -> Callable[..., Any]:
    """The (unbound) forward of a module class; for a class of ours, the stock one."""
    return getattr(cls, "_hf_turbo_stock_forward", None) or cls.forward  # type: ignore[attr-defined]


MakeForward = Callable[[Callable[..., Any]], Callable[..., Any]]


def same_name_subclass(base: type, make_forward: MakeForward | None = None, **attributes: Any) -> type:
    """A subclass of `base` that differs in `forward` or in the given attributes alone; the same one for the same.

    Args:
        base: the stock class of a module, or of another object.
        make_forward: takes the stock (unbound) forward, returns the replacement, which falls back to it.
        **attributes: of the class, e.g. a property.
    """
    # Found by the stock forward, too, which a script may have replaced since: it is what replacements fall back to.
    return _subclass(base, forward_of(base) if hasattr(base, "forward") else None, make_forward, **attributes)


@functools.cache
def _subclass(
    base: type, stock: Callable[..., Any] | None, make_forward: MakeForward | None, **attributes: Any
) -> type:
    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # Pickles and copies name the stock class: ours cannot be found by name, and must not be saved. Not
        # copyreg.__newobj__, for which pickle insists on the object's own class.
        stock_base: Any = _ours_of(base)[1]
        reduced: Any = stock_base.__reduce_ex__(self, protocol)
        return (copyreg._reconstructor, (stock_base, object, None), *reduced[2:])  # type: ignore[attr-defined]

    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "_hf_turbo_stock_forward": stock,
        "_hf_turbo_difference": (make_forward, attributes),
        **attributes,
    }
    if make_forward is not None and stock is not None:
        namespace["forward"] = forward = make_forward(stock)
        look_like(forward, stock)
    subclass: type = type(base)(base.__name__, (base,), namespace)
    if make_forward is None and "forward" in vars(subclass):
        # transformers 5.23 gives every subclass of a checkpointed layer a forward of its own, and the base's then
        # checkpoints no more; but accelerate's device hooks may hold a reference to the base's.
        del subclass.forward  # type: ignore[attr-defined]
    return subclass


def is_swapped(module: nn.Module) -> bool:
    """Whether the module's class, or one that FSDP made out of it, is ours."""
    return hasattr(type(module), "_hf_turbo_stock_forward")


def stock_class(module: nn.Module) -> type:
    """The class of a module, ours looked through."""
    return _ours_of(type(module))[1]


def has_forward(module: nn.Module, make_forward: MakeForward) -> bool:
    """Whether the forward of the module, or of a class that FSDP made out of it, is one that `make_forward` made."""
    differences = (vars(cls).get("_hf_turbo_difference") for cls in type(module).__mro__)
    return any(difference is not None and difference[0] is make_forward for difference in differences)


_Difference = tuple[MakeForward | None, dict[str, Any]]


def _difference(ours: type) -> _Difference:
    """What `same_name_subclass` was given beside the base."""
    difference: _Difference = vars(ours)["_hf_turbo_difference"]
    return difference


def _ours_of(cls: type) -> tuple[list[_Difference], type]:
    """The differences, the innermost first, of the classes of ours that `cls` consists of, and the stock class."""
    differences: list[_Difference] = []
    while "_hf_turbo_difference" in vars(cls):
        differences.append(_difference(cls))
        cls = cls.__mro__[1]
    return differences[::-1], cls


def _stack(cls: type, differences: list[_Difference]) -> type:
    for make_forward, attributes in differences:
        cls = same_name_subclass(cls, make_forward, **attributes)
    return cls


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether all are ordinary tensors with data: no DTensor, no quantized subclass, no ZeRO-3 partition."""
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or hasattr(tensor, "ds_id")):
            return False
    return True


_PLAIN = (torch.Tensor, nn.Parameter)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says: hooks, an instance forward, a parametrization."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or "parametrizations" in module._modules
        or nn.modules.module._has_any_global_hook()
    )


@dataclass
class Finding:
    """What a role found in a model: the patches to apply, and why the rest stays stock.

    Attributes:
        role: norm, mlp, rope, loss: a name of the report and of a TurboConfig field.
        kernel: what runs instead.
        exactness: what the patches promise.
        found: objects of this role in the model.
        patched: how many of them the patches cover.
        patches: to apply, in order.
        reasons: why objects stay stock, with their number.
    """

    role: str
    kernel: str
    exactness: Exactness
    found: int = 0
    patched: int = 0
    patches: list[Patch] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def refuse(self, reason: str, count: int = 1) -> None:
        """Counts objects that stay stock."""
        self.reasons[reason] += count
