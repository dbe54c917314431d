"""Triton's interpreter without what it looks for again at each call of a function."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

_NAMES = ("_patch_lang", "_patch_builtin", "_patch_attr", "_LangPatchScope")


def patch_once() -> None:
    """Let the interpreter look once for what it replaces in its language.

    At each launch it looks through all of the language for the functions that it replaces, and puts
    them back after. It does so again at each call of a `@triton.jit` function, `tl.sum` and
    `tl.zeros` too, although all are replaced by then. That is half of the time of a kernel of a few
    elements.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in _NAMES):  # another Triton
        return
    inside: Any = interpreter
    patch, is_builtin = inside._patch_lang, tl.core.is_builtin

    @cache
    def builtins(package: Any) -> list[tuple[str, Any]]:
        return [(name, one) for name, one in inspect.getmembers(package) if is_builtin(one)]

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name, one in builtins(package):
            inside._patch_attr(package, name, one, builder, scope)

    @cache
    def languages(fn: Any) -> list[Any]:
        return [one for one in (tl, tl.core) if any(one is v for v in fn.__globals__.values())]

    def patch_what_is_not(fn: Any) -> Any:
        functions = [tl.core.tensor.__add__, *(one.arange for one in languages(fn))]
        return patch(fn) if any(map(is_builtin, functions)) else inside._LangPatchScope()

    inside._patch_builtin, inside._patch_lang = patch_builtin, patch_what_is_not
