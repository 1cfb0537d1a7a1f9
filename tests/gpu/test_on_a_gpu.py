"""What has a device computes the same on a GPU. On a CPU the same tests run, where they say something."""

import copy

import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.structures import PixelData
from mmseg.models.decode_heads import UPerHead
from mmseg.models.segmentors import EncoderDecoder, SegTTAModel
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from PIL import Image
from support import TINY_CONFIG, TINY_UPERNET, relative_error, save_segmentor, segmentor_with_statistics, variant

from mmseg_inceptionnext import InceptionNeXt, LateUpsampleUPerHead, Segmentor, optimize_for_inference
from mmseg_inceptionnext.checkpoints.reading import read_checkpoint
from mmseg_inceptionnext.device import multiplies_bfloat16
from mmseg_inceptionnext.export import export
from mmseg_inceptionnext.inference.multi_scale_segmentor import MultiScaleSegmentor
from mmseg_inceptionnext.models.build import build_segmentor
from mmseg_inceptionnext.training.mixed_precision import amp_optim_wrapper
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import train

TOLERANCE = 2e-5  # of the largest value, in float32: sums are in another order
layouts = pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['NCHW', 'NHWC'])


def samples(number: int, size: tuple[int, int], labels: bool = False) -> list[SegDataSample]:
    found = [SegDataSample(metainfo=dict(ori_shape=size, img_shape=size, pad_shape=size)) for _ in range(number)]
    for sample in found if labels else []:
        sample.gt_sem_seg = PixelData(data=torch.randint(3, (1, *size)))
    return found


def label_maps(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found = model(x, samples(len(x), tuple(x.shape[2:])), mode='predict')
    return torch.stack([sample.pred_sem_seg.data for sample in found])


@layouts
def test_backbone_and_derivatives_are_timms(device, layout):
    theirs = timm.create_model('inception_next_atto')
    for name, parameter in theirs.named_parameters():
        if name.endswith('gamma'):
            torch.nn.init.normal_(parameter, 0.3, 0.1)
    ours = InceptionNeXt('a', out_norm=False, norm_cfg=dict(type='BN'))
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith('head.')}, strict=True)
    x = torch.randn(2, 3, 65, 99)
    reference = theirs.double().train()
    expected = reference.forward_intermediates(x.double(), intermediates_only=True)
    ours = ours.to(device, memory_format=layout).train()
    found = ours(x.to(device).contiguous(memory_format=layout))
    for values in (expected, found):
        sum(value.sin().mean() for value in values).backward()
    for value, wanted in zip(found, expected, strict=True):
        assert relative_error(value.cpu().double(), wanted) < TOLERANCE
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    largest = max(gradients[name].abs().max() for name, _ in ours.named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad.cpu().double() - gradients[name]).abs().max() < 20 * TOLERANCE * largest, name


@layouts
@pytest.mark.parametrize('align_corners', [False, True])
def test_head_and_derivatives_are_mmsegs(device, align_corners, layout):
    arguments = dict(in_channels=[8, 12, 16, 20], in_index=[0, 1, 2, 3], channels=16, num_classes=5,
                     norm_cfg=dict(type='BN'), align_corners=align_corners, dropout_ratio=0.0)  # fmt: skip
    theirs, ours = UPerHead(**arguments), LateUpsampleUPerHead(**arguments)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    sizes = [(37, 53), (18, 26), (9, 13), (4, 6)]
    x = [torch.randn(2, c, *size) for c, size in zip(arguments['in_channels'], sizes, strict=True)]
    results = []
    for head, dtype, place in ((theirs, torch.double, 'cpu'), (ours, torch.float, device)):
        head = head.to(place, dtype, memory_format=layout).train()
        maps = [f.to(place, dtype).contiguous(memory_format=layout).requires_grad_() for f in x]
        logits = head(maps)
        results.append([logits, *torch.autograd.grad(logits.sin().sum(), [*maps, *head.parameters()])])
    largest = max(gradient.abs().max() for gradient in results[0][1:])
    assert relative_error(results[1][0].cpu().double(), results[0][0]) < TOLERANCE
    for wanted, found in zip(results[0][1:], results[1][1:], strict=True):
        assert (found.cpu().double() - wanted).abs().max() < 20 * TOLERANCE * largest


@pytest.mark.parametrize('config', [TINY_CONFIG, TINY_UPERNET], ids=['FPN', 'UperNet'])
def test_label_maps_of_the_optimised_model(device, config):
    model = segmentor_with_statistics(config).to(device)
    assert type(model) is EncoderDecoder
    x = torch.randn(2, 3, 96, 64).to(device)
    expected = label_maps(model, x)
    assert expected.unique().numel() > 1
    for fast in (optimize_for_inference(model), optimize_for_inference(model, (96, 64))):
        found = label_maps(fast, x)
        assert found.device.type == device and (found != expected).float().mean() < 1e-3  # near ties


def test_half_precision_deviates_as_autocast_does(device):
    """bfloat16, and float16 on a GPU."""
    model = segmentor_with_statistics(TINY_UPERNET).to(device)
    x = torch.randn(2, 3, 64, 96).to(device)
    with torch.inference_mode():
        expected = model(x, mode='tensor')
        with torch.autocast(device, torch.bfloat16):
            allowed = 2 * relative_error(model(x, mode='tensor').float(), expected)
        found = {'bf16': optimize_for_inference(model, precision='bf16')(x, mode='tensor')}
        if device == 'cuda':
            with torch.autocast(device, torch.float16):
                found['fp16'] = optimize_for_inference(model)(x, mode='tensor')
    for name, logits in found.items():
        assert logits.dtype == torch.float32 and relative_error(logits, expected) < allowed, name


def test_multi_scale_test_is_mmsegs(device):
    model = segmentor_with_statistics(TINY_CONFIG).to(device)
    data = dict(inputs=[], data_samples=[])
    for size in ((64, 96), (96, 128)):
        meta = dict(ori_shape=(64, 96), img_shape=size, pad_shape=size, flip=False, flip_direction=None, img_path='')
        data['inputs'].append([torch.randint(256, (3, *size), dtype=torch.uint8)])
        data['data_samples'].append([SegDataSample(metainfo=meta)])
    (expected,) = SegTTAModel(copy.deepcopy(model)).test_step(copy.deepcopy(data))
    (found,) = MultiScaleSegmentor(model).test_step(data)
    assert found.pred_sem_seg.data.device.type == found.confidence.device.type == device
    assert (found.pred_sem_seg.data[0] != expected.pred_sem_seg.data.squeeze()).float().mean() < 1e-3


def test_the_python_api_returns_arrays(device, tmp_path):
    segmentor = Segmentor(*save_segmentor(tmp_path), device=device, precision='fp32')
    image = np.random.default_rng(0).integers(256, size=(70, 90, 3), dtype=np.uint8)
    on_cpu = Segmentor(*save_segmentor(tmp_path), device='cpu', precision='fp32')(image)
    found = segmentor(image)
    assert found.labels.shape == (70, 90) and (found.labels != on_cpu.labels).mean() < 1e-2
    np.testing.assert_allclose(found.confidence, on_cpu.confidence, atol=1e-3)
    np.testing.assert_allclose(found.entropy, on_cpu.entropy, atol=1e-3)
    tiled = Segmentor(*save_segmentor(tmp_path), device=device, precision='fp32', tile=64)(image)
    assert tiled.labels.shape == (70, 90) and tiled.confidence.min() > 0


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
@pytest.mark.parametrize('config', [TINY_CONFIG, TINY_UPERNET], ids=['FPN', 'UperNet'])
def test_mixed_precision_trains_as_float32_does(device, config, precision):
    if (device, precision) == ('cpu', 'fp16'):
        pytest.skip('mmengine scales losses on GPUs only')
    if (device, precision) == ('cuda', 'bf16') and not multiplies_bfloat16(device):
        pytest.skip('this GPU has no instructions for bfloat16')
    images, losses = [torch.randint(256, (3, 128, 128), dtype=torch.uint8) for _ in range(2)], {}
    labelled = samples(2, (128, 128), labels=True)
    weights = build_segmentor(Config.fromfile(config)).state_dict()
    for name in ('fp32', precision):
        cfg = Config.fromfile(config)
        cfg.model.backbone.drop_path_rate = cfg.model.decode_head.dropout_ratio = 0.0
        if name != 'fp32':
            cfg.optim_wrapper.update(amp_optim_wrapper(bfloat16=name == 'bf16'))
        model = build_segmentor(cfg)
        model.load_state_dict(weights)
        model.to(device).train()
        optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        step = [model.train_step(dict(inputs=images, data_samples=labelled), optim_wrapper) for _ in range(3)]
        losses[name] = [each['decode.loss_ce'].item() for each in step]
    np.testing.assert_allclose(losses[precision], losses['fp32'], rtol=0.05)
    assert losses[precision][2] < losses[precision][0]


@pytest.mark.gpu
def test_synchronised_norms_of_one_process_are_plain_ones(tmp_path):
    """On GPUs alone: a CPU has no SyncBN."""
    torch.distributed.init_process_group('nccl', f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        cfg = Config.fromfile(TINY_CONFIG)
        plain = build_segmentor(cfg).cuda().train()
        synchronised = MODELS.build(cfg.model).cuda().train()
        assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in synchronised.modules())
        synchronised.load_state_dict(plain.state_dict())
        x = torch.randn(2, 3, 64, 64).cuda()
        outputs = []
        for model in (plain, synchronised):
            torch.manual_seed(0)
            outputs.append(model(x, mode='tensor'))
            outputs[-1].sin().sum().backward()
        assert relative_error(outputs[1], outputs[0]) < TOLERANCE
        for (name, ours), theirs in zip(plain.named_parameters(), synchronised.parameters(), strict=True):
            torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-3, atol=1e-4, msg=name)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_resumed_run_ends_as_an_uninterrupted_one(device, tiny_cfg, tmp_path):
    """To rounding on a GPU, where some sums have no fixed order; bit for bit on a CPU."""
    train(variant(tiny_cfg, tmp_path / 'whole'), TrainOptions(seed=5))
    train(variant(tiny_cfg, tmp_path / 'parts', **{'train_cfg.max_iters': 3}), TrainOptions(seed=5))
    train(variant(tiny_cfg, tmp_path / 'parts'), TrainOptions(resume=True))
    whole, parts = (read_checkpoint(tmp_path / name / 'iter_6.pth')['state_dict'] for name in ('whole', 'parts'))
    for key, value in whole.items():
        if device == 'cpu':
            assert torch.equal(parts[key], value), key
        torch.testing.assert_close(parts[key], value, rtol=0.05, atol=5e-3)


@pytest.mark.gpu
def test_an_onnx_file_on_the_gpu_of_onnx_runtime(tmp_path):
    runtime = pytest.importorskip('onnxruntime')
    if 'CUDAExecutionProvider' not in runtime.get_available_providers():
        pytest.skip('this ONNX Runtime has no CUDAExecutionProvider: pip install onnxruntime-gpu')
    config, checkpoint = save_segmentor(tmp_path, base=TINY_UPERNET)
    export(config, checkpoint, tmp_path / 'model.onnx', (64, 96))
    image = np.random.default_rng(0).integers(256, size=(64, 96, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / 'image.png')
    outputs = []
    for provider in ('CPUExecutionProvider', 'CUDAExecutionProvider'):
        session = runtime.InferenceSession(tmp_path / 'model.onnx', providers=[provider])
        assert session.get_providers()[0] == provider
        (name,) = (value.name for value in session.get_inputs())
        outputs.append(session.run(None, {name: image.transpose(2, 0, 1)[None]})[0])
    assert np.abs(outputs[1] - outputs[0]).max() < 5e-3 * np.abs(outputs[0]).max()  # cuDNN uses TF32 there
