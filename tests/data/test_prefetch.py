"""Work ahead: in order, bounded, and without an end if the items have none."""

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice

import pytest

from mmseg_inceptionnext.data.prefetch import map_ahead


def test_results_come_in_order_and_only_a_few_ahead():
    taken = []

    def items():
        for i in count():
            taken.append(i)
            yield i

    with ThreadPoolExecutor(3) as pool:
        results = map_ahead(pool, lambda x: x * x, items(), ahead=4)
        for i, result in enumerate(islice(results, 10)):
            assert result == (i, i * i) and len(taken) <= i + 5


def test_an_error_names_what_was_in_work():
    pending, started = deque(), threading.Event()

    def work(item):
        started.set()
        if item == 2:
            raise OSError('disk')
        return item

    with ThreadPoolExecutor(1) as pool, pytest.raises(OSError, match='disk'):
        list(map_ahead(pool, work, range(5), 1, pending))
    assert pending[0][0] == 2
