"""How many registers does ptxas give to texts that are written in Metal, with a Mac's sizes?

    python benchmarks/registers.py    # on a card: rows to benchmarks/results/registers.jsonl; seconds

Apple's compiler tells nobody. The translation of the same text to CUDA is a second opinion beside the count of
`tinyvllm.metalsim.count_operations`: a lane's accumulators and tiles are the same words on both. An Apple GPU has 128
registers of 32 bits for a lane; what does not fit goes to memory. A card has 255.
"""
import ctypes
from collections.abc import Iterator
from math import log2, e

import tinyvllm  # noqa: F401  picks device and compiler before tinygrad looks
from common import RESULTS, write_row
from tinygrad import Device, Tensor
from tinyvllm.kernels.flash import FLASH_TILED, choose_tile
from tinyvllm.kernels.linear_gpu import kernel_of, plan
from tinyvllm.kernels.metal import Kernel
from tinyvllm.kernels.softmax import DECODE, decode_sizes
from tinyvllm.measure import machine_name

OUT = RESULTS / 'registers.jsonl'
REGISTERS, LOCAL_BYTES = 4, 3    # of CUfunction_attribute


def empty(*shape: int, dtype: str = 'half') -> Tensor:
    "A tensor that is only looked at, never computed; `decode_sizes` and `choose_tile` see a Mac."
    return Tensor.empty(*shape, dtype=dtype, device='METAL')


def texts() -> Iterator[tuple[str, dict, Kernel, int, dict]]:
    "Name, what varies, kernel, threads and constants of each text."
    for D in (64, 96, 128):
        sizes = decode_sizes(empty(64, 32, D), empty(1024, 16, 4, D), empty(64, 64, dtype='int'))
        for heads, simds in ((1, 8), (2, 8), (4, 8), (8, 4)):    # of eight heads four simdgroups' sums fit
            yield 'decode', dict(D=D, HEADS=heads), DECODE, 32 * simds, sizes | dict(HEADS=heads, SIMDS=simds)
        for dtype in ('half', 'float'):
            c = choose_tile(FLASH_TILED, empty(512, 32, D, dtype=dtype), 4)
            shape = dict(T=dtype, T4=f'{dtype}4', H=32, KV=8, D=D, S=16, SCALE=D**-0.5 * log2(e))
            yield 'flash_tiled', dict(D=D, dtype=dtype), FLASH_TILED, 32 * c['SIMDS'], shape | c
    for kind in ('f16', 'int8', 'scale', 'min', 'q4_k', 'q6_k'):
        for T in (1, 2, 4, 8):
            _, threads, c = plan('lanes', 'METAL', T, 4096, False)    # four rows for q6_k too: why it has two
            shape = dict(T='half', T4='half4', N=4096, K=4096, GROUP=32, GATED=0, NORM=0, EPS=1e-5)
            yield 'lanes', dict(kind=kind, tokens=T), kernel_of('lanes', kind), threads, shape | c


def count(source: str, name: str) -> dict[str, int]:
    "Registers of a lane, and bytes of memory that it has beside them, after ptxas."
    from tinygrad.runtime.autogen import cuda
    device, module, function = Device['CUDA'], cuda.CUmodule(), cuda.CUfunction()
    code = device.compiler.compile(source)
    cuda.cuCtxSetCurrent(device.context)
    if cuda.cuModuleLoadData(ctypes.byref(module), code) or cuda.cuModuleGetFunction(
            ctypes.byref(function), module, name.encode()):
        raise RuntimeError(f'{name} cannot be loaded')
    found = {}
    for what, attribute in (('registers', REGISTERS), ('local_bytes', LOCAL_BYTES)):
        number = ctypes.c_int32()
        cuda.cuFuncGetAttribute(ctypes.byref(number), attribute, function)
        found[what] = number.value
    return found


def main() -> None:
    "Write a row for each text."
    for kernel, varies, text, threads, constants in texts():
        source = text.source('CUDA', threads, constants | dict(RESIDENT=0))
        row = dict(kernel=kernel, **varies) | count(source, text.signature.name)
        print(row, flush=True)
        write_row(OUT, row | dict(device='CUDA', machine=machine_name('CUDA')))


if __name__ == '__main__':
    main()
