import subprocess
import sys

import numpy as np
import torch

from mmseg_inceptionnext.device import peak_memory_mb


def test_counts_what_was_freed_again():
    before = peak_memory_mb('cpu')
    torch.ones(100 + int(before), 2**18).sum()  # a MB a row: more than everything before
    assert peak_memory_mb('cpu') > before + 90


def test_a_process_does_not_count_what_its_parent_held():
    held = np.ones((2500, 2**17))  # a MB a row
    program = "from mmseg_inceptionnext.device import peak_memory_mb; print(peak_memory_mb('cpu'))"
    process = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
    assert 100 < float(process.stdout) < 2000 < held.nbytes / 2**20
