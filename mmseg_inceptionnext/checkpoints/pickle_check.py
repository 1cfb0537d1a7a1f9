"""Check the pickle of a checkpoint before torch loads it, and refuse what weights have no need of.

torch's ``weights_only`` unpickler calls what is on a list, with any arguments. That suffices for keys that take forever
to hash, copies of copies of copies, views of terabytes, and, once numpy is listed for mmengine's histories, for arrays
made of raw pointers. Here the same instructions run on stand-ins: arguments are checked, and nothing is built.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedIOBase

import torch

# Instructions that torch writes and reads.
_INSTRUCTIONS = """
    PROTO STOP MARK GLOBAL NEWOBJ REDUCE BUILD APPEND APPENDS SETITEM SETITEMS TUPLE TUPLE1 TUPLE2 TUPLE3
    NONE NEWFALSE NEWTRUE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE
    BINGET LONG_BINGET BINPUT LONG_BINPUT BINPERSID
"""

# Functions that mmengine keeps in a state: pickle finds them by getattr of their class.
METHODS = {
    'mmengine.logging.history_buffer.HistoryBuffer': ('min', 'max', 'mean', 'current'),
    'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler': ('_annealing_cos', '_annealing_linear'),
}
_HISTORY_BUFFER, _ = METHODS

_MOST_TUPLE_KEYS = 1000  # whose hashes can be made to collide


def check_archive_pickle(file: BufferedIOBase, size: int, sizes: dict[str, int]) -> set[str]:
    """Check the pickle of torch's present format.

    Args:
        file: The pickle.
        size: Size of the whole checkpoint in bytes.
        sizes: Size of each storage in bytes, by its key.

    Returns:
        Names of functions that are nothing but statistics of mmengine's histories, which their user registered.

    Raises:
        pickle.UnpicklingError: ``GLOBAL <name>``, where the pickle wants to call something that is not allowed.
        Exception: Any other kind, where it is no such pickle.
    """

    def storage(kind: str, dtype: _Dtype, key: str, location: str, numel: int) -> _Storage:
        _demand(kind == 'storage' and sizes[key] == numel * dtype.itemsize, 'a tensor is not as large as it says')
        return _Storage(numel * dtype.itemsize, dtype)

    return _Checker(file, size, storage).check()


def check_legacy_pickles(file: BufferedIOBase, size: int) -> set[str]:
    """Check the five pickles of the format that torch wrote until 1.6; see :func:`check_archive_pickle`."""
    left = size

    def storage(kind: str, dtype: _Dtype, key: str, location: str, numel: int, view: None) -> _Storage:
        nonlocal left
        if key not in seen:
            left -= numel * dtype.itemsize
        seen.add(key)
        _demand(kind == 'storage' and view is None and numel >= 0 <= left, 'the tensors are larger than the file')
        return _Storage(numel * dtype.itemsize, dtype)

    seen: set[str] = set()
    # Magic number, protocol, sizes of numbers; the checkpoint; keys of the storages.
    return set().union(*[_Checker(file, size, storage).check() for _ in range(5)])


def _demand(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


# Stand-ins of what the pickle builds.


@dataclass(frozen=True)
class _Function:
    """A callable; ``check`` checks its arguments and returns the stand-in of its result."""

    check: Callable


@dataclass(frozen=True)
class _Dtype:
    """A dtype or a type of storage of torch; storages without a type count bytes."""

    itemsize: int


@dataclass(frozen=True)
class _Storage:
    bytes: int
    dtype: _Dtype


@dataclass(frozen=True)
class _Constant:
    """A class or a function that is passed around, or a value that holds nothing else."""

    name: str = ''


@dataclass
class _UnknownFunction:
    """A function that may be one that a user has registered as a statistic with mmengine, and used as nothing else."""

    name: str
    is_statistic: bool = False


class _Tensor:
    pass


class _Size(tuple):
    pass


class _OrderedDict(dict):
    def build(self, state) -> None:
        _demand(type(state) is dict and set(state) <= {'_metadata'}, 'a dictionary has attributes')


class _NumpyDtype:
    def __init__(self, kind: str, itemsize: int):
        self.kind, self.itemsize = kind, itemsize

    def build(self, state) -> None:
        version, order, *rest = state
        sizes = {'U': ([self.itemsize, 4, 8],), 'S': ([self.itemsize, 1, 0],)}.get(self.kind, ([-1, -1, 0],))
        _demand(version == 3 and order in ('<', '>', '|') and rest[:3] == [None] * 3, 'a dtype has parts')
        _demand(rest[3:] in sizes, 'a dtype is of another size')


class _Array:
    def build(self, state) -> None:
        _, shape, dtype, _, content = state
        _demand(_are_counts(shape) and type(content) is bytes, 'an odd array')
        _demand(len(content) == math.prod(shape) * dtype.itemsize, 'an array is not as large as it says')


class _History:
    def build(self, state) -> None:
        expected = dict(max_length=int, _log_history=_Array, _count_history=_Array, statistics_methods=dict)
        _demand(all(isinstance(value, expected[key]) for key, value in state.items()), 'a history holds something else')
        for method in state.get('statistics_methods', {}).values():
            _demand(type(method) in (_Constant, _UnknownFunction), 'a statistic is not a function')
            if type(method) is _UnknownFunction:
                method.is_statistic = True


# Checks of the calls.


def _are_counts(numbers) -> bool:
    return isinstance(numbers, tuple) and all(type(n) is int and n >= 0 for n in numbers)


def _tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, requires_grad: bool, hooks: dict,
            metadata: dict | None = None, dtype: _Dtype | None = None) -> _Tensor:  # fmt: skip
    _demand(_are_counts((offset, *size, *stride)) and len(size) == len(stride) and not hooks, 'an odd tensor')
    _demand(metadata is None or set(metadata) <= {'conj', 'neg'}, 'a tensor has attributes')
    numel, stored = math.prod(size), storage.bytes // (dtype or storage.dtype).itemsize
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    _demand(numel <= stored and (not numel or last < stored), 'a tensor is larger than what is stored')
    return _Tensor()


def _tensor_v3(storage: _Storage, offset: int, size: tuple, stride: tuple, requires_grad: bool, hooks: dict,
               dtype: _Dtype, metadata: dict | None = None) -> _Tensor:  # fmt: skip
    return _tensor(storage, offset, size, stride, requires_grad, hooks, metadata, dtype)


def _quantized_tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, quantizer: tuple,
                      requires_grad: bool, hooks: dict) -> _Tensor:  # fmt: skip
    scheme, *parameters = quantizer
    plain = all(type(value) in (int, float, _Tensor) for value in parameters)
    _demand(type(scheme) is _Constant and plain, 'an odd quantizer')
    return _tensor(storage, offset, size, stride, requires_grad, hooks)


def _sparse_tensor(layout: _Constant, data: tuple) -> _Tensor:
    """Check the types; torch checks that indices are inside of the size."""
    _demand(type(layout) is _Constant and all(type(x) in (_Tensor, _Size, bool) for x in data), 'an odd sparse tensor')
    return _Tensor()


def _meta_tensor(dtype: _Dtype, size: tuple, stride: tuple, requires_grad: bool) -> _Tensor:
    _demand(type(dtype) is _Dtype and _are_counts((*size, *stride)), 'an odd tensor')
    return _Tensor()


def _parameter(data: _Tensor, requires_grad: bool, hooks: dict) -> _Tensor:
    _demand(type(data) is _Tensor and not hooks, 'an odd parameter')
    return data


def _size(numbers: tuple) -> _Size:
    _demand(_are_counts(numbers), 'an odd size')
    return _Size(numbers)


def _device(kind: str, index: int = 0) -> _Constant:
    _demand(type(kind) is str and type(index) is int, 'an odd device')
    return _Constant()


def _layout(name: str) -> _Constant:
    _demand(type(name) is str, 'an odd layout')
    return _Constant()


def _complex(real: float, imaginary: float) -> _Constant:
    _demand(type(real) is type(imaginary) is float, 'an odd number')
    return _Constant()


def _numpy_dtype(code: str, align: bool, copy: bool) -> _NumpyDtype:
    _demand(bool(re.fullmatch('[biuf][1248]|c8|c16|[US][0-9]{1,6}', code)), f'an array of {code[:20]!r}')
    kind, number = code[0], int(code[1:])
    return _NumpyDtype(kind, 4 * number if kind == 'U' else number)


def _reconstruct(kind: _Constant, shape: tuple, code: bytes) -> _Array:
    _demand(kind == _Constant('numpy.ndarray') and shape == (0,) and code == b'b', 'an odd array')
    return _Array()


def _scalar(dtype: _NumpyDtype, content: bytes) -> _Constant:
    _demand(type(content) is bytes and len(content) == dtype.itemsize, 'an odd number')
    return _Constant()


def _getattr(owner: _Constant, name: str) -> _Constant:
    if type(owner) is not _Constant or name not in METHODS.get(owner.name, ()):
        raise pickle.UnpicklingError('GLOBAL builtins.getattr')
    return _Constant(f'{owner.name}.{name}')


_DTYPES = {str(dtype): _Dtype(dtype.itemsize) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_STORAGES = dict(
    Float=4, Double=8, Half=2, BFloat16=2, Long=8, Int=4, Short=2, Char=1, Byte=1, Bool=1, ComplexFloat=8,
    ComplexDouble=16, QInt8=1, QUInt8=1, QInt32=4, QUInt4x2=1, QUInt2x4=1,
)  # fmt: skip
_GLOBALS = {
    'collections.OrderedDict': _Function(_OrderedDict),
    'torch._utils._rebuild_tensor_v2': _Function(_tensor),
    'torch._utils._rebuild_tensor_v3': _Function(_tensor_v3),
    'torch._utils._rebuild_qtensor': _Function(_quantized_tensor),
    'torch._utils._rebuild_sparse_tensor': _Function(_sparse_tensor),
    'torch._utils._rebuild_meta_tensor_no_storage': _Function(_meta_tensor),
    'torch._utils._rebuild_parameter': _Function(_parameter),
    'torch.Size': _Function(_size),
    'torch.device': _Function(_device),
    'torch.serialization._get_layout': _Function(_layout),
    'builtins.complex': _Function(_complex),
    **_DTYPES,
    **{f'torch.{name}Storage': _Dtype(itemsize) for name, itemsize in _STORAGES.items()},
    'torch.storage.UntypedStorage': _Dtype(1),
    **{f'torch.per_{what}': _Constant() for what in ('tensor_affine', 'tensor_symmetric', 'channel_affine',
       'channel_symmetric', 'channel_affine_float_qparams')},
    # What mmengine keeps of its histories, under the names that numpy 1 and 2 write.
    **{name: _Constant(name) for name in (*METHODS, 'numpy.ndarray')},
    'numpy.dtype': _Function(_numpy_dtype),
    **{f'numpy.{core}.multiarray._reconstruct': _Function(_reconstruct) for core in ('core', '_core')},
    **{f'numpy.{core}.multiarray.scalar': _Function(_scalar) for core in ('core', '_core')},
    'builtins.getattr': _Function(_getattr),
}  # fmt: skip


class _Checker(pickle._Unpickler):  # the one in Python, whose instructions can be replaced
    def __init__(self, file: BufferedIOBase, size: int, storage: Callable):
        super().__init__(file)
        self._storage, self._left, self._tuple_keys = storage, size, 0
        self._unknown: dict[str, _UnknownFunction] = {}
        copies = {
            '_codecs.encode': self._encode,
            'builtins.bytearray': self._bytearray,
            'builtins.bytes': self._bytes,
            'builtins.set': self._set,
            'collections.Counter': self._counter,
        }
        self._globals = _GLOBALS | {name: _Function(check) for name, check in copies.items()}

    def check(self) -> set[str]:
        self.load()
        for name, function in self._unknown.items():
            if not function.is_statistic:
                raise pickle.UnpicklingError(f'GLOBAL {name}')
        return set(self._unknown)

    def find_class(self, module: str, name: str):
        full = f'{module.replace("__builtin__", "builtins")}.{name}'  # as Python 2 called it
        if full in self._globals:
            return self._globals[full]
        return self._unknown.setdefault(full, _UnknownFunction(full))

    def persistent_load(self, pid: tuple) -> _Storage:
        return self._storage(*pid)

    # What torch copies when it calls these may be no more than the file holds.

    def _charge(self, number: int) -> None:
        self._left -= number
        _demand(self._left >= 0, 'contents are copied')

    def _encode(self, text: str, encoding: str) -> bytes:
        """Decode bytes, which protocol 2 writes as text."""
        self._charge(len(text))
        _demand(encoding == 'latin1', 'bytes of another encoding')
        return text.encode(encoding)

    def _bytearray(self, content: str | bytes = b'', encoding: str = 'latin-1') -> _Constant:
        _demand(type(content) in (str, bytes) and encoding == 'latin-1', 'an odd bytearray')
        self._charge(len(content))
        return _Constant()

    def _bytes(self) -> bytes:
        """Return the empty one, for which protocol 2 has no text."""
        return b''

    def _set(self, items: list) -> _Constant:
        _demand(type(items) is list, 'an odd set')
        self._charge(len(items))
        for item in items:
            self._check_key(item)
        return _Constant()

    def _counter(self, counts: dict) -> dict:
        _demand(type(counts) is dict, 'an odd counter')
        self._charge(len(counts))
        return dict(counts)

    def _check_key(self, key) -> None:
        """Demand a key that is found fast: a word, whose hash is random, or a number below those that share a hash."""
        if type(key) is tuple:
            self._tuple_keys += 1
            _demand(self._tuple_keys <= _MOST_TUPLE_KEYS and len(key) < 100, 'too many keys are tuples')
        for part in key if type(key) is tuple else (key,):
            small = type(part) is int and abs(part) < 2**60
            _demand(small or type(part) in (str, float, bool, type(None)), 'a key is neither str nor small int')

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is _UnknownFunction:
            raise pickle.UnpicklingError(f'GLOBAL {function.name}')
        _demand(type(function) is _Function and type(arguments) is tuple, 'it calls a non-function')
        self.append(function.check(*arguments))

    def load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if type(kind) is _UnknownFunction:
            raise pickle.UnpicklingError(f'GLOBAL {kind.name}')
        _demand(kind == _Constant(_HISTORY_BUFFER) and arguments == (), 'it builds another class')
        self.append(_History())

    def load_build(self) -> None:
        state = self.stack.pop()
        built = (_OrderedDict, _NumpyDtype, _Array, _History)
        _demand(isinstance(self.stack[-1], built), 'it sets state on plain data')
        self.stack[-1].build(state)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list) -> None:
        _demand(isinstance(self.stack[-1], dict), 'it sets items of a non-dict')
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._check_key(key)
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
