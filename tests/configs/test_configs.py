"""Every shipped config says what the paper says, builds, and fits the data set it names."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmseg.registry import DATASETS, MODELS
from support import ROOT
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

CONFIGS = sorted(p for p in (ROOT / 'configs').rglob('*.py') if '_base_' not in p.parts)
BASELINES = [p for p in CONFIGS if 'baselines' in p.parts]
IMAGENET = [p for p in CONFIGS if p.parent.name == 'imagenet']  # see tests/models/test_classifier.py
OURS = [p for p in CONFIGS if p not in (*BASELINES, *IMAGENET)]
PAPER = [p for p in OURS if p.parent.name in ('upernet', 'fpn')]
ARCHS = {'a': 'atto', 't': 'tiny', 's': 'small', 'b': 'base'}


def name(path: Path) -> str:
    return f'{path.parent.name}/{path.stem}'


def load(path: Path) -> Config:
    cfg = Config.fromfile(path)
    cfg.model.backbone.init_cfg = None
    return cfg


def test_none_is_forgotten():
    assert len(PAPER) == 8
    assert len(OURS) == 13
    assert len(BASELINES) == 17
    assert len(IMAGENET) == 5


@pytest.mark.parametrize('path', CONFIGS, ids=name)
def test_fits_on_a_screen(path):
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize('path', OURS, ids=name)
def test_builds_and_its_heads_fit_backbone_and_data(path):
    cfg = load(path)
    model = MODELS.build(cfg.model)
    is_ade20k = path.parent.name != 'camvid'
    classes = 150 if is_ade20k else 11
    first = model.neck.in_channels if model.with_neck else model.decode_head.in_channels
    assert tuple(first) == model.backbone.out_channels
    if model.with_auxiliary_head:
        features = [model.neck.out_channels] * 4 if model.with_neck else model.backbone.out_channels
        assert model.auxiliary_head.in_channels == features[2]
        assert model.auxiliary_head.num_classes == classes
    assert model.decode_head.num_classes == classes
    for split in ('train', 'val', 'test'):
        dataset = DATASETS.build(dict(cfg[f'{split}_dataloader'].dataset, lazy_init=True))
        assert len(dataset.metainfo['classes']) == classes and dataset.reduce_zero_label == is_ade20k
        checks = [t for t in cfg[f'{split}_dataloader'].dataset.pipeline if t.type == 'CheckAnnotation']
        assert [check.num_classes for check in checks] == ([150] if is_ade20k else [])  # ReadMask checks by itself
    with torch.no_grad():
        model.eval()
        logits = model(torch.zeros(1, 3, 64, 96), mode='tensor')
    assert logits.shape == (1, classes, 16, 24)


@pytest.mark.parametrize('path', OURS, ids=name)
def test_every_norm_is_synchronised(path):
    model = MODELS.build(Config.fromfile(path).model)
    norms = [m for m in model.modules() if isinstance(m, (_BatchNorm, nn.LayerNorm, nn.GroupNorm))]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)


@pytest.mark.parametrize('path', CONFIGS, ids=name)
def test_names_the_package_so_that_other_tools_can_run_it(path):
    classifier = []
    if path in IMAGENET:
        pytest.importorskip('mmpretrain')  # make test-upstream is without it
        classifier = ['mmseg_inceptionnext.models.classifier']
    expected = dict(imports=['mmseg_inceptionnext', *classifier], allow_failed_imports=False)
    assert Config.fromfile(path).custom_imports == expected


@pytest.mark.parametrize('path', BASELINES, ids=name)
def test_a_rival_runs(path):
    """That it costs what the paper prints is in test_complexity.py; that it also computes something, here."""
    model = MODELS.build(load(path).model).eval()
    with torch.no_grad():
        logits = model(torch.rand(1, 3, 64, 96), mode='tensor')
    assert logits.shape == (1, 150, 16, 24) and logits.std() > 0


@pytest.mark.parametrize('path', PAPER, ids=name)
def test_recipe_of_the_paper(path):
    """Sec. 4.2, A.2 and Table 10."""
    cfg = Config.fromfile(path)
    arch, upernet = path.stem[-1], path.parent.name == 'upernet'
    rates = dict(zip('atsb', (0.1, 0.2, 0.3, 0.4) if upernet else (0.1, 0.1, 0.2, 0.2), strict=True))
    assert cfg.model.backbone.arch == ARCHS[arch]
    assert cfg.model.backbone.drop_path_rate == rates[arch]
    release = 'https://github.com/sail-sg/inceptionnext/releases/download/model/'
    assert cfg.model.backbone.init_cfg == dict(
        type='Pretrained', checkpoint=f'{release}inceptionnext_{ARCHS[arch]}.pth'
    )
    optimizer, iterations = cfg.optim_wrapper.optimizer, cfg.train_cfg.max_iters
    assert optimizer.type == 'AdamW'
    assert cfg.param_scheduler[-1].end == iterations and cfg.param_scheduler[-1].eta_min == 0
    if upernet:
        assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (6e-5, (0.9, 0.999), 0.01)
        assert iterations == 160000 and cfg.train_dataloader.batch_size == 2
        assert cfg.param_scheduler[0] == dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500)
        assert cfg.param_scheduler[-1].power == 1.0
        head, auxiliary = cfg.model.decode_head, cfg.model.auxiliary_head
        assert (head.type, head.channels, head.pool_scales) == ('LateUpsampleUPerHead', 512, (1, 2, 3, 6))
        assert (auxiliary.type, auxiliary.channels, auxiliary.in_index) == ('FCNHead', 256, 2)
        assert auxiliary.loss_decode.loss_weight == 0.4
    else:
        assert (optimizer.lr, optimizer.weight_decay) == (2e-4, 1e-4)
        assert iterations == 40000 and cfg.train_dataloader.batch_size == 4
        assert cfg.param_scheduler[-1].power == 0.9
        assert (cfg.model.neck.out_channels, cfg.model.decode_head.channels) == (256, 128)
    assert cfg.train_dataloader.dataset.data_root == 'data/ade/ADEChallengeData2016'
    crop = next(t for t in cfg.train_dataloader.dataset.pipeline if t.type == 'RandomCrop')
    assert tuple(crop.crop_size) == tuple(cfg.model.data_preprocessor.size) == (512, 512)
    resizes = [t for t in cfg.test_dataloader.dataset.pipeline if 'Resize' in t.type]
    assert resizes[0] == dict(type='Resize', scale=(2048, 512), keep_ratio=True)
    assert resizes[1:] == ([] if upernet else [dict(type='ResizeToMultiple', size_divisor=32)])
    assert cfg.model.test_cfg.mode == 'whole'


@pytest.mark.parametrize('arch', ARCHS)
def test_upernet_decays_all_but_the_norms_of_the_backbone(arch):
    cfg = load(ROOT / 'configs' / 'upernet' / f'inceptionnext_{arch}.py')
    model = MODELS.build(cfg.model)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    decay = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    exempt = {id(p) for m in model.backbone.modules() if isinstance(m, _BatchNorm) for p in m.parameters()}
    assert len(exempt) > 30
    for key, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0 if id(parameter) in exempt else 0.01), key


@pytest.mark.parametrize(
    ('config', 'millions'),
    [('upernet/inceptionnext_t', 56), ('upernet/inceptionnext_s', 78), ('upernet/inceptionnext_b', 115),
     ('fpn/inceptionnext_t', 28), ('fpn/inceptionnext_s', 50), ('fpn/inceptionnext_b', 85)],
)  # fmt: skip
def test_parameters_are_those_of_tables_6_and_7(config, millions):
    model = MODELS.build(load(ROOT / 'configs' / f'{config}.py').model)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
