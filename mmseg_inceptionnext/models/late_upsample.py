"""The low-resolution head for UperNets that exist: mmseg's, transformers', segmentation_models_pytorch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.models.late_upsample_uper_head import (
    LateUpsampleUPerHead,
    in_rows,
    is_plain_3x3,
    swap_convolutions,
    top_down,
)


def late_upsample(model: nn.Module) -> list[str]:
    """Let the UperNets in a model convolve their maps at low resolution, in place: the same function, faster.

    Known are mmseg's ``UPerHead``, the head of transformers' ``UperNetForSemanticSegmentation`` and the decoder of
    segmentation_models_pytorch's ``UPerNet``: anywhere in the model, or the model itself. Their 3×3 convolutions become
    a :class:`~mmseg_inceptionnext.models.late_upsample_uper_head.LateUpsampleConv2d` or
    :class:`~mmseg_inceptionnext.models.winograd.WinogradConv2d`, and the former get the maps before up-sampling and
    concatenation. Results and gradients stay the same, up to the rounding of sums in another order. Modules, parameters
    and the keys of the state dict are the same ones as before, so that optimizers, hooks and checkpoints stay valid.

    Returns:
        Names of the convolutions that were replaced; none if this was done before.

    Raises:
        UserError: There is no known UperNet in the model, or one that might compute something else. Nothing is
            replaced then.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f'model is a {type(model).__name__}, no torch.nn.Module: give late_upsample the network itself')
    late = [head for head in model.modules() if isinstance(head, tuple(_FORMS.values())) and head.late]
    heads = {name: head for name, head in model.named_modules() if _kind(head) is not None and head not in late}
    if not heads and not late:
        raise UserError(
            f'model={type(model).__name__} has no UperNet that late_upsample knows: give it one of mmseg (UPerHead), '
            'transformers or segmentation_models_pytorch, not compiled to another form'
        )
    for name, head in heads.items():
        if fault := _fault(head):
            raise UserError(f'{name or "model"} is a {type(head).__name__}, but {fault}')
    return [f'{name}.{conv}' if name else conv for name, head in heads.items() for conv in _swap(head)]


class LateUpsampleUperNetHead(nn.Module):
    """The head of transformers' ``UperNetForSemanticSegmentation``, which becomes one by :func:`late_upsample`."""

    late = True
    convolutions = staticmethod(LateUpsampleUPerHead.convolutions)  # the same names

    def forward(self, encoder_hidden_states: list[Tensor]) -> Tensor:
        *inputs, last = in_rows(encoder_hidden_states)
        maps = [conv(x) for conv, x in zip(self.lateral_convs, inputs, strict=True)]
        maps.append(self.bottleneck([last, *(block(last) for block in self.psp_modules.blocks)]))
        maps = top_down(maps, self.fpn_convs, self.align_corners)
        return self.classifier(self.fpn_bottleneck(maps)).contiguous()

    @staticmethod
    def example(head: Callable[..., nn.Module], channels: list[int]) -> nn.Module:
        """Build a small head for maps of some channels."""
        return head(SimpleNamespace(pool_scales=(1, 2), hidden_size=4, num_labels=3), in_channels=channels)


class LateUpsampleUPerNetDecoder(nn.Module):
    """The decoder of segmentation_models_pytorch's ``UPerNet``, which becomes one by :func:`late_upsample`."""

    late, align_corners = True, False

    @staticmethod
    def convolutions(head: nn.Module) -> tuple[dict[str, list[int]], list[str]]:
        """See :meth:`LateUpsampleUPerHead.convolutions`."""
        pooled, channels = len(head.psp.blocks), head.fusion_block[0].out_channels
        bottlenecks = {
            'psp.out_conv.0': [head.psp.out_conv[0].in_channels - pooled * channels, *[channels] * pooled],
            'fusion_block.0': [channels] * (len(head.fpn_conv_blocks) + 1),
        }
        return bottlenecks, [f'fpn_conv_blocks.{i}.0' for i in range(len(head.fpn_conv_blocks))]

    def forward(self, features: list[Tensor]) -> Tensor:
        is_contiguous = features[-1].is_contiguous()
        *features, last = in_rows([norm(x) for norm, x in zip(self.feature_norms, features[2:], strict=True)])
        sums = [self.psp.out_conv([last, *(block(last) for block in self.psp.blocks)])]
        for block, x in zip(self.fpn_lateral_blocks, reversed(features), strict=True):
            sums.append(block(sums[-1], x))
        maps = [conv(x) for conv, x in zip(self.fpn_conv_blocks, sums[1:], strict=True)]
        out = self.fusion_block([*reversed(maps), sums[0]])
        return out.contiguous() if is_contiguous else out  # the losses of the library take views of the masks

    @staticmethod
    def example(decoder: Callable[..., nn.Module], channels: list[int]) -> nn.Module:
        """Build a small decoder for maps of some channels."""
        return decoder(encoder_channels=channels, encoder_depth=len(channels) - 1, decoder_channels=4)


# The libraries' own classes by name: neither transformers nor segmentation_models_pytorch need be installed.
_FORMS = {
    'mmseg.models.decode_heads.uper_head.UPerHead': LateUpsampleUPerHead,
    'transformers.models.upernet.modeling_upernet.UperNetHead': LateUpsampleUperNetHead,
    'segmentation_models_pytorch.decoders.upernet.decoder.UPerNetDecoder': LateUpsampleUPerNetDecoder,
}


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """Return the known class that a module is of or derives from."""
    return next((cls for cls in type(module).__mro__ if _full_name(cls) in _FORMS), None)


def _full_name(cls: type) -> str:
    return f'{cls.__module__}.{cls.__qualname__}'


def _form(head: nn.Module) -> type[nn.Module]:
    return _FORMS[_full_name(_kind(head))]


def _fault(head: nn.Module) -> str | None:
    """Return why a head cannot take its new form and compute the same, if so."""
    kind, form = _kind(head), _form(head)
    if type(head) not in (kind, form):
        return f'late_upsample knows {kind.__name__} itself: a class derived from it may compute something else'
    if form is not LateUpsampleUPerHead and not _computes_the_same(kind, form):
        library = kind.__module__.partition('.')[0]
        return f'the installed {library} computes it in another way than late_upsample knows: leave it as it is'
    try:
        bottlenecks, others = form.convolutions(head)
        convs = {name: head.get_submodule(name) for name in [*bottlenecks, *others]}
    except (AttributeError, IndexError, TypeError):
        return 'its layers have been replaced: call late_upsample before that, or leave it as it is'
    for name, channels in bottlenecks.items():
        conv = convs[name]
        if not is_plain_3x3(conv) or conv.in_channels != sum(channels):
            what = conv if type(conv) is nn.Conv2d else type(conv).__name__
            return f'its {name} is {what}: only plain 3×3 convolutions can be replaced, leave it as it is'
    pooling = head.psp if form is LateUpsampleUPerNetDecoder else head.psp_modules  # not called as a whole any more
    if 'forward' in vars(head) or 'forward' in vars(pooling) or pooling._forward_hooks or pooling._forward_pre_hooks:
        return 'its forward method has been replaced, or its pooling has hooks: call late_upsample before that'
    return None


def _swap(head: nn.Module) -> list[str]:
    """Give a head its new form, and return the names of the convolutions that were replaced."""
    head.__class__ = form = _form(head)
    head.late = True
    return swap_convolutions(head, *form.convolutions(head), head.align_corners)


@cache
def _computes_the_same(kind: type[nn.Module], form: type[nn.Module]) -> bool:
    """Try a class of another library against our form of it, once: its versions may differ."""
    channels, sizes = [1, 1, 2, 3, 5], [(40, 56), (20, 28), (10, 14), (5, 7), (3, 4)]
    with torch.random.fork_rng(devices=[]), torch.device('cpu'), torch.no_grad():
        maps = [torch.randn(2, c, *size).double() for c, size in zip(channels, sizes, strict=True)]
        try:
            head = form.example(kind, channels).double().eval()
            expected = head(list(maps))
            _swap(head)
            return torch.allclose(head(list(maps)), expected, rtol=1e-9, atol=1e-9)
        except (AttributeError, RuntimeError, TypeError, ValueError):  # built or called in another way
            return False
