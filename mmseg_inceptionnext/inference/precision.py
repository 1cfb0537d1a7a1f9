"""What a segmentor computes in: float32, or bfloat16 where it may; and which of the two is faster here."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable
from threading import Lock

import torch
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.structures import BaseDataElement
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn

from mmseg_inceptionnext.device import multiplies_bfloat16
from mmseg_inceptionnext.errors import UserError

PRECISIONS = ('auto', 'fp32', 'bf16')

_RACE_SECONDS = 1.0
_CLEAR = 1.5  # a ratio of times that a second round would not turn
_WORTH = 1.2  # by how much bfloat16 must be faster: its labels are not exactly float32's


def check_precision(precision: str) -> None:
    """Raise a UserError for a precision that is not one of :data:`PRECISIONS`."""
    if precision not in PRECISIONS:
        raise UserError(f'precision={precision!r} must be one of {", ".join(PRECISIONS)}')


def use_bfloat16(model: nn.Module) -> nn.Module:
    """Let a segmentor compute under autocast in bfloat16, in place; its logits, and what follows, are float32.

    The images are normalised in float32, and so are sums and norms where autocast says so.

    Returns:
        The segmentor, now of a class of its own that inherits from the one before.
    """
    if not isinstance(model, _InBfloat16):
        model.__class__ = type(f'{type(model).__name__}InBfloat16', (_InBfloat16, type(model)), {})
        for head in model.modules():
            if isinstance(head, BaseDecodeHead) and isinstance(getattr(head, 'conv_seg', None), nn.Module):
                head.conv_seg.register_forward_hook(_to_float32)  # up-sampled in bfloat16, near ties would become ties
    return model


class _InBfloat16:
    """Methods of mmseg's segmentors that start an inference, under autocast."""

    def forward(self, inputs: Tensor, *args, **kwargs):
        with torch.autocast(inputs.device.type, torch.bfloat16):
            return super().forward(inputs, *args, **kwargs)

    def extract_feat(self, inputs: Tensor):
        with torch.autocast(inputs.device.type, torch.bfloat16):
            return super().extract_feat(inputs)

    def encode_decode(self, inputs: Tensor, *args, **kwargs):
        with torch.autocast(inputs.device.type, torch.bfloat16):
            return super().encode_decode(inputs, *args, **kwargs)

    def inference(self, inputs: Tensor, *args, **kwargs):
        with torch.autocast(inputs.device.type, torch.bfloat16):
            return super().inference(inputs, *args, **kwargs)


def _to_float32(module: nn.Module, args: tuple, logits: Tensor) -> Tensor:
    return logits.float()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


class AutoPrecision(nn.Module):
    """A segmentor that is made in the faster precision when its first images come: see :func:`faster`.

    Args:
        make: Makes a segmentor, with a ``test_step``, for 'fp32' or 'bf16'.
        device: Kind of its device.
        say: What is called with a line that says which precision was chosen.

    Attributes:
        precision: 'auto' before the first images, then 'fp32' or 'bf16'.
    """

    def __init__(self, make: Callable[[str], nn.Module], device: str, say: Callable[[str], None] = _to_stderr):
        super().__init__()
        self.precision = 'auto'
        self._make, self._device, self._say = make, device, say
        self._race = Lock()  # of threads that predict side by side, the first holds it

    def choose(self, step: Callable[[nn.Module], object], images: int = 1) -> nn.Module:
        """Return the chosen segmentor; the first call chooses it, by what a step with so many images takes."""
        with self._race:
            if self.precision == 'auto':
                self.precision, self.chosen = faster(self._make, step, self._device, images, self._say)
                del self._make  # and with it the model that the others were made of
        return self.chosen

    def test_step(self, data: dict) -> list[BaseDataElement]:
        """Call the chosen segmentor's ``test_step``; the first call chooses it on these images."""
        images = len(data['data_samples'])
        if isinstance(data['data_samples'][0], list):  # views of each image, for a multi-scale test
            images = len(data['data_samples'][0])
        return self.choose(lambda model: model.test_step(copy.deepcopy(data)), images).test_step(data)


def faster(
    make: Callable[[str], nn.Module],
    step: Callable[[nn.Module], object],
    device: str,
    images: int = 1,
    say: Callable[[str], None] = _to_stderr,
) -> tuple[str, nn.Module]:
    """Return the precision in which a step is faster on a device, and the model made for it.

    They race for about a second. bfloat16 must win by a fifth, because its labels are not exactly float32's. A device
    without instructions for bfloat16 takes float32 without a race. Of several processes all take what the first found.

    Args:
        make: Makes the model for 'fp32' or 'bf16'.
        step: What is timed.
        device: Kind of the device.
        images: Number of images that the step takes.
        say: What is called with a line that says what was chosen, and why.
    """
    if not multiplies_bfloat16(device):
        say(f'precision: fp32 (this {device.upper()} has no instructions for bfloat16)')
        return 'fp32', make('fp32').eval()
    models = {precision: make(precision).eval() for precision in ('fp32', 'bf16')}

    def run(model: nn.Module) -> None:
        with torch.inference_mode():
            step(model)
        if device == 'cuda':
            torch.cuda.synchronize()

    seconds = race({precision: lambda model=model: run(model) for precision, model in models.items()})
    results = [seconds]
    broadcast_object_list(results)
    (seconds,) = results
    chosen, other = ('bf16', 'fp32') if _WORTH * seconds['bf16'] < seconds['fp32'] else ('fp32', 'bf16')
    if is_main_process():
        say(f'precision: {chosen} ({seconds[chosen] / images:.2g} s an image; {other} {seconds[other] / images:.2g} s)')
    return chosen, models[chosen]


def race(
    steps: dict[str, Callable[[], object]],
    seconds: float = _RACE_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Run steps in turn and return the shortest time of each.

    A first call takes longer than the next ones: it sets up kernels and memory. So there are rounds until ``seconds``
    are over, and at least two, unless the first has a clear winner.
    """
    shortest = dict.fromkeys(steps, math.inf)
    end = clock() + seconds
    rounds = 0
    while True:
        for name, step in steps.items():
            start = clock()
            step()
            shortest[name] = min(shortest[name], clock() - start)
        rounds += 1
        first, second, *_ = sorted(shortest.values())
        if clock() >= end and (rounds > 1 or second > _CLEAR * first):
            return shortest
