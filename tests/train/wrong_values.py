"""Replaces each value inside the JSON of a valid reply by wrong ones, one at a time."""

import copy
import math
from collections.abc import Iterator
from typing import Any

VALUES = (
    None, True, False, "", "7", [], {}, [[1]], {"a": 1}, -1, 2.5, 10**400, -(10**400), 0.5,
    math.nan, math.inf, -math.inf, -9999.0,
)  # fmt: skip
"""Values of every type; those of a number's own type are no token id, count or log-probability,
but for -1, which is a log-probability."""


def replaced(reply: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the place, the value that is there now, and the whole reply; a key left out, too."""
    for path in _paths(reply):
        for value in VALUES:
            if path:
                changed = copy.deepcopy(reply)
                parent = changed
                for key in path[:-1]:
                    parent = parent[key]
                parent[path[-1]] = value
            else:
                changed = value
            yield ".".join(map(str, path)), value, changed
        if path:
            changed = copy.deepcopy(reply)
            parent = changed
            for key in path[:-1]:
                parent = parent[key]
            del parent[path[-1]]
            yield ".".join(map(str, path)), "nothing", changed


def _paths(node: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the keys that lead to each value, the whole first."""
    yield ()
    if isinstance(node, dict | list):
        for key in node if isinstance(node, dict) else range(len(node)):
            yield from ((key, *path) for path in _paths(node[key]))
