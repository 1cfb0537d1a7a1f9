"""Files in, files out: every input form, names that never collide, nothing lost and nothing overwritten."""

import json
import os
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from support import TINY_CONFIG

from mmseg_inceptionnext import Segmentor, UserError
from mmseg_inceptionnext.inference.predict import count_images, predict
from mmseg_inceptionnext.inference.sources import Output, Source, find_sources


@pytest.fixture(scope='module')
def segmentor(trained):
    return Segmentor(TINY_CONFIG, trained, device='cpu', precision='fp32')


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Images at several depths, and things that are none; the working directory is beside them."""
    monkeypatch.chdir(tmp_path)
    for name in ('in/a.jpg', 'in/sub/a.jpg', 'in/sub/b.PNG', 'in/.hidden.jpg', 'other/a.jpg'):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (40, 30), (200, 100, 50)).save(name)
    Path('in/notes.txt').write_text('no image')
    return tmp_path


def video(path: Path, frames: int = 5, size=(48, 34)) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'mp4v'), 10, size)
    for i in range(frames):
        writer.write(np.full((size[1], size[0], 3), 40 * i, np.uint8))
    writer.release()
    return path


def names(sources) -> dict[str, str]:
    return {str(source.path): str(source.name) for source in sources}


def test_folders_are_searched_and_keep_their_structure(folder):
    expected = {'in/a.jpg': 'a', 'in/sub/a.jpg': 'sub/a', 'in/sub/b.PNG': 'sub/b'}
    assert names(find_sources(['in'], Path('out'))) == expected


def test_globs_keep_the_path_from_where_they_begin(folder):
    assert names(find_sources(['in/**/a.jpg'], Path('out'))) == {'in/a.jpg': 'a', 'in/sub/a.jpg': 'sub/a'}
    assert names(find_sources(['*/a.*'], Path('out'))) == {'in/a.jpg': 'in/a', 'other/a.jpg': 'other/a'}


def test_a_name_with_the_characters_of_a_glob(folder):
    Path('in/a.jpg').rename('in/a[1].jpg')
    assert names(find_sources(['in/a[1].jpg'], Path('out'))) == {'in/a[1].jpg': 'a[1]'}


def test_lists_on_standard_input(folder):
    sources = find_sources(['-'], Path('out'), ['in/a.jpg\n', '\n', 'other/a.jpg\n'])
    assert names(sources) == {'in/a.jpg': 'a', 'other/a.jpg': 'a-2'}


def test_names_never_collide(folder):
    Path('in/a.png').touch()
    Path('in/A.jpg').touch()
    Path('in/a-2.jpg').touch()
    sources = find_sources(['in/a.jpg', 'in/a.png', 'in/A.jpg', 'in/a-2.jpg', 'other', 'in', 'in/a.jpg'], Path('out'))
    found = [str(source.name).lower() for source in sources]
    assert len(set(found)) == len(found) == 7  # each file once


@pytest.mark.parametrize('name', ['../../x.jpg', '/etc/x.jpg', '..', '/', 'a/../../x.jpg'])
def test_names_never_escape(folder, name):
    for inputs, lines in ((['-'], [name]), ([name], ())):
        if Path(name).is_dir() and not lines:
            continue  # whose files keep their path from there
        for source in find_sources(inputs, Path('out'), lines):
            for path in (Output(Path('out')).overlay_of(source), Output(Path('out')).labels_of(source)):
                assert path.resolve().is_relative_to(folder / 'out')


def test_overlays_of_a_folder_called_labels_do_not_meet_label_maps(folder):
    Path('in/labels').mkdir()
    Path('in/sub/a.jpg').rename('in/labels/a.jpg')
    output = Output(Path('out'), labels=True)
    sources = find_sources(['in'], Path('out'))
    paths = [path for source in sources for path in (output.overlay_of(source), output.labels_of(source))]
    assert len(set(paths)) == len(paths)


def test_output_is_not_taken_for_input(folder):
    Path('in/out').mkdir()
    Image.new('RGB', (4, 4)).save('in/out/a.jpg')
    assert 'in/out/a.jpg' not in names(find_sources(['in', 'in/**/*.jpg'], Path('in/out')))
    with pytest.raises(UserError, match='holds no image and no video outside of'):
        find_sources(['in'], Path('in'))


def test_names_that_are_folders_elsewhere(folder):
    """a.jpg is written as a.png, where the images of a folder a.png would go."""
    Path('in/a.png').mkdir()
    Path('in/sub/b.PNG').rename('in/a.png/b.png')
    sources = find_sources(['in'], Path('out'))
    files = {Output(Path('out')).overlay_of(source) for source in sources}
    assert len(files) == 3 and not files & {parent for path in files for parent in path.parents}


def test_globs_do_not_lead_out(folder):
    (source,) = find_sources(['i*/../other/a.jpg'], Path('out'))
    assert Output(Path('out')).overlay_of(source) == Path('out/in/other/a.png')


def test_links_in_a_circle_and_pipes(folder):
    Path('in/circle.jpg').symlink_to('circle.jpg')
    os.mkfifo('in/pipe.jpg')
    Path('in/.hidden').mkdir()
    Path('in/sub/a.jpg').rename('in/.hidden/a.jpg')
    Path('in/gone.jpg').symlink_to('nowhere.jpg')  # is reported when it is opened
    Path('in/loop').symlink_to('.')
    assert set(names(find_sources(['in'], Path('out')))) == {'in/a.jpg', 'in/sub/b.PNG', 'in/gone.jpg'}


def test_inputs_that_are_nothing(folder):
    Path('empty').mkdir()
    for inputs, message in (
        (['empty'], 'empty holds no image'),
        (['*.jpg'], r'\*.jpg holds no'),
        (['-'], 'nothing to'),
    ):
        with pytest.raises(UserError, match=message):
            find_sources(inputs, Path('out'))


def test_writes_overlays_and_label_maps_and_skips_what_cannot_be_read(folder, segmentor):
    Path('in/sub/broken.jpg').write_bytes(b'text')
    sources = [*find_sources(['in'], Path('out')), Source(Path('nowhere.jpg'), Path('nowhere'))]
    written = []
    Image.new('RGB', (3000, 1)).save('in/sub/thin.jpg')
    sources += [Source(Path('in/sub/thin.jpg'), Path('thin'))]
    failures = predict(segmentor, sources, Output(Path('out'), legend=True, labels=True), 2, on_progress=written.append)
    assert failures.keys() == {'in/sub/broken.jpg', 'in/sub/thin.jpg', 'nowhere.jpg'}
    assert failures['nowhere.jpg'] == 'no such file'
    assert sum(written) == 3
    files = sorted(str(path.relative_to('out')) for path in Path('out').rglob('*') if path.is_file())
    labels = ['labels/a.png', 'labels/sub/a.png', 'labels/sub/b.png']
    assert files == ['a.png', *labels, 'manifest.jsonl', 'sub/a.png', 'sub/b.png']
    expected = segmentor('in/a.jpg')
    assert np.array_equal(np.asarray(Image.open('out/labels/a.png')), expected.labels + 1)
    assert np.array_equal(np.asarray(Image.open('out/a.png')), np.asarray(expected.overlay(legend=True)))


def test_nothing_is_overwritten_unless_asked(folder, segmentor):
    sources = find_sources(['in'], Path('out'))
    Path('out').mkdir()
    Path('out/a.png').write_text('mine')
    with pytest.raises(UserError, match=r'out/a.png exist already: pass overwrite=True'):
        predict(segmentor, sources, Output(Path('out')))
    assert [path.name for path in Path('out').iterdir()] == ['a.png'] and Path('out/a.png').read_text() == 'mine'
    assert predict(segmentor, sources, Output(Path('out')), overwrite=True) == {}
    assert Image.open('out/a.png').size == (40, 30)
    with pytest.raises(UserError, match='exist already: pass skip_existing=True to go on, or overwrite=True, or'):
        predict(segmentor, sources, Output(Path('out')))


def test_any_run_can_be_gone_on_with(folder, segmentor):
    """Also one of which nobody knew that it would be stopped: of a first image, say, to the folder it is in."""
    assert predict(segmentor, find_sources(['in/a.jpg'], Path('out')), Output(Path('out'))) == {}
    first = Path('out/a.png').stat()
    sources = find_sources(['in'], Path('out'))
    assert predict(segmentor, sources, Output(Path('out')), skip_existing=True) == {}
    assert Path('out/a.png').stat() == first and Path('out/sub/b.png').is_file()
    files = [json.loads(line)['file'] for line in Path('out/manifest.jsonl').read_text().splitlines()[1:]]
    assert files == sorted(str(source.path) for source in sources)


def test_an_input_is_never_overwritten(folder, segmentor):
    Image.new('RGB', (40, 30)).save('a.png')
    with pytest.raises(UserError, match='a.png would be written, but is one of the images to read'):
        predict(segmentor, find_sources(['a.png'], Path('.')), Output(Path('.')), overwrite=True)


def test_names_as_long_as_file_systems_allow(folder, segmentor):
    path = Path('in') / f'{"x" * 251}.jpg'
    Path('in/a.jpg').rename(path)
    assert predict(segmentor, find_sources([str(path)], Path('out')), Output(Path('out'))) == {}
    assert Path('out', f'{path.stem}.png').is_file()


def test_a_video_becomes_a_video(folder, segmentor):
    sources = find_sources([str(video(folder / 'film.mp4')), 'in/a.jpg'], Path('out'))
    assert count_images(sources) == 6
    failures = predict(segmentor, sources, Output(Path('out'), legend=True, labels=True), batch_size=2)
    assert failures == {}
    film = cv2.VideoCapture('out/film.mp4')
    assert (film.get(cv2.CAP_PROP_FRAME_COUNT), film.get(cv2.CAP_PROP_FPS)) == (5, 10)
    assert film.read()[1].shape[0] > 34  # with the legend
    maps = sorted(Path('out/video_labels/film').iterdir())
    assert [path.name for path in maps] == [f'{i:06d}.png' for i in range(1, 6)]
    assert all(Image.open(path).size == (48, 34) for path in maps)
    video(folder / 'film.mp4', frames=3)
    predict(segmentor, sources, Output(Path('out'), labels=True), overwrite=True)
    assert len(list(Path('out/video_labels/film').iterdir())) == 3
    predict(segmentor, sources, Output(Path('out')), overwrite=True)  # which is not about the label maps
    assert len(list(Path('out/video_labels/film').iterdir())) == 3


def test_names_that_are_no_utf8(folder, segmentor):
    odd = os.fsdecode(b'in/\xff')
    os.rename(video(folder / 'film.mp4'), f'{odd}.mp4')
    os.rename('in/a.jpg', f'{odd}.jpg')
    out = Path(os.fsdecode(b'out\xfe'))
    sources = find_sources(['in'], out)
    assert count_images(sources) == 6 + len(sources) - 2
    assert predict(segmentor, sources, Output(out, labels=True)) == {}
    assert {path.name for path in out.iterdir()} >= {os.fsdecode(b'\xff.png'), os.fsdecode(b'\xff-2.mp4')}
    film = next(path for path in out.iterdir() if path.suffix == '.mp4')
    film.rename('film.mp4')
    assert cv2.VideoCapture('film.mp4').get(cv2.CAP_PROP_FRAME_COUNT) == 5


def test_videos_that_are_none(folder, segmentor):
    Path('text.mp4').write_text('no video')
    video(Path('thin.mp4'), size=(1600, 16))
    sources = find_sources(['text.mp4', 'nowhere.mp4', 'thin.mp4', 'in/a.jpg'], Path('out'))
    failures = predict(segmentor, sources, Output(Path('out')))
    assert '1600×16 pixels are too thin' in failures.pop('thin.mp4')
    assert failures == {
        'text.mp4': 'not a video, or of a format that OpenCV does not read', 'nowhere.mp4': 'no such file'
    }  # fmt: skip
    assert sorted(path.name for path in Path('out').iterdir()) == ['a.png', 'manifest.jsonl']


def test_decoding_goes_on_while_the_network_computes(folder, segmentor, monkeypatch):
    """The first prediction waits until another image has been read, which it never would be in one thread."""
    for i in range(6):
        Image.new('RGB', (40, 30)).save(f'in/{i}.jpg')
    read, reading, compute = [], segmentor.prepare, segmentor.predict
    second = threading.Event()

    def prepare(image):
        read.append(1)
        if len(read) == 2:
            second.set()
        return reading(image)

    def slow_predict(*arguments):
        assert second.wait(10)
        return compute(*arguments)

    monkeypatch.setattr(segmentor, 'prepare', prepare)
    monkeypatch.setattr(segmentor, 'predict', slow_predict)
    assert predict(segmentor, find_sources(['in'], Path('out')), Output(Path('out'))) == {}


@pytest.mark.parametrize('threads, each', [(1, {1}), (2, {1}), (5, {2})])
def test_two_streams_share_the_threads(folder, segmentor, monkeypatch, threads, each):
    """Each waits for the other at its first image: with several threads, there are two at once, each with half."""
    together, compute, had = threading.Barrier(min(threads, 2)), segmentor.predict, set()

    def predict_beside_another(*arguments, **options):
        if len(had) < min(threads, 2):
            together.wait(10)
        had.add((threading.get_ident(), torch.get_num_threads()))
        return compute(*arguments, **options)

    before = torch.get_num_threads()
    monkeypatch.setattr(segmentor, 'predict', predict_beside_another)
    torch.set_num_threads(threads)
    try:
        assert predict(segmentor, find_sources(['in'], Path('out')), Output(Path('out'))) == {}
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert {number for _, number in had} == each and len(had) >= min(threads, 2)


def test_what_is_computed_is_written_before_an_error_ends_the_run(folder, segmentor, monkeypatch):
    compute, calls = segmentor.predict, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(*arguments)

    monkeypatch.setattr(segmentor, 'predict', interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(segmentor, find_sources(['in'], Path('out')), Output(Path('out')))
    assert len([path for path in Path('out').rglob('*.png')]) == 2


def test_a_full_disk_is_the_users_mistake(folder, segmentor, monkeypatch):
    def full(self, content, write=Path.write_bytes):
        if self.suffix == '.png':
            raise OSError(28, 'No space left on device')
        return write(self, content)

    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(UserError, match='cannot write out/.*png: No space left on device'):
        predict(segmentor, find_sources(['in'], Path('out')), Output(Path('out')))
    assert [path for path in Path('out').rglob('*') if path.is_file()] == []
