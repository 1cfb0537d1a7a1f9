"""A data set of your own, from a data file to mIoU and to a file that runs elsewhere.

It checks the data, trains, evaluates the best checkpoint on the test images, segments one of them, exports the model
and segments the image with the exported file. docs/data.md describes the data file.

python examples/own_data.py camvid.yaml --recipe fpn/inceptionnext_t --work-dir work_dirs/camvid
"""

import argparse
import sys
from pathlib import Path

from mmseg_inceptionnext import Segmentor
from mmseg_inceptionnext.command_line import CfgOptions, positive_int, run
from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.console import quiet_screen
from mmseg_inceptionnext.data.check import list_samples, open_dataset
from mmseg_inceptionnext.data.inspection import inspect_data, inspection_text
from mmseg_inceptionnext.evaluation import evaluate
from mmseg_inceptionnext.export import export
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import plan, run_result, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', help='data file (YAML)')
    parser.add_argument('--recipe', default='fpn/inceptionnext_t', help='config file, or the name of a shipped one')
    parser.add_argument('--work-dir', default='work_dirs/own_data')
    parser.add_argument('--weights', help="ImageNet weights of the backbone, or none (the config's)")
    parser.add_argument('--iters', type=positive_int, help='iterations (they follow from the data)')
    parser.add_argument('--cfg-options', nargs='+', action=CfgOptions, metavar='KEY=VALUE')
    args = parser.parse_args()
    with quiet_screen():
        from_data_to_export(args)


def from_data_to_export(args: argparse.Namespace) -> None:
    options = TrainOptions(weights=args.weights, iters=args.iters, seed=0)

    def recipe():
        return load_config(args.recipe, args.work_dir, cfg_options=args.cfg_options, data=args.data)

    found = inspect_data(recipe())
    if not found.ok:
        sys.exit('\n'.join([*found.problems, *(f'{entry["file"]}: {entry["reason"]}' for split in found.splits.values()
                                                for entry in split.wrong)]))  # fmt: skip
    print(inspection_text(found))
    print(plan(recipe(), options))
    end = run_result(train(recipe(), options))

    # The config that the run has saved holds all that follows from the data file.
    cfg = load_config(end['config'], args.work_dir)
    figures = evaluate(cfg, end['checkpoint'], report=Path(args.work_dir, 'report'))
    print(f'mIoU {figures["mIoU"]}')
    for name, figure in figures['per_class'].items():
        print(f'  {name}: IoU {figure["IoU"]}')

    segmentor = Segmentor(cfg, end['checkpoint'])
    image = test_image(cfg)
    result = segmentor(image)
    result.overlay(legend=True).save(Path(args.work_dir, 'example.png'))
    print(f'{image}: {result}')

    height, width = segmentor.prepare(segmentor.read(image))['inputs'].shape[1:]
    exported = Path(args.work_dir, 'model.onnx')
    export(cfg, end['checkpoint'], exported, shape=(height, width), verify=1)
    same = (Segmentor(exported)(image).labels == result.labels).mean()
    print(f'{exported}: {same:.2%} of its labels are those of the checkpoint')


def test_image(cfg) -> str:
    """Return the path of the first test image."""
    return list_samples(open_dataset(cfg.test_dataloader.dataset))[0]['img_path']


if __name__ == '__main__':
    run(main)
