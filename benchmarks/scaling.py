"""Estimate what the processes of a training run tell each other, and how long it takes: the tables of docs/scaling.md.

Counted from the configs: bytes and messages. Assumed, and written below: the speed of an A100, from the paper's
Table 4, and of networks. Nothing is measured here.
"""

import argparse
import math
from dataclasses import dataclass

from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch.nn import SyncBatchNorm

from mmseg_inceptionnext.command_line import markdown_table, run
from mmseg_inceptionnext.config import read_config
from mmseg_inceptionnext.measure.complexity import count_gmacs

# Training throughput on an A100 with TF32, images/s at 224×224 (paper, Table 4), and GMACs of such an image (Table 3).
PAPER = {'t': (901, 4.2), 's': (521, 8.4), 'b': (375, 14.9)}
CROP, IMAGES_PER_GPU, GPUS_PER_NODE = (512, 512), 2, 8
BACKWARD = 2 / 3  # of a training step; gradients travel while it runs
# GB/s that an all-reduce moves through each GPU: NVLink within a node, and between nodes with a 200 Gb/s adapter for
# each GPU, or with one of 100 Gb/s for all.
BANDWIDTH = {'200 Gb/s a GPU': (200, 200), '100 Gb/s a node': (200, 12.5)}
# Microseconds of a message that is too short for bandwidth to matter: within a node, for each doubling of the nodes
# (all-reduce, a tree), and for each further GPU (all-gather, a ring).
LATENCY, PER_DOUBLING, PER_GPU = 20, 10, 1


@dataclass(frozen=True)
class Model:
    """Of one config.

    Attributes:
        name: 'T', …
        gradient_bytes: Of all parameters that are trained, in float32 (autocast changes nothing here).
        channels: Of every SyncBN layer.
        step_ms: Of a GPU that waits for nobody.
    """

    name: str
    gradient_bytes: int
    channels: list[int]
    step_ms: float

    def sync_bn_bytes(self, gpus: int) -> int:
        """What a GPU receives in a step: mean, variance and count of all in the forward pass, two sums backward."""
        return sum(4 * (gpus * (2 * channels + 1) + 2 * 2 * channels) for channels in self.channels)

    def sync_bn_ms(self, gpus: int, network: str) -> float:
        """Of all layers, one after the other, both ways: nothing else can be done meanwhile."""
        latency = len(self.channels) * (all_reduce_latency(gpus) + LATENCY + PER_GPU * max(gpus - GPUS_PER_NODE, 0))
        return latency / 1e3 + self.sync_bn_bytes(gpus) / bandwidth(gpus, network) / 1e6

    def gradients_ms(self, gpus: int, network: str) -> float:
        """Of a ring, which moves 2 (N - 1) / N of the bytes through each GPU."""
        return 2 * (gpus - 1) / gpus * self.gradient_bytes / bandwidth(gpus, network) / 1e6

    def waiting_ms(self, gpus: int, network: str) -> float:
        return self.sync_bn_ms(gpus, network) + max(self.gradients_ms(gpus, network) - BACKWARD * self.step_ms, 0)


def all_reduce_latency(gpus: int) -> float:
    return LATENCY + PER_DOUBLING * math.log2(max(gpus / GPUS_PER_NODE, 1))


def bandwidth(gpus: int, network: str) -> float:
    within, between = BANDWIDTH[network]
    return within if gpus <= GPUS_PER_NODE else between


def read_model(size: str) -> Model:
    init_default_scope('mmseg')
    model = MODELS.build(read_config(f'upernet/inceptionnext_{size}').model)
    gradient_bytes = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    channels = [module.num_features for module in model.modules() if isinstance(module, SyncBatchNorm)]
    throughput, gmacs_224 = PAPER[size]
    # The auxiliary head, which mmseg's tensor mode leaves out, is 1 % of it.
    gmacs = sum(count_gmacs(model.eval(), CROP).values())
    step_ms = 1e3 * IMAGES_PER_GPU * gmacs / (throughput * gmacs_224)
    return Model(size.upper(), gradient_bytes, channels, step_ms)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    models, counts = [read_model(size) for size in PAPER], (8, 64, 512)
    print('Counted:\n')
    rows = [
        [model.name, f'{model.gradient_bytes / 1e6:.0f} MB', str(len(model.channels)), str(2 * len(model.channels)),
         *[f'{model.sync_bn_bytes(gpus) / 1e6:.1f} MB' for gpus in counts]]
        for model in models
    ]  # fmt: skip
    header = ['UperNet', 'gradients', 'SyncBN layers', 'their messages', *[f'bytes on {gpus} GPUs' for gpus in counts]]
    print(markdown_table(header, rows))
    print(f'\nEstimated, {IMAGES_PER_GPU} images a GPU, in ms:\n')
    rows = [
        [model.name, str(gpus), str(IMAGES_PER_GPU * gpus), f'{model.step_ms:.0f}', network,
         f'{model.gradients_ms(gpus, network):.1f}', f'{model.sync_bn_ms(gpus, network):.1f}',
         f'{100 * model.step_ms / (model.step_ms + model.waiting_ms(gpus, network)):.0f} %']
        for model in models
        for gpus in counts
        for network in (BANDWIDTH if gpus > GPUS_PER_NODE else ['200 Gb/s a GPU'])
    ]  # fmt: skip
    header = ['UperNet', 'GPUs', 'batch', 'step', 'network', 'gradients', 'SyncBN', 'efficiency']
    print(markdown_table(header, rows))


if __name__ == '__main__':
    run(main)
