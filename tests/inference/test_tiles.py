"""Windows over an image: those of mmseg's slide inference, the same logits, and no more in memory than a row needs."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmseg.models.segmentors import EncoderDecoder
from mmseg.structures import SegDataSample
from support import TINY_CONFIG, TINY_UPERNET, peak_bytes

from mmseg_inceptionnext import LabelMapSegmentor
from mmseg_inceptionnext.inference.label_map_segmentor import window_logits
from mmseg_inceptionnext.inference.optimize import optimize_for_inference
from mmseg_inceptionnext.inference.tiles import Cell, Grid, Region, cells
from mmseg_inceptionnext.models.build import build_segmentor


def model_of(config=TINY_CONFIG, **options) -> EncoderDecoder:
    cfg = Config.fromfile(config)
    cfg.merge_from_dict({f'model.{key}': value for key, value in options.items()})
    model = build_segmentor(cfg).eval()
    for head in model.decode_head if isinstance(model.decode_head, torch.nn.ModuleList) else [model.decode_head]:
        torch.nn.init.normal_(head.conv_seg.weight)
    return model


def sliding(model, crop, stride):
    model = copy.deepcopy(model)
    model.test_cfg = Config(dict(mode='slide', crop_size=crop, stride=stride))
    return model


@torch.no_grad()
def streamed(model, inputs, grid, **options) -> torch.Tensor:
    """The mean logits of all classes, put together from the cells."""
    logits = (window_logits(model, inputs[..., r.top : r.bottom, r.left : r.right])[0] for r in grid.windows())
    result = torch.full((model.out_channels, *grid.size), torch.nan, dtype=inputs.dtype)
    for cell in cells(grid, logits, model.align_corners, **options):
        mean = torch.stack([cell.total(c) for c in range(cell.channels)]) / cell.weight()
        rows, columns = cell.region.within(Region(0, grid.size[0], 0, grid.size[1]))
        result[:, rows, columns] = mean
    return result


CASES = {
    'a row of windows': ((64, 200), (64, 64), (48, 48)),
    'shifted at both borders': ((150, 170), (64, 64), (40, 48)),
    'overlaps of more than a half': ((130, 140), (64, 64), (20, 24)),
    'last window shifted by a pixel': ((129, 65), (64, 64), (64, 64)),
    'smaller than a window': ((50, 100), (64, 64), (32, 32)),
    'no stride of the head': ((120, 120), (50, 70), (30, 50)),
}


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('case', CASES)
def test_logits_are_those_of_mmsegs_slide_inference(case, align_corners):
    size, crop, stride = CASES[case]
    model = model_of(**{'decode_head.align_corners': align_corners, 'decode_head.num_classes': 7}).double()
    inputs = torch.randn(1, 3, *size, dtype=torch.double)
    with torch.no_grad():
        (expected,) = sliding(model, crop, stride).slide_inference(inputs, [dict(ori_shape=size)])
    result = streamed(model, inputs, Grid(size, crop, stride))
    assert (result - expected).abs().max() < 1e-9
    assert torch.equal(result.argmax(0), expected.argmax(0))


def test_a_cascade_whose_logits_come_at_full_size():
    head = dict(in_channels=64, in_index=3, channels=16, num_classes=5, align_corners=False)
    head = dict(head, loss_decode=dict(type='CrossEntropyLoss'), norm_cfg=dict(type='BN'))
    heads = [
        dict(type='FCNHead', num_convs=1, concat_input=False, **head),
        dict(type='OCRHead', ocr_channels=8, **head),
    ]
    cfg = Config.fromfile(TINY_CONFIG)
    cfg.model.update(type='CascadeEncoderDecoder', num_stages=2, neck=None, decode_head=heads)
    model = build_segmentor(cfg).eval().double()
    inputs, grid = torch.randn(1, 3, 100, 130, dtype=torch.double), Grid((100, 130), (64, 64), (48, 48))
    with torch.no_grad():
        (expected,) = sliding(model, grid.crop, grid.stride).slide_inference(inputs, [dict(ori_shape=grid.size)])
    assert (streamed(model, inputs, grid) - expected).abs().max() < 1e-9


def test_falling_weights_of_neighbours_add_up_to_one_and_meet_without_a_step():
    grid = Grid((64, 208), (64, 64), (48, 48))
    flat = (torch.full((1, 64, 64), float(i)) for i in range(4))  # each window says something else
    ramp = torch.cat([cell.total(0) / cell.weight() for cell in cells(grid, flat, blend=True)], 1)
    steps = ramp[0].diff()
    assert steps.min() >= 0 and steps.max() < 0.11 and ramp[0, 0] == 0 and ramp[0, -1] == 3
    inside = torch.cat(
        [cell.weight() for cell in cells(grid, (torch.ones(1, 64, 64) for _ in range(4)), blend=True)], 1
    )
    assert torch.allclose(inside[32, 16:192], torch.ones(1))


def test_cells_cover_every_pixel_once():
    for size, crop, stride in CASES.values():
        grid, count = Grid(size, crop, stride), torch.zeros(size)
        for region in cells(grid, (None for _ in grid.windows())):
            rows, columns = region.within(Region(0, size[0], 0, size[1]))
            count[rows, columns] += 1
        assert (count == 1).all()


def test_windows_without_logits_leave_the_others_as_they_are():
    grid = Grid((64, 160), (64, 64), (48, 48))
    logits = [torch.randn(3, 16, 16) for _ in grid.windows()]
    whole = [cell.labels() for cell in cells(grid, iter(logits))]
    partly = list(cells(grid, iter([logits[0], None, logits[2]])))
    assert torch.equal(partly[0].labels(), whole[0]) and partly[1] == Region(0, 64, 48, 96)
    assert torch.equal(partly[2].labels()[:, 16:], whole[2][:, 16:])


def test_what_is_held_does_not_grow_with_the_height():
    """Peak of what torch allocates, for 50 classes."""

    def run(rows: int) -> None:
        grid = Grid((128 + 112 * (rows - 1), 240), (128, 128), (112, 112))
        for cell in cells(grid, (torch.randn(50, 32, 32) for _ in grid.windows())):
            assert isinstance(cell, Cell) and cell.labels().shape == cell.region.shape

    peaks = [peak_bytes(lambda rows=rows: run(rows)) for rows in (4, 12)]
    assert peaks[1] < 1.05 * peaks[0]
    assert peaks[1] < 50 * 128 * 240 * 4 / 4  # a quarter of the logits of a row of windows at full size


SAME = dict(ori_shape=(150, 170), img_shape=(150, 170))
LARGER = dict(ori_shape=(201, 177), img_shape=(150, 170))
PADDED = dict(ori_shape=(90, 150), img_shape=(146, 163), pad_shape=(150, 170), padding_size=[3, 4, 1, 3])
MIRRORED = dict(ori_shape=(150, 170), img_shape=(150, 170), flip=True, flip_direction='horizontal')


@pytest.mark.parametrize('config', [TINY_CONFIG, TINY_UPERNET], ids=['fpn', 'upernet'])
@pytest.mark.parametrize('fast', [False, True], ids=['plain', 'fast'])
def test_sliding_windows_of_the_config_give_mmsegs_labels(config, fast):
    model = sliding(model_of(config), (64, 64), (40, 48))
    ours = optimize_for_inference(model) if fast else copy.deepcopy(model)
    ours.__class__ = LabelMapSegmentor
    inputs, metas = torch.randn(4, 3, 150, 170), [SAME, LARGER, PADDED, MIRRORED]
    with torch.no_grad():
        expected, results = (
            each(inputs, [SegDataSample(metainfo=dict(meta)) for meta in metas], mode='predict')
            for each in (model, ours)
        )
    for wanted, result in zip(expected, results, strict=True):
        assert 'seg_logits' not in result  # the fast path was taken
        logits, label = wanted.seg_logits.data, result.pred_sem_seg.data
        missed = logits.amax(0) - logits.gather(0, label)[0]
        assert label.unique().numel() > 5
        assert missed.max() <= (1e-4 * logits.abs().max() if fast else 0)  # ties alone
