import dataclasses
import itertools
from types import SimpleNamespace

import pytest
from support import ROOT, TINY_CONFIG

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.inference import precision
from mmseg_inceptionnext.measure.speed import Speed, interleave, measure_speed, summarize_rounds
from mmseg_inceptionnext.measure.tables import speed_table
from mmseg_inceptionnext.measure.timed_model import Setting, TimedModel
from mmseg_inceptionnext.measure.tradeoff import plot_tradeoff

FACTS = ('shape', 'batch_size', 'device', 'threads', 'layout', 'dtype', 'versions')


def test_configs_are_measured_in_turn():
    calls = []
    rounds = interleave([lambda name=name: calls.append(name) or {'fps': 1} for name in 'abc'], repeat=2)
    assert calls == list('abcabc')
    assert len(rounds) == 2 and all(len(results) == 3 for results in rounds)


def test_ctrl_c_keeps_the_complete_rounds():
    counter = itertools.count()

    def run():
        if next(counter) == 5:
            raise KeyboardInterrupt
        return {'fps': 1}

    assert len(interleave([run, run], repeat=10)) == 2


def test_ratios_are_taken_round_by_round():
    """A machine that slows down by half between the rounds changes no ratio."""
    contestant = SimpleNamespace(config='c', setting=Setting(), facts={name: None for name in FACTS})
    first, second = ([{'fps': fps, 'peak_memory_mb': 1.0} for fps in column] for column in ((8, 4, 2), (4, 2, 1.5)))
    summary = summarize_rounds(contestant, second, first)
    assert (summary.fps, summary.fps_min, summary.fps_max) == (2, 1.5, 4)
    assert (summary.ratio_to_first, summary.ratio_min, summary.ratio_max) == (0.5, 0.5, 0.75)


@pytest.mark.slow
def test_measures_and_survives_a_config_that_does_not_build(tmp_path):
    """In real processes: figures of the sound ones, and the reason of the broken one."""
    broken = tmp_path / 'broken.py'
    broken.write_text(f"_base_ = '{TINY_CONFIG}'\nmodel = dict(backbone=dict(drop_path_rate=2.0))\n")
    configs = [str(TINY_CONFIG), str(broken), str(ROOT / 'configs/mini/fpn_inceptionnext_a.py')]
    rows, failures = measure_speed(configs, Setting(shape=(64, 96), repeat=2))
    assert failures == {str(broken): 'drop_path_rate=2.0 must be at least 0 and below 1'}
    assert [row.config for row in rows] == [configs[0], configs[2]]
    first, second = rows
    assert first.ratio_to_first == first.ratio_min == first.ratio_max == 1
    assert 0 < second.ratio_min <= second.ratio_to_first <= second.ratio_max
    for row in rows:
        assert 0 < row.fps_min <= row.fps <= row.fps_max
        assert 100 < row.peak_memory_mb < 4000 and row.rounds == 2
        assert (row.shape, row.batch_size, row.device, row.dtype, row.layout) == ((64, 96), 1, 'cpu', 'fp32', 'nchw')


@pytest.mark.parametrize(
    'setting',
    [
        Setting('train', shape=(64, 64), fast=True, precision='bf16', repeat=1),
        pytest.param(Setting('backbone', shape=(64, 64), batch_size=2, repeat=1), marks=pytest.mark.slow),
        Setting(shape=(64, 96), fast=True, repeat=1),
        Setting(shape=(64, 96), fast=True, precision='bf16', repeat=1),
        pytest.param(Setting(shape=(64, 96), precision='auto', repeat=1), marks=pytest.mark.slow),
        pytest.param(Setting(shape=(64, 64), fast=True, compile=True, repeat=1), marks=pytest.mark.slow),
        pytest.param(Setting(shape=(64, 64), compile=True, layout='channels_last', repeat=1), marks=pytest.mark.slow),
    ],
    ids=lambda setting: setting.task,
)
def test_every_task(setting):
    (row,), failures = measure_speed([str(TINY_CONFIG)], setting)
    assert failures == {} and row.fps > 0
    assert row.fast == setting.fast and row.dtype in (setting.precision, 'fp32', 'bf16')
    assert row.layout == (setting.layout or row.layout) and row.layout in ('nchw', 'channels_last', 'own')
    assert (row.fps_forward_backward is not None) == (setting.task == 'backbone')


@pytest.mark.slow
def test_real_images(mini_root):
    """With a config whose dataloader has workers of its own."""
    mini = str(ROOT / 'configs/mini/fpn_inceptionnext_a.py')
    (row,), failures = measure_speed([mini], Setting(data_root=str(mini_root), repeat=65))
    assert failures == {} and row.rounds == 65
    _, failures = measure_speed([str(TINY_CONFIG)], Setting(data_root='/nowhere'))
    assert 'no data set at /nowhere' in failures[str(TINY_CONFIG)]


@pytest.mark.parametrize(
    ('setting', 'checkpoints', 'message'),
    [
        (Setting(), ['a.pth', 'b.pth'], '2 checkpoints for 1 configs'),
        (Setting(repeat=0), [], 'repeat=0 must be'),
        (Setting(shape=(8, 512)), [], 'less than 32'),
        (Setting(task='train', data_root='x'), [], "data_root='x' goes with task='fps'"),
        (Setting(precision='tf32'), [], "'tf32' needs a GPU"),
        (Setting('train', precision='fp16'), [], "'fp16' needs a GPU"),
        (Setting('train', precision='auto'), [], "precision='auto' goes with task='fps'"),
        (Setting(fast=True, layout='nchw'), [], 'fast=True chooses the layout'),
    ],
    ids=str,
)
def test_mistakes_are_told_before_anything_starts(setting, checkpoints, message):
    with pytest.raises(UserError, match=message):
        measure_speed([str(TINY_CONFIG)], setting, checkpoints)


def speed(config: str, fps: float) -> Speed:
    values = {field.name: None for field in dataclasses.fields(Speed)}
    values |= dict(config=config, fps=fps, fps_min=fps, fps_max=fps, ratio_to_first=1.0, ratio_min=1.0, ratio_max=1.0)
    values |= dict(peak_memory_mb=10.0, task='fps', shape=(512, 512), device='cpu', dtype='fp32', layout='nchw')
    return Speed(**values)


def test_table_and_plot(tmp_path):
    rows = [speed('configs/upernet/inceptionnext_t.py', 1.5), speed('configs/baselines/upernet/swin_t.py', 1.25)]
    table = speed_table(rows).splitlines()
    assert len(table) == 4 and len({len(line) for line in table}) == 1 and '1.50' in table[2]
    plot_tradeoff(rows, tmp_path / 'plot.png')
    assert (tmp_path / 'plot.png').stat().st_size > 10000
    with pytest.raises(UserError, match='none of the configs is in the paper'):
        plot_tradeoff([speed('mini/fpn_inceptionnext_a', 1.0)], tmp_path / 'plot.png')
    with pytest.raises(UserError, match='plot.xyz'):
        plot_tradeoff(rows, tmp_path / 'plot.xyz')


def test_a_training_step_has_the_shape_that_is_asked_for(monkeypatch):
    """Not the config's crop, to which mmseg pads its batches."""
    subject = TimedModel(str(TINY_CONFIG), Setting('train', shape=(64, 96), batch_size=1), None)
    seen = []
    forward = subject.model.backbone.forward
    monkeypatch.setattr(subject.model.backbone, 'forward', lambda x: seen.append(x.shape) or forward(x))
    subject.steps['fps']()
    assert seen == [(1, 3, 64, 96)]


@pytest.mark.parametrize('fast', [True, False])
def test_the_faster_precision_is_measured(monkeypatch, fast):
    monkeypatch.setattr(precision, 'multiplies_bfloat16', lambda device: True)
    monkeypatch.setattr(precision, 'race', lambda steps: [step() for step in steps.values()] and dict(fp32=2, bf16=1))
    subject = TimedModel(str(TINY_CONFIG), Setting(shape=(64, 96), precision='auto', fast=fast), None)
    assert subject.facts['dtype'] == 'bf16' and isinstance(subject.model, precision._InBfloat16)


@pytest.mark.slow
def test_one_setting_for_each_config():
    """As benchmarks/fast_path.py compares a model with what optimize_for_inference makes of it."""
    settings = [Setting(shape=(64, 64), repeat=1), Setting(shape=(64, 64), repeat=1, fast=True)]
    rows, failures = measure_speed([str(TINY_CONFIG)] * 2, settings)
    assert failures == {} and [row.fast for row in rows] == [False, True]


@pytest.mark.slow
def test_imagenet_models_are_timed_beside_the_papers_throughput(tmp_path):
    models = ['inceptionnext_atto', 'test_convnext']
    rows, failures = measure_speed(models, Setting('backbone', batch_size=2, layout='nchw', repeat=1))
    assert failures == {} and all(row.fps > 0 and row.fps_forward_backward > 0 for row in rows)
    first, second = speed_table(rows).splitlines()[2:]
    assert [cell.strip() for cell in first.split('|')[-5:-1]] == ['9876', '1.00', '2661', '1.00']
    assert [cell.strip() for cell in second.split('|')[-5:-1]] == ['–'] * 4
    assert '9876' not in speed_table([dataclasses.replace(row, shape=(32, 32)) for row in rows])
    plot_tradeoff(rows, tmp_path / 'plot.png')
    assert (tmp_path / 'plot.png').stat().st_size > 10000
    with pytest.raises(UserError, match="inceptionnext_atto is an ImageNet classifier: time it by task='backbone'"):
        measure_speed(models, Setting())
