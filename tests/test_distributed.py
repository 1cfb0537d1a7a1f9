"""How processes meet, here as threads of one process; test_distributed.py has real ones."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import TCPStore

from mmseg_inceptionnext import distributed
from mmseg_inceptionnext.distributed import init_process_group, per_restart_store


def start(port: int, size: int) -> list:
    """Each process's part of the store at a port."""
    with ThreadPoolExecutor(size) as pool:
        clients = [TCPStore('127.0.0.1', port, is_master=False) for _ in range(size)]
        return list(pool.map(per_restart_store, clients, range(size), [size] * size, timeout=60))


def test_processes_that_are_started_again_share_nothing_with_those_before():
    """Also where one before them asked for the first, which had died, and was itself dead before an answer came."""
    server = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    first = start(server.port, 3)
    first[0].set('listening at', 'old')
    server.set('process 2', 'a name nobody has any longer')
    again = start(server.port, 3)
    assert not again[1].check(['listening at'])
    again[0].set('listening at', 'new')
    assert [store.get('listening at') for store in again] == 3 * [b'new']
    assert first[2].get('listening at') == b'old'


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_a_process_alone(monkeypatch, device):
    """On a GPU by mmengine's way, with what the config says; here over gloo, and with no GPU to choose."""
    monkeypatch.setattr(distributed, 'get_device', lambda: device)
    chosen = []
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    server = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    environment = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR='127.0.0.1', MASTER_PORT=server.port)
    for name, value in (environment | {'TORCHELASTIC_USE_AGENT_STORE': True}).items():
        monkeypatch.setenv(name, str(value))
    try:
        init_process_group('pytorch', dict(backend='gloo', timeout=60))
        assert (torch.distributed.get_backend(), torch.distributed.get_world_size()) == ('gloo', 1)
        assert chosen == ([0] if device == 'cuda' else [])
    finally:
        torch.distributed.destroy_process_group()
