"""How fast is memory here, and how much of it does tinygrad's matrix-vector product use?

    python benchmarks/bandwidth.py            # prints rows and adds them to benchmarks/results/bandwidth.jsonl

On a CPU: a read by one thread and by one per core. On a GPU: row sums. On both: the product of SmolLM2's
output layer (49152 x 576) with one vector, float32 and float16, bytes counted once.
"""
from importlib.metadata import version

import tinyvllm  # noqa: F401  picks device and compiler before tinygrad looks
from common import RESULTS, write_row
from tinygrad import Device, Tensor, TinyJit, dtypes
from tinyvllm.measure import gpu_read_bandwidth, machine_name, read_bandwidth, timed

OUT = RESULTS / 'bandwidth.jsonl'


def product(dtype) -> float:
    "Bytes of the matrix per second, best of 9; several matrices in turn, so that no cache holds them."
    weights = [Tensor.ones(49152, 576, dtype=dtype).contiguous().realize() for _ in range(8)]
    x = Tensor.ones(576, dtype=dtype).contiguous().realize()
    sweep = TinyJit(lambda x: [(w @ x).realize() for w in weights])
    return sum(w.nbytes() for w in weights) / min(timed(lambda: sweep(x), repeat=9, warmup=4).runs)


def main() -> None:
    device = Device.DEFAULT
    probes = {'read': lambda: gpu_read_bandwidth(device)}
    if device.startswith('CPU'):
        probes = {'read, 1 thread': lambda: read_bandwidth(threads=1), 'read, all cores': read_bandwidth}
    probes |= {'product, float32': lambda: product(dtypes.float32), 'product, float16': lambda: product(dtypes.float16)}
    about = dict(machine=machine_name(device), device=device, tinygrad=version('tinygrad'))
    for what, probe in probes.items():
        row = dict(what=what, gb_s=round(probe() / 1e9, 2), **about)
        print(f"{row['machine']}: {what}: {row['gb_s']} GB/s")
        write_row(OUT, row)


if __name__ == '__main__':
    main()
