"""Accept a GPU: run the tests that need one, then measure ours against mmseg with timm on it, within nine minutes.

It writes FOLDER/gpu.json and FOLDER/gpu.md after every row, the most important rows first, and leaves out what does not
fit into the time. What the GPU cannot do (memory, bfloat16, TF32) is a cell that says so.

python benchmarks/gpu.py --out work_dirs/gpu
"""

import argparse
import gc
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import mmseg
import timm
import torch
import torch.nn.functional as F
from mmengine.device import get_device
from mmengine.logging import MMLogger
from torch import nn

from mmseg_inceptionnext.command_line import markdown_table, run
from mmseg_inceptionnext.config import read_config, user_error_message
from mmseg_inceptionnext.device import device_name, multiplies_bfloat16, use_device
from mmseg_inceptionnext.errors import UserError, first_sentence
from mmseg_inceptionnext.files import make_folder, write_text
from mmseg_inceptionnext.inference import optimize_for_inference
from mmseg_inceptionnext.inference.label_map_segmentor import LabelMapSegmentor
from mmseg_inceptionnext.measure.speed import interleave
from mmseg_inceptionnext.measure.timed_model import Setting, TimedModel
from mmseg_inceptionnext.models.build import build_segmentor
from mmseg_inceptionnext.models.kernels import use_kernels
from mmseg_inceptionnext.models.token_mixers import InceptionDWConv2d

ROOT = Path(__file__).parents[1]
PRECISIONS = ('bf16', 'tf32', 'fp16', 'fp32')  # in the order of interest
LAYOUTS = ('nchw', 'channels_last')
ARCHS = {'t': 'tiny', 's': 'small', 'b': 'base', 'a': 'atto'}
REFERENCE = 'InceptionNeXt of timm in mmseg'
TESTS_SHARE = 0.4  # of the time, at most


@dataclass(frozen=True)
class Row:
    """Contestants that are measured in turn; each is named, and has the path of a config and its setting."""

    network: str
    what: str
    precision: str
    compiled: bool
    contestants: list[tuple[str, str, Setting]] = field(repr=False)

    @property
    def title(self) -> str:
        return f'{self.network}, {self.what}, {self.precision}{", compiled" if self.compiled else ""}'


def rows(folder: Path, quick: bool) -> list[Row]:
    """Return all rows, the most important first. Configs of the rivals are written into ``folder``."""
    found = []
    for size in 'a' if quick else ARCHS:
        for head in ('fpn',) if quick else ('upernet', 'fpn'):
            configs = write_configs(folder, head, size)
            crop = read_config(configs['ours'])
            sizes = dict(batch_size=crop.train_dataloader.batch_size, shape=crop.model.data_preprocessor.size)
            if quick:
                sizes = dict(batch_size=2, shape=(64, 64))
            network = f'{"UperNet" if head == "upernet" else "FPN"} {size.upper()}'
            for precision in ('tf32', 'fp32') if quick else PRECISIONS:
                for compiled in (False,) if quick else (False, True):
                    setting = Setting(repeat=5, precision=precision, compile=compiled, round_seconds=0.1, **sizes)
                    for task, what in (('fps', 'predict'), ('train', 'training step')):
                        each = replace(setting, task=task)
                        found.append((network, what, precision, compiled, contestants(configs, each)))
                    if head == 'upernet' or quick:
                        each = replace(setting, task='backbone', **({} if quick else dict(batch_size=None, shape=None)))
                        of_backbone = {name: path for name, path in configs.items() if 'head' not in name}
                        found.append((f'backbone {size.upper()}', 'Table 4', precision, compiled,
                                      contestants(of_backbone, each)))  # fmt: skip

    for part, of_part in (('token mixer', ('bf16', 'fp16', 'fp32')), ('label map', ('fp32',))):
        for precision in of_part[-1:] if quick else of_part:
            setting = Setting(repeat=5, precision=precision, round_seconds=0.1, shape=(16, 16) if quick else (128, 128))
            kinds = [(name, f'{part}: {name}', replace(setting, layout=layout))
                     for name in (REFERENCE, 'ours', 'ours, kernels') for layout in LAYOUTS]  # fmt: skip
            found.append((part, 'times/s', precision, False, kinds))

    def rank(row: tuple) -> float:
        network, _, precision, compiled, _ = row
        if 'times/s' in row:
            return 0.2
        size = list(ARCHS).index(network[-1].lower())
        return 2 * size + 0.5 * PRECISIONS.index(precision) + 2 * compiled + ('FPN' in network)

    return [Row(*row) for row in sorted(found, key=rank)]


def contestants(configs: dict[str, str], setting: Setting) -> list[tuple[str, str, Setting]]:
    """Return every config in both layouts, ours with kernels as well, or through optimize_for_inference.

    A compiler, which takes half a minute for each, is given channels_last alone.
    """
    found = [
        (name, config, replace(setting, layout=layout))
        for layout in (LAYOUTS[1:] if setting.compile else LAYOUTS)
        for name, config in configs.items()
    ]
    ours = configs['ours']
    if setting.task != 'train':  # these choose their layout
        found.append(('ours, optimised', ours, replace(setting, fast=True)))
    if setting.task != 'train' and not setting.compile:
        found.append(('ours, optimised, kernels', ours, replace(setting, fast=True, kernels=True)))
    if setting.task != 'fps' and not setting.compile:
        of_training = [replace(setting, layout=layout, kernels=True) for layout in LAYOUTS]
        found += [('ours, kernels', ours, each) for each in of_training]
    return found


def write_configs(folder: Path, head: str, size: str) -> dict[str, str]:
    """Write the rivals of one of our recipes, other backbones under mmseg's head; return the path of each config.

    Ours under mmseg's UPerHead is one more: whether the low-resolution head pays.
    """
    ours = ROOT / 'configs' / head / f'inceptionnext_{size}.py'
    rate = read_config(ours).model.backbone.drop_path_rate
    of_timm = dict(type='TIMMBackbone', features_only=True, pretrained=False, out_indices=(0, 1, 2, 3))
    backbones = {
        REFERENCE: dict(of_timm, model_name=f'inception_next_{ARCHS[size]}', drop_path_rate=rate),
        'ConvNeXt': dict(of_timm, model_name=f'convnext_{ARCHS[size]}', drop_path_rate=rate),
    }
    if size != 'a':  # Swin has no such size
        backbones['Swin'] = read_config(f'baselines/upernet/swin_{size}').model.backbone.to_dict()
    models = {name: dict(backbone=dict(backbone, _delete_=True)) for name, backbone in backbones.items()}
    if head == 'upernet':
        models['ours, plain head'] = {}
        for model in models.values():
            model['decode_head'] = dict(type='UPerHead')
    configs = {}
    for name, model in models.items():
        path = folder / f'{head}_{size}_{len(configs)}.py'
        path.write_text(f'_base_ = {str(ours)!r}\nmodel = {model!r}\n')
        configs[name] = str(path)
    return configs | {'ours': str(ours)}


class TimedPart:
    """A part of a model, timed as :class:`TimedModel` times a whole one; its first contestant is not timm's.

    The token mixer of T's first stage (8×96×128×128) is held against a copy of its input, which reads and writes as
    many bytes; the label map of 150 classes, from 128×128 to 512×512, against interpolation and argmax.
    """

    batch_size = 1

    def __init__(self, name: str, setting: Setting):
        self.setting, self.layout = setting, setting.layout
        part, _, contestant = name.partition(': ')
        self._step = (self._mixer if part == 'token mixer' else self._labels)(contestant)
        self._number = 1
        self.run_round()
        self._number = max(1, round(setting.round_seconds * self.run_round()['fps']))

    def run_round(self) -> dict[str, float]:
        synchronise = torch.cuda.synchronize if get_device() == 'cuda' else lambda: None
        with torch.inference_mode():
            synchronise()
            start = time.perf_counter()
            for _ in range(self._number):
                self._step()
            synchronise()
        return dict(fps=self._number / (time.perf_counter() - start))

    def _mixer(self, contestant: str) -> Callable:
        dtype = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[self.setting.precision]
        layout = torch.channels_last if self.layout == 'channels_last' else torch.contiguous_format
        mixer = nn.Sequential(InceptionDWConv2d(96, 3, 11, 0.125)).to(get_device(), dtype, memory_format=layout)
        x = torch.randn(8, 96, *self.setting.shape, device=get_device()).to(dtype, memory_format=layout)
        if 'kernels' in contestant:
            use_kernels(mixer)
        return x.clone if contestant == REFERENCE else lambda: mixer(x)

    def _labels(self, contestant: str) -> Callable:
        logits = torch.randn(150, *self.setting.shape, device=get_device())
        size = tuple(4 * side for side in self.setting.shape)
        model = LabelMapSegmentor
        if contestant == REFERENCE:
            return lambda: F.interpolate(logits[None], size, mode='bilinear').argmax(1)
        if 'kernels' in contestant:
            model = build_segmentor(read_config('fpn/inceptionnext_a')).to(get_device())
            model = optimize_for_inference(model, kernels=True)
        return lambda: model.label_map(logits, size, dict(ori_shape=size), False)


def unsupported(precision: str) -> str:
    """Return why this device does not compute in a precision; '' if it does."""
    device = get_device()
    if precision == 'bf16' and device == 'cuda' and not multiplies_bfloat16(device):
        return 'no instructions for bfloat16'
    if precision == 'tf32' and (device != 'cuda' or torch.cuda.get_device_capability() < (8, 0)):
        return 'no TF32'
    if precision == 'fp16' and device == 'cpu':
        return 'float16 on a CPU'
    return ''


def timed(config: str, setting: Setting) -> TimedModel | TimedPart:
    """Set up a contestant."""
    return TimedPart(config, setting) if ': ' in config else TimedModel(config, setting, None)


def measure(row: Row) -> list[dict]:
    """Measure the contestants of a row in turn; return what was found for each.

    Raises:
        RuntimeError: An error after which CUDA cannot be used any more in this process.
    """
    cells, models = [], []
    for name, config, setting in row.contestants:
        cells.append(dict(name=name, layout=setting.layout or 'own'))
        model, before = None, reset_peak()
        cells[-1]['reason'], _ = attempt(lambda c=config, s=setting: models.append(timed(c, s)))
        if not cells[-1]['reason']:
            model = models[-1]
            cells[-1].update(layout=model.layout, batch_size=model.batch_size, peak_memory_mb=peak_above(before))
        cells[-1]['model'] = model

    def round_of(cell: dict) -> dict:
        if not cell['reason']:
            cell['reason'], found = attempt(cell['model'].run_round)
        return {} if cell['reason'] else found

    ready = [cell for cell in cells if not cell['reason']]
    rounds = interleave([lambda cell=cell: round_of(cell) for cell in ready], row.contestants[0][2].repeat)
    for i, cell in enumerate(ready):
        if not cell['reason']:
            names = [name for name in rounds[0][i] if name != 'peak_memory_mb']
            cell['images_per_second'] = {name: [results[i][name] for results in rounds] for name in names}
    return [{key: value for key, value in cell.items() if key != 'model'} for cell in cells]


def attempt(step: Callable) -> tuple[str, object]:
    """Call a function; return why it failed, '' if it did not, and its result."""
    try:
        return '', step()
    except torch.OutOfMemoryError:
        reason = 'out of memory'
    except Exception as error:
        if 'CUDA error' in str(error):
            raise
        reason = user_error_message(error) or f'{type(error).__name__}: {first_sentence(error)}'
    torch.cuda.empty_cache()
    return reason, None


def reset_peak() -> int:
    """Forget the peak of the GPU's memory; return the bytes that are allocated now."""
    gc.collect()  # a model's steps hold the model
    if get_device() != 'cuda':
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_above(before: int) -> float | None:
    """Return the peak of the GPU's memory in MiB above what was allocated; None on other devices."""
    return (torch.cuda.max_memory_allocated() - before) / 2**20 if get_device() == 'cuda' else None


class Worker:
    """A process that measures rows: it can be ended when time is over, and replaced when CUDA has failed in it."""

    def __init__(self, device: str | None):
        self._device, self._process = device, None

    def ask(self, row: Row, seconds: float) -> list[dict] | str:
        """Return the cells of a row, or why there are none."""
        if self._process is None:
            context = multiprocessing.get_context('spawn')
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._device), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._connection.send(row)
            reason = self._connection.recv() if self._connection.poll(seconds) else 'ran out of time'
            if not isinstance(reason, str):
                return reason
        except (EOFError, OSError):
            self._process.join()
            reason = f'its process ended with code {self._process.exitcode}'
        self.close()
        return reason

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(connection, device: str | None) -> None:
    warnings.simplefilter('ignore')
    MMLogger.get_instance('benchmark', log_level='ERROR')
    use_device(device)
    torch.backends.cudnn.benchmark = True  # as the recipes' env_cfg
    while True:
        try:
            row = connection.recv()
        except EOFError:
            return
        try:
            connection.send(measure(row))
        except RuntimeError as error:
            connection.send(first_sentence(error))
            return


def run_tests(seconds: float) -> dict:
    """Run the tests marked gpu; return how many passed, and the lines of those that did not."""
    start = time.monotonic()
    command = [sys.executable, '-m', 'pytest', '-q', '-m', 'gpu', '-p', 'no:cacheprovider', 'tests/gpu']
    try:
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        so_far = (error.stdout or b'').decode().splitlines()
        progress = f', so far: {"".join(so_far)[-200:]}' if so_far else ''
        return dict(summary=f'ran out of time after {seconds:.0f} s{progress}', failed=[], seconds=seconds)
    lines = (process.stdout.strip() or process.stderr.strip() or 'no output').splitlines()
    return dict(
        summary=lines[-1].strip('= '),
        failed=[line for line in lines if line.startswith(('FAILED', 'ERROR'))],
        skipped=[line for line in lines if line.startswith('SKIPPED')],
        seconds=time.monotonic() - start,
    )


def machine() -> dict:
    """Return what the figures depend on."""
    facts = dict(device=device_name(get_device()), python=platform.python_version(), torch=torch.__version__,
                 mmseg=mmseg.__version__, timm=timm.__version__)  # fmt: skip
    if get_device() == 'cuda':
        properties = torch.cuda.get_device_properties(0)
        facts |= dict(capability=f'{properties.major}.{properties.minor}', cuda=torch.version.cuda,
                      memory_gib=properties.total_memory / 2**30, cudnn=torch.backends.cudnn.version())  # fmt: skip
    return facts


def lines(row: dict) -> Iterator[list[str]]:
    """Yield the lines of the table for a row: one for each figure, each contestant in its faster layout."""
    cells = row.get('cells', [])
    figures = {name: None for cell in cells for name in cell.get('images_per_second', {})} or {'fps': None}
    for figure in figures:
        best: dict[str, dict] = {}
        for cell in cells:
            name = cell['name']
            if name not in best or median(cell, figure) > median(best[name], figure):
                best[name] = cell
        first = best.get(REFERENCE, {}).get('images_per_second', {}).get(figure)
        what = {'fps_forward_backward': ', training', 'fps': ', inference'}[figure] if len(figures) > 1 else ''
        names = [name for name, _ in COLUMNS]
        yield [
            row['title'] + what,
            *(shown(best[name], figure, first) if name in best else row.get('reason', '–') for name in names),
        ]


COLUMNS = [
    (REFERENCE, 'InceptionNeXt, mmseg + timm'), ('ConvNeXt', 'ConvNeXt, mmseg + timm'), ('Swin', 'Swin, mmseg'),
    *((name, name) for name in ('ours', 'ours, plain head', 'ours, kernels')),
    *((name, name) for name in ('ours, optimised', 'ours, optimised, kernels')),
]  # fmt: skip


def median(cell: dict, figure: str) -> float:
    """Return the median of a figure; 0 if there is none."""
    return statistics.median(cell.get('images_per_second', {}).get(figure) or [0])


def shown(cell: dict, figure: str, first: list[float] | None) -> str:
    """Format images/s, the layout, the ratio to the first contestant with its spread over the rounds, and memory."""
    found = cell.get('images_per_second', {}).get(figure)
    if not found:
        return cell['reason'] or '–'
    text = f'{statistics.median(found):.4g} {dict(nchw="NCHW", channels_last="NHWC").get(cell["layout"], "")}'.strip()
    if first:
        ratios = [ours / theirs for ours, theirs in zip(found, first, strict=True)]
        text += f' · {statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})'
    if cell.get('peak_memory_mb') is not None:
        text += f' · {cell["peak_memory_mb"] / 1024:.1f} GiB'
    return text


def report(result: dict) -> str:
    """Return the Markdown: the machine, the tests, one table, and what did not fit into the time."""
    facts = ', '.join(
        f'{name} {value:.0f}' if isinstance(value, float) else f'{name} {value}'
        for name, value in result['machine'].items()
    )
    parts = [
        f'# {result["machine"]["device"]}\n', f'{facts}\n', f'Tests: {result["tests"]["summary"]}\n',
        *(f'- {line}' for line in (*result['tests']['failed'], *result['tests'].get('skipped', []))),
        '\nImages/s, the layout, the ratio to the first column (median, and spread over the rounds) and peak memory; '
        'each contestant in its faster layout. Parts have times/s; a token mixer has a copy of its input in the first '
        'column, a label map interpolation and argmax.\n',
        markdown_table(['', *(title for _, title in COLUMNS)],
                       [line for row in result['rows'] for line in lines(row)]),
    ]  # fmt: skip
    if result['left_out']:
        parts.append(f'\nLeft out, because the time was over: {"; ".join(result["left_out"])}.')
    return '\n'.join(parts) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', metavar='FOLDER', type=Path, default=Path('work_dirs/gpu'), help='(work_dirs/gpu)')
    parser.add_argument('--minutes', metavar='N', type=float, default=9, help='time for all of it (9)')
    parser.add_argument('--device', help=argparse.SUPPRESS)  # for tests: cpu
    parser.add_argument('--quick', action='store_true', help=argparse.SUPPRESS)  # for tests: small, one network
    args = parser.parse_args()

    start = time.monotonic()
    use_device(args.device)
    if get_device() != 'cuda' and args.device is None:
        raise UserError('there is no CUDA GPU here that torch can use: run it on a machine that has one')
    make_folder(args.out)

    def left() -> float:
        return 60 * args.minutes - (time.monotonic() - start) - 5  # to write and to end

    result = dict(machine=machine(), tests=dict(summary='not run yet', failed=[]), rows=[], left_out=[])

    def save() -> None:
        write_text(args.out / 'gpu.json', json.dumps(result, indent=1))
        write_text(args.out / 'gpu.md', report(result))

    result['tests'] = run_tests(max(TESTS_SHARE * left(), 1))
    print('tests:', result['tests']['summary'], flush=True)
    worker = Worker(args.device)
    longest = {False: 5.0 if args.quick else 20.0, True: 150.0}  # seconds that a row takes, eager and compiled
    try:
        with tempfile.TemporaryDirectory() as folder:
            for row in rows(Path(folder), args.quick):
                if reason := unsupported(row.precision):
                    result['rows'].append(dict(title=row.title, reason=reason))
                elif left() < longest[row.compiled]:
                    result['left_out'].append(row.title)
                else:
                    began = time.monotonic()
                    answer = worker.ask(row, left())
                    longest[row.compiled] = max(longest[row.compiled], time.monotonic() - began)
                    found = dict(reason=answer) if isinstance(answer, str) else dict(cells=answer)
                    result['rows'].append(dict(title=row.title, **found))
                    print(' | '.join(next(lines(result['rows'][-1]))), flush=True)
                save()
    finally:
        worker.close()
        save()
    print(f'{args.out / "gpu.md"} and gpu.json: {len(result["rows"])} rows, {len(result["left_out"])} left out')
    if result['tests']['failed']:
        sys.exit(1)


if __name__ == '__main__':
    run(main)
