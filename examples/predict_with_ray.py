"""Segment a folder, or a Parquet file of paths or bytes, on a Ray cluster: results as Parquet, and label maps as PNGs.

    pip install 'ray[data]'
    python examples/predict_with_ray.py upernet/inceptionnext_t iter_160000.pth photos --out out --actors 2

That runs on this machine. On several, start Ray on each, and then the script on the first:

    ray start --head                       # on the first, which says its address
    ray start --address=10.0.0.1:6379      # on the others
    RAY_ADDRESS=auto python examples/predict_with_ray.py … --actors 16 --gpus 1

Package, checkpoint, images and the output folder must have the same paths on all of them. A Parquet file has a column
``path``, and optionally ``bytes``, the files' content; then nothing is read from the paths. Each actor keeps one
Segmentor. What cannot be read has its reason in the results.
"""

import argparse
import json
import os
from io import BytesIO
from pathlib import Path

os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')  # Ray reports to its makers otherwise

import numpy as np
import pyarrow.dataset
import pyarrow.parquet
import ray
import torch

from mmseg_inceptionnext import Segmentor, UserError
from mmseg_inceptionnext.command_line import output_folder, positive_int, run
from mmseg_inceptionnext.drawing import save_picture
from mmseg_inceptionnext.inference.sources import Output, Source, find_sources

# What reads and writes waits for disks. Where the actors hold all CPUs, it would wait for one for ever.
_NO_CPU = 0


class Segment:
    """An actor with a Segmentor, from a batch of rows to one of results."""

    def __init__(self, config: str, checkpoint: str, precision: str, threads: int, out: str):
        torch.set_num_threads(threads)
        self.segmentor = Segmentor(config, checkpoint, precision=precision)
        self.output = Output(Path(out), labels=True)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list]:
        contents = rows.get('bytes', [None] * len(rows['path']))
        found = [self.segment(*row) for row in zip(rows['path'], rows['name'], contents, strict=True)]
        return dict(path=list(rows['path']), classes=[a for a, _ in found], reason=[b for _, b in found])

    def segment(self, path: str, name: str, content: bytes | None) -> tuple[str, str]:
        """Write a label map, and return the shares of its classes as JSON, and why it could not be read."""
        try:
            result = self.segmentor(Path(path) if content is None else BytesIO(content), keep_logits=False)
        except UserError as error:
            return '', str(error)
        save_picture(result.label_image(), self.output.labels_of(Source(Path(path), Path(name))))
        return json.dumps(result.areas()), ''


def read_group(item: dict) -> list[dict]:
    """Return the rows of a row group of a Parquet file, as :func:`rows_of` has them."""
    file = pyarrow.parquet.ParquetFile(item['file'])
    columns = [name for name in ('path', 'bytes') if name in file.schema_arrow.names]
    rows = file.read_row_group(item['group'], columns).to_pylist()
    for row in rows:
        # The whole name stays, so that a.jpg and a.png do not meet; folders above the root are none.
        path = Path(row['path'])
        row['name'] = '/'.join(part for part in path.parts if part not in ('..', path.anchor))
    return rows


def rows_of(source: Path, out: Path) -> ray.data.Dataset:
    """Return rows of ``path``, ``name`` of the label map, and ``bytes`` where a Parquet file has them."""
    if source.suffix == '.parquet':
        # Not ray.data.read_parquet: one of its tasks wants a CPU, and waits for ever where the actors hold all of them.
        try:
            files = pyarrow.dataset.dataset(source, format='parquet')
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise UserError(f'{source} is no Parquet file: {error}') from error
        if 'path' not in files.schema.names:
            raise UserError(f"{source} has no column 'path', but {', '.join(files.schema.names)}")
        groups = [dict(file=part.path, group=group.id) for part in files.get_fragments() for group in part.row_groups]
        return ray.data.from_items(groups).flat_map(read_group, num_cpus=_NO_CPU)
    sources = [each for each in find_sources([str(source)], out) if not each.is_video]
    return ray.data.from_items([dict(path=str(each.path.absolute()), name=str(each.name)) for each in sources])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('source', type=Path, help='a folder of images, or a .parquet file')
    parser.add_argument('--out', type=output_folder, required=True)
    parser.add_argument('--actors', type=positive_int, default=1)
    parser.add_argument('--cpus', type=positive_int, default=1, help='of each actor (1)')
    parser.add_argument('--gpus', type=float, default=0, help='of each actor, such as 0.5 for two on one (0)')
    parser.add_argument('--precision', choices=('fp32', 'bf16'), default='fp32', help='the same for all actors (fp32)')
    args = parser.parse_args()

    out = args.out.absolute()
    config = str(Path(args.config).absolute()) if args.config.endswith('.py') else args.config
    results = rows_of(args.source, out).map_batches(
        Segment,
        fn_constructor_args=(config, str(args.checkpoint.absolute()), args.precision, args.cpus, str(out)),
        compute=ray.data.ActorPoolStrategy(size=args.actors),
        batch_size=8,
        num_cpus=args.cpus,
        num_gpus=args.gpus,
    )
    results.write_parquet(
        str(out / 'results'), mode=ray.data.SaveMode.OVERWRITE, ray_remote_args=dict(num_cpus=_NO_CPU)
    )
    reasons = pyarrow.parquet.read_table(out / 'results', columns=['reason'])['reason'].to_pylist()
    print(f'{reasons.count("")} images in {out}, {len(reasons) - reasons.count("")} could not be read')


if __name__ == '__main__':
    run(main)
