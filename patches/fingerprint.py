"""Recognises stock code by what it computes, not by its name.

A fingerprint is a hash of a function's normalised syntax tree: docstring, annotations and defaults dropped, parameters
and local names renumbered in order of appearance. Attribute, global and keyword names stay, since they carry the
meaning. Decorators are dropped where they are known to compute nothing. Most of the model families in transformers
share one body per role, so a few fingerprints cover them; a body that has changed, by an update or by a user, is
unknown and stays stock.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Collection
from typing import Any

# Whose wrappers leave to a forward all that it computes: checkpointing; defaults from the config, tuples; recorders.
_TRANSPARENT = {"transformers.modeling_layers", "transformers.utils.generic", "transformers.utils.output_capturing"}


class _Normalise(ast.NodeTransformer):
    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        arguments = node.args
        for argument in [
            *arguments.posonlyargs,
            *arguments.args,
            *filter(None, [arguments.vararg]),
            *arguments.kwonlyargs,
            *filter(None, [arguments.kwarg]),
        ]:
            argument.annotation = None
            argument.arg = self._rename(argument.arg)
        arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
        node.decorator_list, node.returns, node.name = [], None, "f"
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        for name in _assigned_names(node):
            self._rename(name)
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.value is None:
            return None
        return self.visit(ast.Assign(targets=[node.target], value=node.value, lineno=node.lineno))

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self._names.get(node.id, node.id)
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        node.kind = None
        return node

    def _rename(self, name: str) -> str:
        return self._names.setdefault(name, f"v{len(self._names)}")


def _serialise(value: Any) -> str:
    """Like ast.dump, but the same for every Python version: `ast.dump` and the node fields change between releases."""
    if isinstance(value, ast.AST):
        fields = ((name, getattr(value, name, None)) for name in value._fields if name not in ("ctx", "type_comment"))
        return f"{type(value).__name__}({', '.join(f'{k}={_serialise(v)}' for k, v in fields if v not in (None, []))})"
    if isinstance(value, list):
        return f"[{', '.join(map(_serialise, value))}]"
    return repr(value)


def _assigned_names(function: ast.FunctionDef) -> list[str]:
    stores = [node for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return [node.id for node in sorted(stores, key=lambda node: (node.lineno, node.col_offset))]


def unwrapped(function: Any, known: Collection[str] = _TRANSPARENT) -> Any:
    """What is under known wrappers; None where there is another one, which may compute anything.

    Args:
        known: modules that they are of.
    """
    while hasattr(function, "__wrapped__"):
        # Not `__module__`, which functools.wraps takes from what is wrapped.
        if getattr(function, "__globals__", {}).get("__name__") not in known:
            return None
        function = function.__wrapped__
    return function


def syntax_tree(function: Callable[..., Any]) -> ast.Module | None:
    """The syntax tree of the source of `unwrapped(function)`; None where there is none that is readable."""
    inner = unwrapped(function)
    if not inspect.isfunction(inner):
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inner)))
    except (OSError, TypeError, SyntaxError):
        return None


@functools.lru_cache(maxsize=4096)
def fingerprint(function: Callable[..., Any]) -> str | None:
    """First 12 hex digits of the hash of the normalised body of `unwrapped(function)`.

    None where there is no readable source: a builtin, a callable object, a body made at run time, an unknown wrapper.
    """
    tree = syntax_tree(function)
    node = None if tree is None else tree.body[0]
    if not isinstance(node, ast.FunctionDef):
        return None
    return hashlib.sha256(_serialise(_Normalise().visit(node)).encode()).hexdigest()[:12]


def class_fingerprint(cls: type, *methods: str) -> str | None:
    """Fingerprints of several methods of a class, joined with "+"; None if one is missing or unreadable."""
    parts = [fingerprint(getattr(cls, method, None)) for method in methods]
    return None if any(part is None for part in parts) else "+".join(part for part in parts if part)
