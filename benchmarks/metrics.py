"""What do metrics cost a step?

    python benchmarks/metrics.py                # prints rows and adds them to benchmarks/results/metrics.jsonl

One engine, in one process, runs with and without metrics in turns; sequences are greedy and only speak. `overhead`
is of a model that is too small to matter: microseconds of Python in a step, the time that it waited for the device
taken away, and the median of what the metrics added, round by round. `step` is SmolLM2: microseconds of a whole step,
and where the metrics say that they went. `event` is one value into a histogram; `loop` is all that is counted for a
step, over and over, without a step around it.
"""
import argparse
import statistics
import timeit
from bisect import bisect_left

import tinyvllm  # noqa: F401  picks device and compiler before tinygrad looks
from common import RESULTS, write_row
from tinyvllm.cli import measurements as bench
from tinyvllm.engine.defaults import make_engine
from tinyvllm.engine.core import EngineCore
from tinyvllm.models.fused import fused
from tinyvllm.engine.defaults import best_model
from tinyvllm.models.llama import Llama, model_config
from tinyvllm.measure import machine_name
from tinyvllm.server.metrics import SECONDS, MeteredCore, Metrics, attach_metrics
from tinyvllm.core.scheduler import WaitingQueue
from tinyvllm.core.sequence import Batch, Sequence
from tinyvllm.models.weights import tiny_checkpoint
from tinyvllm.models.hub import resolve

OUT, SEQS = RESULTS / 'metrics.jsonl', (1, 8, 32)
TINY = dict(seed=3, max_position_embeddings=1024, num_hidden_layers=1, hidden_size=32)


def tiny():
    config, state = tiny_checkpoint(**TINY)
    return fused(Llama(model_config(config), state))


class Pair:
    "An engine that is metered, or not."
    def __init__(self, model, seqs: int, tokens: int):
        self.load = bench.Load(batch=seqs, context=16, tokens=tokens)
        self.engine = make_engine(model, **self.load.sizes)
        self.prompts = self.load.prompts(model.config.vocab_size)
        self.parts: list[dict] = []    # of a step, for each metered run
        self.run('plain')    # compiles, captures

    def run(self, way: str) -> bench.Run:
        "Decode once."
        if way == 'plain':
            return bench.decode(self.engine, self.prompts, self.load)
        metrics = Metrics()
        run = bench.decode(attach_metrics(self.engine, metrics), self.prompts, self.load)
        self.parts.append(metrics.snapshot()['step_us'])
        return run

    def rounds(self, n: int) -> dict[str, list[bench.Run]]:
        "In turns; the order changes from round to round."
        runs = {'plain': [], 'metered': []}
        for i in range(n):
            for way in list(runs)[::1 if i % 2 else -1]:
                runs[way].append(self.run(way))
        return runs


def host_us(run: bench.Run) -> float:
    return (run.seconds - run.waited) / run.steps * 1e6


def overhead(model, seqs: int, rounds: int) -> dict:
    "Of a step that is Python alone."
    runs = Pair(model, seqs, tokens=100).rounds(rounds)
    plain, full = ([host_us(r) for r in runs[way]] for way in ('plain', 'metered'))
    added = [b - a for a, b in zip(plain, full)]
    quarter = statistics.quantiles(added, n=4)
    return dict(what='overhead', way='tiny', seqs=seqs, us=round(statistics.median(added), 2),
                quartiles_us=[round(quarter[0], 2), round(quarter[2], 2)],
                plain_us=round(statistics.median(plain), 1), metered_us=round(statistics.median(full), 1), samples=rounds)


def whole_steps(model, seqs: int, rounds: int) -> list[dict]:
    "Of SmolLM2, both ways."
    pair = Pair(model, seqs, tokens=16)
    rows = []
    for way, runs in pair.rounds(rounds).items():
        us = [r.seconds / r.steps * 1e6 for r in runs]
        rows.append(dict(what='step', way=way, seqs=seqs, us=round(statistics.median(us)), lowest_us=round(min(us)),
                         samples=rounds))
    rows[-1]['step_us'] = {part: round(statistics.median(p[part] for p in pair.parts), 1) for part in pair.parts[0]}
    return rows


def events() -> list[dict]:
    "One value into a histogram."
    from prometheus_client import CollectorRegistry, Histogram
    theirs = Histogram('gap', 'text', ['model_name'], buckets=SECONDS, registry=CollectorRegistry()).labels('m')
    counts = [0] * (len(SECONDS) + 1)

    def ours():
        counts[bisect_left(SECONDS, 0.013)] += 1
    ways = {'prometheus_client': lambda: theirs.observe(0.013), 'a list': ours}
    return [dict(what='event', way=way, seqs=1, us=round(min(timeit.repeat(call, number=20000, repeat=9)) / 0.02, 3))
            for way, call in ways.items()]


class Nothing:
    "A scheduler, a runner and a request that do nothing."
    waited, waiting = 0.0, WaitingQueue()

    def __init__(self, seqs: int):
        self.batch = Batch.of([(Sequence(i, [1]), 1, [1]) for i in range(seqs)], 16)
        self.output, self.metrics, self.stamps = self, self, [0.0, 1.0, 2.0, 3.0]

    def schedule(self):
        return self.batch

    def update_from_output(self, *_):
        return []

    __call__ = update_from_output


def loop(seqs: int) -> dict:
    "The counting of a step alone."
    nothing, stats = Nothing(seqs), Metrics()
    core = EngineCore(nothing, nothing)
    metered = MeteredCore(core, stats)

    def step():
        metered.step()
        for _ in range(seqs):
            stats.record_tokens(nothing, 0, 1)
    full, plain = (min(timeit.repeat(call, number=2000, repeat=9)) / 0.002 for call in (step, core.step))
    return dict(what='loop', way='a list', seqs=seqs, us=round(full - plain, 2))


def main():
    args = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    args.add_argument('--seqs', type=int, nargs='*', default=SEQS, help='sequences that speak')
    args.add_argument('--rounds', type=int, default=40, help='of the small model; a tenth of them of SmolLM2')
    args = args.parse_args()
    rows, small = [*events(), *map(loop, args.seqs)], tiny()
    rows += [overhead(small, n, args.rounds) for n in args.seqs]
    model = best_model(resolve('smollm2'), 'auto')
    for n in args.seqs:
        rows += whole_steps(model, n, max(3, args.rounds // 10))
    for row in rows:
        print(row)
        write_row(OUT, row | dict(machine=machine_name()))


if __name__ == '__main__':
    main()
