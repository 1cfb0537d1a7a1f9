"""Errors of the library name Python arguments; the tools print their flags instead."""

import pytest

from mmseg_inceptionnext.command_line import name_flags

FLAGS = {name: f'--{name.replace("_", "-")}' for name in ('device', 'shape', 'resume', 'cfg_options', 'out', 'seed')}


@pytest.mark.parametrize(
    ('message', 'expected'),
    [
        ("device='cuda:7' cannot be used", '--device cuda:7 cannot be used'),
        ('device="it\'s" cannot be used', "--device it's cannot be used"),
        ('shape=(16, 512): too small', '--shape 16 512: too small'),
        ('then start again with resume=True', 'then start again with --resume'),
        ('pass resume=True.', 'pass --resume.'),
        ('choose another out=DIR', 'choose another --out DIR'),
        ('seed=-1 must be', '--seed -1 must be'),
        ("cfg_options={'a.b': 1, 'c': 'x'} do not fit", '--cfg-options a.b=1 c=x do not fit'),
        ('model.device=1 and num_classes=2 stay', 'model.device=1 and num_classes=2 stay'),
        ('runs/seed=5/iter_3.pth is truncated', 'runs/seed=5/iter_3.pth is truncated'),
        ('seed=50/iter_3.pth and seed=5.pth are truncated', 'seed=50/iter_3.pth and seed=5.pth are truncated'),
        (
            "/runs/lr=0.1,seed=5/w.pth: try resume='seed=5/v.pth', then",
            '/runs/lr=0.1,seed=5/w.pth: try --resume seed=5/v.pth, then',
        ),
        ("(out=DIR), or device='cpu')", '(--out DIR), or --device cpu)'),
        ('train_dataloader.batch_size=0 must be', 'train_dataloader.batch_size=0 must be'),
    ],
    ids=str,
)
def test_an_argument_becomes_the_flag_that_sets_it(message, expected):
    assert name_flags(message, FLAGS) == expected
