"""A tree as an argument of a compiled function, each of its arrays once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax


@jax.tree_util.register_pytree_with_keys_class
class SharedTree:
    """A tree in which one array may stand in several places, as a base does under the adapters of two networks.

    Such an array is given to the compiler once. Given twice, it would take memory twice: the compiler cannot know that
    two arguments are one array.
    """

    def __init__(self, tree: Any):
        found, self.structure = jax.tree_util.tree_flatten_with_path(tree)
        unique: dict[int, tuple[int, Any, str]] = {}  # id -> (number, leaf, the first of its names)
        for path, leaf in found:
            unique.setdefault(id(leaf), (len(unique), leaf, jax.tree_util.keystr(path, simple=True, separator=".")))
        self.numbers = tuple(unique[id(leaf)][0] for _, leaf in found)
        self.leaves, self.names = ([entry[i] for entry in unique.values()] for i in (1, 2))

    def tree(self) -> Any:
        """Returns the tree itself."""
        return jax.tree.unflatten(self.structure, [self.leaves[i] for i in self.numbers])

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        """Returns (key, leaf) of every distinct leaf, and the static rest."""
        keys = map(jax.tree_util.GetAttrKey, self.names)
        return list(zip(keys, self.leaves, strict=True)), (self.structure, self.numbers, tuple(self.names))

    @classmethod
    def tree_unflatten(cls, static: Any, leaves: Iterable[Any]) -> SharedTree:
        """Rebuilds what ``tree_flatten_with_keys`` took apart."""
        shared = object.__new__(cls)
        shared.leaves, (shared.structure, shared.numbers, shared.names) = list(leaves), static
        return shared
