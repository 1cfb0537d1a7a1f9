"""The kernels without a GPU: in Triton's interpreter, compiled for several, and how they are switched on."""

import os
import subprocess
import sys

import pytest
import torch
from support import ROOT, TINY_UPERNET, segmentor_with_statistics

from mmseg_inceptionnext import MetaNeXt, UserError, optimize_for_inference
from mmseg_inceptionnext.evaluation import evaluate
from mmseg_inceptionnext.models import kernels
from mmseg_inceptionnext.models.kernels import use_kernels
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import train

triton = pytest.importorskip('triton')
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mmseg_inceptionnext.models.kernels import label_map, token_mixer, up_sampled_sum  # noqa: E402


@pytest.mark.slow
def test_in_tritons_interpreter():
    """In a process of its own: Triton asks for the interpreter when it is imported."""
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'tests/gpu/test_triton_kernels.py']
    process = subprocess.run(
        command, cwd=ROOT, env=os.environ | {'TRITON_INTERPRET': '1'}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout[-3000:]
    assert 'skipped' not in process.stdout.splitlines()[-1]


MIXER = dict.fromkeys(('x', 'out', 'weight_hw', 'bias_hw', 'weight_w', 'bias_w', 'weight_h', 'bias_h'), 'dtype')
MAPS = dict.fromkeys(('out', 'result', 'map_0', 'map_1', 'map_2', 'map_3'), 'dtype')
SCALES = dict.fromkeys(('scale_y', 'scale_x', 'scale_2_y', 'scale_2_x'), 'fp32')
KERNELS = {
    'mixer': (token_mixer._mix, MIXER, dict(SQUARE=3, BAND=11, GRADIENT=False, PIXELS=64, BLOCK=16)),
    'mixer, by x': (token_mixer._mix, MIXER, dict(SQUARE=3, BAND=11, GRADIENT=True, PIXELS=512, BLOCK=1)),
    'mixer, by weights': (
        token_mixer._sum_products, dict(x='dtype', grad='dtype', sums='float32'),
        dict(SQUARE=3, BAND=11, TAPS=16, PIXELS=64, BLOCK=16),
    ),
    'sum': (up_sampled_sum._add, MAPS, dict(MAPS=4, ALIGN=False, PIXELS=16, CHANNELS=128)),
    'sum, aligned, by taps': (
        up_sampled_sum._gather, dict(grad='dtype', found='dtype'), dict(ALIGN=True, CHANNELS=128),
    ),
    'labels': (
        label_map._largest_class, dict(logits='dtype', labels='int64'),
        dict(FIRST=True, SECOND=True, UPSIDE_DOWN=True, MIRRORED=True, ALIGN=False, PIXELS=256),
    ),
}  # fmt: skip
DTYPES = {'float32': '*fp32', 'float16': '*fp16', 'bfloat16': '*bf16', 'int64': '*i64'}


@pytest.mark.slow
@pytest.mark.parametrize('capability', [75, 80, 90])
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
@pytest.mark.parametrize('kernel', KERNELS)
def test_compiled_for_a_gpu(kernel, dtype, capability):
    """Of 2080 Ti, A100 and H100. A size of one becomes a constant: Triton does so with arguments that are 1."""
    function, pointers, constants = KERNELS[kernel]
    if 'DTYPE' in function.arg_names:
        constants = constants | dict(DTYPE=tl.float32)
    numbers = [name for name in function.arg_names if name not in (*pointers, *constants, *SCALES)]
    for ones in ((), numbers):
        fixed = constants | dict.fromkeys(ones, 1)
        signature = {name: 'i32' for name in function.arg_names} | SCALES | dict.fromkeys(fixed, 'constexpr')
        signature |= {name: DTYPES[dtype if kind == 'dtype' else kind] for name, kind in pointers.items()}
        signature = {name: signature[name] for name in function.arg_names}
        places = {(function.arg_names.index(name),): value for name, value in fixed.items()}
        compiled = triton.compile(ASTSource(function, signature, places), target=GPUTarget('cuda', capability, 32))
        assert len(compiled.asm['cubin']) > 0


def test_on_a_cpu_they_are_an_error_in_one_line():
    model = segmentor_with_statistics(TINY_UPERNET)
    with pytest.raises(UserError, match='kernels=True is for GPUs, but the model is on cpu: move it to one') as caught:
        optimize_for_inference(model, kernels=True)
    assert '\n' not in str(caught.value)
    with pytest.raises(UserError, match='kernels=True'):
        use_kernels(model)


def test_a_run_whose_config_asks_for_them_ends_before_it_starts(tiny_cfg):
    tiny_cfg.custom_hooks = [*tiny_cfg.get('custom_hooks', []), dict(type='UseKernelsHook')]
    with pytest.raises(UserError, match='kernels=True is for GPUs, but the model is on cpu'):
        train(tiny_cfg, TrainOptions(weights='none', seed=0))


def test_a_checkpoint_of_such_a_run_is_tested_on_a_cpu(tiny_cfg, trained):
    tiny_cfg.custom_hooks = [*tiny_cfg.get('custom_hooks', []), dict(type='UseKernelsHook')]
    assert 0 <= evaluate(tiny_cfg, trained)['mIoU'] <= 100


class OnGpu(torch.nn.Module):
    """A model that says that it is on a GPU."""

    def parameters(self, recurse=True):
        yield torch.empty(0, device='meta').as_subclass(_SaysCuda)


class _SaysCuda(torch.Tensor):
    device = torch.device('cuda')


def test_without_triton_they_are_an_error_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, 'triton', None)
    with pytest.raises(UserError, match='kernels=True needs triton: pip install triton'):
        use_kernels(OnGpu())


def test_a_model_without_parts_that_have_one_is_an_error():
    with pytest.raises(UserError, match='OnGpu has no part with a kernel'):
        use_kernels(OnGpu())


def test_off_by_default_and_plain_on_a_cpu():
    """A model that was trained with them is moved, optimised and predicts without."""
    model = segmentor_with_statistics(TINY_UPERNET)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x, mode='tensor')
        assert not any(type(m) is token_mixer.FusedInceptionDWConv2d for m in optimize_for_inference(model).modules())
        keys = list(model.state_dict())
        assert kernels._swap(model) == 4 + 2 and list(model.state_dict()) == keys
        assert torch.equal(model(x, mode='tensor'), expected)
        torch.testing.assert_close(optimize_for_inference(model)(x, mode='tensor'), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('mixer', [dict(branches=('hw', 'w')), dict(sequential=True), dict(type='DWConv2d')], ids=str)
def test_ablations_of_the_token_mixer_stay_plain(mixer):
    backbone = MetaNeXt('inceptionnext_tiny', token_mixer=mixer, out_indices=(0,))
    assert kernels._swap(backbone) == 0
