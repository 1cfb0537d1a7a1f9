"""Every checkpoint that mmengine writes can be read and resumed, whatever parts of it a config names.

The parts come from the registries: one that is new fails here until its arguments stand below.
"""

import pickle
import sys
from collections import Counter
from copy import deepcopy
from pathlib import Path

import mmseg.datasets  # noqa: F401
import numpy as np
import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS, OPTIM_WRAPPERS, OPTIMIZERS, PARAM_SCHEDULERS
from mmengine.runner import CheckpointLoader
from mmseg.registry import DATASETS, MODELS
from safetensors.torch import save_file
from support import variant

from mmseg_inceptionnext import ReadImage, Segmentor, UserError, get_config
from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.evaluation import evaluate
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import train

# Arguments by the beginning of the name; each comes as …LR, …Momentum and …ParamScheduler.
SCHEDULERS = {
    'ConstantLR': {}, 'LinearLR': {}, 'ExponentialLR': dict(gamma=0.9), 'CosineAnnealingLR': dict(T_max=5),
    'CosineRestartLR': dict(periods=[3, 3], restart_weights=[1, 0.5], eta_min=0),
    'MultiStepLR': dict(milestones=[1, 3, 3]),
    'OneCycleLR': dict(eta_max=0.1, total_steps=6), 'PolyLR': dict(power=0.9), 'QuadraticWarmupLR': {},
    'ReduceOnPlateauLR': dict(monitor='mIoU', rule='greater'), 'StepLR': dict(step_size=2),
}  # fmt: skip
SCHEDULERS |= {name[:-2] + 'Momentum': kwargs for name, kwargs in SCHEDULERS.items() if name != 'OneCycleLR'}
SCHEDULERS |= {
    name[:-2] + 'ParamScheduler': dict(kwargs, param_name='lr')
    for name, kwargs in SCHEDULERS.items()
    if name[-2:] == 'LR'
}


def read_back(tmp_path: Path, content) -> object:
    torch.save({'content': content}, tmp_path / 'w.pth')
    return read_checkpoint(tmp_path / 'w.pth')['content']


def optimizer(kind=torch.optim.SGD, **kwargs) -> torch.optim.Optimizer:
    layer = torch.nn.Linear(3, 2, bias=False)
    made = kind(layer.parameters(), lr=0.1, **kwargs)

    def closure():
        made.zero_grad()
        loss = layer(torch.ones(1, 3)).sum()
        loss.backward()
        return loss

    for _ in range(2):
        made.step(closure)
    return made


@pytest.mark.parametrize('name', sorted(PARAM_SCHEDULERS.module_dict))
def test_schedulers(name, tmp_path):
    assert name in SCHEDULERS, f'a new scheduler: give its arguments above ({name})'
    scheduler = PARAM_SCHEDULERS.get(name)(optimizer(momentum=0.9), **SCHEDULERS[name])
    scheduler.step(*([{'mIoU': 1.0}] if 'Plateau' in name else []))
    state = read_back(tmp_path, scheduler.state_dict())
    assert state == scheduler.state_dict()
    scheduler.load_state_dict(state)


@pytest.mark.parametrize('name', sorted(OPTIMIZERS.module_dict))
def test_optimizers(name, tmp_path):
    kind = OPTIMIZERS.get(name)
    try:
        made = optimizer(kind)
    except (RuntimeError, TypeError, ValueError, ImportError) as error:
        # sparse gradients only; a base class; transformers' Adafactor, without a learning rate; needs a package
        pytest.skip(f'{name}: {error}')
    state = read_back(tmp_path, made.state_dict())
    torch.testing.assert_close(state, made.state_dict(), rtol=0, atol=0, equal_nan=True)


def test_optimizer_wrappers(tmp_path):
    """bfloat16's and float16's; accumulation and clipping keep no state."""
    known = {f'{kind}OptimWrapper' for kind in ('', 'Amp', 'Apex', 'DeepSpeed', 'ColossalAI', 'BFloat16')}
    assert set(OPTIM_WRAPPERS.module_dict) | set(OPTIM_WRAPPERS.children['mmseg'].module_dict) <= known
    wrapper = OptimWrapper(optimizer(), accumulative_counts=4)
    amp = AmpOptimWrapper.__new__(AmpOptimWrapper)  # its constructor wants a GPU
    amp.optimizer, amp.loss_scaler, amp.base_param_settings = optimizer(), torch.amp.GradScaler('cpu'), None
    for state in (
        wrapper.state_dict(),
        OptimWrapperDict(a=wrapper, b=wrapper).state_dict(),
        amp.loss_scaler.state_dict(),
    ):
        torch.testing.assert_close(read_back(tmp_path, state), state, rtol=0, atol=0)


@pytest.mark.parametrize('name', sorted(n for n, c in DATASETS.module_dict.items() if getattr(c, 'METAINFO', None)))
def test_meta_of_data_sets(name, tmp_path):
    meta = dict(DATASETS.get(name).METAINFO, label_map={0: 255, 1: 0}, reduce_zero_label=True)
    assert read_back(tmp_path, meta) == meta


def weighted(self) -> float:
    return 1.0


def test_the_message_hub(tmp_path):
    """Histories with and without values, a registered statistic, and any number that a hook may note."""
    hub = MessageHub(f'hub of {tmp_path.name}')
    numbers = [t(1) for t in (np.int8, np.uint16, np.float16, np.float32, np.float64, np.complex64, np.bool_, np.str_)]
    arrays = [np.arange(3).astype(code) for code in ('?', 'i2', 'u8', 'f2', '>f4', 'c16')] + [np.array(['a', 'bc'])]
    hub.update_info('numbers', numbers)
    hub.update_info('arrays', arrays)
    hub.update_info('best_score', torch.tensor(3.0))
    hub.update_scalar('train/loss', 0.5)
    hub.update_scalar('empty', 0)
    hub.log_scalars['empty'] = HistoryBuffer()
    before = dict(HistoryBuffer._statistics_methods)
    try:
        HistoryBuffer.register_statistics(weighted)
        torch.save({'message_hub': hub.state_dict()}, tmp_path / 'w.pth')
        there = dict(HistoryBuffer._statistics_methods)
        state = read_checkpoint(tmp_path / 'w.pth')['message_hub']
        assert HistoryBuffer._statistics_methods == there  # reading a file changes nothing for others
    finally:
        HistoryBuffer._statistics_methods.clear()
        HistoryBuffer._statistics_methods.update(before)
    assert state['log_scalars']['train/loss'].current() == 0.5 and len(state['log_scalars']['empty'].data[0]) == 0
    assert state['runtime_info']['numbers'] == numbers
    for ours, theirs in zip(state['runtime_info']['arrays'], arrays, strict=True):
        assert ours.dtype.kind == theirs.dtype.kind and np.array_equal(ours, theirs)


TENSORS = {
    'sparse': torch.eye(3).to_sparse(), 'csr': torch.eye(3).to_sparse_csr(),
    'complex': torch.ones(2, dtype=torch.cfloat),
    'conjugated': torch.ones(2, dtype=torch.cfloat).conj(), 'float8': torch.ones(2).to(torch.float8_e4m3fn),
    'uint16': torch.ones(2, dtype=torch.uint16), 'meta': torch.empty(2, 3, device='meta'),
    'quantised': torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8),
    'by channel': torch.quantize_per_channel(torch.randn(3, 2), torch.ones(3), torch.zeros(3), 0, torch.quint8),
}  # fmt: skip


@pytest.mark.parametrize('name', TENSORS)
def test_tensors_of_every_kind(name, tmp_path):
    tensor = TENSORS[name]
    found = read_back(tmp_path, {'a': tensor})['a']
    assert (found.dtype, found.layout, found.shape, found.device) == (
        tensor.dtype, tensor.layout, tensor.shape, tensor.device
    )  # fmt: skip
    if not tensor.is_meta:
        dense = [t.dequantize() if t.is_quantized else t.to_dense().resolve_conj().float() for t in (found, tensor)]
        assert torch.equal(*dense)


@pytest.mark.parametrize(
    'value',
    [pytest.param({1, 'a'}, id='set'), set(), 1j, torch.Size([1, 2]), torch.float32, torch.device('cpu'),
     torch.device('cuda', 1), torch.strided, bytearray(b'abc'), bytearray(), b'', b'abc', Counter('aab'),
     {1.5: 0, None: 1, True: 2, (1, 'a'): 3, 2**40: 4}, 2**100, (1, [2, {3: 4}])],
    ids=repr,
)  # fmt: skip
def test_plain_values(value, tmp_path):
    found = read_back(tmp_path, value)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    'value', [weighted, torch.nn.Linear(1, 1), Path('x'), np.array([None])], ids=['function', *'lpo']
)
def test_code_stays_refused(value, tmp_path):
    with pytest.raises(UserError, match='it wants to run|damaged'):
        read_back(tmp_path, value)


STATEFUL = [dict(type='EMAHook', momentum=0.1), dict(type='EarlyStoppingHook', monitor='mIoU', patience=99)]


@pytest.mark.parametrize(
    'schedulers',
    [
        [dict(type='MultiStepLR', by_epoch=False, milestones=[1, 2]), dict(type='MultiStepMomentum', milestones=[2])],
        [dict(type='OneCycleLR', by_epoch=False, eta_max=0.01, total_steps=9)],
    ],
    ids=['steps', 'one cycle'],
)
def test_runs_with_them_are_resumed_tested_and_used(tiny_cfg, tmp_path, schedulers):
    tiny_cfg.param_scheduler = schedulers
    tiny_cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.01, momentum=0.9)
    tiny_cfg.optim_wrapper.pop('paramwise_cfg', None)
    tiny_cfg.custom_hooks = [*tiny_cfg.custom_hooks, *STATEFUL]
    whole = train(variant(tiny_cfg, tmp_path / 'whole'), TrainOptions(seed=5, weights='none'))
    train(variant(tiny_cfg, tmp_path / 'parts', **{'train_cfg.max_iters': 3}), TrainOptions(seed=5, weights='none'))
    resumed = train(variant(tiny_cfg, tmp_path / 'parts'), TrainOptions(resume=True))
    assert resumed.iter == 6
    if len(schedulers) == 2:  # the other's cycle is of another length in the first part
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    checkpoint = tmp_path / 'parts' / 'iter_6.pth'
    assert evaluate(deepcopy(tiny_cfg), checkpoint)['aAcc'] >= 0
    assert Segmentor(deepcopy(tiny_cfg), checkpoint)(np.zeros((64, 64, 3), np.uint8)).labels.shape == (64, 64)
    assert any(isinstance(hook, EMAHook) for hook in resumed.hooks)
    assert {'EMAHook', 'EarlyStoppingHook'} <= set(HOOKS.module_dict)


def test_a_run_says_at_its_first_save_that_it_could_not_be_resumed(tiny_cfg, tmp_path):
    tiny_cfg.custom_hooks = [*tiny_cfg.custom_hooks, dict(type='NotePathHook')]
    runner = train(tiny_cfg, TrainOptions(seed=5, weights='none'))
    log = next(Path(runner.log_dir).glob('*.log')).read_text()
    assert log.count('could not be resumed from') == 1
    assert log.index('could not be resumed from') < log.index('Iter(train) [4/6]')
    assert 'wants to run pathlib.' in log and runner.iter == 6


@HOOKS.register_module()
class NotePathHook(EMAHook.__base__):
    """Puts something into the checkpoint that is neither data nor mmengine's."""

    def before_save_checkpoint(self, runner, checkpoint) -> None:
        checkpoint['folder'] = Path(runner.work_dir)


def test_errors_are_those_that_other_libraries_expect(tmp_path, monkeypatch, trained):
    """mmseg's tests of backbones want an OSError for a missing checkpoint; torch raises others for a bad one."""
    backbone = MODELS.build(dict(type='ResNet', depth=18, init_cfg=dict(type='Pretrained', checkpoint='nowhere.pth')))
    with pytest.raises(OSError, match='no checkpoint at'):
        backbone.init_weights()
    for load in (read_checkpoint, CheckpointLoader.load_checkpoint):
        with pytest.raises(FileNotFoundError, match='no checkpoint at'):
            load(str(tmp_path / 'w.pth'))
    content = trained.read_bytes()
    (tmp_path / 'torn.pth').write_bytes(content[: len(content) // 2])
    torch.save({'a': weighted}, tmp_path / 'code.pth')
    for name in ('torn.pth', 'code.pth'):
        for kind in (UserError, RuntimeError, pickle.UnpicklingError):
            with pytest.raises(kind, match=name):
                CheckpointLoader.load_checkpoint(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match='no config at'):
        get_config('nowhere/at_all')
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(ImportError, match='pip install'):
        Segmentor(tmp_path / 'model.onnx')
    with pytest.raises(FileNotFoundError):
        ReadImage().transform(dict(img_path=str(tmp_path / 'none.png')))


def test_mmengines_callers_choose_where_tensors_go(trained, tmp_path):
    save_file(dict(read_checkpoint(trained)['state_dict']), tmp_path / 'w.safetensors')
    for location in ('cpu', torch.device('cpu'), None, {'cuda:0': 'cpu'}, lambda storage, _: storage):
        weights = CheckpointLoader.load_checkpoint(str(tmp_path / 'w.safetensors'), map_location=location)
        assert {tensor.device.type for tensor in weights.values()} == {'cpu'}
    for location, expected in (('meta', 'meta'), (lambda storage, _: storage, 'cpu'), (None, 'cpu')):
        content = CheckpointLoader.load_checkpoint(str(trained), map_location=location)
        assert {tensor.device.type for tensor in content['state_dict'].values()} == {expected}
