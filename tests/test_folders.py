"""Listing folders: loops, pipes, links that lead nowhere, folders with the names of images."""

import contextlib
import os
import shutil
import socket

import pytest
from mmengine import fileio
from support import TINY_CONFIG, assert_user_error

from mmseg_inceptionnext import folders
from mmseg_inceptionnext.folders import find_files


@pytest.fixture
def said(monkeypatch):
    lines = []
    folders._leave_out.cache_clear()
    monkeypatch.setattr(folders, 'say', lambda line, level: lines.append(line))
    return lines


@pytest.fixture
def odd_root(mini_root, tmp_path):
    """The data set, with all that is no file of it in the folder of its validation images."""
    root = tmp_path / 'odd'
    shutil.copytree(mini_root, root)
    images = root / 'images' / 'validation'
    (images / 'loop').symlink_to(images)
    (images / 'self.jpg').symlink_to('self.jpg')
    os.mkfifo(images / 'pipe.jpg')
    (images / 'folder.jpg').mkdir()
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(images):  # names of sockets are short
        server.bind('socket.jpg')
    return root


def test_what_is_no_file_is_named_and_left_out(odd_root, mini_root, said):
    images = odd_root / 'images' / 'validation'
    expected = sorted(os.listdir(mini_root / 'images' / 'validation'))
    assert find_files(images, '.jpg') == expected
    assert len(said) == 5
    for name in (
        'loop is left out: a link to a folder that it lies in',
        'self.jpg is left out: its links lead',
        'pipe.jpg is left out: a pipe',
        'socket.jpg is left out: a pipe',
        'folder.jpg is left out: a folder',
    ):
        assert any(name in line for line in said), name
    assert sorted(fileio.list_dir_or_file(images, list_dir=False, suffix='.jpg', recursive=True)) == expected
    assert len(said) == 5  # once


def test_files_in_linked_and_nested_folders_are_found(tmp_path, said):
    (tmp_path / 'a' / 'b.png').mkdir(parents=True)
    (tmp_path / 'a' / 'b.png' / 'c.PNG').write_text('')
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'disk' / 'd.png').write_text('')
    (tmp_path / 'a' / 'link').symlink_to(tmp_path / 'disk')
    (tmp_path / 'a' / '.hidden').mkdir()
    (tmp_path / 'a' / '.hidden' / 'e.png').write_text('')
    (tmp_path / 'a' / 'gone.png').symlink_to(tmp_path / 'nowhere')
    assert find_files(tmp_path / 'a', '.png') == ['b.png/c.PNG', 'gone.png', 'link/d.png']


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, trained, tool_here, monkeypatch):
    (tmp_path / 'in').mkdir()
    scandir = os.scandir

    def refuse(path):
        if not isinstance(path, int) and os.fspath(path).endswith('in'):
            raise PermissionError(13, 'Permission denied', os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    process = tool_here('predict', TINY_CONFIG, trained, tmp_path / 'in', '--out', tmp_path / 'out')
    assert_user_error(process, 'in: Permission denied: change its permissions')


def test_tools_run_on_a_folder_with_a_loop(odd_root, trained, tool_here, tmp_path):
    process = tool_here('check_dataset', TINY_CONFIG, '--data-root', odd_root)
    assert process.returncode == 0, process.stderr
    process = tool_here('test', TINY_CONFIG, trained, '--data-root', odd_root, '--work-dir', tmp_path / 'w')
    assert process.returncode == 0 and 'mIoU' in process.stdout


@pytest.mark.parametrize('kind', ['images', 'annotations'])
def test_links_that_lead_nowhere_make_no_smaller_data_set(kind, mini_root, trained, tool_here, tmp_path):
    root = tmp_path / 'linked'
    shutil.copytree(mini_root, root)
    victim = sorted((root / kind / 'validation').iterdir())[0]
    victim.unlink()
    victim.symlink_to('/disk/that/is/not/mounted.jpg')
    for arguments in (('test', TINY_CONFIG, trained), ('train', TINY_CONFIG, '--weights', 'none')):
        process = tool_here(*arguments, '--data-root', root, '--work-dir', tmp_path / 'w')
        assert_user_error(process, '1 of 2 files are links that lead nowhere', victim.name, '/disk/that/is/not/mounted')
    process = tool_here('check_dataset', TINY_CONFIG, '--data-root', root)
    assert process.returncode == 1 and victim.name in process.stdout
