"""Every forward pass on a GPU that is not there: torch's fake tensors find those left on the CPU.

A fake tensor has a device, a dtype and a shape, and no values; two on different devices cannot be added.
"""

import pytest
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from support import ROOT, TINY_CONFIG, TINY_UPERNET
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mmseg_inceptionnext.config import read_config
from mmseg_inceptionnext.inference import optimize, optimize_for_inference
from mmseg_inceptionnext.inference.multi_scale_segmentor import multi_scale_label_map
from mmseg_inceptionnext.inference.tiles import Grid, cells
from mmseg_inceptionnext.models.build import build_segmentor

SIZE = (64, 96)
META = dict(ori_shape=SIZE, img_shape=SIZE, pad_shape=SIZE)


@pytest.fixture
def fake_gpu():
    with FakeTensorMode(allow_non_fake_inputs=False, shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True)):
        yield


def moved(model: nn.Module) -> nn.Module:
    """Put a model onto the GPU: what is neither parameter nor buffer stays where it is, as in ``model.to``."""
    for module in model.modules():
        for name, tensor in [*module._parameters.items()]:
            if tensor is not None:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device='cuda')
                module._parameters[name] = nn.Parameter(empty, tensor.requires_grad)
        for name, tensor in [*module._buffers.items()]:
            module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device='cuda')
    return model


def optimised(model: nn.Module, precision: str) -> nn.Module:
    """What optimize_for_inference makes for a GPU, made on the CPU: it converts layouts, which fake modules cannot."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimize, '_device', lambda model: 'cuda')
        return optimize_for_inference(model, precision=precision)


FORMS = {
    'plain': lambda model: model,
    'optimised': lambda model: optimised(model, 'fp32'),
    'optimised, bf16': lambda model: optimised(model, 'bf16'),
}
recipes = pytest.mark.parametrize(
    'config', [ROOT / 'configs/upernet/inceptionnext_a.py', ROOT / 'configs/fpn/inceptionnext_a.py'],
    ids=['UperNet', 'FPN'],
)  # fmt: skip


@recipes
@pytest.mark.parametrize(
    'form, mode',
    [(form, mode) for form in FORMS for mode in ('whole', 'slide') if (form, mode) != ('plain', 'slide')],
)  # mmseg's sliding window asks for values, which fake tensors do not have
@pytest.mark.filterwarnings('ignore:User provided device_type of .cuda., but CUDA is not available')
def test_prediction(config, form, mode, request):
    cfg = read_config(config)
    if mode == 'slide':
        cfg.model.test_cfg = dict(mode='slide', crop_size=(64, 64), stride=(32, 32))
    model = FORMS[form](build_segmentor(cfg).eval())
    request.getfixturevalue('fake_gpu')
    images = torch.empty(2, 3, *SIZE, device='cuda')
    with torch.inference_mode():
        assert moved(model)(images, mode='tensor').device.type == 'cuda'
        found = model(images, [SegDataSample(metainfo=META) for _ in images], mode='predict')
        assert found[0].pred_sem_seg.data.device.type == 'cuda'
        if form != 'plain':
            labels = found[0].pred_sem_seg.data[0]
            logits = found[0].class_logits
            values = [*logits.confidence_and_entropy(labels), *logits.top(2)]
            assert {value.device.type for value in values} == {'cuda'}


@pytest.mark.parametrize('config', [TINY_CONFIG, TINY_UPERNET], ids=['FPN', 'UperNet'])
def test_losses(config, request):
    model = build_segmentor(read_config(config)).train()
    request.getfixturevalue('fake_gpu')
    samples = [SegDataSample(metainfo=META) for _ in range(2)]
    for sample in samples:
        sample.gt_sem_seg = PixelData(data=torch.zeros(1, *SIZE, dtype=torch.long, device='cuda'))
    losses = moved(model)(torch.empty(2, 3, *SIZE, device='cuda'), samples, mode='loss')
    assert {value.device.type for name, value in losses.items() if 'loss' in name} == {'cuda'}


def test_multi_scale_labels(fake_gpu):
    logits = [torch.empty(5, 16, 24, device='cuda'), torch.empty(5, 8, 12, device='cuda')]
    flipped = dict(META, flip=True, flip_direction='horizontal')
    assert multi_scale_label_map(logits, [META, flipped], False).device.type == 'cuda'


@pytest.mark.parametrize('blend', [False, True], ids=['equal weights', 'falling weights'])
def test_tiles(blend, fake_gpu):
    grid = Grid(SIZE, (48, 48), (32, 32))
    logits = [torch.empty(5, 12, 12, device='cuda') for _ in grid.windows()]
    assert {cell.labels().device.type for cell in cells(grid, logits, blend=blend)} == {'cuda'}


def test_a_tensor_left_on_the_cpu_is_found(request):
    """Such as an attribute that is no buffer."""

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.shift = nn.Parameter(torch.ones(3)), torch.ones(3)

        def forward(self, x):
            return x * self.weight + self.shift

    model = Shift()
    request.getfixturevalue('fake_gpu')
    with pytest.raises(Exception, match='FakeTensor|device'):
        moved(model)(torch.empty(3, device='cuda'))
