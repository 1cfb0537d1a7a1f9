"""Files for GIS programs: what Deepness and GeoDeep read, and what GeoDeep makes of a map."""

import json

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio import Affine
from support import TINY_UPERNET, assert_user_error, needs_onnx_exporter, save_segmentor

from mmseg_inceptionnext import Segmentor, UserError
from mmseg_inceptionnext.export.deepness import export_for_deepness

pytestmark = needs_onnx_exporter
onnxruntime = pytest.importorskip('onnxruntime')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    return save_segmentor(tmp_path_factory.mktemp('model'), classes=4)


@pytest.fixture(scope='module')
def exported(files, tmp_path_factory):
    out = tmp_path_factory.mktemp('exported') / 'model.onnx'
    verified = export_for_deepness(*files, out, tile=96, resolution=50, verify=2)
    assert verified.shape == (96, 96) and verified.images == 2 and verified.error < 1e-4
    return out


def picture(size) -> np.ndarray:
    noise = np.random.default_rng(1).integers(0, 256, (size[0] // 16, size[1] // 16, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize(size[::-1]))


def test_input_output_and_metadata_are_those_that_the_programs_read(exported):
    session = onnxruntime.InferenceSession(exported)
    (image,), (output,) = session.get_inputs(), session.get_outputs()
    assert (image.type, image.shape) == ('tensor(float)', [1, 3, 96, 96])
    assert (output.type, output.shape) == ('tensor(float)', [1, 4, 96, 96])
    metadata = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    assert metadata == dict(
        model_type='Segmentor', class_names={str(i): f'class {i}' for i in range(4)}, resolution=50, tiles_size=96,
        tile_size=96, tiles_overlap=15, seg_thresh=0, seg_small_segment=0,
    )  # fmt: skip


def test_probabilities_of_values_from_0_to_1_have_our_labels(files, exported):
    pixels = picture((96, 96))
    session = onnxruntime.InferenceSession(exported)
    (result,) = session.run(None, {'image': (pixels / 255).astype(np.float32).transpose(2, 0, 1)[None]})
    assert np.allclose(result.sum(1), 1, atol=1e-5) and result.min() >= 0
    expected = Segmentor(*files, device='cpu')(pixels).labels
    assert len(np.unique(expected)) > 2 and np.mean(result[0].argmax(0) == expected) > 0.999


def test_geodeep_makes_our_labels_of_a_map(files, exported, tmp_path):
    """But for its median filter, and what it sees of a tile at seams."""
    geodeep = pytest.importorskip('geodeep')
    pixels = picture((208, 256))
    with rasterio.open(
        tmp_path / 'map.tif', 'w', driver='GTiff', height=208, width=256, count=3, dtype='uint8', crs='EPSG:32633',
        transform=Affine(0.5, 0, 500000, 0, -0.5, 5400000), photometric='rgb',
    ) as file:  # fmt: skip
        file.write(pixels.transpose(2, 0, 1))
    mask = geodeep.segment(str(tmp_path / 'map.tif'), str(exported))
    expected = Segmentor(*files, device='cpu', tile=96, overlap=14)(pixels).labels
    assert mask.shape == (208, 256) and len(np.unique(expected)) == 4
    assert np.mean(mask == expected) > 0.9
    areas = json.loads(geodeep.segment(str(tmp_path / 'map.tif'), str(exported), output_type='geojson'))
    assert {feature['properties']['class'] for feature in areas['features']} == {f'class {i}' for i in np.unique(mask)}


def test_a_threshold_becomes_two_classes(tmp_path):
    config, checkpoint = save_segmentor(tmp_path, classes=2)
    loss = dict(type='CrossEntropyLoss', use_sigmoid=True)
    head = dict(num_classes=2, out_channels=1, threshold=0.3, loss_decode=loss)
    config.write_text(config.read_text().replace("{'num_classes': 2}", repr(head)))
    content = torch.load(checkpoint, weights_only=True)
    for key in ('decode_head.conv_seg.weight', 'decode_head.conv_seg.bias'):
        content['state_dict'][key] = content['state_dict'][key][:1]
    torch.save(content, checkpoint)
    export_for_deepness(config, checkpoint, tmp_path / 'a.onnx', tile=64, verify=1)
    pixels = picture((64, 64))
    session = onnxruntime.InferenceSession(tmp_path / 'a.onnx')
    (result,) = session.run(None, {'image': (pixels / 255).astype(np.float32).transpose(2, 0, 1)[None]})
    labels = Segmentor(config, checkpoint, 'cpu')(pixels).labels
    assert result.shape == (1, 2, 64, 64) and np.mean(result[0].argmax(0) == labels) > 0.999


def test_the_tool(files, tmp_path, tool_here):
    (tmp_path / 'out').mkdir()
    command = ('export', *files, '--out', 'a.onnx', '--for', 'deepness', '--shape', 64, 64, '--verify', 1)
    process = tool_here(*command)
    assert process.returncode == 0, process.stderr
    assert 'a.onnx: ' in process.stdout and 'tiles of 64×64 pixels of 10 cm (the default of GeoDeep' in process.stdout
    for options, *parts in (
        (('--labels',), '--for deepness'),
        (('--dynamic',), '--for deepness'),
        (('--shape', 64, 96), '--shape 64 96', 'square'),
        (('--resolution', -1), '--resolution -1.0 must be above 0'),
        (('--resolution', 0), '--resolution 0.0 must be above 0'),
        (('--out', 'a.pt2'), 'a.pt2: the file name must end in .onnx'),
        (('--verify', 0), 'there is no image to compare on'),
    ):
        assert_user_error(tool_here(*command, *options), *parts)
    without = tuple(word for word in command if word not in ('--for', 'deepness'))
    assert_user_error(tool_here(*without, '--resolution', 5), '--resolution 5 is for --for deepness')


def test_our_segmentor_refuses_it_since_it_takes_other_values(exported):
    with pytest.raises(UserError, match='model.onnx was not exported by tools/export.py'):
        Segmentor(exported)


@pytest.mark.slow
def test_uper_net(tmp_path):
    files = save_segmentor(tmp_path, base=TINY_UPERNET)
    assert export_for_deepness(*files, tmp_path / 'a.onnx', tile=64, verify=2).differing < 1e-3
