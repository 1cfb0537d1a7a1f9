"""ReadImage in the place of LoadImageFromFile, from local files and from other storages."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.fileio import BaseStorageBackend, LocalBackend, register_backend
from mmseg.registry import TRANSFORMS
from PIL import Image
from support import variant

from mmseg_inceptionnext import ReadImage, SafeRunner, UserError
from mmseg_inceptionnext.errors import UnreadableFile
from mmseg_inceptionnext.evaluation import evaluate
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import train


class Bucket(BaseStorageBackend):
    """Objects under ``bucket://``, or without a prefix, that are files of a folder."""

    folder: Path
    files = LocalBackend()

    def get(self, path):
        return self.files.get(self._file(path))

    def get_text(self, path):
        return self.files.get_text(self._file(path))

    def put(self, content, path):
        self.files.put(content, self._file(path))

    def exists(self, path):
        return self.files.exists(self._file(path))

    def isdir(self, path):
        return self.files.isdir(self._file(path))

    def join_path(self, path, *paths):
        return self.files.join_path(path, *paths)

    def list_dir_or_file(self, path, *args, **kwargs):
        return self.files.list_dir_or_file(self._file(path), *args, **kwargs)

    def _file(self, path) -> str:
        return str(self.folder / str(path).removeprefix('bucket://'))


@pytest.fixture
def bucket(tmp_path, mini_root):
    register_backend('bucket', Bucket, prefixes='bucket', force=True)
    Bucket.folder = tmp_path / 'bucket'
    shutil.copytree(mini_root, Bucket.folder / 'mini')
    return Bucket.folder


@pytest.mark.parametrize('to_float32', [False, True])
def test_it_reads_what_mmcv_reads(tmp_path, to_float32):
    path = str(tmp_path / 'a.png')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)).save(path)
    arguments = dict(to_float32=to_float32, color_type='color', imdecode_backend='cv2', ignore_empty=False)
    ours, theirs = (kind(**arguments).transform(dict(img_path=path)) for kind in (ReadImage, LoadImageFromFile))
    assert np.array_equal(ours['img'], theirs['img']) and ours['img'].dtype == theirs['img'].dtype
    assert {key: ours[key] for key in ('img_shape', 'ori_shape')} == {k: theirs[k] for k in ('img_shape', 'ori_shape')}


def test_what_it_does_not_take_is_said_and_it_shows_its_arguments(tmp_path):
    for wrong in (dict(color_type='grayscale'), dict(imdecode_backend='tifffile')):
        with pytest.raises(UserError, match=f'{next(iter(wrong))}=.* is not one of .*take LoadImageFromFile'):
            TRANSFORMS.build(dict(type='ReadImage', **wrong))
    assert repr(ReadImage(to_float32=True)) == 'ReadImage(to_float32=True, ignore_empty=False, backend_args=None)'
    assert ReadImage(ignore_empty=True).transform(dict(img_path=str(tmp_path / 'none.png'))) is None
    with pytest.raises(UnreadableFile, match='no such file'):
        ReadImage().transform(dict(img_path=str(tmp_path / 'none.png')))


@pytest.mark.slow
def test_a_data_set_in_another_storage(tiny_cfg, bucket):
    """Its back end is found by the prefix of its paths; the same weights and figures as from local files."""
    local = train(variant(tiny_cfg, tiny_cfg.work_dir), TrainOptions(seed=5, weights='none'))
    remote_cfg = variant(tiny_cfg, Path(tiny_cfg.work_dir).parent / 'remote')
    for split in ('train', 'val', 'test'):
        remote_cfg[f'{split}_dataloader'].dataset.data_root = 'bucket://mini'
    remote = train(remote_cfg, TrainOptions(seed=5, weights='none'))
    for name, tensor in local.model.state_dict().items():
        assert torch.equal(tensor, remote.model.state_dict()[name])
    checkpoint = Path(local.work_dir, 'iter_6.pth')
    assert evaluate(remote_cfg, checkpoint) == evaluate(tiny_cfg, checkpoint)
    remote_cfg.train_dataloader.dataset.data_root = 'bucket://nothing'
    with pytest.raises(UserError, match='no data set at bucket://nothing'):
        train(remote_cfg, TrainOptions(seed=5, overwrite=True))


def test_checkpoints_in_another_storage_by_back_end_not_by_prefix(tiny_cfg, bucket):
    runner = SafeRunner.from_cfg(tiny_cfg)
    weights = dict(save_optimizer=False, save_param_scheduler=False)
    runner.save_checkpoint('runs', 'a.pth', **weights, backend_args=dict(backend='bucket'))
    assert (bucket / 'runs' / 'a.pth').is_file() and not Path('runs').exists()
    local = Path(tiny_cfg.work_dir, 'x:', 'y')  # an odd folder, but a local one
    runner.save_checkpoint(str(local), 'a.pth', **weights)
    assert [path.name for path in local.iterdir()] == ['a.pth']
