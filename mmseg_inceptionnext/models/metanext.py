"""MetaNeXt (Yu et al., CVPR 2024) as a segmentation backbone: ConvNeXt's block around any token mixer.

Read from top to bottom: norm, MLP, block, stage, network. Its token mixers are in
:mod:`~mmseg_inceptionnext.models.token_mixers`; :class:`~mmseg_inceptionnext.InceptionNeXt` is one case of it.
Section, table and equation numbers are the paper's (arXiv:2303.16900). Parameter names are those of InceptionNeXt's
released ImageNet checkpoints, so that nothing is renamed on load.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import mmengine
import torch
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from timm.layers import DropPath, LayerNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.models.archs import MetaNeXtArch, resolve_metanext_arch
from mmseg_inceptionnext.models.token_mixers import build_token_mixer
from mmseg_inceptionnext.models.weights import load_pretrained


def build_norm(norm_cfg: Mapping, channels: int) -> nn.Module:
    """Build a norm of (N, C, H, W) maps: 'LN' normalises over channels (timm's LayerNorm2d), others are mmcv's.

    Raises:
        UserError: There is no such norm, or it does not take its arguments.
    """
    if norm_cfg.get('type') in ('LN', 'LN2d'):  # mmpretrain's name for it
        norm_cfg = {'eps': 1e-6, **norm_cfg, 'type': LayerNorm2d}
    try:
        return build_norm_layer(dict(norm_cfg), channels)[1]
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"norm_cfg={dict(norm_cfg)} is no norm of {channels} channels: use type='SyncBN', 'BN' or 'LN'"
        ) from error


class ConvMlp(nn.Module):
    """Two 1×1 convolutions with a GELU between them. (N, C, H, W) to (N, C, H, W)."""

    def __init__(self, channels: int, hidden_channels: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden_channels, kernel_size=1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden_channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class MetaNeXtBlock(nn.Module):
    """x + γ · MLP(Norm(TokenMixer(x))) (Sec. 3.1, Eq. 3), with LayerScale γ and stochastic depth.

    Input and output: (N, C, H, W).
    """

    def __init__(self, channels: int, mlp_ratio: float, drop_path: float, layer_scale_init_value: float,
                 norm_cfg: Mapping, token_mixer: Mapping):  # fmt: skip
        super().__init__()
        self.token_mixer = build_token_mixer(token_mixer, channels)
        self.norm = build_norm(norm_cfg, channels)
        self.mlp = ConvMlp(channels, int(channels * mlp_ratio))
        self.gamma = nn.Parameter(torch.full((channels,), float(layer_scale_init_value)))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.token_mixer(x)))
        return x + self.drop_path(y * self.gamma[:, None, None])


class MetaNeXtStage(nn.Module):
    """A down-sampling (norm, then a 2×2 convolution of stride 2), if any, and a row of blocks.

    (N, C_in, H, W) to (N, C, ⌊H/2⌋, ⌊W/2⌋); without down-sampling, the size is kept.
    """

    def __init__(self, in_channels: int, channels: int, downsample: bool, drop_path_rates: list[float],
                 norm_cfg: Mapping, with_cp: bool, **block):  # fmt: skip
        super().__init__()
        self.with_cp = with_cp
        self.downsample = nn.Identity()
        if downsample:
            self.downsample = nn.Sequential(
                build_norm(norm_cfg, in_channels),
                nn.Conv2d(in_channels, channels, kernel_size=2, stride=2),
            )
        self.blocks = nn.Sequential(
            *(MetaNeXtBlock(channels, drop_path=rate, norm_cfg=norm_cfg, **block) for rate in drop_path_rates)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            if not torch.jit.is_scripting() and self.with_cp and x.requires_grad:
                x = _checkpointed(block, x)
            else:
                x = block(x)
        return x


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """Compute ``block(x)``; its activations are recomputed in the backward pass.

    The recomputation runs every BatchNorm a second time, but its running statistics must count the batch once. A
    compiler, which takes no context, updates them once by itself. A trace has no backward pass to save memory in.
    """
    if torch.jit.is_tracing():
        return block(x)
    if torch.compiler.is_compiling():
        return checkpoint(block, x, use_reentrant=False)
    contexts = partial(_recomputation_contexts, block)
    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


def _recomputation_contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _frozen_statistics(block)


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Normalise by batch statistics as in training, but keep the running ones as they are."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


@mmengine.registry.MODELS.register_module()  # where mmdet and mmpretrain look as well
@MODELS.register_module()
class MetaNeXt(BaseModule):
    """MetaNeXt (Sec. 3.1), returning the feature maps of several stages.

    Args:
        arch: Name of an entry of :data:`~mmseg_inceptionnext.models.archs.METANEXT_ARCHS`, such as 'convnext_tiny', or
            a dict. The dict has ``depths``, ``channels`` and ``mlp_ratios``, a tuple each with an entry a stage, and
            optionally ``patch_size`` (4), ``token_mixer`` and ``norm_cfg``. Three numbers in place of the tuples make
            it isotropic: every block is a stage of its own, and none down-samples.
        in_channels: Channels of the input image.
        drop_path_rate: Stochastic depth rate of the last block; it rises linearly from 0 over all blocks (Table 10).
        layer_scale_init_value: Initial value of γ, above 0.
        out_indices: Stages whose output is returned, ascending; -1 is the last. Later stages are not built. Default:
            all; of an isotropic arch, the blocks that end its quarters.
        norm_cfg: Type and arguments of every normalisation layer: a kind of BatchNorm, or 'LN' over channels. Default:
            the arch's.
        out_norm: Give each returned map a norm of its own (``norm0``, ``norm1``, …), as the paper's author did for
            segmentation. ImageNet checkpoints do not have them; they start as the identity.
        frozen_stages: Stages that are not trained and stay in eval mode: -1 none, 0 the stem, n the stem and the
            first n stages. The out-norms belong to the segmentor and are trained in any case.
        norm_eval: Keep every BatchNorm in eval mode while training.
        with_cp: Activation checkpointing: recompute each block in the backward pass to save memory.
        token_mixer: ``dict(type=…)`` with its arguments, see :mod:`~mmseg_inceptionnext.models.token_mixers`. Without
            another ``type`` than the arch's, it changes the arguments that it names. Default: the arch's.
        init_cfg: ``dict(type='Pretrained', checkpoint=X)`` loads ImageNet weights, see
            :func:`~mmseg_inceptionnext.models.weights.load_pretrained`. Default: truncated normal, σ = 0.02.

    Attributes:
        out_channels (tuple[int]): Channels of each returned map.
        strides (tuple[int]): Stride of each returned map against the input.

    Input: (N, in_channels, H, W), H and W at least the largest stride.
    Output: a tuple of (N, out_channels[i], H_i, W_i), where H_i is H divided by the patch size and then halved by each
    stage that down-samples, rounded down each time.

    Raises:
        UserError: An unknown ``arch``, or an argument outside its range.
    """

    def __init__(
        self,
        arch: str | Mapping,
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        out_indices: tuple[int, ...] | None = None,
        norm_cfg: Mapping | None = None,
        out_norm: bool = True,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        token_mixer: Mapping | None = None,
        init_cfg: dict | list[dict] | None = None,
    ):
        super().__init__(init_cfg)
        arch: MetaNeXtArch = resolve_metanext_arch(arch)
        depths, channels, mlp_ratios = arch.depths, arch.channels, arch.mlp_ratios
        norm_cfg = arch.norm_cfg if norm_cfg is None else norm_cfg
        out_indices = arch.default_out_indices if out_indices is None else out_indices
        out_indices = _check_out_indices(out_indices, len(depths))
        if not 0 <= drop_path_rate < 1:
            raise UserError(f'drop_path_rate={drop_path_rate} must be at least 0 and below 1')
        if not layer_scale_init_value > 0:
            raise UserError(f'layer_scale_init_value={layer_scale_init_value} must be above 0')
        if not -1 <= frozen_stages <= len(depths):
            raise UserError(f'frozen_stages={frozen_stages} must be from -1 (none) to {len(depths)} (all)')

        self.in_channels = in_channels
        self.out_indices = out_indices
        self.out_channels = tuple(channels[i] for i in self.out_indices)
        self.strides = tuple(arch.strides[i] for i in self.out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels[0], kernel_size=arch.patch_size, stride=arch.patch_size),
            build_norm(norm_cfg, channels[0]),
        )
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist())
        self.stages = nn.Sequential()
        for i in range(self.out_indices[-1] + 1):
            self.stages.append(
                MetaNeXtStage(
                    channels[max(i - 1, 0)],
                    channels[i],
                    downsample=i > 0 and not arch.isotropic,
                    drop_path_rates=[next(rates) for _ in range(depths[i])],
                    norm_cfg=norm_cfg,
                    with_cp=with_cp,
                    mlp_ratio=mlp_ratios[i],
                    layer_scale_init_value=layer_scale_init_value,
                    token_mixer=arch.mixer_with(token_mixer),
                )
            )
        for i in self.out_indices:
            self.add_module(f'norm{i}', build_norm(norm_cfg, channels[i]) if out_norm else nn.Identity())
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self._freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        outs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outs.append(getattr(self, f'norm{i}')(x))
        return tuple(outs)

    def init_weights(self) -> None:
        init_cfgs = self.init_cfg if isinstance(self.init_cfg, list) else [self.init_cfg or {}]
        pretrained = [cfg for cfg in init_cfgs if cfg.get('type') == 'Pretrained']
        # mmengine's own loader silently accepts partial matches and falls back to unpickling; ours does neither.
        original, self.init_cfg = self.init_cfg, [cfg for cfg in init_cfgs if cfg and cfg not in pretrained]
        super().init_weights()
        self.init_cfg = original
        for cfg in pretrained:
            load_pretrained(self, cfg['checkpoint'])

    def train(self, mode: bool = True) -> MetaNeXt:
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch activation checkpointing on or off, as timm's models do; see ``with_cp``."""
        for stage in self.stages:
            stage.with_cp = enable

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Return the depth of a parameter's layer and the number of layers, for mmpretrain's layer-wise decay.

        The stem is layer 0, each block the next one, together with the down-sampling before it, and out-norms and all
        that is not of the backbone (whose names begin with ``prefix``) are the last.
        """
        depths = [len(stage.blocks) for stage in self.stages]
        last = sum(depths) + 1
        name = param_name.removeprefix(prefix) if param_name.startswith(prefix) else ''
        if name.startswith('stem.'):
            return 0, last + 1
        if match := re.match(r'stages\.(\d+)\.(?:downsample|blocks\.(\d+))\.', name):
            return sum(depths[: int(match[1])]) + int(match[2] or 0) + 1, last + 1
        return last, last + 1

    def _freeze_stages(self) -> None:
        frozen = [self.stem, *self.stages[: self.frozen_stages]] if self.frozen_stages >= 0 else []
        for module in frozen:
            module.eval()
            module.requires_grad_(False)


def _check_out_indices(out_indices: tuple[int, ...], num_stages: int) -> tuple[int, ...]:
    """Return stages counted from the first, once they are known to be some and to ascend."""
    indices = tuple(i + num_stages if -num_stages <= i < 0 else i for i in out_indices)
    if not indices or not set(indices) <= set(range(num_stages)):
        raise UserError(f'out_indices={tuple(out_indices)} must name stages from 0 to {num_stages - 1}')
    if list(indices) != sorted(set(indices)):
        raise UserError(f'out_indices={tuple(out_indices)} must ascend: feature maps come in the order of the stages')
    return indices
