"""Two trainings do not share a work dir."""

import subprocess
import sys

import pytest
from support import TINY_CONFIG, assert_user_error

from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import train
from mmseg_inceptionnext.training.work_dir_lock import holder, locked

HOLD = """
import sys
from mmseg_inceptionnext.training.work_dir_lock import locked
with locked(sys.argv[1]):
    print('held', flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that has the lock of the folder 'work'."""
    process = subprocess.Popen(
        [sys.executable, '-c', HOLD, str(tmp_path / 'work')], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == 'held\n'
    yield process
    process.kill()
    process.wait()


def test_the_second_training_says_who_has_it(other, tmp_path, mini_root, tool_here, tiny_cfg):
    options = ('--data-root', mini_root, '--weights', 'none', '--work-dir', tmp_path / 'work')
    process = tool_here('train', TINY_CONFIG, *options)
    assert_user_error(process, f'in use by process {other.pid} on ', 'python -c', 'another --work-dir')
    assert f'process {other.pid}' in holder(tmp_path / 'work')
    other.kill()  # nothing that it could do
    other.wait()
    assert holder(tmp_path / 'work') == ''
    assert train(tiny_cfg, TrainOptions(weights='none')).iter == 6
    assert not (tmp_path / 'work' / '.lock').exists()


def test_a_test_beside_a_training_is_allowed(other, trained, mini_root, tool_here, tmp_path):
    process = tool_here('test', TINY_CONFIG, trained, '--data-root', mini_root, '--work-dir', tmp_path / 'work')
    assert process.returncode == 0, process.stderr


def test_who_has_just_come_is_another_training(other, tmp_path):
    (tmp_path / 'work' / '.lock').write_text('')
    with pytest.raises(UserError, match='in use by another training: wait'), locked(tmp_path / 'work'):
        pass


def test_it_is_given_back_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path):
        assert (tmp_path / '.lock').is_file()
    assert list(tmp_path.iterdir()) == []
