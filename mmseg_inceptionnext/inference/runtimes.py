"""Run an ONNX graph in ONNX Runtime or in OpenVINO, on the CPU.

Graphs come from strangers, too: a run can be interrupted, and what goes wrong in a runtime is one line.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np

from mmseg_inceptionnext.errors import MissingPackage

_EXTRAS = {'openvino': 'openvino', 'nncf': 'int8'}  # of pyproject.toml; the other packages are in 'onnx'


def import_onnx(name: str) -> ModuleType:
    """Import the package 'onnx', 'onnxruntime', 'onnxscript', 'openvino' or 'nncf'.

    ONNX Runtime's wheels report each session to Microsoft, and NNCF each quantisation to Intel, unless these variables
    are set before they are imported.

    Raises:
        UserError: It is not installed.
    """
    os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')
    os.environ.setdefault('NNCF_CI', '1')
    try:
        return import_module(name)
    except ImportError as error:
        what = {'openvino': "runtime='openvino' needs", 'nncf': "precision='int8' needs"}.get(name, '.onnx files need')
        extra = _EXTRAS.get(name, 'onnx')
        raise MissingPackage(f'{what} {name}: pip install mmseg-inceptionnext[{extra}]') from error


class OnnxRuntimeSession:
    """A graph in ONNX Runtime.

    Args:
        content: The ONNX file.
        precision: Ignored: the graph's dtypes say it.
        threads: Number of threads.

    Attributes:
        values: Dtype and shape of each input and output, in this order; None stands for a size that is dynamic.
    """

    name = 'ONNX Runtime'

    def __init__(self, content: bytes, precision: str, threads: int):
        self._runtime = import_onnx('onnxruntime')
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        _limit_memory()
        options.add_session_config_entry('session.use_env_allocators', '1')
        self._session = self._runtime.InferenceSession(
            content,
            options,
            providers=['CPUExecutionProvider'],
            disabled_optimizers=['ConstantFolding'],  # it would run parts of the graph without the limit
        )
        names = {'tensor(uint8)': 'uint8', 'tensor(int64)': 'int64', 'tensor(float)': 'float32'}
        values = [*self._session.get_inputs(), *self._session.get_outputs()]
        self._input = values[0].name
        # Sizes that are dynamic have a name, or none.
        self.values = [
            (names.get(value.type, value.type), [size if isinstance(size, int) else None for size in value.shape])
            for value in values
        ]

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        """Return the outputs for an input."""
        # In a thread: the main one could not handle a signal before ONNX Runtime returns, which a large graph may put
        # off for hours. Told to terminate, it returns after the operator that is running.
        options = self._runtime.RunOptions()
        with ThreadPoolExecutor(1) as thread:
            run = thread.submit(self._session.run, None, {self._input: images}, options)
            try:
                results = run.result()
            except KeyboardInterrupt:
                options.terminate = True
                raise
        return results


class OpenVinoSession:
    """A graph in OpenVINO. Arguments, attributes and method are those of :class:`OnnxRuntimeSession`.

    The precision 'bf16' is a request: OpenVINO computes in float32 where the processor has no units for bfloat16. What
    'int8' leaves unquantised is computed in bfloat16, too.
    """

    name = 'OpenVINO'

    def __init__(self, content: bytes, precision: str, threads: int):
        core = _core(import_onnx('openvino'))
        lower = precision in ('bf16', 'int8') and computes_bf16()
        model = core.compile_model(
            core.read_model(content, b''),
            'CPU',
            {
                'INFERENCE_PRECISION_HINT': 'bf16' if lower else 'f32',
                'INFERENCE_NUM_THREADS': threads,
                'PERFORMANCE_HINT': 'LATENCY',
            },
        )
        self.values = [
            (
                port.get_element_type().to_dtype().name,
                [size.get_length() if size.is_static else None for size in port.get_partial_shape()],
            )
            for port in (*model.inputs, *model.outputs)
        ]
        self._request = model.create_infer_request()

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        """Return the outputs for an input."""
        self._request.start_async([images])
        try:
            while not self._request.wait_for(100):  # milliseconds, between which signals are handled
                pass
        except KeyboardInterrupt:
            self._request.cancel()
            with suppress(RuntimeError):  # says that it was cancelled; then it can be started again
                self._request.wait()
            raise
        return [tensor.data.copy() for tensor in self._request.output_tensors]


def computes_bf16() -> bool:
    """Return whether OpenVINO computes in bfloat16 on this processor, which is then faster than float32."""
    return 'BF16' in _core(import_onnx('openvino')).get_property('CPU', 'OPTIMIZATION_CAPABILITIES')


@cache
def _core(openvino: ModuleType):
    """Return the core of OpenVINO: one for the process, which is never dropped.

    Its CPU plugin gives the thread that loads it a stack for signal handlers, and unmaps that when it is unloaded, in
    whichever thread. After that, any signal that Python handles (Ctrl-C, SIGTERM) would end the process with SIGSEGV.
    """
    return openvino.Core()


RUNTIMES: dict[str, Callable] = {'onnxruntime': OnnxRuntimeSession, 'openvino': OpenVinoSession}


@cache
def _limit_memory() -> None:
    """Give all our sessions of this process together at most three quarters of the memory that it can have.

    A graph of a kilobyte can ask for any amount. ONNX Runtime takes a limit for the whole process only.
    """
    if not hasattr(os, 'sysconf'):  # Windows
        limit = 0  # none
    else:
        limit = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
        with suppress(OSError, ValueError):  # not in a container, or 'max'
            limit = min(limit, int(Path('/sys/fs/cgroup/memory.max').read_text()))
    runtime = import_onnx('onnxruntime')
    kind = runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    where = runtime.OrtMemoryInfo('Cpu', kind, 0, runtime.OrtMemType.DEFAULT)
    runtime.create_and_register_allocator(where, runtime.OrtArenaCfg({'max_mem': 3 * limit // 4}))
