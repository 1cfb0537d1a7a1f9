"""Train a segmentor."""

import argparse

from mmseg_inceptionnext.command_line import add_config_options, run
from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.training.train import train


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
    args = parser.parse_args()

    cfg = load_config(args.config, args.work_dir, args.data_root, args.launcher, args.cfg_options)
    train(cfg, weights=args.weights, resume=args.resume, amp=args.amp, seed=args.seed)


if __name__ == '__main__':
    run(main)
