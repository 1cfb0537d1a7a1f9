"""bfloat16 under autocast, and the race between it and float32."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from support import ROOT, TINY_CONFIG, TINY_UPERNET, assert_user_error, segmentor_with_statistics
from torch import nn

from mmseg_inceptionnext import Segmentor, UserError, optimize_for_inference
from mmseg_inceptionnext.evaluation import evaluate
from mmseg_inceptionnext.inference import precision
from mmseg_inceptionnext.inference.multi_scale_segmentor import MultiScaleSegmentor
from mmseg_inceptionnext.inference.optimize import made_for
from mmseg_inceptionnext.inference.precision import faster, race, use_bfloat16

UPERNET = ROOT / 'configs/mini/upernet_inceptionnext_a.py'


def deviation(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return ((logits - expected).pow(2).mean().sqrt() / expected.std()).item()


def under_autocast(model, inputs):
    with torch.autocast('cpu', torch.bfloat16):
        return model(inputs, mode='tensor').float()


@pytest.mark.parametrize(
    'config',
    ['mini/upernet_inceptionnext_a', 'fpn/inceptionnext_a',
     pytest.param('upernet/inceptionnext_t', marks=pytest.mark.slow),
     pytest.param('baselines/upernet/convnext_t', marks=pytest.mark.slow)],
)  # fmt: skip
def test_no_further_from_float32_than_the_plain_model_under_autocast(config):
    """With mmseg's head, and nothing folded."""
    plain, ours = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        model = segmentor_with_statistics(ROOT / f'configs/{config}.py')
        stock = model
        if 'upernet_' in config or config.startswith('upernet'):
            stock = segmentor_with_statistics(ROOT / f'configs/{config}.py', **{'decode_head.type': 'UPerHead'})
            stock.load_state_dict(model.state_dict())
        fast = optimize_for_inference(model, precision='bf16')
        inputs = torch.randn(1, 3, 96, 160)
        with torch.no_grad():
            expected = stock(inputs, mode='tensor')
            logits = fast(inputs, mode='tensor')
            assert logits.dtype == torch.float32
            plain.append(deviation(under_autocast(stock, inputs), expected))
            ours.append(deviation(logits, expected))
    assert 0 < sum(ours) < 1.05 * sum(plain)


HEADS = {
    'UPerHead': (TINY_UPERNET, {'decode_head.type': 'UPerHead'}),
    'GELU': (TINY_UPERNET, {'decode_head.act_cfg': dict(type='GELU')}),
    'ConvAWS': (TINY_UPERNET, {'decode_head.conv_cfg': dict(type='ConvAWS')}),
    'no norms on the maps': (TINY_CONFIG, {'backbone.out_norm': False}),
    'PSPHead': (
        TINY_UPERNET,
        {'decode_head': dict(_delete_=True, type='PSPHead', in_channels=64, in_index=3, channels=16, num_classes=150)},
    ),
    'SegformerHead': (
        TINY_UPERNET,
        {'decode_head': dict(_delete_=True, type='SegformerHead', in_channels=[16, 32, 48, 64], in_index=[0, 1, 2, 3],
                             channels=16, num_classes=150)},
    ),
    'sliding window': (TINY_CONFIG, {'test_cfg': dict(mode='slide', crop_size=(64, 64), stride=(48, 48))}),
}  # fmt: skip


@pytest.mark.parametrize('fast', [True, False], ids=['fast', 'plain'])
@pytest.mark.parametrize('kind', HEADS)
def test_any_head_and_any_size(kind, fast):
    """As near as under autocast alone; labels of two images, and of another size, differ only where logits are near."""
    path, changes = HEADS[kind]
    model = segmentor_with_statistics(path, **changes)
    half = made_for(model, 'bf16', fast)
    assert not isinstance(model, precision._InBfloat16)
    with torch.no_grad():
        for inputs in (torch.randn(2, 3, 96, 128), torch.randn(1, 3, 70, 101)):
            expected, logits = model(inputs, mode='tensor'), half(inputs, mode='tensor')
            assert logits.dtype == torch.float32
            bound = 1.3 * deviation(under_autocast(model, inputs), expected)
            assert 0 < deviation(logits, expected) < bound
            labels = [m(inputs, mode='predict')[0].pred_sem_seg.data for m in (model, half)]
            assert labels[0].shape == labels[1].shape and labels[1].dtype == torch.int64
            assert (labels[0] != labels[1]).float().mean() < 0.1
        again = copy.deepcopy(half)
        assert torch.equal(again(inputs, mode='tensor'), logits)
        assert torch.equal(use_bfloat16(again)(inputs, mode='tensor'), logits)


def test_what_is_called_without_forward_runs_under_autocast_too():
    """As MultiScaleSegmentor does for sliding windows."""
    model = use_bfloat16(segmentor_with_statistics(TINY_CONFIG))
    seen = []
    model.backbone.stem[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    inputs, meta = torch.randn(1, 3, 64, 64), dict(ori_shape=(64, 64), img_shape=(64, 64))
    with torch.no_grad():
        model.extract_feat(inputs)
        logits = model.inference(inputs, [meta])
    assert seen == [torch.bfloat16] * 2 and logits.dtype == torch.float32


@pytest.mark.parametrize('mode', ['whole', 'slide'])
def test_multi_scale(mode):
    changes = {} if mode == 'whole' else {'test_cfg': dict(mode='slide', crop_size=(64, 64), stride=(48, 48))}
    model = segmentor_with_statistics(TINY_CONFIG, **changes)
    data = dict(
        inputs=[[torch.randint(256, (3, size, size), dtype=torch.uint8)] for size in (64, 96)],
        data_samples=[[sample(64, size)] for size in (64, 96)],
    )
    (expected,), (result,) = (
        MultiScaleSegmentor(made_for(model, kind, fast=True)).test_step(copy.deepcopy(data))
        for kind in ('fp32', 'bf16')
    )
    assert (result.pred_sem_seg.data != expected.pred_sem_seg.data).float().mean() < 0.1


def sample(original: int, size: int):
    from mmseg.structures import SegDataSample

    return SegDataSample(metainfo=dict(ori_shape=(original, original), img_shape=(size, size), pad_shape=(size, size)))


class Clock:
    """A clock that steps move on, by what they take in their first and in later calls."""

    def __init__(self, **seconds: tuple[float, float]):
        self.now, self.calls = 0.0, []
        self.steps = {name: self.step(name, *times) for name, times in seconds.items()}

    def step(self, name: str, first: float, later: float):
        times = itertools.chain([first], itertools.repeat(later))

        def run() -> None:
            self.calls.append(name)
            self.now += next(times)

        return run

    def __call__(self) -> float:
        return self.now


def test_a_race_goes_in_turns_for_about_a_second():
    clock = Clock(a=(0.3, 0.1), b=(0.4, 0.15))
    assert race(clock.steps, clock=clock) == pytest.approx(dict(a=0.1, b=0.15))
    assert clock.calls == ['a', 'b'] * 3


def test_a_slow_first_call_costs_nobody_the_race():
    clock = Clock(a=(2.0, 0.5), b=(1.9, 0.6))
    assert race(clock.steps, clock=clock) == pytest.approx(dict(a=0.5, b=0.6))
    assert clock.calls == ['a', 'b'] * 2


def test_a_clear_winner_of_the_first_second_needs_no_more():
    clock = Clock(a=(4.0, 4.0), b=(1.0, 1.0))
    assert race(clock.steps, clock=clock) == dict(a=4.0, b=1.0) and clock.calls == ['a', 'b']


@pytest.mark.parametrize('winner', ['fp32', 'bf16'])
def test_the_faster_is_taken_and_said_in_a_line(monkeypatch, winner):
    monkeypatch.setattr(precision, 'multiplies_bfloat16', lambda device: True)
    seconds = {'fp32': 1.24, 'bf16': 1.24} | {winner: 0.62}
    monkeypatch.setattr(precision, 'race', lambda steps: [step() for step in steps.values()] and seconds)
    run, lines = [], []
    chosen, model = faster(lambda name: nn.Sequential(named(name)), run.append, 'cpu', 2, lines.append)
    other = 'fp32' if winner == 'bf16' else 'bf16'
    assert (chosen, model[0].name, len(run)) == (winner, winner, 2) and not model.training
    assert lines == [f'precision: {winner} (0.31 s an image; {other} 0.62 s)']


@pytest.mark.parametrize(('seconds', 'chosen'), [(0.95, 'fp32'), (0.85, 'fp32'), (0.8, 'bf16')])
def test_other_labels_must_be_worth_it(monkeypatch, seconds, chosen):
    monkeypatch.setattr(precision, 'multiplies_bfloat16', lambda device: True)
    monkeypatch.setattr(precision, 'race', lambda steps: dict(fp32=1.0, bf16=seconds))
    assert faster(named, None, 'cpu')[0] == chosen


def named(name: str) -> nn.Module:
    module = nn.Identity()
    module.name = name
    return module


def test_without_instructions_for_bfloat16_there_is_no_race(monkeypatch, capsys):
    monkeypatch.setattr(precision, 'multiplies_bfloat16', lambda device: False)
    made = []
    chosen, _ = faster(lambda name: made.append(name) or nn.Identity(), None, 'cpu')
    assert (chosen, made) == ('fp32', ['fp32'])
    assert capsys.readouterr().err == 'precision: fp32 (this CPU has no instructions for bfloat16)\n'


def raced(monkeypatch, winner: str) -> list:
    """Let one precision win every race; return a list that grows by each."""
    races = []
    monkeypatch.setattr(precision, 'multiplies_bfloat16', lambda device: True)
    monkeypatch.setattr(precision, 'race', lambda steps: races.append(1) or {name: name != winner for name in steps})
    return races


@pytest.mark.parametrize('winner', ['fp32', 'bf16'])
def test_a_segmentor_chooses_once_and_its_copies_keep_the_choice(trained, monkeypatch, capsys, winner):
    races = raced(monkeypatch, winner)
    image = np.random.default_rng(0).integers(256, size=(64, 96, 3), dtype=np.uint8)
    segmentor = Segmentor(TINY_CONFIG, trained, device='cpu')
    assert pickle.loads(pickle.dumps(segmentor)).__reduce__()[1][5] == 'auto' and not races
    expected = Segmentor(TINY_CONFIG, trained, device='cpu', precision=winner)([image, image[:32]])
    for result, wanted in zip(segmentor([image, image[:32]], batch_size=2), expected, strict=True):
        assert np.array_equal(result.labels, wanted.labels) and result.labels.dtype == np.int16
    assert len(races) == 1 and capsys.readouterr().err.count(f'precision: {winner} (') == 1
    for other in (pickle.loads(pickle.dumps(segmentor)), copy.deepcopy(segmentor)):
        assert other.__reduce__()[1][5] == winner
        assert np.array_equal(other(image).labels, expected[0].labels)
    assert len(races) == 1


@pytest.mark.parametrize('options', [{}, dict(fast=False), dict(tta=True)], ids=str)
def test_evaluation_in_the_chosen_precision(tiny_cfg, trained, monkeypatch, options):
    races = raced(monkeypatch, 'bf16')
    expected = evaluate(tiny_cfg, trained, precision='bf16', **options)
    assert evaluate(tiny_cfg, trained, precision='auto', **options) == expected and len(races) == 1
    assert abs(evaluate(tiny_cfg, trained, **options)['aAcc'] - expected['aAcc']) < 2


def test_optimised_for_the_size_of_an_example(monkeypatch):
    raced(monkeypatch, 'bf16')
    model = segmentor_with_statistics(TINY_CONFIG)
    assert type(optimize_for_inference(model, (64, 64), 'auto')).__name__ == 'LabelMapSegmentorInBfloat16'
    with pytest.raises(UserError, match=r"precision='auto' needs example_shape=\(H, W\)"):
        optimize_for_inference(model, precision='auto')


def test_mistakes(trained, tiny_cfg, tmp_path):
    for function in (
        lambda: Segmentor(TINY_CONFIG, trained, precision='fp8'),
        lambda: evaluate(tiny_cfg, trained, precision='fp8'),
        lambda: optimize_for_inference(None, precision='fp8'),
    ):
        with pytest.raises(UserError, match="precision='fp8' must be one of auto, fp32, bf16"):
            function()
    with pytest.raises(UserError, match="precision='bf16': an .onnx file computes in what it was exported in: leave"):
        Segmentor(tmp_path / 'model.onnx', precision='bf16')


@pytest.mark.parametrize('tool', ['predict', 'test', 'benchmark'])
def test_tools_name_the_precisions(tool, tool_here):
    process = tool_here(tool, 'fpn_tiny', 'a.pth', 'a.jpg', '--precision', 'int4')
    assert_user_error(process, 'argument --precision', "'int4'", 'auto', 'fp32', 'bf16')


def test_predict_says_what_it_chose(trained, mini_root, tool_here, monkeypatch):
    raced(monkeypatch, 'bf16')
    process = tool_here('predict', TINY_CONFIG, trained, mini_root / 'images/validation', '--out', 'out')
    assert process.returncode == 0 and process.stdout == '2 images in out\n'
    assert process.stderr.count('precision: bf16 (') == 1
    process = tool_here('predict', 'model.onnx', 'a.jpg', '--out', 'out', '--precision', 'fp32')
    assert_user_error(process, '--precision fp32: an .onnx file computes in what it was exported in: leave it out')


def test_the_test_tool_says_what_it_chose(trained, mini_root, tool_here, monkeypatch):
    raced(monkeypatch, 'bf16')
    process = tool_here('test', TINY_CONFIG, trained, '--data-root', mini_root, '--precision', 'auto')
    assert process.returncode == 0, process.stderr
    assert process.stdout.count('precision: bf16 (') == 1 and process.stdout.splitlines()[-1].startswith('mIoU ')
