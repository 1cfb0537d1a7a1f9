"""``python -m mmseg_inceptionnext``: the tools under one name."""

import json
import shlex

import pytest
from support import ROOT, TINY_CONFIG, assert_user_error

from mmseg_inceptionnext.command_line import SHORT_NAMES

COMMANDS = sorted(SHORT_NAMES.get(path.stem, path.stem) for path in (ROOT / 'tools').glob('*.py'))


@pytest.fixture
def command(run_here):
    return lambda *arguments: run_here('-m', 'mmseg_inceptionnext', *arguments)


def test_the_commands_are_those_that_the_readme_names():
    named = {
        'train',
        'test',
        'predict',
        'flops',
        'benchmark',
        'export',
        'check',
        'doctor',
        'compare',
        'mini-ade20k',
        'paper',
    }
    assert set(COMMANDS) == named


def test_without_a_command_they_are_listed_with_a_line_each(command):
    nothing, asked = command(), command('--help')
    assert (nothing.returncode, nothing.stdout) == (2, '')
    assert (asked.returncode, asked.stdout) == (0, nothing.stderr)
    usage, _, *lines = asked.stdout.splitlines()
    assert usage.startswith('usage: python -m mmseg_inceptionnext ')
    assert [line.split()[0] for line in lines] == COMMANDS
    assert all(line.endswith('.') and len(line) <= 120 for line in lines)


def test_an_unknown_command_is_one_line(command):
    process = command('trian', 'x.py')
    assert_user_error(process, "no command 'trian'", ', '.join(COMMANDS))
    assert process.stderr.count('\n') == 1


@pytest.mark.parametrize('name', COMMANDS)
def test_help_can_be_copied(command, name):
    process = command(name, '--help')
    assert process.returncode == 0 and process.stderr == ''
    assert process.stdout.startswith(f'usage: python -m mmseg_inceptionnext {name} ')


def test_a_mistake_is_one_line_here_too(command):
    assert_user_error(command('flops', 'nowhere.py'), 'nowhere.py: no config at')
    assert_user_error(command('predict', TINY_CONFIG), 'python -m mmseg_inceptionnext predict: error: ')


@pytest.mark.slow
def test_what_train_and_test_print_to_copy_works(command, mini_root, tmp_path):
    """Data are loaded by other processes; the work dir is below the current folder."""
    options = ['--data-root', mini_root, '--cfg-options', 'test_dataloader.num_workers=2']
    process = command('train', TINY_CONFIG, '--weights', 'none', *options, 'train_cfg.max_iters=3')
    assert process.returncode == 0, process.stderr[-3000:]
    assert (tmp_path / 'work_dirs' / 'configs' / 'fpn_tiny' / 'iter_3.pth').is_file()
    figure, printed = process.stdout.strip().splitlines()[-1].split('. Test it: ')
    python, *arguments = shlex.split(printed)
    assert python == 'python' and arguments[:3] == ['-m', 'mmseg_inceptionnext', 'test']
    process = command(*arguments[2:], '--report', 'report', '--json', 'figures.json')
    assert process.returncode == 0, process.stderr[-3000:]
    assert figure.split(' at ')[0] == f'mIoU {json.loads((tmp_path / "figures.json").read_text())["mIoU"]:.2f}'
    run = json.loads((tmp_path / 'report' / 'report.json').read_text())['run']
    assert shlex.split(run['command'])[1:] == [*arguments, '--report', 'report', '--json', 'figures.json']
