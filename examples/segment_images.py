"""The Python API: segment images, say what covers how much of them, and save overlays.

python examples/segment_images.py upernet/inceptionnext_t work_dirs/…/iter_160000.pth street.jpg beach.jpg
"""

import argparse
from pathlib import Path

from mmseg_inceptionnext import Segmentor
from mmseg_inceptionnext.command_line import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('images', nargs='+')
    args = parser.parse_args()

    segmentor = Segmentor(args.config, args.checkpoint)
    for path, result in zip(args.images, segmentor(args.images), strict=True):
        print(path)
        for name, share in result.areas().items():
            print(f'  {share:6.1%} {name}')
        result.overlay(legend=True).save(f'{Path(path).stem}_segmented.png')


if __name__ == '__main__':
    run(main)
