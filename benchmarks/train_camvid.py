"""Train UperNet InceptionNeXt-A on CamVid by this project, and by mmseg with timm: the same seeds, steps and float32.

The runs follow one another on a quiet machine, each a command as a user would give it: ``tools/train.py`` with
camvid/upernet_a, and mmseg's own train.py with ``stock_camvid_upernet_a.py``. A run that has ended is not repeated.

python benchmarks/train_camvid.py --data-root CamVid --iters 900 --seeds 0 1
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import mmseg

from mmseg_inceptionnext.command_line import markdown_table, positive_int, run
from mmseg_inceptionnext.errors import UserError

HERE = Path(__file__).absolute().parent
WARM_UP, ITERS = 200, 6000  # of both configs


def command(whose: str, iters: int, seed: int, data_root: Path, work_dir: Path) -> list:
    if whose == 'ours':
        return [
            HERE.parent / 'tools/train.py', 'camvid/upernet_a', '--data-root', data_root, '--work-dir', work_dir,
            '--iters', iters, '--seed', seed, '--overwrite', '--cfg-options', f'train_cfg.val_interval={iters}',
        ]  # fmt: skip
    warm_up = round(WARM_UP * iters / ITERS)
    options = {
        'randomness.seed': seed,
        'train_cfg.max_iters': iters,
        'train_cfg.val_interval': iters,
        'param_scheduler.0.end': warm_up,
        'param_scheduler.1.begin': warm_up,
        'param_scheduler.1.end': iters,
        'default_hooks.checkpoint.interval': iters,
    } | {f'{split}_dataloader.dataset.data_root': data_root for split in ('train', 'val', 'test')}
    return [
        Path(mmseg.__file__).parent / '.mim/tools/train.py', HERE / 'stock_camvid_upernet_a.py',
        '--work-dir', work_dir, '--cfg-options', *(f'{key}={value}' for key, value in options.items()),
    ]  # fmt: skip


def train(whose: str, iters: int, seed: int, data_root: Path, folder: Path) -> dict:
    """Train once, and return ``seconds`` of the whole command and ``mIoU`` on val after the last step."""
    work_dir = folder / f'{whose}_{iters}_{seed}'
    result = work_dir / 'result.json'
    if result.exists():
        return json.loads(result.read_text())
    work_dir.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with open(work_dir / 'output.txt', 'w') as output:
        arguments = [sys.executable, *map(str, command(whose, iters, seed, data_root, work_dir))]
        if subprocess.run(arguments, stdout=output, stderr=subprocess.STDOUT).returncode:
            raise UserError(f'{whose}, seed {seed}: the training failed, see {output.name}')
    seconds = time.perf_counter() - start
    *_, scalars = sorted(work_dir.glob('*/vis_data/scalars.json'))
    *_, last = (line['mIoU'] for line in map(json.loads, scalars.read_text().splitlines()) if 'mIoU' in line)
    found = dict(seconds=seconds, mIoU=last)
    result.write_text(json.dumps(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-root', type=Path, required=True, help='the folder with train, trainannot, …')
    parser.add_argument('--iters', type=positive_int, default=900, help='steps of eight crops (900)')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1])
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/train_camvid'))
    args = parser.parse_args()
    rows, ratios = [], []
    for seed in args.seeds:
        found = {
            whose: train(whose, args.iters, seed, args.data_root.absolute(), args.work_dir.absolute())
            for whose in ('stock', 'ours')
        }
        rows += [[str(seed), whose, f'{x["seconds"]:.0f}', f'{x["mIoU"]:.2f}'] for whose, x in found.items()]
        ratios.append(found['stock']['seconds'] / found['ours']['seconds'])
        print(f'seed {seed}: stock takes {ratios[-1]:.2f} times as long', flush=True)
    print(markdown_table(['seed', '', 'seconds', 'mIoU on val'], rows))


if __name__ == '__main__':
    run(main)
