"Kernels from Metal source, run on numpy arrays or on raw addresses."
import ctypes
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import MappingProxyType

import numpy as np

from tinyvllm.metalsim import checks
from tinyvllm.metalsim.compiler import MetalError, library, runtime
from tinyvllm.metalsim.counts import Dispatch, Traffic, note
from tinyvllm.metalsim.lines import line_of
from tinyvllm.metalsim.source import Parameter, Signature, function_constants, signatures, strip_comments
from tinyvllm.metalsim.translate import needs_fibers

# numpy's names for the types that a `constant T&` may have.
DTYPES = {'int': 'i4', 'int32_t': 'i4', 'uint': 'u4', 'uint32_t': 'u4', 'long': 'i8', 'int64_t': 'i8', 'ulong': 'u8',
          'uint64_t': 'u8', 'short': 'i2', 'ushort': 'u2', 'char': 'i1', 'uchar': 'u1', 'bool': 'u1',
          'half': 'f2', 'float': 'f4'}
RED_ZONE, RED = 4096, 0xA5  # bytes kept free on both sides of an array, and what they hold
RACE_LIMIT = 1 << 24  # bytes; larger buffers have no access history: that takes 28 bytes for each byte
# Metal lets a GPU take denormals of single precision for zero, and Apple's do: what needs them fails there too.
FLUSH = os.environ.get('METALSIM_FLUSH', '1') != '0'
DYNAMIC = 8  # threadgroup parameters: [[threadgroup(0)]] to [[threadgroup(7)]]
LOCK = threading.Lock()  # the runtime is one machine: one dispatch at a time


class Binding(ctypes.Structure):
    "A buffer as rt.cpp sees it."
    _fields_ = [('ptr', ctypes.c_void_p), ('size', ctypes.c_uint64), ('name', ctypes.c_char_p),
                ('writable', ctypes.c_uint64), *((name, ctypes.c_uint64) for name in Traffic._fields)]


class Word(ctypes.Structure):
    "The addresses of a word that announces the rest of its buffer, and the buffer's index."
    _fields_ = [('lo', ctypes.c_void_p), ('hi', ctypes.c_void_p), ('buffer', ctypes.c_uint)]


class Launch(ctypes.Structure):
    "The arguments of `msl_launch` in rt.cpp."
    _fields_ = [('entry', ctypes.c_void_p), ('buffers', ctypes.c_void_p), ('bindings', ctypes.c_void_p),
                ('count', ctypes.c_uint), ('ntg', ctypes.c_uint * 3), ('tgsz', ctypes.c_uint * 3),
                *((name, ctypes.c_int) for name in ('order', 'check', 'strict', 'fill', 'flat', 'flush')),
                ('seed', ctypes.c_uint64), ('race_limit', ctypes.c_uint64), ('dynamic', ctypes.c_uint32 * DYNAMIC),
                ('image_lo', ctypes.c_void_p), ('image_hi', ctypes.c_void_p), ('word', Word),
                ('origin', ctypes.c_uint * 3)]


_open: list[tuple[str | None, dict]] = []


@contextmanager
def launching(
    kernel: str | None = None, # name of the kernels that are meant; None: all
    **how, # see `Kernel.dispatch`
) -> Iterator[None]:
    "Inside the block kernels are launched with these arguments, also those that tinygrad launches."
    _open.append((kernel, how))
    try:
        yield
    finally:
        _open.remove((kernel, how))


class Library:
    "The kernels of one source, compiled and loaded: `Library(source)['name']` is a kernel."

    def __init__(self,
        source: str, # Metal
        check: bool = True, # look at every read and write, or run as fast as it goes
        name: str = 'kernel.metal', # of the source, for messages
        constants: Mapping[int | str, object] = MappingProxyType({}), # function constants: index or name -> value
    ):
        self.source, self.check, self.name = source, check, name
        text = strip_comments(source)
        indices = function_constants(text)
        values = {k: constants.get(k, constants.get(int(i) if i.isdigit() else i)) for k, i in indices.items()}
        values = {k: value for k, value in values.items() if value is not None}
        self.missing = [k for k in indices if k not in values and f'is_function_constant_defined({k})' not in text]
        self.flat = not check and not needs_fibers(source)
        runtime()  # kernels find its functions when they are loaded
        self.path = library(source, check, self.flat, name, values)
        self.code = ctypes.CDLL(str(self.path))
        self.signatures = {k.name: k for k in signatures(source, values)}
        self.image = image_of(self.path)

    def __getitem__(self, name: str) -> 'Kernel':
        if self.missing:
            raise MetalError(f"{self.name}: function constants without a value: {', '.join(self.missing)}; tinygrad "
                             'has no way to set them, `Library(source, constants={0: value})` has')
        if name not in self.signatures:
            raise MetalError(f"{self.name} has no kernel '{name}'; it has {', '.join(self.signatures) or 'none'}")
        return Kernel(self, self.signatures[name])

    def where(self,
        pc: int, # an address in the code, or 0
        line: int, # if the runtime knows it, else 0
    ) -> str: # such as ` at kernel.metal:12`
        "Return the line of the source that an address belongs to; empty if unknown."
        line = line or (pc and line_of(self.path, pc - self.image[0] - 1))
        return f' at {self.name}:{line}' if line else ''


class Kernel:
    "One kernel: call it on numpy arrays, `launch` it on addresses, or `verify` it."

    def __init__(self,
        library: Library, # it belongs to
        signature: Signature, # its parameters
    ):
        self.library, self.signature, self.name = library, signature, signature.name
        self.slots = signature.slots

    def __call__(self,
        args: list, # numpy arrays, written in place, and numbers for `constant T&`
        grid: Sequence[int], # threadgroups, up to three numbers
        threads: Sequence[int], # in a threadgroup
        **how, # see `launch`
    ) -> None:
        "Run the kernel on arrays, written in place. In check mode they lie between red zones meanwhile."
        if len(args) != len(self.slots):
            raise MetalError(f'{self.name} takes {len(self.slots)} buffers, got {len(args)}')
        arrays = [self.array(self.parameter(i), value) for i, value in enumerate(args)]
        lent = [in_red_zone(a) if self.library.check else a for a in arrays]
        self.launch([a.ctypes.data for a in lent], [a.nbytes for a in arrays], grid, threads, **how)
        for i, (array, copy) in enumerate(zip(arrays, lent)):
            if self.slots[i].writable and copy is not array:
                array[...] = copy

    def parameter(self, index: int) -> Parameter:
        "Return the parameter of a buffer index; raises `MetalError` if there is none."
        if index not in self.slots:
            raise MetalError(f'{self.name}: no parameter has [[buffer({index})]]')
        return self.slots[index]

    def array(self,
        parameter: Parameter, # what it is bound to
        value, # a numpy array, or a number
    ) -> np.ndarray:
        "Convert a number to an array of the parameter's type; check an array."
        if not isinstance(value, np.ndarray):
            return np.array([value], DTYPES[parameter.scalar])
        if not value.flags.c_contiguous:
            raise MetalError(f"{self.name}: the array for '{parameter.name}' is not contiguous")
        return value

    def launch(self,
        addresses: list[int], # by buffer index
        sizes: list[int], # in bytes
        grid: Sequence[int], # threadgroups
        threads: Sequence[int], # in a threadgroup
        **how, # see `dispatch`; `launching` goes before it
    ) -> None:
        "Run the kernel on addresses of memory; raises `MetalError`."
        for name, options in _open:
            how |= options if name in (None, self.name) else {}
        self.dispatch(addresses, sizes, three(grid), three(threads), **how)

    def dispatch(self,
        addresses: list[int], # by buffer index
        sizes: list[int], # in bytes
        grid: tuple[int, int, int], # threadgroups
        threads: tuple[int, int, int], # in a threadgroup
        order: int = 0, # of the threads: 0 forwards, 1 backwards, 2 shuffled, 3 interleaved too
        fill: int = 0xff, # byte that fresh threadgroup memory is full of
        seed: int = 1, # of the shuffling
        strict: bool = True, # lanes that have returned may not miss a collective
        dynamic: Sequence[int] = (), # bytes for [[threadgroup(0)]], [[threadgroup(1)]], ...
        publish: tuple[int, int, int] | None = None, # index, offset, size of a word that announces its buffer
        flush: bool = FLUSH, # denormals of single precision are zero, as on a GPU
        origin: Sequence[int] = (0, 0, 0), # threadgroups before it, in any direction, do not run
    ) -> None:
        """Run the kernel as it is told to.

        Whoever polls `publish` from outside may read the rest of its buffer as soon as it is written: in check mode a
        barrier for device memory must come between all that was written before and the word, and nothing after it.
        """
        if prod(threads) > self.signature.max_threads:
            raise MetalError(f'{self.name}: {prod(threads)} threads, '
                             f'max_total_threads_per_threadgroup is {self.signature.max_threads}')
        buffers = (ctypes.c_void_p * max(1, len(addresses)))(*addresses)
        bindings = (Binding * max(1, len(addresses)))(*map(self.binding, range(len(addresses)), addresses, sizes))
        self.run(Launch(self.entry(), ctypes.addressof(buffers), ctypes.addressof(bindings), len(addresses), grid,
                        threads, order, self.library.check, strict, fill, self.library.flat, flush, seed, RACE_LIMIT,
                        (ctypes.c_uint32 * DYNAMIC)(*dynamic), *self.library.image, word_of(publish, addresses),
                        (ctypes.c_uint * 3)(*origin)))
        note(Dispatch(self.name, grid, threads, self.traffic(bindings)))

    def run(self, launch: Launch) -> None:
        "Run one dispatch; an error of the runtime is raised as `MetalError`."
        machine = runtime()
        with LOCK:
            if machine.msl_launch(ctypes.byref(launch)):
                place = self.library.where(machine.msl_error_pc(), machine.msl_error_line())
                raise MetalError(f'{self.name}: {machine.msl_error().decode()}{place}')

    def traffic(self, bindings: ctypes.Array) -> dict[str, Traffic]:
        "Return the traffic of each buffer, by the parameter's name; numbers (`constant T&`) are no buffers."
        if not self.library.check:
            return {}
        return {p.name: Traffic(*(getattr(bindings[i], field) for field in Traffic._fields))
                for i, p in self.slots.items() if not p.is_reference}

    def entry(self) -> ctypes.c_void_p:
        "Return the address of the entry point that runs one thread, or all of them without fibers."
        kind = 'flat' if self.library.flat else 'entry'
        return ctypes.cast(getattr(self.library.code, f'msl_{kind}_{self.signature.symbol}'), ctypes.c_void_p)

    def binding(self, index: int, address: int, size: int) -> Binding:
        "Describe a buffer for the runtime: its name, and whether the kernel may write to it."
        parameter = self.slots.get(index)
        if parameter is None:
            return Binding(address, size, b'?', False)
        return Binding(address, size, parameter.name.encode(), parameter.writable)

    def verify(self, args: list, grid: Sequence[int], threads: Sequence[int], outs: list[int], **how) -> None:
        "Run it in several orders of its threads: see `checks.verify`."
        checks.verify(self, args, grid, threads, outs, **how)


def word_of(publish: tuple[int, int, int] | None, addresses: list[int]) -> Word:
    "Describe the word that a launch publishes; an empty one for None."
    if publish is None:
        return Word()
    index, offset, size = publish
    return Word(addresses[index] + offset, addresses[index] + offset + size, index)


def three(numbers: Sequence[int]) -> tuple[int, int, int]:
    "Return three launch sizes: those that are missing are 1."
    return tuple(map(int, (*numbers, 1, 1)[:3]))


def in_red_zone(array: np.ndarray) -> np.ndarray:
    "Copy an array into a larger one, with a red zone on both sides; aligned to 16 bytes."
    space = np.full(array.nbytes + 2 * RED_ZONE + 64, RED, np.uint8)
    start = RED_ZONE - (space.ctypes.data + RED_ZONE) % 16 + 16
    copy = space[start:start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def image_of(path: Path) -> tuple[int, int]:
    "Return the first and the last address at which a shared object is loaded."
    file = re.escape(str(path.resolve()))
    spans = re.findall(rf'^(\w+)-(\w+) .*{file}(?: .deleted.)?$', Path('/proc/self/maps').read_text(), re.M)
    return int(spans[0][0], 16), int(spans[-1][1], 16)
