"""Go through the pickle of a checkpoint before torch does, and refuse what weights have no need of.

torch's ``weights_only`` interpreter calls what is on a list, with any arguments: that suffices for keys that take
forever to hash, copies of copies of copies, views of terabytes, and, once numpy is listed for mmengine's histories, for
arrays made of raw pointers. Here the same instructions run on stand-ins: arguments are checked, and nothing is made.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedIOBase

# Instructions that torch writes and reads.
_INSTRUCTIONS = """
    PROTO STOP MARK GLOBAL NEWOBJ REDUCE BUILD APPEND APPENDS SETITEM SETITEMS TUPLE TUPLE1 TUPLE2 TUPLE3
    NONE NEWFALSE NEWTRUE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE
    BINGET LONG_BINGET BINPUT LONG_BINPUT BINPERSID
"""

# Of mmengine's HistoryBuffer: its statistics, which its pickle looks up by getattr.
HISTORY_METHODS = ('min', 'max', 'mean', 'current')

_STORAGES = dict(Float=4, Double=8, Half=2, BFloat16=2, Long=8, Int=4, Short=2, Char=1, Byte=1, Bool=1)


def check_archive_pickle(file: BufferedIOBase, size: int, sizes: dict[str, int]) -> None:
    """Check the pickle of torch's present format.

    Args:
        file: The pickle.
        size: Of the whole checkpoint in bytes.
        sizes: Of each storage in bytes, by its key.

    Raises:
        pickle.UnpicklingError: ``GLOBAL <name>`` of what it wants to call and may not.
        Exception: of any other kind where it is no such pickle.
    """

    def storage(kind: str, itemsize: _Itemsize, key: str, location: str, numel: int) -> _Storage:
        _demand(kind == 'storage' and sizes[key] == numel * itemsize.bytes, 'a tensor is not as large as it says')
        return _Storage(numel)

    _Checker(file, size, storage).load()


def check_legacy_pickles(file: BufferedIOBase, size: int) -> None:
    """Check the five pickles of the format that torch wrote until 1.6; see :func:`check_archive_pickle`."""
    left = size

    def storage(kind: str, itemsize: _Itemsize, key: str, location: str, numel: int, view: None) -> _Storage:
        nonlocal left
        if key not in seen:
            left -= numel * itemsize.bytes
        seen.add(key)
        _demand(kind == 'storage' and view is None and numel >= 0 <= left, 'the tensors are larger than the file')
        return _Storage(numel)

    seen: set[str] = set()
    for _ in range(5):  # magic number, protocol, sizes of numbers; the checkpoint; keys of the storages
        _Checker(file, size, storage).load()


def _demand(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


@dataclass(frozen=True)
class _Function:
    """May be called; ``check`` returns the stand-in of its result."""

    check: Callable


@dataclass(frozen=True)
class _Itemsize:
    bytes: int


@dataclass(frozen=True)
class _Storage:
    numel: int


class _Constant:
    """A class or a method that is passed around."""


class _Tensor:
    pass


class _OrderedDict(dict):
    def build(self, state) -> None:
        _demand(type(state) is dict and set(state) <= {'_metadata'}, 'a dictionary has attributes')


class _Dtype:
    def __init__(self, itemsize: int):
        self.itemsize = itemsize

    def build(self, state) -> None:
        version, order, *rest = state
        _demand(version == 3 and order in ('<', '|') and rest == [None, None, None, -1, -1, 0], 'a dtype has parts')


class _Numbers:
    def build(self, state) -> None:
        _, shape, dtype, _, content = state
        _demand(all(type(n) is int and n >= 0 for n in shape) and type(content) is bytes, 'an odd array')
        _demand(len(content) == math.prod(shape) * dtype.itemsize, 'an array is not as large as it says')


class _History:
    def build(self, state) -> None:
        expected = dict(max_length=int, _log_history=_Numbers, _count_history=_Numbers, statistics_methods=dict)
        methods = state.get('statistics_methods', {}).values()
        sound = all(isinstance(value, expected[key]) for key, value in state.items())
        _demand(sound and all(method is _METHOD for method in methods), 'a history holds something else')


_ARRAY, _HISTORY, _METHOD = _Constant(), _Constant(), _Constant()


def _ordered_dict() -> _OrderedDict:
    return _OrderedDict()


def _tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, requires_grad: bool, hooks: dict) -> _Tensor:
    numbers = (offset, *size, *stride)
    _demand(all(type(n) is int and n >= 0 for n in numbers) and len(size) == len(stride) and not hooks, 'an odd tensor')
    numel = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    _demand(numel <= storage.numel and (not numel or last < storage.numel), 'a tensor is larger than what is stored')
    return _Tensor()


def _parameter(data: _Tensor, requires_grad: bool, hooks: dict) -> _Tensor:
    _demand(type(data) is _Tensor and not hooks, 'an odd parameter')
    return data


def _dtype(code: str, align: bool, copy: bool) -> _Dtype:
    _demand(bool(re.fullmatch('[biuf][1248]', code)), f'an array of {code[:20]!r}')
    return _Dtype(int(code[1]))


def _reconstruct(kind: _Constant, shape: tuple, code: bytes) -> _Numbers:
    _demand(kind is _ARRAY and shape == (0,) and code == b'b', 'an odd array')
    return _Numbers()


def _scalar(dtype: _Dtype, content: bytes) -> _Constant:
    _demand(type(content) is bytes and len(content) == dtype.itemsize, 'an odd number')
    return _Constant()


def _getattr(owner: _Constant, name: str) -> _Constant:
    if owner is not _HISTORY or name not in HISTORY_METHODS:
        raise pickle.UnpicklingError('GLOBAL builtins.getattr')
    return _METHOD


_GLOBALS = {
    'collections.OrderedDict': _Function(_ordered_dict),
    'torch._utils._rebuild_tensor_v2': _Function(_tensor),
    'torch._utils._rebuild_parameter': _Function(_parameter),
    **{f'torch.{name}Storage': _Itemsize(itemsize) for name, itemsize in _STORAGES.items()},
    # What mmengine's HistoryBuffer consists of, under the names that numpy 1 and 2 write.
    'mmengine.logging.history_buffer.HistoryBuffer': _HISTORY,
    'numpy.ndarray': _ARRAY,
    'numpy.dtype': _Function(_dtype),
    **{f'numpy.{core}.multiarray._reconstruct': _Function(_reconstruct) for core in ('core', '_core')},
    **{f'numpy.{core}.multiarray.scalar': _Function(_scalar) for core in ('core', '_core')},
    'builtins.getattr': _Function(_getattr),
}


class _Checker(pickle._Unpickler):  # the one in Python, whose instructions can be replaced
    def __init__(self, file: BufferedIOBase, size: int, storage: Callable):
        super().__init__(file)
        self._storage, self._left = storage, size

    def find_class(self, module: str, name: str):
        full = f'{module.replace("__builtin__", "builtins")}.{name}'  # as Python 2 called it
        if full == '_codecs.encode':
            return _Function(self._encode)
        if full not in _GLOBALS:
            raise pickle.UnpicklingError(f'GLOBAL {full}')
        return _GLOBALS[full]

    def persistent_load(self, pid: tuple) -> _Storage:
        return self._storage(*pid)

    def _encode(self, text: str, encoding: str) -> bytes:
        """Decode bytes, which protocol 2 writes as text; each occurrence makes a copy."""
        self._left -= len(text)
        _demand(encoding == 'latin1' and self._left >= 0, 'bytes are copied')
        return text.encode(encoding)

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        _demand(isinstance(function, _Function) and type(arguments) is tuple, 'it calls what is no function')
        self.append(function.check(*arguments))

    def load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        _demand(kind is _HISTORY and arguments == (), 'it makes what is no history')
        self.append(_History())

    def load_build(self) -> None:
        state = self.stack.pop()
        _demand(isinstance(self.stack[-1], (_OrderedDict, _Dtype, _Numbers, _History)), 'it changes what is plain')
        self.stack[-1].build(state)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Small numbers, and words, whose hashes cannot be foreseen, are found fast in any dictionary.
            _demand(type(key) is str or type(key) is int and abs(key) < 2**31, 'a key is neither a word nor a number')
            _demand(isinstance(self.stack[-1], dict), 'it writes into what is no dictionary')
            self.stack[-1][key] = value

    dispatch = {
        code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in _INSTRUCTIONS.split())
    }
    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }
