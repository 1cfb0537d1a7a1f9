"""Label maps equal those of mmseg's EncoderDecoder on every pixel."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmseg.models.segmentors import EncoderDecoder
from mmseg.structures import SegDataSample
from support import TINY_CONFIG, peak_bytes

from mmseg_inceptionnext import LabelMapSegmentor
from mmseg_inceptionnext.inference.label_map_segmentor import label_map
from mmseg_inceptionnext.models.build import build_segmentor


def pair(**model) -> tuple[EncoderDecoder, LabelMapSegmentor]:
    cfg = Config.fromfile(TINY_CONFIG)
    cfg.merge_from_dict({'model.type': 'LabelMapSegmentor', **{f'model.{key}': value for key, value in model.items()}})
    ours = build_segmentor(cfg).eval()
    torch.nn.init.normal_(ours.decode_head.conv_seg.weight)
    plain = copy.deepcopy(ours)
    plain.__class__ = EncoderDecoder
    return plain, ours


def predict(model, inputs, metas):
    samples = None if metas is None else [SegDataSample(metainfo=meta) for meta in metas]
    with torch.no_grad():
        return model(inputs, samples, mode='predict')


SAME = dict(ori_shape=(64, 96), img_shape=(64, 96))
LARGER = dict(ori_shape=(101, 77), img_shape=(64, 96))
PADDED = dict(ori_shape=(90, 150), img_shape=(60, 90), pad_shape=(64, 96), padding_size=[2, 4, 1, 3])
PADDED_BY_MODEL = dict(ori_shape=(90, 150), img_shape=(60, 90), pad_shape=(64, 96, 3), img_padding_size=(0, 6, 0, 4))
MIRRORED = dict(ori_shape=(50, 70), img_shape=(64, 96), flip=True, flip_direction='horizontal')
UPSIDE_DOWN = dict(ori_shape=(50, 70), img_shape=(64, 96), flip=True, flip_direction='vertical')
NOT_FLIPPED = dict(ori_shape=(50, 70), img_shape=(64, 96), flip=False, flip_direction=None)


def test_half_precision_is_up_sampled_in_float32():
    """Rounded after up-sampling, neighbouring classes would be equal, and the first of them be taken."""
    logits = torch.randn(5, 16, 24).bfloat16()
    assert torch.equal(label_map(logits, (64, 96), SAME, False), label_map(logits.float(), (64, 96), SAME, False))


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize(
    'metas', [[SAME, LARGER], [LARGER, SAME], [PADDED, PADDED], [PADDED_BY_MODEL] * 2, [MIRRORED, UPSIDE_DOWN],
              [NOT_FLIPPED] * 2, None], ids=['larger', 'first larger', 'padded', 'padded by the model', 'flipped',
                                             'not flipped', 'no samples'],
)  # fmt: skip
def test_maps_are_equal(metas, align_corners):
    plain, ours = pair(**{'decode_head.align_corners': align_corners})
    inputs = torch.randn(2, 3, 64, 96)
    expected, samples = predict(plain, inputs, metas), predict(ours, inputs, metas)
    for sample, wanted in zip(samples, expected, strict=True):
        label = sample.pred_sem_seg.data
        assert label.dtype == torch.int64 and label.unique().numel() > 5
        assert torch.equal(label, wanted.pred_sem_seg.data)
        assert 'seg_logits' not in sample


def test_of_equal_logits_the_first_class_wins():
    logits = torch.tensor([1.0, 2.0, 2.0, 0.0])[:, None, None].expand(4, 3, 3)
    assert (label_map(logits, (9, 9), dict(ori_shape=(9, 9)), False) == 1).all()


@pytest.mark.parametrize(
    'model', [dict(test_cfg=dict(mode='whole', return_logits=True)),
              {'decode_head.num_classes': 2, 'decode_head.out_channels': 1, 'decode_head.threshold': 0.5}],
    ids=['asked for', 'threshold'],
)  # fmt: skip
def test_logits_where_they_are_asked_for_or_needed(model):
    if 'decode_head.out_channels' in model:
        model['decode_head.loss_decode.use_sigmoid'] = True
    plain, ours = pair(**model)
    inputs = torch.randn(1, 3, 64, 96)
    (expected,), (sample,) = predict(plain, inputs, [dict(LARGER)]), predict(ours, inputs, [dict(LARGER)])
    assert torch.equal(sample.seg_logits.data, expected.seg_logits.data)
    assert torch.equal(sample.pred_sem_seg.data, expected.pred_sem_seg.data)


def test_a_fifth_of_the_memory():
    """Largest sum of what is allocated, for 150 classes at 512×683."""
    logits, meta = torch.randn(1, 150, 128, 171), dict(ori_shape=(512, 683), img_shape=(512, 683))
    plain, _ = pair()

    def mmseg():
        up_sampled = F.interpolate(logits, (512, 683), mode='bilinear')
        return plain.postprocess_result(up_sampled, [SegDataSample(metainfo=meta)])[0].pred_sem_seg.data

    def ours():
        return label_map(logits[0], (512, 683), meta, False)

    assert torch.equal(mmseg(), ours())
    assert peak_bytes(ours) * 5 < peak_bytes(mmseg)
