"""Arrays of more than 2**31 elements, of which few are there.

A kernel that computes an index in 32 bits reads or writes in the wrong place from 2**31 on. A processor's memory
is made of pages that cost nothing until they are touched; a GPU's is allocated, and left as it is.
"""
import ctypes
import mmap
import sys
from dataclasses import dataclass, field
from math import prod

import numpy as np
from tinygrad import Device, Tensor, dtypes
from tinygrad.device import Buffer

__all__ = ['ROOM', 'SparseArray', 'allocate_sparse', 'read_part', 'write_part']

ROOM = 2**35            # bytes of address space on both sides: an index that wraps lands here and on nothing else
NORESERVE = 0x4000      # Linux: pages are not counted before they are touched


@dataclass(frozen=True)
class SparseArray:
    "An array that is given in parts; what lies between them may hold anything, or zeros."
    shape: tuple[int, ...]
    dtype: str                                                        # 'float16', 'int32', ...
    parts: dict[int, np.ndarray] = field(default_factory=dict)        # flat index of its first element -> values

    @property
    def nbytes(self) -> int:
        "Bytes of the whole."
        return prod(self.shape) * np.dtype(self.dtype).itemsize

    def to_tensor(self, device: str) -> Tensor:
        "Allocate the whole, write the parts. Raises `MemoryError`."
        tensor = allocate_sparse(self.shape, self.dtype, device)
        for start, part in self.parts.items():
            write_part(tensor, start, part.astype(self.dtype))
        return tensor


def is_host_memory(device: str) -> bool:
    "Are the buffers of a device memory of this process, page by page?"
    return device.startswith('CPU') or device.startswith('METAL') and sys.platform != 'darwin'


def allocate_sparse(
    shape: tuple[int, ...], # of the tensor
    dtype: str, # numpy's name
    device: str, # tinygrad's name
) -> Tensor: # realized, nothing written
    "Allocate a large buffer without touching it. Raises `MemoryError`."
    like = dict(dtype=getattr(dtypes, dtype), device=device)
    if not is_host_memory(device) or sys.platform == 'darwin':
        tensor = Tensor.empty(*shape, **like)
        tensor.uop.buffer.allocate()
        return tensor
    nbytes = prod(shape) * np.dtype(dtype).itemsize
    try:
        mapping = mmap.mmap(-1, nbytes + 2 * ROOM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    except OSError as error:
        raise MemoryError(f'{nbytes / 2**30:.0f} GB of address space: {error}') from None
    memory = (ctypes.c_uint8 * nbytes).from_buffer(mapping, ROOM)
    tensor = Tensor.from_blob(external_pointer(memory, device), shape, **like)
    tensor.mapping = memory    # it lives as long as the tensor
    return tensor


def external_pointer(memory: ctypes.Array, device: str) -> int:
    "What tinygrad takes as the address of a buffer that somebody else owns."
    if device.startswith('CPU'): return ctypes.addressof(memory)
    from tinyvllm.metalsim.device import MTLBuffer
    memory.buffer = MTLBuffer(memory)
    return memory.buffer.value


def part_of(tensor: Tensor, start: int, size: int) -> Buffer:
    "View so many elements of a realized tensor as a buffer."
    whole = tensor.uop.base.buffer
    return whole.view(size, whole.dtype, start * whole.dtype.itemsize).ensure_allocated()


def write_part(
    tensor: Tensor, # realized
    start: int, # flat index
    part: np.ndarray, # of the tensor's type
) -> None:
    "Write some elements of a tensor in place."
    view, raw = part_of(tensor, start, part.size), np.ascontiguousarray(part)
    view.allocator._copyin(view._buf, memoryview(bytearray(raw.tobytes())))
    Device[tensor.device].synchronize()


def read_part(
    tensor: Tensor, # realized
    start: int, # flat index
    size: int, # elements
) -> np.ndarray:
    "Read some elements of a tensor."
    return part_of(tensor, start, size).numpy().copy()
