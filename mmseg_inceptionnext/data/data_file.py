"""Read a data file: the short YAML that describes a data set of one's own."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from mmseg_inceptionnext.errors import MissingFile, UserError
from mmseg_inceptionnext.labels import Code, distinct_colour

SPLITS = ('train', 'val', 'test')
# Those of Ultralytics' files come last; of these, nc and download say nothing that is needed here.
_KEYS = (
    'path', *SPLITS, 'classes', 'ignore_classes', 'val_fraction', 'channels', 'names', 'masks_dir', 'label_mapping',
    'nc', 'download',
)  # fmt: skip
_CLASS_KEYS = ('name', 'labels', 'values', 'color')  # values: lightly-train's older name of labels
_VAL_FRACTION = 0.1
_ALWAYS_IGNORED = 255
_LARGEST_ID = 65535
_PATH_PARTS = ('name', 'stem', 'suffix', 'parent', 'parents', 'parts')  # that a template may use


@dataclass(frozen=True)
class Folders:
    """Where a split lies.

    Attributes:
        images: Folder of the images, relative to the data set's path, or absolute.
        masks: Folder of the masks; or a template of a mask's path, with ``{image_path.stem}`` and the like.
        list: File with the names of the images, relative to their folder and without suffix; None for all.
    """

    images: str
    masks: str
    list: str | None = None


@dataclass(frozen=True)
class DataClass:
    """A class of a data set: its name, what masks hold for it (ids or colours), and its colour in pictures (RGB).

    Label maps that are written hold the first of the codes.
    """

    name: str
    codes: tuple[Code, ...]
    color: tuple[int, int, int]


@dataclass(frozen=True)
class DataFile:
    """A data set of one's own.

    Attributes:
        path: Absolute path of the folder that the folders of the splits are relative to.
        splits: Folders by split: 'train', and 'val' and 'test' if the file names them.
        classes: The classes, in the order of their labels.
        ignored: Ids or colours of pixels that are not trained on and not counted.
        val_fraction: Share of the training images that are held out for validation; None if there is a 'val'.
        channels: Channels of the images.
    """

    path: Path
    splits: dict[str, Folders]
    classes: tuple[DataClass, ...]
    ignored: tuple[Code, ...]
    val_fraction: float | None
    channels: int


def read_data_file(source: str | Path | Mapping[str, Any]) -> DataFile:
    """Read and check a data file.

    Its keys are those of lightly-train's ``data``; files of Ultralytics with PNG masks (``names``, ``masks_dir``,
    ``label_mapping``) are read as well. docs/data.md describes both.

    Args:
        source: Path of a YAML file, or its content as a dict, whose paths are relative to the current folder.

    Raises:
        UserError: It cannot be read, or something in it is wrong, or a folder does not exist.
    """
    where, base = ('data', Path.cwd()) if isinstance(source, Mapping) else (str(source), Path(source).parent)
    content = source if isinstance(source, Mapping) else _read_yaml(Path(source))
    try:
        return _parse(dict(content), base)
    except UserError as error:
        raise type(error)(f'{where}: {error}') from error


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that stands twice; the last would win without a word."""

    def construct_mapping(self, node, deep=False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        _no_duplicates(map(str, keys), 'the key {} stands twice')
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict:
    try:
        content = yaml.load(path.read_text(encoding='utf-8-sig'), _Loader)
    except FileNotFoundError as error:
        raise MissingFile(
            f'no data file at {path.absolute()}: `check FOLDER --write {path.name}` drafts one'
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read: {getattr(error, "strerror", None) or error}') from error
    except UserError as error:
        raise UserError(f'{path}: {error}') from error
    except yaml.YAMLError as error:
        mark = getattr(error, 'problem_mark', None)
        line = f', line {mark.line + 1}' if mark else ''
        raise UserError(f'{path}{line}: not YAML: {getattr(error, "problem", None) or error}') from error
    if not isinstance(content, dict):
        raise UserError(f'{path} holds no keys: it needs train, val and classes')
    return content


def _parse(content: dict, base: Path) -> DataFile:
    _check_keys(content, _KEYS, 'key')
    path = Path(base, _text(content.get('path', '.'), 'path')).expanduser().absolute()
    if not path.is_dir():
        raise MissingFile(f'path: there is no folder {path}')
    if 'names' in content and 'classes' in content:
        raise UserError('it has both names and classes: keep one of them')
    unlabelled: list[Code] = []
    if 'names' in content:
        content, unlabelled = _from_ultralytics(content, path)
    elif odd := [key for key in ('masks_dir', 'label_mapping') if key in content]:
        raise UserError(f'{odd[0]} goes with names, not with classes: give each split its masks, or a class its labels')
    if 'classes' not in content:
        raise UserError('classes is missing: the names of the classes, in the order of their ids')
    splits = {name: _folders(name, content[name], path) for name in SPLITS if content.get(name) is not None}
    if 'train' not in splits:
        raise UserError('train is missing: train: {images: FOLDER, masks: FOLDER}')
    classes, ignored = _classes(content['classes'], content.get('ignore_classes'), unlabelled, base)
    fraction = content.get('val_fraction')
    if fraction is not None and 'val' in splits:
        raise UserError('it has both val and val_fraction: keep one of them')
    if 'val' not in splits:
        fraction = _VAL_FRACTION if fraction is None else fraction
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
            raise UserError(f'val_fraction: {fraction!r} is not between 0 and 1')
    channels = content.get('channels', 3)
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise UserError(f'channels: {channels!r} is not a positive whole number')
    return DataFile(path, splits, classes, ignored, fraction, channels)


def _check_keys(given: Mapping, known: Iterable[str], what: str) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            meant = f'did you mean {close[0]}?' if close else f'known are {", ".join(known)}'
            raise UserError(f'unknown {what} {key!r}: {meant}')


def _text(value, key: str) -> str:
    if not isinstance(value, (str, Path)) or not str(value):
        raise UserError(f'{key}: {value!r} is not a path')
    return str(value)


def _folders(name: str, given, path: Path) -> Folders:
    if not isinstance(given, Mapping):
        raise UserError(f'{name}: {given!r} is not of the form {{images: FOLDER, masks: FOLDER}}')
    _check_keys(given, ('images', 'masks', 'list'), f'key of {name}')
    for key in ('images', 'masks'):
        if key not in given:
            raise UserError(f'{name}.{key} is missing')
    folders = Folders(**{key: _text(value, f'{name}.{key}') for key, value in given.items()})
    for key, folder in (('images', folders.images), ('masks', folders.masks)):
        if '{' in folder and key == 'masks':
            _check_template(folder, name)
        elif not (path / folder).is_dir():
            raise MissingFile(f'{name}.{key}: there is no folder {path / folder}')
    if folders.list and not (path / folders.list).is_file():
        raise MissingFile(f'{name}.list: there is no file {path / folders.list}')
    return folders


def _check_template(template: str, split: str) -> None:
    try:
        one, other = (fill_template(template, PurePosixPath('/images/train', f'{name * 40}.jpg')) for name in 'ab')
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f'{split}.masks: {template!r} is not a template such as {{image_path.parent}}/{{image_path.stem}}_mask.png '
            f'({type(error).__name__}: {error})'
        ) from error
    if one == other:
        raise UserError(f'{split}.masks: {template!r} is the same for every image: it needs {{image_path.stem}}')


def fill_template(template: str, image_path: PurePosixPath) -> str:
    """Return the path of an image's mask.

    As in lightly-train's templates, ``{image_path}`` may be followed by attributes of a path and by indices, and here
    by slices: ``{image_path.stem[:-12]}``.

    Raises:
        ValueError, TypeError, IndexError: The template has something else in braces, or does not fit a path.
    """

    def filled(match: re.Match) -> str:
        value = image_path
        for name, index in re.findall(r'\.(\w+)|\[([-\d:]+)\]', match[1]):
            if name:
                if name not in _PATH_PARTS:
                    raise ValueError(f'{name} is none of {", ".join(_PATH_PARTS)}')
                value = getattr(value, name)
            else:
                bounds = [int(bound) if bound else None for bound in index.split(':')]
                value = value[slice(*bounds) if ':' in index else bounds[0]]
        return str(value)

    path = re.sub(r'\{image_path((?:\.\w+|\[[-\d:]+\])*)\}', filled, template)
    if '{' in path or '}' in path:
        raise ValueError('only {image_path…} can be filled in')
    return path


def _classes(given, ignore, unlabelled: list[Code], base: Path) -> tuple[tuple[DataClass, ...], tuple[Code, ...]]:
    """Parse ``classes`` and ``ignore_classes``; add what else is without a class."""
    if isinstance(given, str):
        given = _read_json(base / given)
    if isinstance(given, (list, tuple)):
        given = dict(enumerate(given))
    if not isinstance(given, Mapping) or not given:
        raise UserError(f'classes: {given!r} is neither a list of names nor {{id: name}}')
    _no_duplicates((_id(key, 'classes') for key in given), 'classes: the id {} stands twice')
    parsed = {_id(key, 'classes'): _class(key, value) for key, value in given.items()}
    _no_duplicates((name for name, _, _ in parsed.values()), 'classes: two classes have the name {!r}')
    _no_duplicates((code for _, codes, _ in parsed.values() for code in codes), 'classes: {} belongs to two classes')
    is_colour = {isinstance(code, tuple) for _, codes, _ in parsed.values() for code in codes}
    if len(is_colour) > 1:
        raise UserError('classes: some have ids and others colours: masks hold either')

    ignored = list(unlabelled)
    for entry in _listed(ignore, 'ignore_classes'):
        code = _code(entry, 'ignore_classes')
        owner = code if code in parsed else next((key for key, (_, codes, _) in parsed.items() if code in codes), None)
        if owner is None:
            ignored.append(code)
            continue
        name, codes, _ = parsed[owner]
        if owner != code and len(codes) > 1:
            raise UserError(f'ignore_classes: {entry} is one of the labels of {name!r}: remove it from one of them')
        ignored += parsed.pop(owner)[1]
    if not parsed:
        raise UserError('ignore_classes: no class is left')
    if len(parsed) == 1:
        ((name, _, _),) = parsed.values()
        raise UserError(
            f'classes: {name!r} is the only one that is not ignored, and nothing can be learned from one: name the '
            f'background as well, such as {{0: background, 255: {name}}}'
        )
    taken = {code for _, codes, _ in parsed.values() for code in codes}
    if is_colour == {True}:
        if odd := [code for code in ignored if not isinstance(code, tuple)]:
            raise UserError(f'ignore_classes: {odd[0]} is neither a colour nor the id of a class')
    elif odd := [code for code in ignored if isinstance(code, tuple)]:
        raise UserError(f'ignore_classes: {list(odd[0])} is a colour, but the classes are ids: give its id')
    elif _ALWAYS_IGNORED not in taken:
        ignored.append(_ALWAYS_IGNORED)
    classes = []
    for name, codes, color in parsed.values():
        color = color or (codes[0] if isinstance(codes[0], tuple) else distinct_colour(len(classes)))
        classes.append(DataClass(name, codes, color))
    return tuple(classes), tuple(dict.fromkeys(ignored))


def _class(key, given) -> tuple[str, tuple[Code, ...], tuple[int, int, int] | None]:
    if not isinstance(given, Mapping):
        return _name(given, key), (_id(key, 'classes'),), None
    _check_keys(given, _CLASS_KEYS, f'key of class {key}')
    if 'name' not in given:
        raise UserError(f'classes: class {key} has no name')
    labels = given.get('labels', given.get('values'))
    codes = tuple(_code(label, f'classes: {key}') for label in _listed(labels, f'classes: labels of {key}'))
    color = None
    if given.get('color') is not None:
        color = _code(given['color'], f'classes: color of {key}')
        if not isinstance(color, tuple):
            raise UserError(f'classes: color of {key}: {color!r} is not [red, green, blue] of 0 … 255')
    return _name(given['name'], key), codes or (_id(key, 'classes'),), color


def _name(given, key) -> str:
    if isinstance(given, (Mapping, list, tuple)) or given is None or not str(given).strip():
        raise UserError(f'classes: the name of class {key} is {given!r}: write a word')
    return str(given).strip()


def _id(given, where: str) -> int:
    text = str(given)
    if isinstance(given, bool) or not re.fullmatch(r'-?\d+', text) or not 0 <= int(text) <= _LARGEST_ID:
        raise UserError(f'{where}: {given!r} is not an id from 0 to {_LARGEST_ID}')
    return int(text)


def _code(given, where: str) -> Code:
    if isinstance(given, (list, tuple)):
        if len(given) != 3 or not all(type(value) is int and 0 <= value <= 255 for value in given):
            raise UserError(f'{where}: {list(given)} is not a colour: [red, green, blue] of 0 … 255')
        return tuple(given)
    return _id(given, where)


def _listed(given, where: str) -> list:
    if given is None:
        return []
    if isinstance(given, (set, list, tuple)):
        return list(given)
    raise UserError(f'{where}: {given!r} is not a list')


def _no_duplicates(values: Iterable, message: str) -> None:
    for value, times in Counter(values).items():
        if times > 1:
            raise UserError(message.format(list(value) if isinstance(value, tuple) else value))


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise UserError(f'classes: {path} cannot be read as JSON ({error})') from error


def _from_ultralytics(content: dict, path: Path) -> tuple[dict, list[Code]]:
    """Return a file of Ultralytics in our keys, and the ids that it maps to no class.

    Masks lie where the last folder ``images`` of an image's path is replaced by ``masks_dir``. ``label_mapping`` says
    which class an id of the masks stands for; ids that it leaves out stand for themselves, 255 for no class.
    """
    masks_dir = content.get('masks_dir') or ('masks' if (path / 'masks').is_dir() else None)
    if masks_dir is None:
        raise UserError('masks_dir is missing: masks are read from image files, polygons in .txt files are not')
    names = content['names']
    names = dict(enumerate(names)) if isinstance(names, (list, tuple)) else names
    if not isinstance(names, Mapping):
        raise UserError(f'names: {names!r} is neither a list nor {{id: name}}')
    mapping = content.get('label_mapping') or {}
    if not isinstance(mapping, Mapping):
        raise UserError(f'label_mapping: {mapping!r} is not of the form {{id: class}}')
    labels: dict[int, list[int]] = {_id(key, 'names'): [] for key in names}
    ignored = []
    for source, target in mapping.items():
        if re.fullmatch(r'-\d+', str(source)):
            continue  # no mask can hold it
        source = _id(source, 'label_mapping')
        if target in (None, 'ignore_label', _ALWAYS_IGNORED):
            ignored.append(source)
        elif target in labels:
            labels[target].append(source)
        else:
            raise UserError(f'label_mapping: {source} is mapped to {target!r}, which is no class of names')
    for key, sources in labels.items():
        if key not in map(int, (source for source in mapping if str(source).isdecimal())):
            sources.append(key)
        if not sources:
            raise UserError(f'label_mapping: no id stands for {names[key]!r}')
    splits = {}
    for name in SPLITS:
        if content.get(name) is None:
            continue
        images = PurePosixPath(_text(content[name], name))
        parts = list(images.parts)
        if 'images' not in parts:
            raise UserError(f'{name}: {str(images)!r} has no folder called images, which masks_dir could replace')
        parts[len(parts) - 1 - parts[::-1].index('images')] = str(masks_dir)
        splits[name] = dict(images=str(images), masks=str(PurePosixPath(*parts)))
    classes = {key: dict(name=names[key], labels=sources) for key, sources in labels.items()}
    kept = {key: content[key] for key in ('channels', 'val_fraction', 'ignore_classes') if key in content}
    return dict(splits, classes=classes, **kept), ignored
