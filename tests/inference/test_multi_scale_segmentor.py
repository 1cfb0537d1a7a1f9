"""The multi-scale label map is mmseg's of the same views, in bounded memory."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmseg.models.segmentors import EncoderDecoder, SegTTAModel
from mmseg.structures import SegDataSample
from support import TINY_CONFIG, peak_bytes

from mmseg_inceptionnext import UserError, optimize_for_inference
from mmseg_inceptionnext.data.pipeline import TTA_RATIOS, pipeline_for_arrays, use_multi_scale
from mmseg_inceptionnext.inference.multi_scale_segmentor import MultiScaleSegmentor, multi_scale_label_map
from mmseg_inceptionnext.models.build import build_segmentor


def config() -> Config:
    cfg = Config.fromfile(TINY_CONFIG)
    return cfg


def views_of(cfg: Config, *images: np.ndarray) -> dict:
    """A batch as the test pipeline with --tta makes it."""
    dataset_cfg = Config(dict(pipeline=pipeline_for_arrays(cfg.test_dataloader.dataset.pipeline)))
    use_multi_scale(dataset_cfg)
    pipeline = Compose(dataset_cfg.pipeline)
    return pseudo_collate([pipeline(dict(img=image)) for image in images])


def image(height: int, width: int) -> np.ndarray:
    small = np.random.default_rng(height).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.kron(small, np.ones((height // 6, width // 8, 1), np.uint8))


MODELS_TO_TEST = {
    'whole': {},
    'sliding window': dict(test_cfg=dict(mode='slide', crop_size=(64, 64), stride=(48, 48))),
}


@pytest.mark.parametrize(
    'kind', [pytest.param(kind, marks=[pytest.mark.slow] * (kind == 'sliding window')) for kind in MODELS_TO_TEST]
)
def test_agrees_with_mmsegs_own(kind):
    cfg = config()
    cfg.merge_from_dict({f'model.{key}': value for key, value in MODELS_TO_TEST[kind].items()})
    model = build_segmentor(cfg).eval()
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    assert type(model) is EncoderDecoder
    (expected,) = SegTTAModel(model).test_step(views_of(cfg, image(96, 128)))
    for segmentor in (model, optimize_for_inference(model)):
        (sample,) = MultiScaleSegmentor(segmentor).test_step(views_of(cfg, image(96, 128)))
        label, wanted = sample.pred_sem_seg.data, expected.pred_sem_seg.data.squeeze()
        assert label.shape == (1, 96, 128) and label.dtype == torch.int64
        assert label.unique().numel() > 1
        assert (label[0] != wanted).sum() <= 2  # ties within rounding: the order of sums differs


def test_a_single_channel_is_averaged_as_probability_too():
    """mmseg's own takes the sigmoid twice, so that everything is above a threshold of a half."""
    cfg = config()
    cfg.model.decode_head.update(num_classes=2, out_channels=1, threshold=0.5)
    cfg.model.decode_head.loss_decode.use_sigmoid = True
    model = build_segmentor(cfg).eval()
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    views = views_of(cfg, image(96, 128))
    probability = 0
    for inputs, samples in zip(views['inputs'], views['data_samples'], strict=True):
        (sample,) = model.test_step(dict(inputs=inputs, data_samples=samples))
        probability = probability + sample.seg_logits.data / 12  # which holds a probability, with one channel
    (sample,) = MultiScaleSegmentor(model).test_step(views_of(cfg, image(96, 128)))
    label = sample.pred_sem_seg.data
    assert (label != (probability > 0.5)).sum() <= 2 and 0 < label.float().mean() < 1


def test_images_of_any_sizes_go_together():
    cfg = config()
    model = MultiScaleSegmentor(build_segmentor(cfg).eval())
    images = image(96, 128), image(150, 80)
    together = model.test_step(views_of(cfg, *images))
    for sample, alone in zip(together, images, strict=True):
        (expected,) = model.test_step(views_of(cfg, alone))
        assert torch.equal(sample.pred_sem_seg.data, expected.pred_sem_seg.data)
        assert sample.pred_sem_seg.data.shape[1:] == alone.shape[:2]


@pytest.mark.parametrize('scale', [1.0, 300.0], ids=['usual', 'extreme'])
def test_is_the_argmax_of_the_mean_probability(scale):
    """Of 37 classes, which chunks do not divide, in float64 by the book; also where an exponential would overflow."""
    size, metas, logits = (40, 56), [], []
    for i, (height, width) in enumerate([(10, 14), (20, 28)]):
        for flip in (False, True):
            metas.append(
                dict(ori_shape=size, img_shape=(4 * height, 4 * width), flip=flip, flip_direction='horizontal')
            )
            logits.append(torch.randn(37, height, width, dtype=torch.float64) * scale * (i + 1))
    probability = 0
    for view, meta in zip(logits, metas, strict=True):
        x = F.interpolate(view[None], meta['img_shape'], mode='bilinear')
        x = F.interpolate(x.flip(-1) if meta['flip'] else x, size, mode='bilinear')
        probability = probability + x.softmax(1)[0] / len(logits)
    label = multi_scale_label_map([view.float() for view in logits], metas, False)
    chosen = probability.gather(0, label)[0]
    assert (probability.max(0).values - chosen).max() < 1e-5
    if scale == 1:  # else views are sure of different classes, and ties are many
        assert (label[0] != probability.argmax(0)).sum() <= 2


@pytest.mark.slow
def test_memory_does_not_grow_with_classes_and_views_as_mmsegs_does():
    """150 classes at 512×683, the twelve views of the protocol; mmseg's holds twelve maps of 210 MB."""
    views = [(round(128 * ratio), round(171 * ratio)) for ratio in TTA_RATIOS]
    logits = [torch.randn(150, *view) for view in views for _ in range(2)]
    metas = [
        dict(ori_shape=(512, 683), img_shape=(4 * height, 4 * width), flip=flip, flip_direction='horizontal')
        for height, width in views
        for flip in (False, True)
    ]
    one_map = 150 * 512 * 683 * 4
    assert peak_bytes(lambda: multi_scale_label_map(logits, metas, False)) < 2 * one_map


def test_the_test_scale_is_multiplied_and_mirrored():
    cfg = config()
    data = views_of(cfg, image(96, 128))
    sizes = [tuple(view[0].shape[1:]) for view in data['inputs']]
    assert sizes[::2] == sizes[1::2] == [(80, 107), (120, 160), (160, 213), (200, 267), (240, 320), (280, 373)]
    for plain, mirrored in zip(data['inputs'][::2], data['inputs'][1::2], strict=True):
        assert torch.equal(plain[0].flip(-1), mirrored[0])
    assert [view[0].flip for view in data['data_samples']] == [False, True] * 6
    assert all(isinstance(view[0], SegDataSample) and view[0].ori_shape == (96, 128) for view in data['data_samples'])


def test_sizes_are_rounded_up_where_the_config_does():
    cfg = Config.fromfile(TINY_CONFIG.parents[2] / 'configs' / 'fpn' / 'inceptionnext_t.py')
    data = views_of(cfg, image(96, 128))
    assert all(side % 32 == 0 for view in data['inputs'] for side in view[0].shape[1:])


def test_a_pipeline_without_a_scale():
    for pipeline in ([dict(type='PackSegInputs')], [dict(type='Resize', scale_factor=2.0)]):
        with pytest.raises(UserError, match='tta=True multiplies the scale of the Resize'):
            use_multi_scale(Config(dict(pipeline=pipeline)))
