"""The documentation against the code: commands, options, links, names of tests and files.

The slow part runs the commands in the order of their page, as they are written, in a folder where all that they name is
small: configs (CONFIGS), ADE20K (the embedded data set), checkpoints (a few iterations), images and videos (noise).
"""

import argparse
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import rasterio
from mmengine.config import Config
from mmengine.registry import HOOKS
from PIL import Image
from support import ROOT, TINY_CONFIG, TINY_UPERNET

from mmseg_inceptionnext.command_line import SHORT_NAMES
from mmseg_inceptionnext.config import find_config, load_config, read_config
from mmseg_inceptionnext.data import inspection
from mmseg_inceptionnext.measure.paper import TABLE_6, TABLE_7
from mmseg_inceptionnext.models.build import build_segmentor
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import train

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'SECURITY.md', *sorted((ROOT / 'docs').glob('*.md'))]

# In a comment behind a command, on the line before a paragraph of them, or in a block of Python: it is not run.
MARKS = ('needs GPUs', 'needs SLURM', 'needs MPI', 'needs several machines', 'needs a download', 'takes minutes')

# Commands that something else runs: a file, and the words in it that do.
ELSEWHERE = {
    'make demo': ('tests/test_docs.py', 'def test_make_demo'),
    'make test': ('.ci/run', 'make lint test'),
    'make lint': ('.ci/run', 'make lint test'),
    'make test-all': ('Makefile', 'test-all: $(READY)'),
    'python3 -m venv .venv && source .venv/bin/activate': ('Makefile', '$(PYTHON) -m venv $(VENV)'),
    'pip install .': ('tests/test_package.py', "'pip', 'wheel'"),
    'python tools/check_dataset.py --data camvid.yaml': ('tests/data/test_draft.py', "'--data', 'draft.yaml'"),
    'python tools/check_dataset.py ../camvid --write camvid.yaml': (
        'tests/data/test_draft.py',
        "'--write', 'draft.yaml'",
    ),
    **{
        f'python tools/{command}': (
            'tests/data/test_own_data.py',
            'def test_written_label_maps_score_the_reported_miou',
        )
        for command in (
            'train.py fpn/inceptionnext_t --data camvid.yaml --work-dir work_dirs/camvid',
            'test.py work_dirs/camvid/inceptionnext_t.py work_dirs/camvid/best_mIoU_iter_5781.pth',
            'predict.py work_dirs/camvid/inceptionnext_t.py work_dirs/camvid/best_mIoU_iter_5781.pth a.png --out out',
        )
    },
    "pip install '.[geo]'": ('Makefile', "install --quiet --editable '.[dev]'"),
    "pip install '.[onnx]'": ('Makefile', "install --quiet --editable '.[dev]'"),
}

# What stands for the shipped configs; patterns of several meet those that are here.
CONFIGS = {
    'upernet/inceptionnext_t': TINY_UPERNET,
    'fpn/inceptionnext_t': TINY_CONFIG,
    'mini/fpn_inceptionnext_a': TINY_CONFIG,
    'baselines/upernet/swin_t': TINY_UPERNET,
    'baselines/fpn/pvt_s': TINY_CONFIG,
}
STAND_IN = """
_base_ = {base!r}
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(data_root={data_root!r}))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root={data_root!r}))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=2, val_interval=2)
"""

# Whose options the table of a page lists.
TABLES = {
    'reproduce.md': 'benchmark',
    'data.md': 'check_dataset',
    'deploy.md': 'export',
    'predict.md': 'predict',
    'evaluate.md': 'test',
    'train.md': 'train',
}
OF_OTHERS = {'--no-deps', '--max-restarts', '--logdir', '--nproc-per-node'}  # pip's, torchrun's, TensorBoard's


@dataclass(frozen=True)
class Block:
    """Between ``` and ```: of which language, and the number of its first line."""

    page: Path
    language: str
    line: int
    text: str

    def __str__(self) -> str:
        return f'{self.page.relative_to(ROOT)}:{self.line}'

    @property
    def is_config(self) -> bool:
        return self.text.startswith('_base_ = ')

    @property
    def is_marked(self) -> bool:
        return any(f'  # {mark}' in self.text for mark in MARKS)


@dataclass(frozen=True)
class Command:
    """A command of a block, without its comment."""

    page: Path
    line: int
    text: str
    mark: str | None

    def __str__(self) -> str:
        return f'{self.page.relative_to(ROOT)}:{self.line}: {self.text}'

    @property
    def is_python(self) -> bool:
        return self.text.rpartition(' | ')[2].startswith('python ')


def blocks(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(rf'^```{language}\n(.*?)^```$', text, re.DOTALL | re.MULTILINE):
            found.append(Block(page, language, text[: match.start(1)].count('\n') + 1, match[1]))
    return found


def commands() -> list[Command]:
    found = []
    for block in blocks('bash'):
        of_paragraph, text, first = None, '', 0
        for number, line in enumerate(block.text.splitlines(), block.line):
            first, text = (first, text + line) if text else (number, line)
            if text.endswith('\\'):
                text = text[:-1]
                continue
            command, _, comment = text.partition('#') if text.startswith('#') else text.partition(' #')
            mark = next((mark for mark in MARKS if mark in comment), None)
            if command.strip():
                found.append(Command(block.page, first, ' '.join(command.split()), mark or of_paragraph))
            else:  # a blank line, or a comment of its own
                of_paragraph = mark
            text = ''
    return found


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r'^```.*?^```$', '', page.read_text(), flags=re.DOTALL | re.MULTILINE)


def spans(page: Path) -> list[str]:
    """What is set in `code` in the prose."""
    return [' '.join(span.split()).replace('\\|', '|') for span in re.findall(r'`([^`]+)`', prose(page))]


class Parsed(Exception):
    """Thrown by a parser that is asked to parse."""


@cache
def parser(script: str) -> argparse.ArgumentParser:
    """Of a file below the root."""

    def stop(self, *_):
        raise Parsed(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, 'parse_args', stop)
        patch.setattr(sys, 'argv', [script])
        patch.syspath_prepend(str((ROOT / script).parent))  # as Python does
        with pytest.raises(Parsed) as parsed:
            runpy.run_path(str(ROOT / script))['main']()
    return parsed.value.args[0]


def options(script: str) -> dict[str, argparse.Action]:
    return {name: action for name, action in parser(script)._option_string_actions.items() if name.startswith('--')}


TOOLS = sorted(path.stem for path in (ROOT / 'tools').glob('*.py'))


def named_script(words: list[str]) -> tuple[str | None, list[str]]:
    """The script that a command runs, and the words behind its name."""
    by_short_name = {SHORT_NAMES.get(tool, tool): tool for tool in TOOLS}
    for i, word in enumerate(words):
        if word == 'mmseg_inceptionnext' and words[i + 1 : i + 2] and words[i + 1] in by_short_name:
            return f'tools/{by_short_name[words[i + 1]]}.py', words[i + 2 :]
        if re.fullmatch(r'(tools|examples|benchmarks)/[\w/]+\.(py|sh)', word):
            return re.sub(r'(dist|slurm)_(\w+)\.sh', r'\2.py', word), words[i + 1 :]
    return None, []


def test_every_command_is_run_or_says_why_not():
    unknown = [str(c) for c in commands() if not (c.mark or c.text in ELSEWHERE or c.is_python)]
    assert unknown == [], f'run them here, or mark them by one of {MARKS}'
    assert set(ELSEWHERE) <= {c.text for c in commands()}
    for file, words in ELSEWHERE.values():
        assert words in (ROOT / file).read_text(), file


def test_commands_have_only_options_that_exist():
    wrong = []
    for command in commands():
        script, words = named_script(command.text.split())
        if script:
            wrong += [f'{command}: {word}' for word in words if word.startswith('--') and word not in options(script)]
    assert wrong == []


def test_the_prose_names_only_options_that_exist():
    known = set(OF_OTHERS).union(*(options(f'tools/{tool}.py') for tool in TOOLS))
    wrong = []
    for page in PAGES:
        for span in spans(page):
            script, words = named_script(span.split())
            of_script = set(options(script)) if script and words else known
            words = words or span.split()
            named = [word.strip('[]') for word in words if re.match(r'\[?--\w', word)]
            wrong += [f'{page.name}: {span}: {word}' for word in named if word not in of_script]
    assert wrong == []


@pytest.mark.parametrize('page', TABLES)
def test_tables_of_options_are_complete(page):
    """Every option that may be left out is in a row, and every row is of options and names their choices."""
    of_tool = options(f'tools/{TABLES[page]}.py')
    listed = set()
    for row in re.findall(r'^\| (`--.*?) \| ', (ROOT / 'docs' / page).read_text(), re.MULTILINE):
        for option, value in re.findall(r'`(--[\w-]+) ?([^`]*)`', row):
            assert option in of_tool
            listed |= set(of_tool[option].option_strings)  # --fast and --no-fast are one
            if of_tool[option].choices:
                assert value.replace('\\', '').split('|') == list(of_tool[option].choices), option
    assert listed == {name for name, action in of_tool.items() if name != '--help' and not action.required}


@pytest.mark.parametrize('tool', [tool for tool in TOOLS if tool not in TABLES.values()])
def test_every_option_is_named_on_a_page_that_names_the_tool(tool):
    names = f'tools/{tool}.py', f'mmseg_inceptionnext {SHORT_NAMES.get(tool, tool)}'
    texts = [text for page in PAGES if any(name in (text := page.read_text()) for name in names)]
    assert texts
    for option in options(f'tools/{tool}.py'):
        assert option == '--help' or any(option in text for text in texts), option


def anchors(page: Path) -> set[str]:
    """GitHub's, of the headings."""
    headings = re.findall(r'^#+ (.*)$', prose(page), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def test_links_lead_somewhere():
    wrong = []
    for page in PAGES:
        for link in re.findall(r'\]\(([^)\s]+)\)', prose(page)):
            path, _, anchor = link.partition('#')
            target = page.parent / path if path else page
            if '://' not in link and not (target.exists() and (not anchor or anchor in anchors(target))):
                wrong.append(f'{page.name}: {link}')
    assert wrong == []


def test_the_readme_links_to_every_page():
    links = re.findall(r'\]\((docs/\w+\.md)', (ROOT / 'README.md').read_text())
    assert set(links) == {f'docs/{page.name}' for page in PAGES if page.parent.name == 'docs'}


def rows(page: Path) -> list[list[str]]:
    """The cells of all tables of a page."""
    return [list(map(str.strip, line[1:-1].split('|'))) for line in prose(page).splitlines() if line.startswith('|')]


def test_figures_of_the_models_stand_in_one_table():
    """The one of docs/reproduce.md, with the paper's mIoU; the README's is an excerpt of it."""
    figures = {}
    for config, *cells in rows(ROOT / 'docs' / 'reproduce.md'):
        if config.startswith('configs/') and len(cells) == 13:
            params, gmacs, executed, miou = cells[1], cells[3], cells[7], cells[12]
            figures[config] = [params, gmacs, gmacs if executed == '=' else executed, miou]
    mious = {config: float(row[-1]) for config, row in figures.items()}
    assert mious == {f'configs/{name}.py': row.miou for name, row in (TABLE_6 | TABLE_7).items()}
    readme = [row for row in rows(ROOT / 'README.md') if len(row) == 6]
    excerpt = [[params.removesuffix(' M'), *others] for _, size, params, *others in readme if size in ('T', 'S', 'B')]
    names = [f'configs/{head}/inceptionnext_{size}.py' for head in ('upernet', 'fpn') for size in 'tsb']
    assert excerpt == [figures[name] for name in names]


def test_files_and_tests_that_are_named_exist():
    folders = '|'.join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ('data', 'work_dirs'))
    wrong, tests = [], 0
    for page in PAGES:
        for span in spans(page):
            if match := re.fullmatch(r'(?:tests/)?((?:\w+/)?test_\w+\.py)(?:::(\w+)…?)?', span):
                files, test = list((ROOT / 'tests').rglob(match[1])), match[2] or ''
                tests += 1
                if not (len(files) == 1 and f'\ndef {test}' in files[0].read_text()):
                    wrong.append(f'{page.name}: {span}')
            elif re.match(rf'({folders})/', span):
                path = span.split()[0]
                if not (path.endswith('.onnx') or list(ROOT.glob(path))):
                    wrong.append(f'{page.name}: {span}')
    assert wrong == [] and tests > 10


def test_checkpoints_have_the_number_of_the_last_iteration():
    for command in commands():
        words = command.text.split()
        for config, checkpoint in zip(words, words[1:], strict=False):
            if match := re.fullmatch(r'(?:work_dirs/(.*)/)?iter_(\d+)\.pth', checkpoint):
                config = match[1] if config in ('--weights', '--finetune') else config
                if 'imagenet' in config and find_spec('mmpretrain') is None:
                    continue  # make test-upstream is without it
                cfg = Config.fromfile(find_config(ROOT / config if config.endswith('.py') else config))
                assert cfg.train_cfg.max_iters == int(match[2]), command
                assert match[1] in (None, config.removeprefix('configs/').removesuffix('.py')), command


@pytest.fixture(scope='module')
def trained_upernet(tmp_path_factory, mini_root) -> Path:
    work_dir = tmp_path_factory.mktemp('trained')
    options = {'train_cfg.max_iters': 1, 'train_cfg.val_interval': 1, 'train_dataloader.batch_size': 2}
    train(load_config(TINY_UPERNET, work_dir, mini_root, cfg_options=options), TrainOptions(weights='none', seed=0))
    return work_dir / 'iter_1.pth'


@pytest.fixture
def sandbox(tmp_path, mini_root, trained, trained_upernet, roads, monkeypatch) -> Path:
    """A folder that looks like a checkout with data and results, all of them small."""
    for name in ('tools', 'benchmarks', 'Makefile'):
        (tmp_path / name).symlink_to(ROOT / name)
    ade = tmp_path / 'data' / 'ade' / 'ADEChallengeData2016'
    for name, base in CONFIGS.items():
        config = tmp_path / 'configs' / f'{name}.py'
        config.parent.mkdir(parents=True, exist_ok=True)
        data_root = 'data/mini_ade20k' if name.startswith('mini/') else str(ade.relative_to(tmp_path))
        config.write_text(STAND_IN.format(base=str(base), data_root=data_root))
    shutil.copytree(ROOT / 'examples', tmp_path / 'examples')

    ade.parent.mkdir(parents=True)
    shutil.copytree(mini_root, ade)
    (tmp_path / 'data' / 'roads').symlink_to(roads)
    monkeypatch.setattr(inspection, '_ADE20K_IMAGES', {'training': 4, 'validation': 2})

    for checkpoint, source in (
        ('iter_160000.pth', trained_upernet),
        ('work_dirs/upernet/inceptionnext_t/iter_160000.pth', trained_upernet),
        ('work_dirs/mini/fpn_inceptionnext_a/iter_600.pth', trained),
    ):
        (tmp_path / checkpoint).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tmp_path / checkpoint)
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    for picture in ('street.jpg', 'photos/park.jpg', 'photos/2024/beach.jpg', 'more/summer/lake.png'):
        (tmp_path / picture).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(tmp_path / picture)
    with rasterio.open(
        tmp_path / 'ortho.tif', 'w', driver='GTiff', width=128, height=96, count=3, dtype='uint8', crs='EPSG:32633',
        transform=rasterio.Affine(0.2, 0, 500000, 0, -0.2, 5400000),
    ) as file:  # fmt: skip
        file.write(noise.transpose(2, 0, 1))
    video = cv2.VideoWriter(str(tmp_path / 'drive.mp4'), cv2.VideoWriter_fourcc(*'mp4v'), 5, (128, 96))
    for _ in range(3):
        video.write(noise)
    video.release()
    return tmp_path


def stand_in(word: str) -> str:
    """A config that is given by its name is looked for in the package: take the sandbox's by its path."""
    return f'configs/{word}.py' if word in CONFIGS else word


@contextmanager
def without_checkpoints(folder: Path, hidden: bool) -> Iterator[None]:
    """Put checkpoints aside for a moment: a new user has none where a training begins."""
    aside = {path: path.read_bytes() for path in folder.rglob('*.pth')} if hidden else {}
    for path in aside:
        path.unlink()
    yield
    for path, content in aside.items():
        path.write_bytes(content)


def to_run(page: Path) -> list[Command | Block]:
    """In the order of the page."""
    found = [c for c in commands() if c.is_python and not c.mark and c.text not in ELSEWHERE]
    found += [block for block in blocks('python') if not block.is_marked]
    return sorted((item for item in found if item.page == page), key=lambda item: item.line)


@pytest.mark.slow
@pytest.mark.parametrize('page', filter(to_run, PAGES), ids=lambda page: page.name)
def test_what_a_page_tells_to_run_runs(page, sandbox, run_here, monkeypatch):
    for item in to_run(page):
        if isinstance(item, Block) and item.is_config:
            (sandbox / 'snippet.py').write_text(item.text)
            cfg = read_config(sandbox / 'snippet.py')
            build_segmentor(cfg)
            for hook in cfg.custom_hooks:
                HOOKS.build(hook)
            continue
        if isinstance(item, Block):
            monkeypatch.chdir(sandbox)
            code = re.sub(r"'([\w/]+)'", lambda match: repr(stand_in(match[1])), item.text)
            exec(compile(code, str(item), 'exec'), {})
            continue
        feed, _, command = item.text.rpartition(' | ')
        fed = subprocess.check_output(['bash', '-c', feed], cwd=sandbox)
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(fed)))
        # bash takes the quotes off and puts in what patterns match.
        words = subprocess.check_output(['bash', '-c', f'printf "%s\\0" {command}'], cwd=sandbox, text=True)
        words = list(map(stand_in, words.rstrip('\0').split('\0')[1:]))  # without `python`
        with without_checkpoints(sandbox / 'work_dirs', 'train' in command and '--resume' not in words):
            process = run_here(*words)
        assert process.returncode == 0, f'{item}\n{process.stdout[-1000:]}\n{process.stderr[-3000:]}'


@pytest.mark.slow
def test_make_demo(sandbox):
    for name in ('pyproject.toml', 'ready'):  # a set-up environment is newer than what it was made from
        (sandbox / name).touch()
    variables = dict(
        BIN=Path(sys.executable).parent, READY='ready', DEMO_CONFIG='configs/fpn/inceptionnext_t.py',
        DEMO_DATA='data/ade', DEMO_OUT='work_dirs/demo',
    )  # fmt: skip
    process = subprocess.run(
        ['make', 'demo', *(f'{key}={value}' for key, value in variables.items())],
        cwd=sandbox, env=os.environ | {'OMP_NUM_THREADS': '1'}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    for file in ('figures.json', 'report/index.html', 'pictures/ADE_val_00000001.png'):
        assert (sandbox / 'work_dirs' / 'demo' / file).is_file()
