"""Compute a bounded number of results ahead of their consumer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

Item, Result = TypeVar('Item'), TypeVar('Result')


def map_ahead(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int,
    pending: deque[tuple[Item, Future]] | None = None,
) -> Iterator[tuple[Item, Result]]:  # fmt: skip
    """Yield ``(item, function(item))`` in order, while ``ahead`` more are computed.

    ``Executor.map`` would take all items at once, and hold all results.

    Args:
        pool: Threads or processes that call the function.
        function: Function of an item.
        items: Items, taken one by one; may be infinite.
        ahead: Number of items that are submitted before the first result is waited for.
        pending: Queue to use, for a caller that wants to know what was pending when a process died.
    """
    pending = deque() if pending is None else pending
    for item in items:
        pending.append((item, pool.submit(function, item)))
        if len(pending) > ahead:
            yield pending[0][0], pending[0][1].result()
            pending.popleft()
    while pending:
        yield pending[0][0], pending[0][1].result()
        pending.popleft()
