"""METAL for tinygrad, simulated: its own renderer, scheduler, TinyJit and graph batches run unchanged.

Everything that touches tinygrad's inside is here, and follows `tinygrad.runtime.ops_metal` and
`graph.metal` step by step; `tests/test_metalsim_device.py` tells when these have changed.
"""
import ctypes
import itertools
import mmap
import os
import struct
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from math import prod

import numpy as np
from tinygrad.device import Compiled, CompileError, Compiler, Device, LRUAllocator, Program, TinyELF
from tinygrad.engine.jit import GraphRunner
from tinygrad.engine.realize import estimate_uop
from tinygrad.helpers import PARALLEL
from tinygrad.renderer.cstyle import MetalRenderer
from tinygrad.uop.ops import Ops, sym_infer

from tinyvllm.errors import BadInput
from tinyvllm.metalsim.capture import note_source
from tinyvllm.metalsim.command_buffers import (M1_BANDWIDTH, MTLCommandBuffer, autorelease, check_pools,
                                               estimate_seconds, to_ns_str, wait_check)
from tinyvllm.metalsim.compiler import MetalCompileError, MetalError, compiler, library
from tinyvllm.metalsim.counts import note_graph
from tinyvllm.metalsim.kernel import DTYPES, RED_ZONE, Library
from tinyvllm.metalsim.linter import MAX_BUFFERS, lint
from tinyvllm.metalsim.pipelines import build_pipeline

MAGIC = b'MSIM'  # compiled code is this, then the source: `Library` finds its object in the cache
ALIGNMENT = 256  # of a buffer's first byte, as Metal's
UNSET = 0xFF  # fresh memory is full of it: NaN in every float type
SPARSE, MAP_NORESERVE = 1 << 30, 0x4000  # larger memory is left empty: pages that are not touched cost nothing

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
        complaints = lint(src) if knob('METALSIM_LINT', '1') else []
        if complaints:
            raise CompileError('\n'.join(complaints))
        check = knob('METALSIM_CHECK', '1')
        try:
            library(src, check)
        except MetalCompileError as error:
            raise CompileError(str(error)) from None
        return MAGIC + bytes([check]) + src.encode()


class MTLBuffer:
    "Memory as Metal hands it out: an object, whose handle is what `external_ptr` takes, and no address."
    handles = itertools.count(0x600000000000, 16)  # such as Objective-C has for its objects
    known: weakref.WeakValueDictionary[int, 'MTLBuffer'] = weakref.WeakValueDictionary()

    def __init__(self,
        memory: ctypes.Array, # in bytes
    ):
        self.memory, self.value = memory, next(self.handles)
        self.known[self.value] = self

    @classmethod
    def find(cls, handle: int) -> 'MTLBuffer':
        "The buffer of a handle. Raises `BadInput` for any other number; a Mac would crash."
        if handle not in cls.known:
            raise BadInput(f'{handle:#x} is no MTLBuffer; external_ptr is a buffer object, not the address of bytes')
        return cls.known[handle]


class MetalBuffer:
    "A part of a block of memory."

    def __init__(self,
        buf: MTLBuffer, # all of the block
        size: int, # of this part
        offset: int = 0, # of this part
    ):
        self.buf, self.size, self.offset = buf, size, offset

    @property
    def address_and_size(self) -> tuple[int, int]:
        "Address and size: the bytes that a kernel may access."
        return ctypes.addressof(self.buf.memory) + self.offset, self.size


class MetalAllocator(LRUAllocator):
    "Memory of this process, with a zone around each block that no kernel may touch."

    def _alloc(self, size: int, options) -> MetalBuffer:
        if options.external_ptr:
            return MetalBuffer(MTLBuffer.find(options.external_ptr), size)
        if size >= SPARSE:
            space = mmap.mmap(-1, size + 2 * RED_ZONE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
            return MetalBuffer(MTLBuffer((ctypes.c_uint8 * size).from_buffer(space, RED_ZONE)), size)
        space = (ctypes.c_uint8 * (size + 2 * RED_ZONE + ALIGNMENT))()
        start = RED_ZONE - (ctypes.addressof(space) + RED_ZONE) % ALIGNMENT + ALIGNMENT
        memory = (ctypes.c_uint8 * size).from_buffer(space, start)
        ctypes.memset(memory, UNSET, size)
        return MetalBuffer(MTLBuffer(memory), size)

    def _as_buffer(self, src: MetalBuffer) -> memoryview:
        return memoryview(src.buf.memory).cast('B')[src.offset:src.offset + src.size]

    def _copyin(self, dest: MetalBuffer, src: memoryview):
        self.dev.synchronize()
        self._as_buffer(dest)[:] = src

    def _copyout(self, dest: memoryview, src: MetalBuffer):
        self.dev.synchronize()
        dest[:] = self._as_buffer(src)

    def _transfer(self, dest: MetalBuffer, src: MetalBuffer, sz: int, src_dev, dest_dev):
        dest_dev.synchronize()

        def copy():
            self._as_buffer(dest)[:sz] = self._as_buffer(src)[:sz]
        src_dev.submit(f'COPY {src_dev.device} -> {dest_dev.device}', [(copy, 2 * sz / M1_BANDWIDTH)])
        src_dev.synchronize()

    def _offset(self, buf: MetalBuffer, size: int, offset: int) -> MetalBuffer:
        return MetalBuffer(buf.buf, size, offset)


class MetalProgram(Program):
    "A kernel that tinygrad calls."

    def __init__(self, dev: 'MetalDevice', obj: TinyELF):
        self.dev, self.name, self.lib, self.signature = dev, obj.name, obj.lib, obj.signature
        self.profile_key = obj.profile_key
        if obj.lib[:len(MAGIC)] != MAGIC:
            raise MetalError(f'{obj.name} was not compiled by the simulator')
        check, source = obj.lib[len(MAGIC)], obj.lib[len(MAGIC) + 1:].decode()
        self.kernel = Library(source, bool(check))[to_ns_str(obj.name).text]
        self.max_total_threads = build_pipeline(source, obj.name, dev.arch)

    def __call__(self, *bufs, global_size=(1, 1, 1), local_size=(1, 1, 1), vals=(), wait=False, **_):
        if prod(local_size) > self.max_total_threads:
            raise RuntimeError(f'local size {local_size} bigger than {self.max_total_threads} with exec width 32')
        table = {i: buffer.address_and_size for i, buffer in enumerate(bufs)}
        numbers = []
        for value, (_, index, dtype, _) in zip(vals, self.signature[len(bufs):]):
            numbers.append(getattr(ctypes, f'c_int{dtype.bitsize}')(value))
            table[index] = ctypes.addressof(numbers[-1]), dtype.itemsize
        seconds = estimate_seconds(0, sum(buffer.size for buffer in bufs))
        run = partial(self.dispatch, table, global_size, local_size, kept=(bufs, numbers))
        done = self.dev.submit(self.name, [(run, seconds)])
        if wait:
            wait_check(done)
            return done.end - done.start

    def dispatch(self,
        table: dict[int, tuple[int, int]], # buffer index -> address and size
        global_size, # threadgroups
        local_size, # threads in one
        kept=(), # what must live until the kernel has run
    ) -> None:
        """Run the kernel, under the rules of a command encoder. Raises `MetalError`.

        With more threads than its pipeline allows it does not run, and nothing is said: so does the GPU.
        """
        note_source(self.kernel.library.source)
        if any(not float(n).is_integer() for n in global_size):
            raise MetalError(f'{self.name}: global size {global_size} is not whole')
        if prod(global_size) == 0 or prod(local_size) > self.max_total_threads:
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
        self.command_buffer, self.costs = None, [estimate_uop(call) for call in self.linear.src]
        autorelease(len(self.calls))  # an indirect command for each
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
        if self.command_buffer is not None:
            self.command_buffer.check_alive()  # it is released below
            if self.command_buffer in self.dev.mtl_buffers_in_flight:
                wait_check(self.command_buffer)
        for (_, table, _), replace in zip(self.commands, self.uop_replace):
            for position, i in replace:
                table[position] = input_uops[i].buffer._buf.address_and_size
        for j, global_size, local_size in self.updated_launch_dims(var_vals):
            self.commands[j] = *self.commands[j][:2], (global_size, local_size)
        for name, offset, fmt in self.bound_vars:
            struct.pack_into(fmt, self.dev.allocator._as_buffer(self.var_buf), offset, var_vals[name])
        note_graph(len(self.commands))
        runs = [partial(run.dispatch, table, *sizes) for run, table, sizes in self.commands]
        self.command_buffer = self.dev.submit(f'batched {len(self.calls)}', zip(runs, self.seconds(var_vals)))
        if wait:
            wait_check(self.command_buffer)
            return self.command_buffer.end - self.command_buffer.start

    def seconds(self, var_vals) -> list[float]:
        "Simulated seconds of each command, by what tinygrad and our kernels say that it computes and moves."
        return [estimate_seconds(sym_infer(e.ops, var_vals), sym_infer(e.mem, var_vals)) for e in self.costs]

    @staticmethod
    def supports_uop(batch_devs, new_call) -> bool:
        "Refuse a view that begins above 4 GiB in its buffer: commands of a graph keep 32 bits of it."
        for view in [u.src[0] if u.op is Ops.BITCAST else u for u in new_call.src[1:]]:
            if view.op is Ops.SHRINK and view.src[1].val * view.src[0].dtype.itemsize > 0xFFFFFFFF:
                return False
        return GraphRunner.supports_uop(batch_devs, new_call)


class MetalDevice(Compiled):
    "What tinygrad opens for METAL: of the family `$METALSIM_ARCH`, from Apple7 (M1) on."

    def __init__(self, device: str):
        compiler()  # without one, say so now
        self.mtl_buffers_in_flight: list[MTLCommandBuffer] = []
        self.mtl_queue: list[MTLCommandBuffer] = []  # those that have not run yet
        super().__init__(device, MetalAllocator(self), [MetalRenderer], MetalProgram, MetalGraph,
                         arch=os.environ.get('METALSIM_ARCH', 'Apple9'))

    def submit(self,
        label: str, # for people
        commands: Iterable[tuple[Callable, float]], # what runs each, and its simulated seconds
    ) -> MTLCommandBuffer:
        "Run commands as one command buffer, and keep it until `synchronize`. Raises `MetalError`."
        check_pools()
        command_buffer = MTLCommandBuffer(to_ns_str(label), self.mtl_queue)
        command_buffer.commit(commands)
        self.mtl_buffers_in_flight.append(command_buffer)
        return command_buffer

    def synchronize(self):
        "Wait for all command buffers, and forget them. Raises the error of one that has failed."
        check_pools()
        for command_buffer in self.mtl_buffers_in_flight:
            wait_check(command_buffer)
        self.mtl_buffers_in_flight.clear()
