"""What does a step cost, kernel by kernel from Python, as tinygrad replays it, and as one graph?

    python benchmarks/runner.py            # prints rows and adds them to benchmarks/results/runner.jsonl
    python benchmarks/runner.py --start    # also two starts in fresh processes, with an empty kernel cache

SmolLM2-135M as it is stored, fused kernels, sequences that decode, contexts of 64 to 128 tokens. The three
ways take turns, so that a busy machine is busy for all of them; a row is the fastest step and the median.
`host_us` is what Python spends on a step around the device: deciding, filling inputs, reading tokens.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

import tinyvllm  # noqa: F401  picks device and compiler before tinygrad looks
from common import RESULTS, write_row
from tinygrad import Device
from tinyvllm.core.blocks import BlockManager
from tinyvllm.engine.defaults import make_engine
from tinyvllm.engine.defaults import best_attend
from tinyvllm.engine.defaults import best_model, best_cache
from tinyvllm.measure import counting, machine_name
from tinyvllm.runner.eager import EagerRunner
from tinyvllm.runner.graphs import CPUGraph
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.core.scheduler import Scheduler
from tinyvllm.models.hub import resolve

OUT = RESULTS / 'runner.jsonl'
STEPS, WARMUP, CONTEXT = 24, 4, 64
START = '''
import time
start = time.perf_counter()
from tinyvllm.engine.llm import LLM
from tinyvllm.measure import counting
from tinyvllm.sampling.params import SamplingParams
with counting() as c: LLM('smollm2', num_blocks=64).generate('Hello', SamplingParams(max_tokens=8, temperature=0))
print(time.perf_counter() - start, c.compiled)'''


def engines(model, rows):
    "The same model under an eager runner, with TinyJit, and with TinyJit's calls in one graph."
    blocks = rows * -(-(CONTEXT + 3 * (STEPS + WARMUP)) // 16) + 1
    cache, attend = best_cache(model, blocks), best_attend(model)
    eager = dict(runner=EagerRunner(model, cache, attend), cache=cache,
                 scheduler=Scheduler(BlockManager(blocks, 16), rows, rows * CONTEXT))
    sizes = dict(num_blocks=blocks, max_num_seqs=rows, max_num_batched_tokens=rows * CONTEXT)
    return {'eager': make_engine(model, **eager), 'replay': make_engine(model, **sizes), 'graph': make_engine(model, **sizes)}


def turns(engines, rows):
    "Seconds of each step of each way, kernels of the last one, and what Python took of each step with a graph."
    times, kernels, host, call = {w: [] for w in engines}, {}, [], CPUGraph.__call__
    graph = Device[Device.DEFAULT].graph
    inside = []

    def clocked(self, *args, **more):
        inside.append(seconds := call(self, *args, **more | dict(wait=True)))
        return seconds
    CPUGraph.__call__ = clocked
    params = SamplingParams(temperature=0, max_tokens=STEPS + WARMUP, ignore_eos=True)
    for engine in engines.values():
        for i in range(rows):
            engine.add_request(i, [1 + i] * CONTEXT, params)
    for step in range(STEPS + WARMUP - 1):
        for way, engine in engines.items():
            Device[Device.DEFAULT].graph = None if way == 'replay' else graph
            inside.clear()
            with counting() as c:
                begin = time.perf_counter()
                engine.step()
                times[way].append(time.perf_counter() - begin)
            kernels[way] = c.kernels
            if way == 'graph':
                host.append(times[way][-1] - sum(inside))
    CPUGraph.__call__, Device[Device.DEFAULT].graph = call, graph
    return {w: t[WARMUP:] for w, t in times.items()}, kernels, host[WARMUP:]


def starts():
    "Seconds to eight tokens in a fresh process, and programs compiled: with an empty cache, and again."
    with tempfile.TemporaryDirectory() as folder:
        for what in ('first start', 'second start'):
            env = os.environ | {'CACHEDB': f'{folder}/kernels.db'}
            said = subprocess.run([sys.executable, '-c', START], env=env, capture_output=True, text=True, check=True).stdout
            seconds, programs = said.split()[-2:]
            yield dict(what=what, seconds=round(float(seconds), 1), programs=int(programs))


def main():
    args = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    args.add_argument('--start', action='store_true', help='time two starts as well')
    args.add_argument('--rows', type=int, nargs='*', default=[1, 8], help='sequences that decode')
    args = args.parse_args()
    rows = []
    if args.rows:
        model = best_model(resolve('smollm2'))
    for n in args.rows:
        times, kernels, host = turns(engines(model, n), n)
        for way, seconds in times.items():
            rows.append(dict(what='step', way=way, rows=n, ms=round(min(seconds) * 1e3, 2), kernels=kernels[way],
                             median_ms=round(statistics.median(seconds) * 1e3, 2), steps=len(seconds)))
            if way == 'graph':
                rows[-1]['host_us'] = round(min(host) * 1e6)
    rows += starts() if args.start else []
    about = dict(model='SmolLM2-135M Q4_1', machine=machine_name(Device.DEFAULT), device=Device.DEFAULT,
                 tinygrad=version('tinygrad'))
    for row in rows:
        print(row)
        write_row(OUT, row | about)


if __name__ == '__main__':
    main()
