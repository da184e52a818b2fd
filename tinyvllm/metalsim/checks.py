"The same kernel under several orders of its threads: what depends on the order is a bug."
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tinyvllm.metalsim.compiler import MetalError

if TYPE_CHECKING:
    from tinyvllm.metalsim.kernel import Kernel

# (order of the threads, byte that threadgroup memory is full of, seed)
RUNS = ((0, 0xff, 1), (1, 0x00, 1), (2, 0x5a, 2), (3, 0xff, 3), (3, 0x11, 4))


def verify(
    kernel: 'Kernel', # in check mode
    args: list, # as for a call; only `outs` are written
    grid: Sequence[int], # threadgroups
    threads: Sequence[int], # in a threadgroup
    outs: list[int], # indices of the arguments that must agree
    rtol: float = 0.0, # how far two orders may differ: 0 unless atomics add floats
    atol: float = 0.0, # the same, absolute
    nan_ok: bool = False, # outputs that are partly left as they were may hold NaN
    **how, # see `Kernel.launch`
) -> None:
    "Run a kernel in five orders of its threads; raises `MetalError` where the outputs differ."
    first = None
    for order, fill, seed in RUNS:
        copies = [a.copy() if isinstance(a, np.ndarray) else a for a in args]
        kernel(copies, grid, threads, order=order, fill=fill, seed=seed, **how)
        first = first or copies
        for i in outs:
            compare(kernel, i, copies[i], first[i], rtol, atol, nan_ok)
    for i in outs:
        args[i][...] = first[i]


def compare(
    kernel: 'Kernel', # for its name
    index: int, # of the output
    found: np.ndarray, # in this order
    expected: np.ndarray, # in the first order
    rtol: float, # relative tolerance
    atol: float, # absolute tolerance
    nan_ok: bool, # NaN may stand in it
) -> None:
    "Raise `MetalError` for NaN, and for a difference to the first order."
    name = kernel.slots[index].name
    if not nan_ok and found.dtype.kind == 'f' and np.isnan(found).any():
        raise MetalError(f"{kernel.name}: NaN in output buffer {index} ('{name}')")
    a, b = (x.astype(np.float64) for x in (found, expected))
    if not np.allclose(a, b, rtol, atol, equal_nan=True):
        worst = np.nanmax(np.abs(a - b))
        raise MetalError(f"{kernel.name}: buffer {index} ('{name}') depends on the order of the threads: "
                         f'differs by up to {worst:.3g}')
