"""The counter against closed forms, and the paper's tables."""

import pytest
import timm
import torch
from support import ROOT
from torch import nn

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.measure.complexity import count_gmacs, measure_complexity
from mmseg_inceptionnext.measure.imagenet import is_imagenet_model
from mmseg_inceptionnext.measure.paper import (
    TABLE_1,
    TABLE_3,
    TABLE_4,
    TABLE_5,
    TABLE_6,
    TABLE_7,
    TABLE_8,
    imagenet_row,
    paper_row,
)
from mmseg_inceptionnext.measure.tables import complexity_table
from mmseg_inceptionnext.models.token_mixers import InceptionDWConv2d

TABLES = TABLE_6 | TABLE_7


class Segmentor(nn.Module):
    """A backbone and a head with mmseg's signature."""

    def __init__(self, backbone: nn.Module, head: nn.Module | None = None):
        super().__init__()
        self.backbone, self.head = backbone, head or nn.Identity()

    def forward(self, inputs, mode):
        return self.head.forward(self.backbone(inputs))


def test_three_layers_counted_by_hand():
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, stride=2, groups=8))
    macs = count_gmacs(Segmentor(backbone, nn.Conv2d(8, 5, 1)), (9, 11))
    assert macs['backbone'] * 1e9 == pytest.approx(9 * 11 * 3 * 8 * 9 + 4 * 5 * 8 * 9)
    assert macs['head'] * 1e9 == pytest.approx(4 * 5 * 8 * 5)
    assert 'neck' not in macs


@pytest.mark.parametrize(('channels', 'ratio', 'band'), [(96, 0.125, 11), (64, 0.25, 9)])
def test_token_mixer_costs_what_table_2_says(channels, ratio, band):
    """Parameters (2k + 9)·g of the weights and as many MACs a position, with g = C/8: (2k + 9)·C/8·HW."""
    height, width, g = 20, 30, int(channels * ratio)
    mixer = InceptionDWConv2d(channels, square_kernel_size=3, band_kernel_size=band, branch_ratio=ratio)
    weights = sum(p.numel() for name, p in mixer.named_parameters() if name.endswith('weight'))
    assert weights == (2 * band + 9) * g
    model = Segmentor(nn.Sequential(nn.Conv2d(3, channels, 1), mixer))
    stem = 3 * channels * height * width
    assert count_gmacs(model, (height, width))['backbone'] * 1e9 - stem == pytest.approx(weights * height * width)


def test_attention_is_counted():
    class Attention(nn.Module):
        def forward(self, x):
            tokens = x.flatten(2).transpose(1, 2)
            return torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)

    macs = count_gmacs(Segmentor(Attention()), (4, 8))
    assert sum(macs.values()) * 1e9 == pytest.approx(2 * 32 * 32 * 3)


@pytest.mark.parametrize('config', TABLES, ids=str)
def test_tables_6_and_7(config):
    """Within 1 of every printed figure."""
    printed = TABLES[config]
    measured = measure_complexity(ROOT / 'configs' / f'{config}.py')
    assert abs(measured.gmacs - printed.macs) < 1
    # The table prints 23 M for PoolFormer-S24 and 35 M for S36, but the backbones differ by 9.5 M only.
    expected = 25 if printed.name == 'PoolFormer-S24' else printed.params
    assert abs(measured.params_m - expected) < 1
    assert measured.gmacs == pytest.approx(sum(measured.gmacs_by_part.values()))


def test_the_auxiliary_head_counts_in_the_parameters_only():
    measured = measure_complexity(ROOT / 'configs/upernet/inceptionnext_t.py', (64, 64))
    assert measured.params_m - measured.params_m_without_aux == pytest.approx(
        (384 * 256 * 9 + 2 * 256 + 257 * 150) / 1e6
    )
    assert measured.shape == (64, 64)


def test_macs_are_proportional_to_the_image():
    one, four = (
        measure_complexity(ROOT / 'configs/fpn/inceptionnext_a.py', shape).gmacs for shape in ((128, 128), (256, 256))
    )
    assert four == pytest.approx(4 * one)


@pytest.mark.parametrize(('shape', 'fitting'), [((7, 100), '32×128'), ((0, 64), '32×64')], ids=str)
def test_a_shape_that_does_not_fit(shape, fitting):
    with pytest.raises(UserError, match=f'cannot take {shape[0]}×{shape[1]} images: use {fitting}'):
        measure_complexity(ROOT / 'configs/fpn/inceptionnext_a.py', shape)


def test_rows_are_found_by_the_path_of_the_config(tmp_path):
    assert paper_row(ROOT / 'configs/upernet/inceptionnext_t.py').name == 'InceptionNeXt-T'
    assert paper_row('configs/baselines/fpn/pvt_l.py').macs == 80
    assert paper_row('upernet/inceptionnext_t').name == 'InceptionNeXt-T'
    (tmp_path / 'upernet').mkdir()
    (tmp_path / 'upernet/inceptionnext_t.py').touch()
    assert paper_row(tmp_path / 'upernet/inceptionnext_t.py') is None
    assert paper_row(ROOT / 'configs/mini/fpn_inceptionnext_a.py') is None


def test_the_low_resolution_head_is_counted_too():
    """Table 6's MACs by the plain head, and by hand what ours does: at 512×2048 two thirds of a layer are smaller."""
    measured = measure_complexity(ROOT / 'configs/upernet/inceptionnext_t.py')
    pixels, taps = 128 * 512, 9 * 512 * 512
    up_sampled = taps * pixels * (1 / 4 + 1 / 16 + 1 / 64) - 3 * taps * pixels
    pooled = taps * (1 + 4 + 9 + 36) - 4 * taps * pixels / 64
    assert measured.gmacs_executed == pytest.approx(measured.gmacs + (up_sampled + pooled) / 1e9)
    plain = measure_complexity(ROOT / 'configs/baselines/upernet/swin_t.py')
    assert plain.gmacs_executed == plain.gmacs


@pytest.mark.parametrize('row', {row.model: row for row in (*TABLE_1, *TABLE_3, *TABLE_5, *TABLE_8)}.values(), ids=str)
def test_tables_1_3_5_and_8(row):
    """Parameters and MACs at 224² of every row agree with the print within its last digit; DeiT-S is timm's."""
    measured = measure_complexity(row.model)
    assert measured.shape == (224, 224)
    for value, printed in ((measured.params_m, row.params), (measured.gmacs, row.macs)):
        assert abs(value - float(printed)) <= 10 ** -len(printed.partition('.')[2])


# Table 4's rows whose MACs are not within the last digit; why is in docs/paper.md.
_OTHERWISE = {('mobilenetv2_140', 224), ('efficientnet_b0', 224), ('ghostnet_130', 224), ('convnext_base', 384)}


@pytest.mark.slow
@pytest.mark.parametrize('row', [row for row in TABLE_4 if row.model], ids=lambda row: f'{row.name} {row.size}')
def test_table_4(row):
    measured = measure_complexity(row.model, (row.size, row.size))
    assert abs(measured.params_m - float(row.params)) <= 10 ** -len(row.params.partition('.')[2])
    agrees = abs(measured.gmacs - float(row.macs)) <= 10 ** -len(row.macs.partition('.')[2])
    assert agrees == ((row.model, row.size) not in _OTHERWISE)


@pytest.mark.parametrize('name', ['mobilenetv2_140', 'efficientnet_b0', 'ghostnet_130'])
def test_with_two_operations_for_each_value_of_a_norm_small_models_have_the_printed_macs(name):
    values = []
    with torch.device('meta'):
        model = timm.create_model(name).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(lambda module, args, out: values.append(out.numel()))
    with torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device='meta'))
    printed = next(row.macs for row in TABLE_4 if row.model == name)
    assert f'{measure_complexity(name).gmacs + 2 * sum(values) / 1e9:.2f}' == printed


def test_the_print_is_that_of_the_size():
    rows = [measure_complexity('convnext_tiny', (side, side)) for side in (224, 256)]
    printed = [line.split('|')[-3].strip() for line in complexity_table(rows, paper=True).splitlines()[2:]]
    assert printed == ['4.5', '–']
    assert imagenet_row('inceptionnext_base', (384, 384)).macs == '43.6'


def test_the_paper_stands_beside_an_imagenet_model():
    table = complexity_table(
        [measure_complexity('convnext_tiny_k5'), measure_complexity('deit_tiny_patch16_224')], True
    )
    *_, first, second = table.splitlines()
    assert [cell.strip() for cell in first.split('|')[-5:-1]] == ['28.4', '+0.0', '4.4', '+0.0']
    assert [cell.strip() for cell in second.split('|')[-5:-1]] == ['–'] * 4


def test_a_name_that_is_neither_a_config_nor_a_model():
    with pytest.raises(UserError, match='no config at .*convnext_tiny_k9'):
        measure_complexity('convnext_tiny_k9')


def test_a_config_that_is_named_like_a_model_is_a_config(tmp_path):
    for name in ('resnet50.py', 'convnext_tiny.py', tmp_path / 'resnet50.py'):
        assert not is_imagenet_model(name)
    assert is_imagenet_model('resnet50') and is_imagenet_model('convnext_tiny')
