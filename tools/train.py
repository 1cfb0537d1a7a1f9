"""Train a segmentor."""

import argparse
import shlex
from pathlib import Path

from mmengine.dist import is_main_process

from mmseg_inceptionnext.command_line import add_config_options, run
from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.training.train import plan, summary, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    add_config_options(parser)
    parser.add_argument(
        '--weights', metavar='X|none', help='weights of the backbone: timm name, https URL, file, or none (the config)'
    )
    parser.add_argument(
        '--resume', nargs='?', const=True, default=False, metavar='CKPT', help='go on from CKPT (the last checkpoint)'
    )
    parser.add_argument('--amp', action='store_true', help='mixed precision: bf16, or fp16 on GPUs without it')
    parser.add_argument('--seed', type=int, help='of all random numbers')
    parser.add_argument(
        '--auto-batch', action='store_true', help="accumulate gradients so that the recipe's effective batch holds"
    )
    parser.add_argument(
        '--dry-run', action='store_true', help='build everything, try two iterations, print the schedule and its cost'
    )
    args = parser.parse_args()

    cfg = load_config(args.config, args.work_dir, args.data_root, args.launcher, args.cfg_options)
    options = dict(
        weights=args.weights, resume=args.resume, amp=args.amp, seed=args.seed, auto_batch=args.auto_batch
    )  # fmt: skip
    if args.dry_run:
        resolved = plan(cfg, **options)
        if is_main_process():
            print(resolved)
        return
    end = summary(train(cfg, **options))
    if is_main_process():
        figure = f'mIoU {end["best"]:.2f} at iteration' if end['best'] is not None else 'Last iteration'
        test = [Path(__file__).with_name('test.py'), end['config'], end['checkpoint']]
        print(f'{figure} {end["iteration"]}. Test it: {shlex.join(["python", *map(str, test)])}')


if __name__ == '__main__':
    run(main)
