"""The matrices against torch.nn.functional.interpolate."""

import pytest
import torch
import torch.nn.functional as F

from mmseg_inceptionnext.models.interpolation import shifted_interpolation, source_band


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize(('size', 'new_size'), [(1, 1), (1, 5), (3, 3), (4, 7), (5, 20), (7, 16), (9, 4)], ids=str)
def test_rows_of_the_matrix_are_those_of_interpolate_shifted(size, new_size, align_corners):
    matrices = shifted_interpolation(size, new_size, align_corners)
    unit = torch.eye(size, dtype=torch.double)[None]
    expected = F.interpolate(unit[..., None], (new_size, 1), mode='bilinear', align_corners=align_corners)[0, :, :, 0].T
    assert matrices.shape == (3, new_size, size)
    torch.testing.assert_close(matrices[1], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(matrices[0], F.pad(expected, (0, 0, 1, 0))[:-1], rtol=0, atol=1e-12)
    torch.testing.assert_close(matrices[2], F.pad(expected, (0, 0, 0, 1))[1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize('align_corners', [False, True])
def test_a_band_holds_all_that_is_not_zero(align_corners):
    matrices = shifted_interpolation(7, 24, align_corners)
    for start in range(0, 24, 5):
        low, high = source_band(start, start + 5, 7, 24, align_corners)
        block = matrices[:, start : start + 5]
        assert not block[..., :low].any() and not block[..., high:].any()
