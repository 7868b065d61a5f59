"""Runs a function once a module has been imported, without importing it: hf_turbo works in any import order."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


class _NotifyingLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, finder: ImportHooks):
        self._loader, self._finder = loader, finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its own loader: pickling, inspect and importlib.reload look at it.
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._finder.notify(module.__name__)


def _watch(module: ModuleType, finder: ImportHooks) -> None:
    """Notifies `finder` when the import system marks the module's spec as initialised."""
    spec: Any = module.__spec__
    stock: Any = type(spec)

    class ModuleSpec(stock):
        @property
        def _initializing(self) -> bool:
            return self.__dict__.get("_initializing", False)

        @_initializing.setter
        def _initializing(self, value: bool) -> None:
            self.__dict__["_initializing"] = value
            if not value:
                self.__class__ = stock
                if sys.modules.get(module.__name__) is module:
                    finder.notify(module.__name__)

    spec.__class__ = ModuleSpec


class ImportHooks(importlib.abc.MetaPathFinder):
    """A meta-path finder that finds nothing itself: it lets the others find and watches the modules asked for."""

    def __init__(self) -> None:
        self._callbacks: dict[str, list[Callable[[], None]]] = {}

    def when_imported(self, name: str, callback: Callable[[], None]) -> None:
        """Calls `callback` now if module `name` is imported, otherwise right after it has been."""
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            callback()
            return
        self._callbacks.setdefault(name, []).append(callback)
        if module is not None:
            # In the middle of its import, which is where `import torch` runs entry points when a script begins with
            # `from transformers import Trainer`: no finder is asked again, but the spec is told of the end.
            _watch(module, self)
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def clear(self) -> None:
        """Forgets all callbacks and leaves `sys.meta_path`."""
        self._callbacks.clear()
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def notify(self, name: str) -> None:
        for callback in self._callbacks.pop(name, []):
            callback()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._callbacks:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _NotifyingLoader(spec.loader, self)
                return spec
        return None
