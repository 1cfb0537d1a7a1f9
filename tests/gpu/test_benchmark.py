"""benchmarks/gpu.py, which accepts a GPU, as far as a CPU can run it."""

import json
import multiprocessing
import os
import runpy
import time
from types import SimpleNamespace

import pytest
import torch
from support import ROOT, assert_user_error

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.measure.timed_model import Setting

SCRIPT = ROOT / 'benchmarks' / 'gpu.py'


@pytest.fixture
def benchmark() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU here')
def test_without_a_gpu_it_says_so_in_one_line(run_here):
    process = run_here(SCRIPT, '--out', 'out')
    assert_user_error(process, 'there is no CUDA GPU here')
    assert process.stderr.count('\n') == 1


@pytest.mark.slow
def test_from_end_to_end(run_here, tmp_path):
    process = run_here(SCRIPT, '--device', 'cpu', '--quick', '--minutes', 3, '--out', 'out')
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / 'out' / 'gpu.json').read_text())
    assert result['machine']['device'] == 'cpu' and result['left_out'] == []
    rows = {row['title']: row for row in result['rows']}
    assert rows['FPN A, predict, tf32'] == dict(title='FPN A, predict, tf32', reason='no TF32')
    cells = rows['backbone A, Table 4, fp32']['cells']
    reasons = [cell['reason'] for cell in cells if 'kernels' not in cell['name']]
    assert reasons == [''] * 7
    assert {cell['reason'][:24] for cell in cells if 'kernels' in cell['name']} == {'kernels=True is for GPUs'}
    assert {'fps', 'fps_forward_backward'} == set(cells[0]['images_per_second'])
    assert all(len(figure) == 5 and min(figure) > 0 for figure in cells[0]['images_per_second'].values())
    table = (tmp_path / 'out' / 'gpu.md').read_text()
    assert (
        table.count('\n| FPN A') == 4
        and table.count('1.00 (1.00 – 1.00)') == 6
        and '\n| token mixer, times/s, fp32 ' in table
    )


def test_what_does_not_fit_into_the_time_is_left_out_and_named(run_here, tmp_path):
    process = run_here(SCRIPT, '--device', 'cpu', '--quick', '--minutes', 0.05, '--out', 'out')
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / 'out' / 'gpu.json').read_text())
    assert [row['reason'] for row in result['rows']] == ['no TF32'] * 3
    assert 'FPN A, training step, fp32' in result['left_out']
    assert 'Left out, because the time was over: ' in (tmp_path / 'out' / 'gpu.md').read_text()


def test_a_contestant_that_does_not_fit_is_a_cell_and_not_the_end(benchmark, monkeypatch):
    """In set-up or in a round, whatever it is: memory, a type, a mistake."""

    class Contestant:
        layout, batch_size = 'nchw', 2

        def __init__(self, config, setting, checkpoint):
            self.rounds = 0
            if config == 'large':
                raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 3 GiB')
            if config == 'odd':
                raise UserError("precision='fp8' is odd")
            self.config = config

        def run_round(self):
            self.rounds += 1
            if self.config == 'late' and self.rounds == 2:
                raise NotImplementedError('"conv" not implemented for \'Half\'')
            return dict(fps=10.0 * self.rounds, peak_memory_mb=1.0)

    monkeypatch.setitem(benchmark.measure.__globals__, 'TimedModel', Contestant)
    setting = Setting(repeat=3)
    names = [benchmark.REFERENCE, 'ConvNeXt', 'Swin', 'ours']
    contestants = list(zip(names, ['sound', 'large', 'odd', 'late'], [setting] * 4, strict=True))
    cells = benchmark.measure(benchmark.Row('N', 'predict', 'fp32', False, contestants))
    assert [cell['reason'] for cell in cells] == [
        '', 'out of memory', "precision='fp8' is odd",
        'NotImplementedError: "conv" not implemented for \'Half\'',
    ]  # fmt: skip
    assert cells[0]['images_per_second'] == dict(fps=[10.0, 20.0, 30.0])
    (line,) = benchmark.lines(dict(title='N', cells=cells))
    assert line[1:4] == ['20 NCHW · 1.00 (1.00 – 1.00)', 'out of memory', "precision='fp8' is odd"]


def test_a_row_shows_the_faster_layout_and_ratios_round_by_round(benchmark):
    def cell(name, layout, figures):
        return dict(name=name, layout=layout, reason='', images_per_second=dict(fps=figures), peak_memory_mb=2048.0)

    cells = [
        cell(benchmark.REFERENCE, 'nchw', [4.0, 2.0, 1.0]), cell('ours', 'nchw', [1.0, 1.0, 1.0]),
        cell(benchmark.REFERENCE, 'channels_last', [8.0, 4.0, 2.0]), cell('ours', 'channels_last', [16.0, 8.0, 5.0]),
    ]  # fmt: skip
    (line,) = benchmark.lines(dict(title='N', cells=cells))
    assert line[1] == '4 NHWC · 1.00 (1.00 – 1.00) · 2.0 GiB'
    assert line[4] == '8 NHWC · 2.00 (2.00 – 2.50) · 2.0 GiB'


def test_a_row_that_takes_too_long_or_ends_its_process_is_named_and_the_next_one_is_measured(benchmark, monkeypatch):
    def measure(row: str) -> list[str]:
        if row == 'slow':
            time.sleep(60)
        if row == 'fatal':
            os._exit(7)
        if row == 'after which CUDA is unusable':
            raise RuntimeError('CUDA error: an illegal memory access was encountered. More about that')
        return [row]

    # Forked, so that the process knows this function.
    context = SimpleNamespace(get_context=lambda kind: multiprocessing.get_context('fork'))
    names = benchmark.Worker.ask.__globals__
    monkeypatch.setitem(names, 'multiprocessing', context)
    monkeypatch.setitem(names, 'measure', measure)
    worker = benchmark.Worker('cpu')
    try:
        assert worker.ask('slow', 0.2) == 'ran out of time'
        assert worker.ask('first', 30) == ['first']
        assert worker.ask('fatal', 30) == 'its process ended with code 7'
        assert worker.ask('second', 30) == ['second']
        assert worker.ask('after which CUDA is unusable', 30) == 'CUDA error: an illegal memory access was encountered'
        assert worker.ask('third', 30) == ['third']
    finally:
        worker.close()
