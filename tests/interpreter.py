"""Lets Triton's interpreter put its own operations into triton.language once a launch.

It does so before each launch and again at every call of a jitted helper, in every program: searches
of triton.language that cost more than the helper. What it puts there is the same each time.
"""

import sys
from functools import cache
from typing import Any


def search_once_a_launch() -> None:
    """Change the interpreter of this process, if it is imported."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or hasattr(interpreter, "kdrl_searched"):
        return
    language = interpreter.tl
    search, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    searched: set[frozenset[str]] = set()

    @cache
    def modules(function: Any) -> frozenset[str]:
        """Name the modules of triton.language that a kernel or helper sees."""
        values = function.__globals__.values()
        return frozenset(
            x.__name__ for x in (language, language.core) if any(x is y for y in values)
        )

    def search_once(function: Any) -> Any:
        if modules(function) in searched:
            return None  # a helper's, which no one reads
        searched.add(modules(function))
        return search(function)

    def launch_anew(self: Any, *arguments: Any, **options: Any) -> Any:
        searched.clear()
        return launch(self, *arguments, **options)

    interpreter.kdrl_searched = searched
    interpreter._patch_lang = search_once
    interpreter.GridExecutor.__call__ = launch_anew
