"""From a data file to label maps: every form of masks, through training, evaluation, prediction and export."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image
from support import ROOT, TINY_CONFIG, TINY_UPERNET, assert_user_error

from mmseg_inceptionnext import Segmentor, UserError
from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.config_files import heads
from mmseg_inceptionnext.data.check import list_samples, open_dataset
from mmseg_inceptionnext.data.class_weights import losses_of, use_class_weights
from mmseg_inceptionnext.data.data_file import read_data_file
from mmseg_inceptionnext.data.mask_dataset import MaskDataset
from mmseg_inceptionnext.evaluation import evaluate
from mmseg_inceptionnext.export import export
from mmseg_inceptionnext.models.build import build_segmentor
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import run_result, train

SIZE = (48, 64)


def labels_of(index: int) -> np.ndarray:
    """Four stripes, labels 0 to 3, that move from image to image."""
    return (np.arange(SIZE[1])[None] + 7 * index + np.zeros((SIZE[0], 1), int)) // 16 % 4


@dataclass
class Form:
    """A way to store masks, and the data file for it.

    Attributes:
        store: Turns labels 0 … 3 into the image of a mask.
        content: What the data file says besides the folders.
        truth: Class of each stored value; None where it is ignored.
    """

    store: Callable[[np.ndarray], Image.Image]
    content: dict
    truth: dict = field(default_factory=dict)
    image_name: str = '{}.jpg'
    mask_name: str = '{}.png'
    masks: str = 'masks/{}'
    splits: tuple = ('train', 'val')
    channels: int = 3


def ids(*values, dtype=np.uint8):
    return lambda labels: Image.fromarray(np.array(values, dtype)[labels])


def colours(labels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.array([[0, 0, 0], [255, 0, 0], [0, 128, 255], [9, 9, 9]], np.uint8)[labels])


def palette(labels: np.ndarray) -> Image.Image:
    return colours(labels).convert('P', palette=Image.Palette.ADAPTIVE, colors=4)


COLOUR_CLASSES = {
    0: {'name': 'ground', 'labels': [[0, 0, 0]]},
    1: {'name': 'roof', 'labels': [[255, 0, 0], [0, 128, 255]], 'color': [200, 0, 0]},
}
COLOURS = {(0, 0, 0): 0, (255, 0, 0): 1, (0, 128, 255): 1, (9, 9, 9): None}
FOUR = dict(classes=list('abcd'))
FORMS = {
    'binary 0/255': Form(ids(0, 255, 0, 255), dict(classes={0: 'off', 255: 'on'}), {0: 0, 255: 1}),
    'ignored id': Form(ids(0, 1, 2, 11), dict(classes=list('abc'), ignore_classes=[11]), {0: 0, 1: 1, 2: 2, 11: None}),
    'ignored class': Form(ids(0, 1, 2, 3), dict(FOUR, ignore_classes=[0]), {0: None, 1: 0, 2: 1, 3: 2}),
    'merged': Form(
        ids(3, 4, 7, 255),
        dict(classes={1: {'name': 'vehicle', 'labels': [3, 4]}, 7: 'road'}),
        {3: 0, 4: 0, 7: 1, 255: None},
    ),
    'colours': Form(colours, dict(classes=COLOUR_CLASSES, ignore_classes=[[9, 9, 9]]), COLOURS),
    'palette': Form(palette, dict(classes=COLOUR_CLASSES, ignore_classes=[[9, 9, 9]]), COLOURS),
    '16 bits': Form(
        ids(0, 300, 65535, 40000, dtype=np.uint16),
        dict(classes={0: 'a', 300: 'b', 65535: 'c'}, ignore_classes=[40000]),
        {0: 0, 300: 1, 65535: 2, 40000: None},
    ),
    'suffixes': Form(
        ids(0, 1, 2, 3), FOUR, {i: i for i in range(4)}, image_name='sub/{}.JPEG', mask_name='sub/{}.TIF'
    ),
    'template': Form(
        ids(0, 1, 2, 3), FOUR, {i: i for i in range(4)}, image_name='{}.png', mask_name='{}_mask.png',
        masks='{{image_path.parent}}/{{image_path.stem}}_mask.png',
    ),
    'held out': Form(ids(0, 1, 2, 3), FOUR, {i: i for i in range(4)}, splits=('train',)),
    'four channels': Form(
        ids(0, 1, 2, 3), dict(FOUR, channels=4), {i: i for i in range(4)}, image_name='{}.png', channels=4
    ),
    'one channel': Form(
        ids(0, 1, 2, 3), dict(FOUR, channels=1), {i: i for i in range(4)}, image_name='{}.png', channels=1
    ),
    'ultralytics': Form(
        ids(7, 8, 0, 255),
        dict(names={0: 'road', 1: 'walk'}, masks_dir='masks', label_mapping={-1: 255, 0: 'ignore_label', 7: 0, 8: 1}),
        {7: 0, 8: 1, 0: None, 255: None},
    ),
    'ultralytics, ignored': Form(
        ids(0, 1, 2, 7), dict(names=list('abc'), masks_dir='masks', ignore_classes=[0, 7]),
        {0: None, 1: 0, 2: 1, 7: None},
    ),
}  # fmt: skip


def write(root, form: Form, number: int = 6) -> dict:
    """Write images and masks of a form; return the content of its data file."""
    content = dict(path=str(root), **form.content)
    for split in form.splits:
        is_template = '{{' in form.masks
        folder = root / 'images' / split
        mask_folder = folder if is_template else root / 'masks' / split
        for i in range(number):
            labels = labels_of(i + 10 * (split == 'val'))
            pixels = np.random.default_rng(i).integers(256, size=(*SIZE, form.channels), dtype=np.uint8)
            pixels[..., 0] = 60 * labels
            for base, name, image in (
                (folder, form.image_name, Image.fromarray(pixels.squeeze())),
                (mask_folder, form.mask_name, form.store(labels)),
            ):
                path = base / name.format(i)
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path, **({'quality': 95} if path.suffix.lower() in ('.jpg', '.jpeg') else {}))
        masks = form.masks.format(split)
        content[split] = f'images/{split}' if 'names' in content else dict(images=f'images/{split}', masks=masks)
    return content


def options(**changes) -> dict:
    return {'train_cfg.max_iters': 2, 'train_cfg.val_interval': 2, **changes}


def scored(pairs, form: Form) -> float:
    """Return the mIoU of label maps against masks, counted pixel by pixel."""
    number = max(label for label in form.truth.values() if label is not None) + 1
    hit, union = np.zeros(number), np.zeros(number)
    for mask, prediction in pairs:
        for stored, label in form.truth.items():
            if label is None:
                continue
            at = (mask == stored).all(-1) if np.ndim(stored) else mask == stored
            guess = prediction[at]
            codes = {other: code for other, code in form.truth.items() if code is not None}
            classes = np.full(len(guess), -1)
            for other, code in codes.items():
                classes[(guess == other).all(-1) if np.ndim(other) else guess == other] = code
            assert (classes >= 0).all()  # label maps hold what masks hold
            hit[label] += (classes == label).sum()
            union[label] += len(guess)
            for code in range(number):
                if code != label:
                    union[code] += (classes == code).sum()
    return float(np.nanmean(hit / np.where(union, union, np.nan)) * 100)


def as_stored(path, form: Form) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert('RGB') if any(np.ndim(code) for code in form.truth) else image)


# Much like others.
SLOW = (
    'ignored id', 'palette', 'one channel', 'suffixes', 'ignored class', 'ultralytics', 'ultralytics, ignored',
    'template', 'held out', 'four channels', '16 bits', 'merged', 'binary 0/255',
)  # fmt: skip


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FORMS]
)
def test_written_label_maps_score_the_reported_miou(tmp_path, name):
    form = FORMS[name]
    content = write(tmp_path / 'data', form, number=12 if name == 'held out' else 6)
    cfg = load_config(TINY_CONFIG, tmp_path / 'work', data=content, cfg_options=options())
    end = run_result(train(cfg, TrainOptions(weights='none', seed=0)))

    cfg = load_config(end['config'], tmp_path / 'work')  # without the data file
    figures = evaluate(cfg, end['checkpoint'], out=tmp_path / 'out', report=tmp_path / 'report')
    dataset = MaskDataset(**{k: v for k, v in cfg.test_dataloader.dataset.items() if k != 'type'} | dict(pipeline=[]))
    samples = [dataset.get_data_info(i) for i in range(len(dataset))]
    pairs = [
        (as_stored(s['seg_map_path'], form), as_stored(tmp_path / 'out' / f'{stem(s["img_path"])}.png', form))
        for s in samples
    ]
    assert pairs and scored(pairs, form) == pytest.approx(figures['mIoU'], abs=0.006)

    segmentor = Segmentor(end['config'], end['checkpoint'], precision='fp32')
    assert np.array_equal(np.asarray(segmentor(samples[0]['img_path']).label_image()), pairs[0][1])
    if name in ('four channels', 'one channel', 'colours', '16 bits'):
        export(end['config'], end['checkpoint'], tmp_path / 'm.onnx', shape=(64, 64), dynamic=True, verify=1)
        again = Segmentor(tmp_path / 'm.onnx')(samples[0]['img_path'])
        assert np.array_equal(np.asarray(again.label_image()), pairs[0][1])


def stem(path: str) -> str:
    return path.rpartition('/')[2].rpartition('.')[0]


@pytest.mark.slow
def test_more_than_255_classes(tmp_path):
    """Where 255 is a class, the label of ignored pixels is another."""
    classes = {i: f'class {i}' for i in range(300)}
    form = Form(ids(0, 255, 299, 400, dtype=np.uint16), dict(classes=classes, ignore_classes=[400]),
                {**{i: i for i in range(300)}, 400: None})  # fmt: skip
    content = write(tmp_path / 'data', form, number=2)
    alone = dict(num_workers=0, persistent_workers=False)
    changes = {f'{split}_dataloader.{key}': value for split in ('train', 'val') for key, value in alone.items()}
    changes['train_dataloader.batch_size'] = 2
    cfg = load_config(TINY_UPERNET, tmp_path / 'work', data=content, cfg_options=options(**changes))
    assert [head.num_classes for head in (cfg.model.decode_head, cfg.model.auxiliary_head)] == [300, 300]
    assert cfg.model.decode_head.ignore_index == cfg.val_evaluator.ignore_index == 65535
    end = run_result(train(cfg, TrainOptions(weights='none', seed=0)))
    cfg = load_config(end['config'], tmp_path / 'work')
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    figures = evaluate(cfg, end['checkpoint'], out=tmp_path / 'out', report=tmp_path / 'report')
    pairs = [(as_stored(tmp_path / f'data/masks/val/{i}.png', form), as_stored(tmp_path / f'out/{i}.png', form))
             for i in range(2)]  # fmt: skip
    assert scored(pairs, form) == pytest.approx(figures['mIoU'], abs=0.006)


def test_a_data_file_is_relative_to_its_folder(tmp_path, monkeypatch):
    write(tmp_path / 'data', FORMS['ignored id'])
    (tmp_path / 'files').mkdir()
    (tmp_path / 'files' / 'd.yaml').write_text(
        'path: ../data\ntrain: {images: images/train, masks: masks/train}\n'
        'val: {images: images/val, masks: masks/val}\n'
        'classes: [a, b, c]\nignore_classes: [11]\n'
    )
    monkeypatch.chdir(tmp_path / 'files')
    for name in ('d.yaml', tmp_path / 'files' / 'd.yaml'):
        assert read_data_file(name).path.resolve() == (tmp_path / 'data').resolve()
    (tmp_path / 'data' / 'own.yaml').write_text(
        (tmp_path / 'files' / 'd.yaml').read_text().replace('path: ../data\n', '')
    )
    assert read_data_file(tmp_path / 'data' / 'own.yaml').path == tmp_path / 'data'


SPLITS = dict(train=dict(images='images/train', masks='masks/train'), val=dict(images='images/val', masks='masks/val'))


@pytest.mark.parametrize(
    ('change', 'parts'),
    [
        (dict(clases=['a']), ("unknown key 'clases'", 'did you mean classes')),
        (dict(classes=None), ('classes',)),
        (dict(classes=['a', 'a']), ("two classes have the name 'a'",)),
        (dict(classes={0: 'a', '0': 'b'}), ('0',)),
        (dict(classes={0: {'name': 'a', 'labels': [1]}, 1: {'name': 'b', 'labels': [1]}}), ('1 belongs to two',)),
        (dict(classes={0: {'name': 'a', 'labels': [[1, 2]]}}), ('[1, 2] is not a colour',)),
        (dict(classes={0: {'name': 'a', 'labels': [[1, 2, 300]]}}), ('[1, 2, 300] is not a colour',)),
        (dict(classes={0: {'name': 'a', 'label': [1]}}), ("'label'", 'did you mean labels')),
        (dict(classes={0: {'name': 'a', 'labels': [1]}, 1: {'name': 'b', 'labels': [[1, 2, 3]]}}), ('either',)),
        (dict(classes={0: {'name': 'a', 'color': [1, 2]}}), ('[1, 2] is not a colour',)),
        (dict(classes='water'), ('water', 'JSON')),
        (dict(classes={70000: 'a'}), ('70000', 'not an id')),
        (dict(ignore_classes=11), ('ignore_classes: 11 is not a list',)),
        (dict(ignore_classes=['sky']), ("'sky' is not an id",)),
        (dict(path='nowhere'), ('there is no folder', 'nowhere')),
        (dict(train=dict(images='images/train')), ('train.masks is missing',)),
        (dict(train=dict(images='images/trian', masks='masks/train')), ('train.images: there is no folder', 'trian')),
        (dict(train=dict(images='images/train', masks='m/{image.stem}.png')), ('train.masks', 'template')),
        (dict(train=dict(images='images/train', masks='m/{image_path.parent}.png')), ('same for every image',)),
        (dict(train=dict(images='images/train', masks='{image_path.__class__}{image_path.stem}')), ('template',)),
        (dict(train=dict(images='images/train', mask='x')), ('did you mean masks',)),
        (dict(train='images/train'), ('train', 'images: FOLDER')),
        (dict(val_fraction=0.1), ('both val and val_fraction',)),
        (dict(val=None, val_fraction=1.5), ('val_fraction: 1.5',)),
        (dict(channels=0), ('channels: 0',)),
        (dict(names=['a']), ('both names and classes',)),
        (dict(masks_dir='m'), ('masks_dir goes with names',)),
        (dict(ignore_classes=[[0, 0, 0]]), ('ignore_classes: [0, 0, 0] is a colour, but the classes are ids',)),
        (dict(classes={255: 'crack'}), ("'crack' is the only one", 'background')),
        (dict(classes=['a', 'b'], ignore_classes=[1]), ("'a' is the only one",)),
        (dict(train=dict(SPLITS['train'], list='no.txt')), ('train.list: there is no file', 'no.txt')),
        (dict(train=dict(SPLITS['train'], list=['a'])), ("train.list: ['a'] is not a path",)),
    ],
    ids=str,
)
def test_bad_data_files_end_in_one_line(tmp_path, change, parts):
    write(tmp_path, FORMS['ignored id'])
    content = dict(path=str(tmp_path), **SPLITS, classes=['a', 'b', 'c'], ignore_classes=[11], **{}) | change
    if 'path' in change:
        content['path'] = str(tmp_path / change['path'])
    with pytest.raises(UserError) as error:
        read_data_file({key: value for key, value in content.items() if value is not None or key == 'classes'})
    assert '\n' not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize('text', ['classes: [a', '- a\n- b\n', '', b'\xff\xfe'.decode('latin1')])
def test_a_file_that_is_no_yaml(tmp_path, tool_here, text):
    (tmp_path / 'd.yaml').write_text(text)
    assert_user_error(tool_here('train', TINY_CONFIG, '--data', 'd.yaml'), 'd.yaml')


def test_an_id_that_is_not_named_stops_a_training_before_it_starts(tmp_path, tool_here):
    content = write(tmp_path / 'data', FORMS['ignored class']) | dict(classes=list('abc'))
    content.pop('ignore_classes')
    cfg = load_config(TINY_CONFIG, tmp_path / 'work', data=content, cfg_options=options())
    with pytest.raises(UserError, match=r'id 3 is on 25\.00% of the pixels, in 6 of 6 masks') as error:
        train(cfg, TrainOptions(weights='none'))
    assert 'ignore_classes: [3]' in str(error.value) and 'ignore_classes: [0]' in str(error.value)
    assert not list((tmp_path / 'work').glob('*.pth'))
    content = write(tmp_path / 'data', FORMS['ignored id'])
    content.pop('ignore_classes')
    with pytest.raises(UserError, match=r'id 11 is on .* add it to classes, or `ignore_classes: \[11\]`'):
        train(load_config(TINY_CONFIG, tmp_path / 'work', data=content), TrainOptions(weights='none'))


def test_a_list_of_names(tmp_path):
    content = write(tmp_path / 'data', FORMS['suffixes'], number=9)
    (tmp_path / 'data/masks/train/sub/7.TIF').unlink()  # as most of VOC's images have none
    for split, names in (('train', 'sub/2\n\nsub/0\r\nsub/2'), ('val', 'sub/8')):
        (tmp_path / f'data/{split}.txt').write_text(names)
        content[split] = dict(SPLITS['train'], list=f'{split}.txt')
    cfg = load_config(TINY_CONFIG, tmp_path / 'work', data=content)
    found = {}
    for split in ('train', 'val', 'test'):
        dataset = open_dataset(cfg[f'{split}_dataloader'].dataset)
        found[split] = [Path(sample['img_path']).name for sample in list_samples(dataset)]
        assert dataset.list_masks() == {sample['seg_map_path'] for sample in list_samples(dataset)}
    assert found == dict(train=['0.JPEG', '2.JPEG'], val=['8.JPEG'], test=['8.JPEG'])
    for line, message in (('sub/77', "has no image 'sub/77'"), ('sub/2.JPEG', "has no image 'sub/2.JPEG'")):
        (tmp_path / 'data/val.txt').write_text(line)
        with pytest.raises(UserError, match=message):
            load_config(TINY_CONFIG, tmp_path / 'work', data=content)


def test_weights_of_other_classes_are_left_out(tmp_path):
    """Eleven classes, as CamVid has: weights by their place would be taken for theirs."""
    content = write(tmp_path / 'data', FORMS['ignored id'])
    eleven = content | dict(classes=[f'class {i}' for i in range(11)])

    def weights(cfg) -> list:
        return [losses_of(head)[0].get('class_weight') for _, head in heads(cfg.model)]

    assert all(len(found) == 11 for found in weights(load_config('camvid/fpn_a', tmp_path / 'w')))
    assert weights(load_config('camvid/fpn_a', tmp_path / 'w', data=content)) == [None, None]
    cfg = load_config('camvid/fpn_a', tmp_path / 'w', data=eleven)
    assert weights(cfg) == [None, None]

    use_class_weights(cfg, {f'class {i}': i + 1 for i in range(11)})
    own = weights(cfg)
    cfg.dump(tmp_path / 'saved.py')  # as a run does
    assert weights(load_config(tmp_path / 'saved.py', tmp_path / 'w', data=eleven)) == own
    others = eleven | dict(classes=[f'other {i}' for i in range(11)])
    assert weights(load_config(tmp_path / 'saved.py', tmp_path / 'w', data=others)) == [None, None]

    (tmp_path / 'own.py').write_text(
        f'_base_ = {str(ROOT / "configs/camvid/fpn_a.py")!r}\n'
        'model = dict(decode_head=dict(loss_decode=dict(class_weight=[1.0, 2.0, 3.0])))\n'
    )
    assert weights(load_config(tmp_path / 'own.py', tmp_path / 'w', data=content)) == [[1, 2, 3], None]
    cfg = load_config(tmp_path / 'own.py', tmp_path / 'w', data=eleven)
    with pytest.raises(UserError, match='class_weight of CrossEntropyLoss has 3 values for 11 classes'):
        train(cfg, TrainOptions(weights='none'))


def test_an_image_without_a_mask_and_a_mask_without_an_image_are_named(tmp_path, tool_here):
    write(tmp_path / 'data', FORMS['ignored id'])
    (tmp_path / 'data/masks/train/3.png').rename(tmp_path / 'data/masks/train/extra.png')
    (tmp_path / 'd.yaml').write_text(
        'path: data\ntrain: {images: images/train, masks: masks/train}\nval: {images: images/val, masks: masks/val}\n'
        'classes: [a, b, c]\nignore_classes: [11]\n'
    )
    process = tool_here('check_dataset', TINY_CONFIG, '--data', 'd.yaml', '--workers', '1')
    assert process.returncode == 1
    assert 'images/train/3.jpg: has no annotation' in process.stdout and 'extra.png' in process.stderr
    assert_user_error(tool_here('train', TINY_CONFIG, '--data', 'd.yaml'), '3.jpg', '1 of 6 images have no annotation')


@pytest.mark.parametrize(
    ('recipe', 'epochs'),
    [('upernet/inceptionnext_t', 127), ('camvid/upernet_a', 131), ('mini/fpn_inceptionnext_a', 75)],
)
def test_images_are_seen_as_often_as_the_recipe_sees_its_own(tmp_path, recipe, epochs):
    cfg = load_config(recipe, tmp_path / 'w', data=write(tmp_path / 'data', FORMS['ignored id']))
    assert cfg.epochs == epochs and 'train_images' not in cfg


def test_what_the_user_sets_wins(tmp_path):
    content = write(tmp_path / 'data', FORMS['ignored id'])
    cfg = load_config('fpn/inceptionnext_t', tmp_path / 'w', data=content)
    assert cfg.model.decode_head.num_classes == 3 and cfg.epochs == 63
    assert cfg.model.data_preprocessor.size == (32, 32)
    resize = [t.scale for t in cfg.test_dataloader.dataset.pipeline if t.type == 'Resize']
    assert resize == [(192, 48)]  # not blown up to 2048×512

    given = {
        'train_cfg.max_iters': 77,
        'model.backbone.arch': 'atto',
        'test_dataloader.dataset.pipeline.1.scale': (99, 50),
    }
    cfg = load_config('fpn/inceptionnext_t', tmp_path / 'w', data=content, cfg_options=given)
    assert cfg.train_cfg.max_iters == 77 and 'epochs' not in cfg
    assert cfg.model.neck.in_channels == [40, 80, 160, 320]
    assert tuple(cfg.test_dataloader.dataset.pipeline[1].scale) == (99, 50)

    own = tmp_path / 'own.py'
    own.write_text(
        "_base_ = 'mmseg_inceptionnext::upernet/inceptionnext_t.py'\n"
        'train_cfg = dict(max_iters=1234)\nmodel = dict(backbone=dict(arch="atto"))\n'
    )
    cfg = load_config(own, tmp_path / 'w', data=content)
    assert cfg.train_cfg.max_iters == 1234 and 'epochs' not in cfg
    assert cfg.model.decode_head.in_channels == [40, 80, 160, 320] and cfg.model.auxiliary_head.in_channels == 160
    assert cfg.model.auxiliary_head.num_classes == 3


def test_another_arch_of_the_family_keeps_neck_and_head_fitting(tmp_path):
    content = write(tmp_path / 'data', FORMS['merged'])
    options = {'model.backbone.type': 'MetaNeXt', 'model.backbone.arch': 'convnext_iso_small'}
    cfg = load_config('upernet/inceptionnext_t', tmp_path / 'w', data=content, cfg_options=options)
    assert cfg.model.decode_head.in_channels == [384] * 4
    assert build_segmentor(cfg).backbone.out_indices == (3, 8, 12, 17)


def test_a_cascade_gets_the_classes_in_every_head(tmp_path):
    content = write(tmp_path / 'data', FORMS['merged'])
    own = tmp_path / 'own.py'
    own.write_text(
        "_base_ = 'mmseg_inceptionnext::upernet/inceptionnext_t.py'\n"
        "bn = dict(type='BN')\n"
        "model = dict(_delete_=True, type='CascadeEncoderDecoder', num_stages=2,\n"
        '  data_preprocessor={{_base_.model.data_preprocessor}},\n'
        "  backbone=dict(type='InceptionNeXt', arch='atto'),\n"
        "  decode_head=[dict(type='FCNHead', in_channels=1, in_index=3, channels=16, num_classes=150, norm_cfg=bn),\n"
        "    dict(type='OCRHead', in_channels=1, in_index=3, channels=16, ocr_channels=8, num_classes=150)])\n"
    )
    cfg = load_config(own, tmp_path / 'w', data=content)
    assert [head.num_classes for head in cfg.model.decode_head] == [2, 2]
    assert [head.in_channels for head in cfg.model.decode_head] == [320, 320]


def test_held_out_images_are_stable(tmp_path):
    """Images that are added later move none from one part to the other."""
    form = FORMS['held out']

    def parts(number: int) -> list[set[str]]:
        content = write(tmp_path / 'data', form, number)
        cfg = load_config(TINY_CONFIG, tmp_path / 'w', data=dict(content, val_fraction=0.3))
        found = []
        for split in ('train', 'val'):
            dataset = cfg[f'{split}_dataloader'].dataset.to_dict() | dict(pipeline=[])
            dataset.pop('type')
            found.append({stem(sample['img_path']) for sample in MaskDataset(**dataset).load_data_list()})
        return found

    train_few, val_few = parts(20)
    train_many, val_many = parts(60)
    assert not train_few & val_few and len(train_few | val_few) == 20
    assert train_few <= train_many and val_few <= val_many and 6 <= len(val_many) <= 30


def test_images_of_one_name_are_named(tmp_path):
    content = write(tmp_path / 'data', FORMS['ignored id'])
    Image.new('RGB', SIZE[::-1]).save(tmp_path / 'data/images/train/3.png')
    with pytest.raises(UserError, match=r'3\.jpg and .*3\.png have the same name'):
        load_config(TINY_CONFIG, tmp_path / 'w', data=content)


@pytest.mark.slow
def test_camvid_by_its_data_file_alone(tmp_path):
    """Real photographs, from a folder outside the repository."""
    root = ROOT.parent / 'shared' / 'camvid'
    if not root.is_dir():
        pytest.skip('CamVid is not beside this checkout')
    names = 'Sky, Building, Pole, Road, Pavement, Tree, SignSymbol, Fence, Car, Pedestrian, Bicyclist'
    (tmp_path / 'camvid.yaml').write_text(
        f'path: {root}\ntrain: {{images: train, masks: trainannot}}\nval: {{images: val, masks: valannot}}\n'
        f'test: {{images: test, masks: testannot}}\nclasses: [{names}]\nignore_classes: [11]\n'
    )
    cfg = load_config('fpn/inceptionnext_t', tmp_path / 'w', data=tmp_path / 'camvid.yaml')
    assert isinstance(cfg, Config) and cfg.model.decode_head.num_classes == 11
    assert cfg.model.data_preprocessor.size == (352, 352)
