"""Read every image and annotation of a data set, and say what would stop a training run or make it worse."""

from __future__ import annotations

import copy
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmseg.datasets import BaseSegDataset
from mmseg.registry import TRANSFORMS
from PIL import Image

from mmseg_inceptionnext.config_files import require, require_segmentor
from mmseg_inceptionnext.data.check import head_faults, list_annotations, list_samples, open_dataset
from mmseg_inceptionnext.data.class_weights import keep_counts
from mmseg_inceptionnext.data.ignore_index import use_one_ignore_index
from mmseg_inceptionnext.data.lossy_masks import draw_lossy
from mmseg_inceptionnext.data.mask_dataset import MaskDataset
from mmseg_inceptionnext.data.mask_palettes import MaskPalettes
from mmseg_inceptionnext.data.pipeline import leaf_datasets, missing_ground_truth, remove_ground_truth
from mmseg_inceptionnext.data.read_pairs import Pair, pair_reader
from mmseg_inceptionnext.data.sampling import evenly_spread
from mmseg_inceptionnext.data.transforms import label_fault, one_pixel_fault, vanishing_fault
from mmseg_inceptionnext.data.unnamed_codes import UnnamedCodes, draw_unnamed
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.labels import IGNORE_INDEX, Code

# ADE20K's scene parsing benchmark: files beside its folders that give it away, and its numbers of images.
_ADE20K_FILES = ('objectInfo150.txt', 'sceneCategories.txt')
_ADE20K_IMAGES = {'training': 20210, 'validation': 2000}
_MOST_ALIKE = 5  # files with the same fault that are listed one by one
_LOSSY_DRAWN = 2  # masks of a split


@dataclass
class Split:
    """What one split holds; the names are those of the JSON file.

    Attributes:
        images, annotations: Number of images, and of images with an annotation.
        checked: Number of images that were read.
        sizes: (width, height) of the smallest, the median and the largest image, by area.
        pixels, ignored_pixels: Pixels of the annotations that could be read, and those without a class.
        classes: Pixels and number of files of each class, ``{name: {'pixels', 'files'}}``.
        without_labels: Images whose pixels are all ignored.
        wrong: What cannot be trained on, ``{'file', 'reason'}``.
        orphans: Annotations without an image.
        duplicates: Number of images that are the same file as an earlier one of the split.
    """

    images: int = 0
    annotations: int = 0
    checked: int = 0
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    pixels: int = 0
    ignored_pixels: int = 0
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    without_labels: list[str] = field(default_factory=list)
    wrong: list[dict[str, str]] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    duplicates: int = 0


@dataclass
class Inspection:
    """What is known of a data set after it has been read.

    Attributes:
        ok: Whether there is no wrong file and no problem.
        splits: By name: 'train', 'val', and 'test' where it has other files than 'val'.
        duplicates: (training image, image of another split) that are the same file.
        problems: What is wrong with the data set as a whole, a line each.
        warnings: What may be a mistake, a line each.
        unnamed: Ids or colours of the masks that the data file does not name; no field, because the problems say it.
    """

    ok: bool = True
    splits: dict[str, Split] = field(default_factory=dict)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.unnamed: list[Code] = []


@dataclass
class Coding:
    """How a config reads annotations, and what the files hold: (256,) pixels, and files, of each value."""

    reduce_zero_label: bool
    num_classes: int
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    files: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    total_files: int = 0

    def add(self, counts: np.ndarray) -> None:
        self.pixels += counts
        self.files += counts > 0
        self.total_files += 1


class _Source:
    """One of a config's data sets, with what is needed to judge its files."""

    def __init__(self, dataset: BaseSegDataset, pipeline: Sequence[dict], sample: dict):
        self.names = [name.strip() for name in dataset.metainfo['classes']]
        self.scale = _smallest_scale(pipeline)
        self.palettes = MaskPalettes(dataset.metainfo.get('palette') or ())
        self.channels = next((t['channels'] for t in pipeline if 'channels' in t), 3)
        self.mask_coding = dataset.coding if isinstance(dataset, MaskDataset) else None
        if self.mask_coding:
            self.masks = 'colours' if self.mask_coding.is_colour else 'ids'
            self.unnamed = UnnamedCodes(self.mask_coding)
            self.ignored = {self.mask_coding.ignore_index}
            return
        self.masks = None
        self.coding = (dataset.reduce_zero_label, len(dataset.label_map or self.names))
        loader = next((t for t in pipeline if t['type'] == 'LoadAnnotations'), dict(type='LoadAnnotations'))
        self.labels = _labels_of_values(loader, sample)
        checks = [t['ignore_index'] for t in pipeline if t['type'] == 'CheckAnnotation' and 'ignore_index' in t]
        self.ignored = {IGNORE_INDEX, *checks}  # labels of pixels without a class
        self.by_opencv = loader.get('imdecode_backend') == 'cv2'

    def faults(self, image: str, annotation: str | None, pair: Pair) -> Iterator[tuple[str, str]]:
        """Yield (file, reason) for each reason why a readable pair cannot be trained on."""
        thin = one_pixel_fault(pair.size) if pair.size and annotation else None
        if thin := thin or pair.size and vanishing_fault(pair.size, self.scale):
            yield image, thin
        if pair.counts is None or self.mask_coding:
            return
        if pair.palette and self.by_opencv:
            yield annotation, "has a palette, which LoadAnnotations' imdecode_backend='cv2' reads as colours: remove it"
        for value in pair.counts:
            if len(self.names) <= self.labels[value] and self.labels[value] not in self.ignored:
                hint = ' (it is an index into a palette: if that is of colours, convert it)' if pair.palette else ''
                yield annotation, label_fault(value, self.coding[1], int(self.coding[0])) + hint
                return

    def reading(self, image: str, annotation: str | None) -> tuple:
        """Return the arguments of :func:`~mmseg_inceptionnext.data.read_pairs.read_pair` for a pair."""
        return image, annotation, self.masks, self.channels

    def labels_of(self, counts: dict[int, int]) -> list[int]:
        """Return the label of each value in an annotation; -1 if it has none."""
        values = np.array(list(counts), np.int64)
        if self.mask_coding:
            return self.mask_coding.labels_of(values).tolist()
        return self.labels[values].tolist()


def inspect_data(
    cfg: Config,
    workers: int = 1,
    sample: int | None = None,
    progress: Callable[[Iterable, int], Iterable] = lambda pairs, total: pairs,
    splits: Sequence[str] = ('train', 'val', 'test'),
    report: Path | None = None,
) -> Inspection:
    """Read the images and annotations of a config's training, validation and test data.

    If all training annotations are read, the number of pixels of each class is kept beside them, see
    :func:`~mmseg_inceptionnext.data.class_weights.keep_counts`.

    Args:
        cfg: A whole config.
        workers: Number of processes that read; 1 is this one.
        sample: Number of pairs of each split to read, evenly spread over its names. All names are compared anyway.
        progress: Function that wraps the iterator over the pairs, given their number.
        splits: The data to read.
        report: Folder for pictures of two examples of each id or colour that the data file does not name, and of the
            first masks that are compressed with loss.

    Raises:
        UserError: A data root, a folder or every image of a split is missing, or a process was killed.
    """
    require(cfg, 'model', 'train_dataloader')
    require_segmentor(cfg)
    cfg = copy.deepcopy(cfg)
    use_one_ignore_index(cfg)
    found = Inspection()
    codings: dict[tuple[bool, int], Coding] = {}
    jobs: list[tuple[str, _Source, str, str | None]] = []
    for name, datasets in _datasets(cfg, splits).items():
        split = found.splits[name] = Split()
        pairs = _list_pairs(split, datasets, cfg.model, found.problems)
        if not split.annotations and name != 'test':
            found.problems.append(f'{name}: no image has an annotation: correct data_prefix.seg_map_path')
        if sample is not None:
            pairs = evenly_spread(pairs, sample)
        jobs += [(name, *pair) for pair in pairs]

    first: dict[str, dict[bytes, str]] = {name: {} for name in found.splits}
    sources = list(dict.fromkeys((name, source) for name, source, *_ in jobs))
    sizes: dict[str, list[tuple[int, int]]] = {name: [] for name in found.splits}
    turned: dict[str, list[str]] = {name: [] for name in found.splits}
    lossy: dict[str, list[str]] = {name: [] for name in found.splits}
    with pair_reader(workers) as read:
        results = zip(jobs, read([source.reading(*files) for _, source, *files in jobs]), strict=True)
        for (name, source, image, annotation), pair in progress(results, len(jobs)):
            split = found.splits[name]
            split.checked += 1
            faults = [*pair.wrong, *source.faults(image, annotation, pair)]
            split.wrong += [dict(file=file, reason=reason) for file, reason in faults]
            if pair.size:
                sizes[name].append(pair.size)
            if pair.digest and first[name].setdefault(pair.digest, image) is not image:
                split.duplicates += 1
            if pair.lossy:
                lossy[name].append(annotation)
            if pair.counts is not None:
                # Of an image that is on its side, another size would tell.
                if pair.orientation > 1 and (pair.orientation < 5 or pair.size[0] == pair.size[1]):
                    turned[name].append(image)
                if pair.palette:
                    labels = dict(zip(pair.counts, source.labels_of(pair.counts), strict=True))
                    source.palettes.add(annotation, pair.palette, labels)
                if source.mask_coding:
                    source.unnamed.add(image, annotation, pair.counts)
                else:
                    pixels = np.zeros(256, np.int64)
                    pixels[list(pair.counts)] = list(pair.counts.values())
                    codings.setdefault(source.coding, Coding(*source.coding)).add(pixels)
                _count(split, source, image, pair.counts)

    for name, split in found.splits.items():
        if areas := sorted(sizes[name], key=lambda size: size[0] * size[1]):
            split.sizes = dict(min=areas[0], median=areas[len(areas) // 2], max=areas[-1])
        if name != 'train':
            same = first['train'].keys() & first[name]
            found.duplicates += sorted((first['train'][digest], first[name][digest]) for digest in same)
    if report:
        for name, masks in lossy.items():
            for mask in masks[:_LOSSY_DRAWN]:
                draw_lossy(mask, report / f'lossy_{name}_{Path(mask).stem}.png')
    for name, source in sources:
        if source.mask_coding:
            found.problems += [f'{name}: {fault}' for fault in source.unnamed.faults()]
            found.unnamed += [code for code in source.unnamed.codes() if code not in found.unnamed]
            if report:
                draw_unnamed(source.unnamed, report)
    found.problems = list(dict.fromkeys(found.problems))  # the splits have the same heads
    found.warnings = [
        *_split_warnings(found),
        *(line for c in codings.values() for line in coding_warnings(c)),
        *(_turned_warning(name, images) for name, images in turned.items() if images),
        *(f'{name}: {line}' for name, source in sources for line in source.palettes.warnings()),
    ]
    found.ok = not found.problems and not any(split.wrong for split in found.splits.values())
    if found.ok and sample is None and 'train' in found.splits:
        keep_counts(cfg, {name: count['pixels'] for name, count in found.splits['train'].classes.items()})
    return found


def coding_warnings(coding: Coding) -> Iterator[str]:
    """Yield warnings that ``reduce_zero_label`` may be wrong for the annotations; none is certain."""
    pixels, n = coding.pixels, coding.num_classes
    of_pixels, of_files = pixels / pixels.sum(), coding.files / coding.total_files
    if pixels[255] and not pixels[1:255].any():
        first = int(coding.reduce_zero_label)
        yield (
            f'the annotations hold no label but 0 and 255, which is on {of_pixels[255]:.0%} of the pixels and always '
            f'ignored: if these are masks of two classes, write {first} and {first + 1} instead'
        )
    elif coding.reduce_zero_label and of_pixels[0] > 0.5:
        yield (
            f'0 is on {of_pixels[0]:.0%} of the pixels in {of_files[0]:.0%} of the files: with reduce_zero_label=True '
            'it is ignored. Set that to False if 0 is a class'
        )
    elif coding.reduce_zero_label and pixels[:n].all() and not pixels[n]:
        yield (
            f'the labels are 0 … {n - 1}, and {n} is nowhere: with reduce_zero_label=True the {n} classes are 1 … {n}, '
            'and 0 is ignored. Set that to False if 0 is a class'
        )
    elif not coding.reduce_zero_label and n < 255 and pixels[n] and not pixels[n + 1 : 255].any():
        yield (
            f'the labels go up to {n}, one past the {n} classes. Is {n}, on {of_pixels[n]:.2%} of the pixels, to be '
            f'ignored (`ignore_classes: [{n}]` in a data file)? Or is 0, on {of_pixels[0]:.2%}, the unlabelled one? '
            'Then set reduce_zero_label=True, which makes 1 the first class'
        )


def grouped(wrong: list[dict[str, str]]) -> Iterator[str]:
    """Yield a line for each wrong file; one line alone for those that have the same reason, if there are many."""
    groups: dict[str, list[dict[str, str]]] = {}
    for entry in wrong:
        kind = re.sub(r'\d+×\d+|\S*[/\\]\S*', '…', entry['reason'])
        groups.setdefault(kind, []).append(entry)
    for entries in groups.values():
        if len(entries) <= _MOST_ALIKE:
            yield from (f'{entry["file"]}: {entry["reason"]}' for entry in entries)
        else:
            yield f'{_number(len(entries))} files, such as {entries[0]["file"]}: {entries[0]["reason"]}'


def inspection_text(found: Inspection) -> str:
    """Describe a data set in a few lines, with the warnings last."""
    lines = []
    for name, split in found.splits.items():
        part = f', a sample of {_number(split.checked)} checked' if split.checked < split.images else ''
        sizes = ' … '.join(f'{width}×{height}' for width, height in split.sizes.values())
        lines.append(f'{name}: {_number(split.images)} images{part}, {sizes} (smallest, median, largest)')
        if split.duplicates:
            lines.append(f'  {_number(split.duplicates)} images are the same file as another')
        if not split.pixels:
            continue
        shares = {cls: count['pixels'] / split.pixels for cls, count in split.classes.items() if count['pixels']}
        ranked = [f'{cls} {shares[cls]:.2%}' for cls in sorted(shares, key=shares.get, reverse=True)]
        lines.append(
            f'  {len(shares)} of {len(split.classes)} classes on {_number(split.pixels)} pixels, '
            f'{split.ignored_pixels / split.pixels:.2%} ignored'
        )
        lines.append(f'  most: {", ".join(ranked[:3])}; least: {", ".join(ranked[-3:])}')
        if absent := [cls for cls in split.classes if cls not in shares]:
            more = f' and {len(absent) - 5} more' if len(absent) > 5 else ''
            lines.append(f'  never: {", ".join(absent[:5])}{more}')
    return '\n'.join([*lines, *(f'warning: {line}' for line in found.warnings)])


def _datasets(cfg: Config, splits: Sequence[str]) -> dict[str, list[tuple[BaseSegDataset, list[dict]]]]:
    """Return data sets and pipelines of each split; the test split only where it has other files than validation."""
    found = {}
    for name in splits:
        if not cfg.get(f'{name}_dataloader'):
            continue
        tree = copy.deepcopy(cfg[f'{name}_dataloader'].dataset)
        if name == 'test' and missing_ground_truth(tree):
            remove_ground_truth(tree)
        found[name] = [(open_dataset(leaf), leaf.get('pipeline', [])) for leaf in leaf_datasets(tree)]
    files = {
        name: [(d.data_prefix, d.ann_file, getattr(d, 'part', None)) for d, _ in datasets]
        for name, datasets in found.items()
    }
    if files.get('test') == files.get('val'):
        found.pop('test', None)
    return found


def _list_pairs(
    split: Split, datasets: list[tuple[BaseSegDataset, list[dict]]], model_cfg: dict, problems: list[str]
) -> list[tuple[_Source, str, str | None]]:
    """List (source, image, annotation) of a split, and note what is wrong with the listing."""
    pairs, expected, present = [], set(), set()
    for dataset, pipeline in datasets:
        samples, annotations = list_samples(dataset), list_annotations(dataset)
        source = _Source(dataset, pipeline, samples[0])
        split.classes |= {name: dict(pixels=0, files=0) for name in source.names}
        problems += head_faults(model_cfg, len(source.names))
        if not dataset.ann_file:  # with a list of names, files that it leaves out are no mistake
            problems += _count_faults(Path(dataset.data_prefix['img_path']), len(samples))
            suffix = '' if isinstance(dataset, MaskDataset) else dataset.seg_map_suffix
            present |= {path for path in annotations if path.endswith(suffix)}
        for image, annotation in ((sample['img_path'], sample.get('seg_map_path')) for sample in samples):
            expected.add(annotation)
            if annotation is not None and annotation not in annotations:
                split.wrong.append(dict(file=image, reason=f'has no annotation: expected {annotation}'))
                annotation = None
            pairs.append((source, image, annotation))
    split.images = len(pairs)
    split.annotations = sum(annotation is not None for *_, annotation in pairs)
    split.orphans = sorted(present - expected)
    return pairs


def _count_faults(folder: Path, images: int) -> Iterator[str]:
    """Yield what is wrong with the number of images, if the data set is ADE20K by its name or its other files."""
    root, expected = folder.absolute().parents[1], _ADE20K_IMAGES.get(folder.name)
    is_ade20k = root.name == 'ADEChallengeData2016' or any((root / name).is_file() for name in _ADE20K_FILES)
    if not is_ade20k or not expected or images == expected:
        return
    if images < expected:
        yield (
            f'{root}: this looks like a partial download: {_number(images)} of {_number(expected)} {folder.name} images'
        )
    else:
        yield f'{root}: has {_number(images)} {folder.name} images, where ADE20K has {_number(expected)}'


def _labels_of_values(loader: dict, sample: dict) -> np.ndarray:
    """Return the label that LoadAnnotations makes of each value that a file can hold: (256,) uint8."""
    with tempfile.NamedTemporaryFile(suffix='.png') as file:
        Image.fromarray(np.arange(256, dtype=np.uint8)[None]).save(file, 'PNG')
        file.flush()
        try:
            return TRANSFORMS.build(loader)(dict(sample, seg_map_path=file.name, seg_fields=[]))['gt_seg_map']
        except AssertionError as error:
            raise UserError(f'LoadAnnotations does not fit its data set: {error}') from error


def _smallest_scale(pipeline: Sequence[dict]) -> tuple[int, int] | None:
    """Return the smallest scale that a pipeline's first (Random)Resize fits an image into, if it keeps the ratio."""
    for t in pipeline:
        if t['type'] in ('Resize', 'RandomResize'):
            if not t.get('keep_ratio') or np.shape(t.get('scale')) != (2,):
                return None
            return tuple(int(side * min(t.get('ratio_range') or [1])) for side in t['scale'])
    return None


def _count(split: Split, source: _Source, image: str, counts: dict[int, int]) -> None:
    """Add what an annotation holds, the pixels of each value in its file."""
    labels: Counter[int] = Counter()
    for label, pixels in zip(source.labels_of(counts), counts.values(), strict=True):
        labels[label] += pixels
    split.pixels += sum(counts.values())
    split.ignored_pixels += sum(labels[label] for label in source.ignored)
    present = [label for label in labels if 0 <= label < len(source.names) and label not in source.ignored]
    for label in present:
        split.classes[source.names[label]]['pixels'] += labels[label]
        split.classes[source.names[label]]['files'] += 1
    if not present:
        split.without_labels.append(image)


def _split_warnings(found: Inspection) -> Iterator[str]:
    for name, split in found.splits.items():
        if orphans := split.orphans:
            yield (
                f'{name}: {_number(len(orphans))} annotations have no image and are left out, the first {orphans[0]}: '
                'are images missing, or do their names end in something else?'
            )
        if without := split.without_labels:
            yield f'{name}: {_number(len(without))} images have no labelled pixel, the first {without[0]}'
    if found.duplicates:
        pairs = '; '.join(f'{image} = {other}' for image, other in found.duplicates[:3])
        yield (
            f'{_number(len(found.duplicates))} images are both in the training data and held out: {pairs}'
            f'{"; …" if len(found.duplicates) > 3 else ""}'
        )


def _turned_warning(name: str, images: list[str]) -> str:
    return (
        f'{name}: {_number(len(images))} images have an EXIF orientation, by which they are mirrored or turned when '
        f'they are read, such as {", ".join(images[:3])}; their masks are taken as they are stored, and sizes do not '
        'tell whether they fit: look at some'
    )


def _number(count: int) -> str:
    return f'{count:,}'.replace(',', ' ')
