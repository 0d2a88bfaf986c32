"""How often one thread calls torch, by what a call costs on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_MEMORY = ("empty", "empty_strided", "empty_like", "new_empty")


class TorchCalls(TorchDispatchMode):
    """Inside a `with`, counts the operators of the thread that entered it.

    Those that other operators call are counted, too, where the dispatcher is gone through.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self._views: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        self.names[name] += 1
        if func.is_view:
            self._views.add(name)
        return func(*args, **(kwargs or {}))

    def by_sort(self) -> dict[str, int]:
        """views: launch nothing. memory: take some. work: the rest, each a launch or a copy."""
        views = self._count(lambda name: name in self._views)
        memory = self._count(lambda name: name in _MEMORY)
        return {"views": views, "memory": memory, "work": self.names.total() - views - memory}

    def _count(self, wanted: Callable[[str], bool]) -> int:
        return sum(count for name, count in self.names.items() if wanted(name))
