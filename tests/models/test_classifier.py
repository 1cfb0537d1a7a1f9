"""ImageNet classifiers: the recipes of Table 9, parity with timm, and weights in and out."""

import subprocess
import sys

import pytest
import timm
import torch
from mmengine.optim import build_optim_wrapper
from support import ROOT, assert_user_error

pytest.importorskip('mmpretrain')

from mmseg_inceptionnext.config import load_config, read_config
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.hub import get_model
from mmseg_inceptionnext.measure.complexity import measure_complexity
from mmseg_inceptionnext.models.build import build_segmentor
from mmseg_inceptionnext.models.weights import load_classifier, load_pretrained

TINY = ROOT / 'tests' / 'configs' / 'imagenet_tiny.py'
TIMM = {'a': 'atto', 't': 'tiny', 's': 'small', 'b': 'base', 'b_384': 'base'}


def classifier(name: str, **changes):
    cfg = read_config(f'imagenet/inceptionnext_{name}')
    cfg.merge_from_dict(changes)
    return build_segmentor(cfg).eval()


@pytest.mark.parametrize('name', TIMM)
def test_logits_are_timms_with_its_weights(name, tmp_path):
    torch.manual_seed(1)
    theirs = timm.create_model(f'inception_next_{TIMM[name]}', pretrained=False).eval()
    torch.nn.init.normal_(theirs.head.fc2.weight)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
        if hasattr(module, 'gamma'):
            module.gamma.data.uniform_(0.1, 0.5)
    torch.save(theirs.state_dict(), tmp_path / 'timm.pth')
    ours = classifier(name)
    load_classifier(ours, tmp_path / 'timm.pth')
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        expected = theirs(x)
        assert torch.equal(ours(x), expected) and expected.std() > 0.1


@pytest.mark.parametrize(
    ('name', 'drop_path', 'dropout', 'mixup', 'augment', 'erase', 'lr', 'batch', 'epochs', 'warmup'),
    [
        ('a', 0.1, 0.0, 0.2, (5, 'inf'), 0.1, 1e-3, 1280, 450, 5),
        ('t', 0.1, 0.0, 0.8, (9, 0.5), 0.25, 4e-3, 4096, 300, 20),
        ('s', 0.3, 0.0, 0.8, (9, 0.5), 0.25, 4e-3, 4096, 300, 20),
        ('b', 0.4, 0.0, 0.8, (9, 0.5), 0.25, 4e-3, 4096, 300, 20),
        ('b_384', 0.7, 0.5, 0.8, (9, 0.5), 0.25, 5e-5, 1024, 30, None),
    ],
)  # fmt: skip
def test_recipes_are_those_of_table_9(name, drop_path, dropout, mixup, augment, erase, lr, batch, epochs, warmup):
    cfg = read_config(f'imagenet/inceptionnext_{name}')
    model = build_segmentor(cfg)
    blocks = [block for stage in model.backbone.stages for block in stage.blocks]
    assert blocks[-1].drop_path.drop_prob == pytest.approx(drop_path)
    assert all((block.gamma == 1e-6).all() for block in blocks)
    assert model.head.drop.p == dropout
    assert model.head.loss_module.label_smooth_val == 0.1
    augments = model.data_preprocessor.batch_augments
    assert [type(augment).__name__ for augment in augments.augments] == ['Mixup', 'CutMix']
    assert [augment.alpha for augment in augments.augments] == [mixup, 1.0] and augments.probs is None
    transforms = {transform.type: transform for transform in cfg.train_dataloader.dataset.pipeline}
    side, policy = 384 if name == 'b_384' else 224, transforms['RandAugment']
    assert (policy.magnitude_level, policy.magnitude_std) == augment
    assert transforms['RandomErasing'].erase_prob == erase
    assert transforms['RandomResizedCrop'].scale == cfg.test_dataloader.dataset.pipeline[-2].crop_size == side
    assert cfg.auto_scale_lr.base_batch_size == batch and 'clip_grad' not in cfg.optim_wrapper
    assert (cfg.train_cfg.max_iters - 1) * batch < epochs * 1281167
    assert cfg.train_cfg.max_iters * batch >= epochs * 1281167
    assert cfg.param_scheduler[0].end == (-(-warmup * 1281167 // batch) if warmup else 37535)
    assert [s.type for s in cfg.param_scheduler] == ['LinearLR'] * (name != 'b_384') + ['CosineAnnealingLR']
    ema = [hook for hook in cfg.custom_hooks if hook.type == 'EMAHook']
    assert [hook.momentum for hook in ema] == ([1e-4] if name == 'b_384' else [])
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group['lr'], group['betas'], group['eps']) == (lr, (0.9, 0.999), 1e-8)
        assert {group['weight_decay']} == {0.05 if p.ndim > 1 else 0.0 for p in group['params']}


def test_mixed_labels_and_a_gradient_for_every_parameter():
    from mmpretrain.structures import DataSample

    model = build_segmentor(read_config(TINY)).train()
    data = dict(
        inputs=torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8),
        data_samples=[DataSample().set_gt_label(i) for i in range(4)],
    )
    prepared = model.data_preprocessor(data, training=True)
    scores = torch.stack([sample.gt_score for sample in prepared['data_samples']])
    assert scores.shape == (4, 10) and torch.allclose(scores.sum(1), torch.ones(4))
    model.loss(**prepared)['loss'].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_what_it_trains_loads_into_a_segmentor(tmp_path, caplog):
    model = build_segmentor(read_config('imagenet/inceptionnext_a'))
    torch.nn.init.normal_(model.backbone.stages[0].blocks[0].gamma)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'iter_1.pth')
    cfg = read_config('upernet/inceptionnext_a')
    cfg.model.backbone.init_cfg = None
    segmentor = build_segmentor(cfg)
    load_pretrained(segmentor.backbone, tmp_path / 'iter_1.pth')
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(segmentor.backbone.state_dict()[key], value), key


def test_of_other_classes_all_but_the_classifier_is_taken_over(tmp_path, capsys):
    source = classifier('a')
    torch.save(source.state_dict(), tmp_path / 'thousand.pth')
    model = classifier('a', **{'model.head.num_classes': 10})
    before = model.head.fc2.weight.clone()
    with pytest.raises(UserError, match='has 1000 classes, the config 10: set model.head.num_classes'):
        load_classifier(model, tmp_path / 'thousand.pth')
    model.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'thousand.pth'))
    model.init_weights()
    assert torch.equal(model.head.fc2.weight, before)
    assert torch.equal(model.head.fc1.weight, source.head.fc1.weight)
    assert torch.equal(model.backbone.stem[0].weight, source.backbone.stem[0].weight)


def _atto_without(key):
    state_dict = timm.create_model('inception_next_atto').state_dict()
    return {name: value for name, value in state_dict.items() if name != key}


@pytest.mark.parametrize(
    ('make', 'parts'),
    [
        (lambda: timm.create_model('inception_next_tiny').state_dict(), 'this is inception_next_tiny'),
        (lambda: timm.create_model('convnext_atto').state_dict(), 'this is no InceptionNeXt'),
        (lambda: _atto_without('head.norm.weight'), 'head.norm.weight'),
        (lambda: _atto_without('stem.1.bias'), 'backbone.stem.1.bias'),
        (lambda: dict(state_dict={}), 'holds no tensors'),
        (lambda: _atto_without('') | {'head.fc2.weight': torch.tensor(1.0)}, 'head.fc2.weight is'),
    ],
    ids=['other arch', 'other network', 'no norm', 'no stem', 'empty', 'a scalar'],
)  # fmt: skip
def test_weights_load_all_or_not_at_all(make, parts, tmp_path):
    torch.save(make(), tmp_path / 'x.pth')
    model = classifier('a')
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=parts):
        load_classifier(model, tmp_path / 'x.pth', finetune=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_without_mmpretrain_a_line_names_the_extra(tmp_path):
    code = (
        "import sys; sys.modules['mmpretrain'] = None; import runpy; sys.argv = ['train', 'imagenet/inceptionnext_t']; "
        f"runpy.run_path({str(ROOT / 'tools' / 'train.py')!r}, run_name='__main__')"
    )
    process = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert_user_error(process, 'need mmpretrain', 'pip install mmseg-inceptionnext[imagenet]')


def test_the_384_recipe_starts_from_the_one_at_224(tmp_path):
    cfg = load_config('imagenet/inceptionnext_b_384', tmp_path)
    assert cfg.model.init_cfg.checkpoint.endswith('inceptionnext_base.pth')


def test_a_head_that_does_not_fit_the_backbone_is_a_line():
    with pytest.raises(UserError, match='head.in_channels=768 do not fit InceptionNeXt, whose out_channels are 1024'):
        classifier('t', **{'model.backbone.arch': 'base'})


def test_what_counts_and_builds_models_takes_its_configs():
    cost = measure_complexity('imagenet/inceptionnext_a')
    assert cost.shape == (224, 224) and (round(cost.params_m, 1), round(cost.gmacs, 2)) == (4.2, 0.50)
    assert measure_complexity('imagenet/inceptionnext_b_384').shape == (384, 384)
    assert type(get_model('imagenet/inceptionnext_a', device='cpu')).__name__ == 'ImageNetClassifier'


@pytest.mark.parametrize(
    'arguments',
    [['export', 'CONFIG', 'x.pth', '--out', 'x.onnx'],
     ['check_dataset', 'CONFIG'], ['benchmark', 'CONFIG'], ['benchmark', 'CONFIG', '--task', 'train']],
    ids=' '.join,
)  # fmt: skip
def test_what_is_for_segmentors_says_so(arguments, tool_here, tmp_path):
    (tmp_path / 'a.png').touch()
    process = tool_here(*(TINY if word == 'CONFIG' else word for word in arguments))
    assert_user_error(process, 'imagenet_tiny.py is the config of a classifier: name that of a segmentor')
