"""A data set of your own, from a folder to mIoU: check, train, evaluate the best checkpoint, segment an image.

The folder has images/{training,validation}/*.jpg and annotations/{training,validation}/*.png; classes, colours and
schedule are in config.py beside this file.

python examples/custom_data/train_and_test.py --data-root data/roads --work-dir work_dirs/roads
"""

import argparse
from pathlib import Path

from mmseg_inceptionnext import Segmentor
from mmseg_inceptionnext.command_line import add_config_options, run
from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.evaluation import evaluate
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import run_result, train

CONFIG = Path(__file__).with_name('config.py')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_options(parser)
    parser.add_argument('--weights', help="ImageNet weights of the backbone, or none (the config's)")
    args = parser.parse_args()
    overrides = (args.work_dir, args.data_root, args.launcher, args.cfg_options)

    end = run_result(train(load_config(CONFIG, *overrides), TrainOptions(weights=args.weights, seed=0)))

    figures = evaluate(load_config(CONFIG, *overrides), end['checkpoint'], report=end['checkpoint'].parent / 'report')
    print(f'mIoU {figures["mIoU"]}')
    for name, figure in figures['per_class'].items():
        print(f'  {name}: IoU {figure["IoU"]}')

    cfg = load_config(CONFIG, *overrides)
    image = next(Path(cfg.val_dataloader.dataset.data_root, 'images', 'validation').glob('*.jpg'))
    result = Segmentor(cfg, end['checkpoint'])(image)
    result.overlay(legend=True).save(end['checkpoint'].parent / 'example.png')
    print(f'{image.name}: {result.area("road"):.0%} road')


if __name__ == '__main__':
    run(main)
