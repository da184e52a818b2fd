"""How fast is memory here, and how much of it does tinygrad's matrix-vector product use?

    python benchmarks/bandwidth.py            # prints rows and adds them to benchmarks/results/bandwidth.jsonl

On a CPU: a read by one thread and by one per core. On a GPU: row sums. On both: the product of SmolLM2's
output layer (49152 x 576) with one vector, float32 and float16, bytes counted once.
"""
from importlib.metadata import version

import tinyvllm  # noqa: F401  picks device and compiler before tinygrad looks
from common import RESULTS, write_row
from tinygrad import Device
from tinyvllm.cli.report_sections import bandwidth_probes
from tinyvllm.measure import machine_name

OUT = RESULTS / 'bandwidth.jsonl'


def main() -> None:
    device = Device.DEFAULT
    about = dict(machine=machine_name(device), device=device, tinygrad=version('tinygrad'))
    for what, probe in bandwidth_probes(device).items():
        row = dict(what=what, gb_s=round(probe() / 1e9, 2), **about)
        print(f"{row['machine']}: {what}: {row['gb_s']} GB/s")
        write_row(OUT, row)


if __name__ == '__main__':
    main()
