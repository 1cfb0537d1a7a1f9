"""Measure UperNets of other backbones and libraries against themselves: a table of docs/speed.md.

mmseg's through optimize_for_inference, transformers' and segmentation_models_pytorch's through late_upsample, all with
random weights, in float32. A model and its faster form are measured in turn; ratios are taken round by round.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from mmseg.structures import SegDataSample
from torch import nn

from mmseg_inceptionnext import late_upsample
from mmseg_inceptionnext.command_line import markdown_table, positive_int, run
from mmseg_inceptionnext.config import find_config, read_config
from mmseg_inceptionnext.inference import optimize_for_inference
from mmseg_inceptionnext.measure.speed import interleave
from mmseg_inceptionnext.models.build import build_segmentor

SHAPE = (512, 512)


def of_mmseg(name: str) -> tuple[nn.Module, nn.Module]:
    model = build_segmentor(read_config(find_config(f'baselines/upernet/{name}'))).eval()
    return model, optimize_for_inference(model)


def of_transformers() -> tuple[nn.Module, nn.Module]:
    import transformers

    backbone = transformers.ConvNextConfig(  # its default sizes, a tuple, are not taken as such
        hidden_sizes=[96, 192, 384, 768], out_features=[f'stage{i}' for i in range(1, 5)]
    )
    cfg = transformers.UperNetConfig(backbone_config=backbone, use_auxiliary_head=False, num_labels=150)
    return treated(transformers.UperNetForSemanticSegmentation(cfg))


def of_smp() -> tuple[nn.Module, nn.Module]:
    import segmentation_models_pytorch as smp

    return treated(smp.UPerNet('tu-convnext_tiny', encoder_weights=None, decoder_channels=512, classes=150))


def treated(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    late = copy.deepcopy(model.eval())
    late_upsample(late)
    return model, late


MODELS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    'mmseg, Swin-T': lambda: of_mmseg('swin_t'),
    'mmseg, ConvNeXt-T': lambda: of_mmseg('convnext_t'),
    'transformers, ConvNeXt-T': of_transformers,
    'segmentation_models_pytorch, ConvNeXt-T, 512 channels': of_smp,
}


def seconds(model: nn.Module) -> dict[str, float]:
    x, start = torch.randn(1, 3, *SHAPE), time.perf_counter()
    with torch.inference_mode():
        if hasattr(model, 'data_preprocessor'):  # of mmseg
            model(x, [SegDataSample(metainfo=dict(ori_shape=SHAPE, img_shape=SHAPE))], mode='predict')
        else:
            model(x)
    return dict(seconds=time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--repeat', type=positive_int, default=7, metavar='N', help='rounds (7)')
    args = parser.parse_args()
    cells = []
    for name, make in MODELS.items():
        runs = [lambda model=model: seconds(model) for model in make()]
        interleave(runs, 2)  # to warm up
        rounds = interleave(runs, args.repeat)
        before, after = ([results[i]['seconds'] for results in rounds] for i in range(2))
        ratios = [a / b for a, b in zip(before, after, strict=True)]
        cells.append([
            name, f'{statistics.median(before):.3f}', f'{statistics.median(after):.3f}',
            f'{statistics.median(ratios):.2f}', f'{min(ratios):.2f} – {max(ratios):.2f}',
        ])  # fmt: skip
    print(markdown_table(['', 's', 's, faster', 'ratio', 'spread'], cells))
    print(f'{args.repeat} rounds, {SHAPE[0]}×{SHAPE[1]}, {torch.get_num_threads()} threads, torch {torch.__version__}')


if __name__ == '__main__':
    run(main)
