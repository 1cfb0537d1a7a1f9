"""Files are written as a whole or not at all, and what the system refuses is said in one line."""

import errno
import os

import pytest

from mmseg_inceptionnext.files import atomic_write, system_fault, write_text


def test_the_old_content_stays_where_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / 'q.json'
    path.write_text('old')

    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    with pytest.raises(OSError) as caught, atomic_write(path) as partial:
        partial.write_text('ne')
        full()
    assert caught.value.filename == str(path)
    assert system_fault(caught.value) == f'{path}: No space left on device: free space'
    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(OSError):
        write_text(path, 'new')
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['q.json']


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    (tmp_path / 'file').write_text('')
    for path in (tmp_path / 'file' / 'a.json', tmp_path / ('x' * 300)):
        with pytest.raises(OSError) as caught:
            write_text(path, '')
        assert str(path).startswith(system_fault(caught.value).partition(':')[0])


def test_text_is_utf8_and_odd_names_are_escaped(tmp_path):
    write_text(tmp_path / 'a', 'Bäume ' + os.fsdecode(b'\xff.png'))
    assert (tmp_path / 'a').read_bytes() == 'Bäume \\udcff.png'.encode()


@pytest.mark.parametrize('number', [errno.EACCES, errno.EROFS, errno.EIO, errno.ESTALE, errno.ELOOP, errno.EMFILE])
def test_what_the_system_refuses_is_no_bug(number):
    assert system_fault(OSError(number, os.strerror(number), 'a/b')).startswith(f'a/b: {os.strerror(number)}: ')


def test_what_says_nothing_or_is_a_bug_keeps_its_traceback():
    assert system_fault(FileNotFoundError(errno.ENOENT, 'No such file')) == ''
    assert system_fault(ValueError('x')) == system_fault(OSError('plain')) == ''
