"""Work ahead of its consumer, a bounded number of items."""

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
    """Yield ``(item, function(item))`` in order, while ``ahead`` more items are in work.

    ``Executor.map`` would take all items at once, and hold all results.

    Args:
        pool: Threads or processes that call the function.
        function: Applied to each item.
        items: Taken one by one; an iterator without an end will do.
        ahead: Number of items that are submitted before the first result is waited for.
        pending: Queue to use, for a caller that wants to know what was in work when a process died.
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
