import ctypes
import subprocess
import sys

import numpy as np
import pytest
import torch

from mmseg_inceptionnext.device import multiplies_bfloat16, peak_memory_mb


def test_counts_what_was_freed_again():
    before = peak_memory_mb('cpu')
    torch.ones(100 + int(before), 2**18).sum()  # a MB a row: more than everything before
    assert peak_memory_mb('cpu') > before + 90


def test_a_process_does_not_count_what_its_parent_held():
    held = np.ones((2500, 2**17))  # a MB a row
    program = "from mmseg_inceptionnext.device import peak_memory_mb; print(peak_memory_mb('cpu'))"
    process = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
    assert 100 < float(process.stdout) < 2000 < held.nbytes / 2**20


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'mallopt'), reason='another C library')
def test_freed_memory_is_kept_for_the_next_tensor():
    """In a process of its own: it stays so for the whole process, and the heap of this one depends on other tests."""
    program = (
        'import resource, torch\nfrom mmseg_inceptionnext.device import keep_freed_memory\n'
        'keep_freed_memory()\n'
        'for i in range(8):\n'
        '    torch.ones(2**24)\n'
        '    if i == 3: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n'
        'print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())'
    )
    process = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
    assert int(process.stdout) < 2**26  # of four tensors of that size


def test_products_of_bfloat16_by_the_processor_s_instructions(monkeypatch):
    monkeypatch.setattr('platform.machine', lambda: 'x86_64')
    for bf16, amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr('torch.cpu._is_avx512_bf16_supported', lambda bf16=bf16: bf16)
        monkeypatch.setattr('torch.cpu._is_amx_tile_supported', lambda amx=amx: amx)
        assert multiplies_bfloat16('cpu') == (bf16 or amx)
    assert not multiplies_bfloat16('mps')
