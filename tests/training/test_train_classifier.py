"""Training and testing a classifier with the ImageNet recipe, on ten classes of textures."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support import ROOT, assert_user_error, variant
from textures import NAMES, make_textures

pytest.importorskip('mmpretrain')

from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import run_result, train

TINY = ROOT / 'tests' / 'configs' / 'imagenet_tiny.py'


@pytest.fixture(scope='module')
def textures(tmp_path_factory):
    return make_textures(tmp_path_factory.mktemp('textures') / 'root', train=3, val=1)


@pytest.mark.slow
def test_an_epoch_teaches_what_a_linear_classifier_does_not_learn(tmp_path):
    from sklearn.linear_model import RidgeClassifier

    root = make_textures(tmp_path / 'data', train=1280, val=20)
    options = {'train_dataloader.batch_size': 16}
    cfg = load_config(TINY, tmp_path / 'work', root, cfg_options=options)
    cfg.default_hooks.logger.interval = 50
    cfg.param_scheduler[0].end = cfg.param_scheduler[1].begin = 20
    cfg.param_scheduler[1].end = cfg.train_cfg.max_iters = cfg.train_cfg.val_interval = 800
    result = run_result(train(cfg, TrainOptions(seed=0)))
    assert result['metric'] == 'accuracy/top1' and result['best'] > 50

    def pixels(split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
        paths = [root / split / name / f'{i}.png' for name in NAMES for i in range(number)]
        images = [np.asarray(Image.open(path).convert('L').resize((32, 32))) / 255 for path in paths]
        return np.stack(images).reshape(len(paths), -1), np.repeat(np.arange(10), number)

    linear = RidgeClassifier().fit(*pixels('train', 1280))
    assert linear.score(*pixels('val', 20)) < 0.35


@pytest.mark.parametrize('auto_batch', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(auto_batch, textures, tmp_path):
    """With mixup or cutmix, random erasing, stochastic depth, dropout and moving averages."""
    # In a worker, augmentation does not seed the process that draws the mixtures.
    options = {'model.head.dropout': 0.5, 'model.backbone.drop_path_rate': 0.5, 'train_dataloader.num_workers': 1}
    whole = load_config(TINY, tmp_path / 'whole', textures, cfg_options=options)
    whole.train_dataloader.dataset.pipeline[5].erase_prob = 1.0
    whole.custom_hooks = [*whole.custom_hooks, dict(type='EMAHook', momentum=0.1, update_buffers=True)]
    resumed = variant(whole, tmp_path / 'resumed')
    runner = train(whole, TrainOptions(seed=3, auto_batch=auto_batch))
    assert runner.optim_wrapper._accumulative_counts == (2 if auto_batch else 1)
    checkpoint = str(tmp_path / 'whole' / 'iter_2.pth')
    np.random.seed(99)  # whatever the state of a new process is
    train(resumed, TrainOptions(resume=checkpoint, auto_batch=auto_batch))
    ends = [torch.load(tmp_path / name / 'iter_4.pth', weights_only=False) for name in ('whole', 'resumed')]
    for part in ('state_dict', 'ema_state_dict'):
        first, second = (end[part] for end in ends)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    start = torch.load(checkpoint, weights_only=False)['state_dict']
    assert not torch.equal(start['head.fc2.weight'], ends[0]['state_dict']['head.fc2.weight'])


def test_the_tools_train_test_and_go_on_from_other_classes(textures, tool_here, tmp_path):
    arguments = [TINY, '--data-root', textures]
    process = tool_here('train', *arguments, '--work-dir', tmp_path / 'a', '--epochs', '1', '--seed', '0')
    assert process.returncode == 0, process.stderr[-2000:]
    assert 'accuracy/top1' in process.stdout and 'Test it: ' in process.stdout
    assert 'InceptionNeXt + MlpClsHead' in process.stdout
    checkpoint = tmp_path / 'a' / 'iter_4.pth'
    process = tool_here('test', *arguments[:1], checkpoint, *arguments[1:], '--json', tmp_path / 'a.json')
    assert process.returncode == 0, process.stderr[-2000:]
    figures = json.loads((tmp_path / 'a.json').read_text())
    assert set(figures) == {'accuracy/top1', 'accuracy/top5'} and 0 <= figures['accuracy/top1'] <= 100

    small = tmp_path / 'small'
    for split in ('train', 'val'):
        for name in NAMES[:5]:
            shutil.copytree(textures / split / name, small / split / name)
    arguments = [TINY, '--data-root', small, '--cfg-options', 'model.head.num_classes=5']
    assert_user_error(
        tool_here('test', TINY, checkpoint, *arguments[1:]), 'has 10 classes, the config 5: set model.head.num_classes'
    )
    process = tool_here('train', *arguments, '--work-dir', tmp_path / 'b', '--weights', checkpoint)
    assert process.returncode == 0, process.stderr[-2000:]
    assert 'left out: its classifier of 10 classes, as there are 5 here' in process.stdout


def test_an_image_that_cannot_be_read_is_named_or_replaced(textures, tool_here, tmp_path):
    root = tmp_path / 'damaged'
    shutil.copytree(textures, root)
    for name in NAMES[:5]:
        (root / 'train' / name / '0.png').write_bytes(b'no image')
    arguments = ['train', TINY, '--data-root', root, '--epochs', '2', '--seed', '0']
    assert_user_error(tool_here(*arguments, '--work-dir', tmp_path / 'a'), 'damaged/train', '0.png', 'start again with')
    process = tool_here(*arguments, '--work-dir', tmp_path / 'b', '--skip-bad-images')
    assert process.returncode == 0, process.stderr[-2000:]
    assert '5 training images cannot be read; others replaced them' in process.stdout


def test_timms_weights_are_tested(textures, tool_here, tmp_path):
    torch.save(timm.create_model('inception_next_atto', num_classes=10).state_dict(), tmp_path / 'timm.pth')
    options = ['--cfg-options', 'model.head.num_classes=10', 'test_dataloader.num_workers=0']
    process = tool_here('test', 'imagenet/inceptionnext_a', tmp_path / 'timm.pth', '--data-root', textures, *options)
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.splitlines()[-1].startswith('accuracy/top1 ')


def test_the_backbone_of_another_classifier_is_loaded_whole_or_not_at_all(textures, tool_here, tmp_path):
    config, weights = tmp_path / 'own.py', tmp_path / 'timm.pth'
    config.write_text(
        f"_base_ = '{TINY}'\nmodel = dict(_delete_=True, type='ImageClassifier',\n"
        "    data_preprocessor=dict(mean=[0, 0, 0], std=[255, 255, 255]), neck=dict(type='GlobalAveragePooling'),\n"
        "    backbone=dict(type='InceptionNeXt', arch='atto', out_indices=(-1,), out_norm=False),\n"
        "    head=dict(type='LinearClsHead', num_classes=10, in_channels=320))\n"
    )
    arguments = ['train', config, '--data-root', textures, '--work-dir', tmp_path / 'work', '--weights', weights]
    torch.save(timm.create_model('inception_next_tiny').state_dict(), weights)
    assert_user_error(tool_here(*arguments), 'does not fit the backbone (this is inception_next_tiny)')
    torch.save(timm.create_model('inception_next_atto').state_dict(), weights)
    process = tool_here(*arguments, '--dry-run')
    assert process.returncode == 0 and 'tensors into the backbone' in process.stdout, process.stderr[-2000:]


def test_a_dry_run_says_what_a_run_costs(textures, tool_here, tmp_path):
    process = tool_here(
        'train', TINY, '--data-root', textures, '--work-dir', tmp_path / 'work', '--auto-batch', '--dry-run'
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert '16 = 1 × 8 × 2' in process.stdout and not list((tmp_path / 'work').glob('*.pth'))


@pytest.mark.parametrize(
    ('options', 'parts'),
    [
        (['--data-root', 'missing'], ['no data set at ', 'missing', 'pass --data-root DIR']),
        (['--data-root', '.'], ['no folder ', '/train in the data set']),
        (['--data-root', 'flat'], ['flat/train has no folders of classes']),
        (['--data-root', 'eleven'], ['num_classes is 10, but', 'eleven/train has 11 folders', 'num_classes=11']),
        (['--data-root', 'other'], ['other/val has other classes than ', "such as 'blobs'"]),
        (['--data-root', 'empty'], ['empty/train/rows has no image']),
        (['--data-root', 'root', '--cfg-options', 'val_evaluator.topk=20'], ['topk=20 needs as many classes']),
        (['--data-root', 'root', '--finetune', 'x.pth'], ['--finetune x.pth is for segmentors', '--weights x.pth']),
        (['--data-root', 'root', '--class-weights', 'auto'], ['--class-weights auto is for segmentors']),
        (['--data-root', 'root', '--strategy', 'fsdp'], ['--strategy fsdp is for segmentors']),
        (['--data-root', 'root', '--data', 'd.yaml'], ['--data d.yaml is for segmentors']),
    ],
    ids=lambda value: ' '.join(value[:4]),
)  # fmt: skip
def test_mistakes(options, parts, textures, tool_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(textures, 'root')
    for name in ('flat', 'eleven', 'other', 'empty'):
        shutil.copytree(textures, name)
    shutil.rmtree('flat/train')
    (tmp_path / 'flat' / 'train').mkdir()
    shutil.copytree('eleven/train/rows', 'eleven/train/more')
    (tmp_path / 'other' / 'val' / 'blobs').rename(tmp_path / 'other' / 'val' / 'spots')
    shutil.rmtree('empty/train/rows')
    (tmp_path / 'empty' / 'train' / 'rows').mkdir()
    assert_user_error(tool_here('train', TINY, '--work-dir', 'work', *options), *parts)


@pytest.mark.parametrize(
    'option',
    [['--tta'], ['--out', 'out'], ['--show-dir', 'out'], ['--report', 'out'], ['--temperature', 'fit'],
     ['--precision', 'bf16']],
    ids=' '.join,
)  # fmt: skip
def test_what_is_for_segmentors_is_refused(option, textures, tool_here, tmp_path):
    process = tool_here('test', TINY, tmp_path / 'x.pth', '--data-root', textures, *option)
    assert_user_error(process, ' '.join(option[:1]), 'is for segmentors')
