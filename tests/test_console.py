"""What reaches the screen of a training, and what its log file has."""

import os
import subprocess
import sys

import pytest
from mmengine.logging import MMLogger
from support import ROOT, TINY_CONFIG

from mmseg_inceptionnext.console import quiet_screen, quieten
from mmseg_inceptionnext.training.hooks.progress import classes_text, figures_text


@pytest.fixture
def arguments(mini_root):
    return ('train', TINY_CONFIG, '--data-root', mini_root, '--work-dir', 'w', '--weights', 'none', '--iters', '2')


def test_a_training_takes_few_lines_and_the_log_has_all(tool, arguments, tmp_path):
    process = tool(*arguments)
    assert process.returncode == 0, process.stderr[-3000:]
    lines = process.stdout.splitlines()
    assert len(lines) < 25
    for beginning in ('data: 4 training', 'model: InceptionNeXt + FPN + FPNHead', 'device: ', 'schedule: 2 iterations'):
        assert [line for line in lines if line.startswith(beginning)]
    first = next(line for line in lines if line.startswith('Iter(train) [1/2]'))
    assert all(part in first for part in ('loss: ', 'lr: ', 'images/s', 'eta: '))
    assert lines[-1].startswith('mIoU ') and any(line.startswith('validation at iteration') for line in lines)
    assert 'nan' not in process.stdout and 'UserWarning' not in process.stderr
    (log,) = (tmp_path / 'w').glob('*/*.log')
    text = log.read_text()
    for part in ('Config:', 'Hooks will be executed', 'Iter(val)', 'per class results', 'schedule: 2'):
        assert part in text, part


@pytest.mark.slow
def test_verbose_gives_mmengines_screen_back(tool, arguments):
    process = tool(*arguments, '--verbose')
    assert process.returncode == 0
    assert 'Hooks will be executed' in process.stdout and 'schedule: 2 iterations' not in process.stdout


def test_a_test_says_its_figures_and_the_worst_classes(tool, trained, mini_root):
    process = tool('test', TINY_CONFIG, trained, '--data-root', mini_root, '--work-dir', 'w')
    assert process.returncode == 0, process.stderr
    assert len(process.stdout.splitlines()) < 20 and 'IoU, worst first: ' in process.stdout


def test_another_process_shows_errors_alone(monkeypatch, capsys):
    monkeypatch.setattr('mmseg_inceptionnext.console.is_main_process', lambda: False)
    logger = MMLogger('another')
    quieten(logger)
    logger.warning('of no interest')
    logger.error('what went wrong')
    assert capsys.readouterr().out == 'error: what went wrong\n'


def test_loggers_have_their_handlers_again_afterwards():
    logger = MMLogger.get_current_instance()
    before = list(logger.handlers)
    with quiet_screen():
        assert logger.handlers != before
    assert logger.handlers == before


def test_figures_that_are_no_numbers_are_left_out():
    assert figures_text({'aAcc': 1.0, 'mDice': 2.345, 'note': 'x', 'time': 3.0}) == 'mDice 2.35, aAcc 1.00'


def test_at_most_twenty_classes_worst_first():
    text = classes_text({f'c{i}': 50.0 - i for i in range(30)})
    assert text.startswith('  IoU, worst first: c29 21.0, c28 22.0') and text.endswith('and 10 better ones')
    assert all(len(line) <= 100 for line in text.splitlines())


PRINT = """
import sys
from mmseg_inceptionnext.command_line import run

def main():
    print('Bäume', '\\udcff', flush=True)
    for _ in range(20000):
        print('a line')
    print('the end', file=sys.stderr)

run(main)
"""


def run_in_shell(redirection: str, **environment) -> subprocess.CompletedProcess:
    script = f'"$0" -c "$1" {redirection}; echo "code ${{PIPESTATUS[0]}}"'
    return subprocess.run(
        ['bash', '-c', script, sys.executable, PRINT], capture_output=True, text=True,
        env=os.environ | {'PYTHONPATH': str(ROOT)} | environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    ('redirection', 'environment', 'out', 'err'),
    [
        ('| head -1', {}, 'Bäume \\udcff\ncode 0\n', 'the end\n'),
        pytest.param(
            '| head -1', {'PYTHONUNBUFFERED': '1'}, 'Bäume \\udcff\ncode 0\n', 'the end\n', marks=pytest.mark.slow
        ),
        ('| head -1', {'PYTHONIOENCODING': 'ascii'}, 'B\\xe4ume \\udcff\ncode 0\n', 'the end\n'),
        ('>&-', {}, 'code 0\n', 'the end\n'),
        (
            '> /dev/full', {}, 'code 2\n',
            'the end\nerror: a part of the output is lost (No space left on device): free space, and run it again\n',
        ),
    ],
)  # fmt: skip
def test_nothing_that_is_printed_ends_a_tool(redirection, environment, out, err):
    process = run_in_shell(redirection, **environment)
    assert (process.stdout, process.stderr) == (out, err)
