"""How fast does a model arrive, and how much memory does that take on the way?

    python benchmarks/load.py                 # prints rows and adds them to benchmarks/results/load.jsonl

Loads SmolLM2 in four ways, each in a fresh process, in turn, three times after a warm-up that fills the
compiler's cache; a row is the run with the median time. `cpu_seconds` is what this process worked: on a
busy machine `seconds` is longer. `ours` is `Checkpoint.load`. The others are what
one writes without it: `gguf_load` is tinygrad's own reader, then one realize; `load_file` reads the whole
safetensors file into numpy first. A row keeps the process's memory over time, and its peak as the
kernel counts it.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import tinyvllm  # picks device and compiler before tinygrad looks
from common import RESULTS, write_row
from tinygrad import Device, Tensor, dtypes
from tinyvllm.measure import machine_name, peak_memory
from tinyvllm.models.weights import open_checkpoint, save_safetensors
from tinyvllm.models.hub import resolve

OUT = RESULTS / 'load.jsonl'
RUNS, POINTS = 3, 60


def ours(path, dtype):
    return open_checkpoint(path).load(dtype=dtype)


def gguf_load(path, dtype):
    from tinygrad.llm.gguf import gguf_load
    state = {n: t.cast(getattr(dtypes, dtype)).contiguous() for n, t in gguf_load(path)[1].items()}
    Tensor.realize(*state.values())
    return state


def load_file(path, dtype):
    from safetensors.numpy import load_file
    state = {n: Tensor(a).cast(getattr(dtypes, dtype)).contiguous() for n, a in load_file(path / 'model.safetensors').items()}
    Tensor.realize(*state.values())
    return state


WAYS = {'ours': ours, 'gguf_load': gguf_load, 'load_file': load_file}


def memory_now():
    "Resident bytes of this process, 0 where there is no /proc."
    try:
        return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def one_run(way, path, dtype):
    "Load once in this process; print what it took. (`save` writes the safetensors file for the others.)"
    if way == 'save':
        return print(json.dumps(save_safetensors(dtype, {}, ours(path, 'float16'))))
    Tensor([1.0]).contiguous().realize()
    base, curve, done = memory_now(), [], threading.Event()
    start, work = time.perf_counter(), time.process_time()

    def watch():
        while not done.wait(0.02):
            curve.append((round(time.perf_counter() - start, 3), memory_now()))
    threading.Thread(target=watch, daemon=True).start()
    state = WAYS[way](Path(path), dtype)
    Device[Device.DEFAULT].synchronize()
    seconds, cpu = time.perf_counter() - start, time.process_time() - work
    done.set()
    curve.append((round(seconds, 3), memory_now()))
    thin = curve[::-(-len(curve) // POINTS)] + curve[-1:]
    print(json.dumps(dict(seconds=round(seconds, 3), cpu_seconds=round(cpu, 3), base_bytes=base, peak_bytes=peak_memory(),
                          final_bytes=sum(t.nbytes() for t in state.values()), curve=thin)))


def fresh(way, path, dtype):
    "One run in a process of its own. (This one stays small: Linux counts a parent's memory in a child's peak.)"
    out = subprocess.run([sys.executable, __file__, '--one', way, str(path), dtype], check=True, capture_output=True, text=True)
    return json.loads(out.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--one', nargs=3, metavar=('WAY', 'PATH', 'DTYPE'), help='one load in this process')
    if (args := parser.parse_args()).one:
        return one_run(*args.one)
    about = dict(machine=machine_name(), device=Device.DEFAULT, tinygrad=version('tinygrad'))
    with tempfile.TemporaryDirectory() as folder:
        fresh('save', resolve('smollm2'), str(Path(folder) / 'f16'))
        files = {'GGUF, Q4_1': resolve('smollm2'), 'safetensors, F16': Path(folder) / 'f16'}
        cases = [('GGUF, Q4_1', w, d) for d in ('float32', 'float16') for w in ('ours', 'gguf_load')]
        cases += [('safetensors, F16', w, 'float16') for w in ('ours', 'load_file')]
        runs = {case: [] for case in cases}
        for i in range(RUNS + 1):
            for case in cases if i % 2 else cases[::-1]:  # alternate, so that no one is always last
                file, way, dtype = case
                result = fresh(way, files[file], dtype)
                if i:
                    runs[case].append(result)
    for (file, way, dtype), results in runs.items():
        middle = statistics.median_low(r['seconds'] for r in results)
        run = next(r for r in results if r['seconds'] == middle)
        row = dict(model='SmolLM2-135M', file=file, way=way, dtype=dtype, median_of=RUNS,
                   gb_s=round(run['final_bytes'] / run['seconds'] / 1e9, 3), **run, **about)
        print(f"{file} -> {dtype}, {way}: {row['seconds']} s, {row['gb_s']} GB/s, "
              f"peak {row['peak_bytes'] / 1e6:.0f} MB for {row['final_bytes'] / 1e6:.0f} MB of weights")
        write_row(OUT, row)


if __name__ == '__main__':
    main()
