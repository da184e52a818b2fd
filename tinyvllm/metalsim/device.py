"""METAL for tinygrad, simulated: its own renderer, scheduler, TinyJit and graph batches run unchanged.

Everything that touches tinygrad's inside is here, and follows `tinygrad.runtime.ops_metal` and
`graph.metal` step by step; `tests/test_metalsim_device.py` tells when these have changed.
"""
import ctypes
import os
import struct
import time
from math import prod

import numpy as np
from tinygrad.device import Compiled, CompileError, Compiler, Device, LRUAllocator, Program, TinyELF
from tinygrad.engine.jit import GraphRunner
from tinygrad.helpers import PARALLEL
from tinygrad.renderer.cstyle import MetalRenderer

from tinyvllm.metalsim.capture import note_source
from tinyvllm.metalsim.compiler import MetalCompileError, MetalError, compiler, library
from tinyvllm.metalsim.counts import note_graph
from tinyvllm.metalsim.kernel import DTYPES, RED_ZONE, Library
from tinyvllm.metalsim.linter import MAX_BUFFERS, lint

MAGIC = b'MSIM'  # compiled code is this, then the source: `Library` finds its object in the cache
ALIGNMENT = 256  # of a buffer's first byte, as Metal's
UNSET = 0xFF  # fresh memory is full of it: NaN in every float type

PARALLEL.value = 0  # processes that compile are started afresh, and would not find this module


def knob(name: str, default: str) -> bool:
    "An environment variable that is 0 or 1."
    return os.environ.get(name, default) != '0'


class MetalCompiler(Compiler):
    "Compiles, to tell about errors; the objects are in our own cache, so tinygrad keeps none."

    def __init__(self):
        super().__init__(None)

    def __reduce__(self):
        return MetalCompiler, ()

    def compile(self, src: str) -> bytes:
        "Raises `CompileError` with the line numbers of the source."
        note_source(src)
        complaints = lint(src) if knob('METALSIM_LINT', '0') else []
        if complaints:
            raise CompileError('\n'.join(complaints))
        check = knob('METALSIM_CHECK', '1')
        try:
            library(src, check)
        except MetalCompileError as error:
            raise CompileError(str(error)) from None
        return MAGIC + bytes([check]) + src.encode()


class MetalBuffer:
    "A part of a block of memory."

    def __init__(self,
        memory: ctypes.Array, # all of the block, in bytes
        size: int, # of this part
        offset: int = 0, # of this part
    ):
        self.memory, self.size, self.offset = memory, size, offset

    @property
    def address_and_size(self) -> tuple[int, int]:
        "Address and size: the bytes that a kernel may access."
        return ctypes.addressof(self.memory) + self.offset, self.size


class MetalAllocator(LRUAllocator):
    "Memory of this process, with a zone around each block that no kernel may touch."

    def _alloc(self, size: int, options) -> MetalBuffer:
        if options.external_ptr:
            return MetalBuffer((ctypes.c_uint8 * size).from_address(options.external_ptr), size)
        space = (ctypes.c_uint8 * (size + 2 * RED_ZONE + ALIGNMENT))()
        start = RED_ZONE - (ctypes.addressof(space) + RED_ZONE) % ALIGNMENT + ALIGNMENT
        memory = (ctypes.c_uint8 * size).from_buffer(space, start)
        ctypes.memset(memory, UNSET, size)
        return MetalBuffer(memory, size)

    def _as_buffer(self, src: MetalBuffer) -> memoryview:
        return memoryview(src.memory).cast('B')[src.offset:src.offset + src.size]

    def _copyin(self, dest: MetalBuffer, src: memoryview):
        self._as_buffer(dest)[:] = src

    def _copyout(self, dest: memoryview, src: MetalBuffer):
        dest[:] = self._as_buffer(src)

    def _transfer(self, dest: MetalBuffer, src: MetalBuffer, sz: int, src_dev, dest_dev):
        self._as_buffer(dest)[:sz] = self._as_buffer(src)[:sz]

    def _offset(self, buf: MetalBuffer, size: int, offset: int) -> MetalBuffer:
        return MetalBuffer(buf.memory, size, offset)


class MetalProgram(Program):
    "A kernel that tinygrad calls."

    def __init__(self, dev: 'MetalDevice', obj: TinyELF):
        self.dev, self.name, self.lib, self.signature = dev, obj.name, obj.lib, obj.signature
        self.profile_key = obj.profile_key
        if obj.lib[:len(MAGIC)] != MAGIC:
            raise MetalError(f'{obj.name} was not compiled by the simulator')
        check, source = obj.lib[len(MAGIC)], obj.lib[len(MAGIC) + 1:].decode()
        self.kernel = Library(source, bool(check))[obj.name]
        self.max_total_threads = self.kernel.signature.max_threads

    def __call__(self, *bufs, global_size=(1, 1, 1), local_size=(1, 1, 1), vals=(), wait=False, **_):
        start = time.perf_counter()
        table = {i: buffer.address_and_size for i, buffer in enumerate(bufs)}
        numbers = []  # kept until the kernel has run
        for value, (_, index, dtype, _) in zip(vals, self.signature[len(bufs):]):
            numbers.append(getattr(ctypes, f'c_int{dtype.bitsize}')(value))
            table[index] = ctypes.addressof(numbers[-1]), dtype.itemsize
        self.dispatch(table, global_size, local_size)
        return time.perf_counter() - start if wait else None

    def dispatch(self,
        table: dict[int, tuple[int, int]], # buffer index -> address and size
        global_size, # threadgroups
        local_size, # threads in one
    ) -> None:
        "Run the kernel, under the rules of a command encoder. Raises `MetalError`."
        note_source(self.kernel.library.source)
        if any(not float(n).is_integer() for n in global_size):
            raise MetalError(f'{self.name}: global size {global_size} is not whole')
        if prod(local_size) > self.max_total_threads:
            raise RuntimeError(f'local size {local_size} bigger than {self.max_total_threads}')
        if prod(global_size) == 0:
            return
        self.check_table(table)
        bound = [table.get(i, (0, 0)) for i in range(max(table, default=-1) + 1)]
        addresses, sizes = [b[0] for b in bound], [b[1] for b in bound]
        self.kernel.launch(addresses, sizes, global_size, local_size)

    def check_table(self,
        table: dict[int, tuple[int, int]], # buffer index -> address and size
    ) -> None:
        "Raise `MetalError` if a parameter is not bound, to an index out of range, or to too few bytes."
        if missing := [p.name for i, p in self.kernel.slots.items() if i not in table]:
            raise MetalError(f"{self.name}: not bound: {', '.join(missing)} (bound are {sorted(table)})")
        if max(table, default=0) >= MAX_BUFFERS:
            raise MetalError(f'{self.name}: buffer index {max(table)}, the last one is {MAX_BUFFERS - 1}')
        for i, p in self.kernel.slots.items():
            size = np.dtype(DTYPES.get(p.scalar, 'u1')).itemsize
            if p.is_reference and size > table[i][1]:
                raise MetalError(f"{self.name}: '{p.name}' has {size} bytes, {table[i][1]} are bound")


class MetalGraph(GraphRunner):
    "Kernels that TinyJit replays in one call: commands that are bound once, with what changes written in."

    def __init__(self, linear, input_uops=()):
        super().__init__(linear, input_uops)
        self.dev, self.commands, self.bound_vars = Device[self.device], [], []
        if self.vars:
            numbers = [dtype for run in self.runtimes for _, _, dtype, shape in run.signature if shape == ()]
            self.var_buf = self.dev.allocator.alloc(sum(dtype.itemsize for dtype in numbers))
        for (_, ast, bufs, _), run, replace in zip(self.calls, self.runtimes, self.uop_replace):
            replaced = {position for position, _ in replace}
            table = {i: b._buf.address_and_size for i, b in enumerate(bufs) if i not in replaced}
            self.bind_vars(table, run.signature[len(bufs):])
            self.commands.append((run, table, ast.arg.launch_dims({v: 0 for v in self.vars})))

    def bind_vars(self, table: dict, numbers) -> None:
        "Bind variables: all lie in one buffer, one after the other."
        for name, index, dtype, _ in numbers:
            offset = sum(struct.calcsize(fmt) for _, _, fmt in self.bound_vars)
            table[index] = self.var_buf.address_and_size[0] + offset, dtype.itemsize
            self.bound_vars.append((name, offset, dtype.fmt))

    def __call__(self, input_uops, var_vals, wait=False):
        start = time.perf_counter()
        for (_, table, _), replace in zip(self.commands, self.uop_replace):
            for position, i in replace:
                table[position] = input_uops[i].buffer._buf.address_and_size
        for j, global_size, local_size in self.updated_launch_dims(var_vals):
            self.commands[j] = *self.commands[j][:2], (global_size, local_size)
        for name, offset, fmt in self.bound_vars:
            struct.pack_into(fmt, self.dev.allocator._as_buffer(self.var_buf), offset, var_vals[name])
        note_graph(len(self.commands))
        for run, table, sizes in self.commands:
            run.dispatch(table, *sizes)
        return time.perf_counter() - start if wait else None


class MetalDevice(Compiled):
    "What tinygrad opens for METAL: of the family `$METALSIM_ARCH`, from Apple7 (M1) on."

    def __init__(self, device: str):
        compiler()  # without one, say so now
        super().__init__(device, MetalAllocator(self), [MetalRenderer], MetalProgram, MetalGraph,
                         arch=os.environ.get('METALSIM_ARCH', 'Apple9'))
