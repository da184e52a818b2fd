"""C kernels in tests: between guard regions, for vectors of any width, and broken on purpose.

Vectors of 4 floats are NEON's, of 8 AVX2's, of 16 AVX-512's. Every machine compiles all three: what is wider than
its registers is split by the compiler.
"""
import ctypes
import faulthandler
import mmap
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from tinyvllm.kernels.metal import Kernel

WIDTHS = (4, 8, 16)      # floats in a vector
NATIVE = '-mcpu=native' if os.uname().machine in ('arm64', 'aarch64') else '-march=native'


def fix_lanes(monkeypatch: pytest.MonkeyPatch, lanes: int) -> None:
    "From here on every C kernel is compiled for vectors of so many floats."
    original = Kernel.source

    def source(self, device, threads, constants):
        return original(self, device, threads, dict(LANES=lanes) | constants if device == 'CPU' else constants)
    monkeypatch.setattr(Kernel, 'source', source)


@pytest.fixture(params=WIDTHS)
def lanes(request, monkeypatch):
    "A test that asks for this runs once for each width of vectors."
    fix_lanes(monkeypatch, request.param)
    return request.param


class Guarded:
    "Runs a kernel's C on arrays that lie between guard regions: what it touches there, or in its inputs, shows."
    compiled = {}

    def __init__(self, kernel: Kernel, constants: dict):
        self.slots = list(kernel.signature.slots.values())
        self.name, source = kernel.signature.name, kernel.source('CPU', 1, constants)
        if source not in self.compiled:
            self.compiled[source] = build(source)
        self.function = getattr(self.compiled[source], self.name)

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        "The written arrays; raises `AssertionError` where anything else has changed; reading behind an end faults."
        memory = [guarded(a) for a in arrays]
        before = [room.copy() for room in memory]
        self.function(*(ctypes.c_void_p(room[room.size - a.size:].ctypes.data) for room, a in zip(memory, arrays)))
        for slot, room, old, a in zip(self.slots, memory, before, arrays):
            assert room[:-a.size].tobytes() == old[:-a.size].tobytes(), f'{slot.name}: written before its start'
            assert slot.writable or room.tobytes() == old.tobytes(), f'{slot.name}: an input has changed'
        return [room[room.size - a.size:].reshape(a.shape).copy()
                for slot, room, a in zip(self.slots, memory, arrays) if slot.writable]


def build(source: str) -> ctypes.CDLL:
    "Compile C and load it."
    handle, path = tempfile.mkstemp('.so')
    os.close(handle)
    flags = f'-shared -x c -O1 -fPIC -ffreestanding -fno-math-errno -nostdlib {NATIVE} - -o {path}'
    subprocess.run([os.environ.get('CC', 'clang'), *flags.split()], input=source.encode(), check=True,
                   capture_output=True)
    library = ctypes.CDLL(path)
    os.unlink(path)
    return library


@cache
def preprocessed(source: str) -> str:
    "C after its preprocessor: what this machine compiles of it for this width of vectors."
    command = [os.environ.get('CC', 'clang'), *f'-E -P -x c {NATIVE} -'.split()]
    return subprocess.run(command, input=source, check=True, capture_output=True, text=True).stdout


def is_compiled(whole: Kernel, broken: Kernel, constants: dict) -> bool:
    "Does the change concern what this width compiles?"
    return len({preprocessed(kernel.source('CPU', 1, constants)) for kernel in (whole, broken)}) == 2


def guarded(a: np.ndarray) -> np.ndarray:
    "A copy of the array at the end of its memory: poison before it, and behind it a page that must not be touched."
    pages = -(-a.nbytes // mmap.PAGESIZE) + 1
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    room = np.frombuffer(memory, a.dtype, pages * mmap.PAGESIZE // a.itemsize)
    room[:] = np.nan if a.dtype.kind == 'f' else 0
    room[-a.size:] = a.ravel()
    end = ctypes.c_void_p(room.ctypes.data + room.nbytes)
    assert ctypes.CDLL(None).mprotect(end, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return room


def passes_in_child(check: Callable[[], bool], seconds: int = 20) -> bool:
    "Does the check hold in a child process? A broken kernel may crash, or run forever."
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        signal.alarm(seconds)
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0
