"""What does a long prompt cost those who are being answered, and what does the budget of a step change?

    python benchmarks/chunked.py                # prints rows and adds them to benchmarks/results/chunked.jsonl
    python benchmarks/chunked.py --model qwen3-0.6b --budgets 128 256 512 1024 2048 4096      # on a card

One engine. `long`: some requests are being answered when a prompt of 2048 tokens arrives; gaps are those of the
running answers until its first token. `short`: prompts of 24 tokens arrive together. Budgets (`max_num_batched_tokens`) come in turns, every round in another order, after a round that compiles.
A row has the medians of its rounds; the worst gap is the median of the rounds' worst.
"""
import argparse
import random
import statistics
import time
from dataclasses import dataclass

import tinyvllm  # noqa: F401  picks device and compiler before tinygrad looks
from common import RESULTS, write_row
from tinygrad import Device
from tinyvllm.cli import measurements as bench
from tinyvllm.engine.defaults import make_engine
from tinyvllm.measure import machine_name
from tinyvllm.sampling.params import SamplingParams

OUT = RESULTS / 'chunked.jsonl'
BUDGETS = (32, 64, 128, 256, 512, 1024, 4096)    # the last one: no chunks
LONG, SHORT = 2048, 24


@dataclass
class Scene:
    "An engine, and the prompts that it meets."
    engine: object
    prompts: list[list[int]]

    def add(self, length: int, max_tokens: int):
        "A request with a new prompt of so many tokens."
        self.prompts.append(self.prompts.pop(0))    # another one each time
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        return self.engine.add_request(object(), self.prompts[0][:length], params)

    def until(self, outputs) -> int:
        "Step until each has a token; returns the steps."
        steps = 0
        while not all(out.outputs[0].token_ids for out in outputs):
            bench.step(self.engine)
            steps += 1
        return steps


def long(scene: Scene, running: int) -> dict:
    "A long prompt arrives."
    others = [scene.add(SHORT, 4096) for _ in range(running)]
    scene.until(others)
    for _ in range(4):
        bench.step(scene.engine)
    before = [len(out.metrics.stamps) for out in others]
    new = scene.add(LONG, 2)
    steps = scene.until([new])
    arrival, first = new.metrics.stamps[:2]
    gaps = [b - a for out, n in zip(others, before) for a, b in zip(out.metrics.stamps[n - 1:], out.metrics.stamps[n:])]
    bench.end(scene.engine)
    return dict(steps=steps, ttft_s=first - arrival, worst_gap_ms=max(gaps) * 1e3,
                gap_ms=statistics.median(gaps) * 1e3, spoken=len(gaps))


def short(scene: Scene, requests: int) -> dict:
    "Many short prompts arrive."
    start = time.perf_counter()
    outputs = [scene.add(SHORT, 2) for _ in range(requests)]
    steps = scene.until(outputs)
    seconds = time.perf_counter() - start
    firsts = [out.metrics.stamps[1] - start for out in outputs]
    bench.end(scene.engine)
    return dict(steps=steps, seconds=seconds, ttft_s=statistics.median(firsts))


def rounds(scene: Scene, call, n: int, args, budgets) -> list[dict]:
    "Medians for each budget."
    found = {budget: [] for budget in budgets}
    for i in range(args.rounds + 1):
        for budget in random.Random(i).sample(budgets, len(budgets)):
            scene.engine.scheduler.max_num_batched_tokens = budget
            found[budget].append(call(scene, n))
    return [dict(budget=budget, requests=n, samples=args.rounds) |
            {k: round(statistics.median(r[k] for r in runs[1:]), 4) for k in runs[0]} for budget, runs in found.items()]


def main():
    args = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    args.add_argument('--model', default='smollm2', help='a name, a folder, a file, or the shape of one as for `tinyvllm bench decode`')
    args.add_argument('--rounds', type=int, default=3)
    args.add_argument('--running', type=int, default=4, help='answers on their way')
    args.add_argument('--short', type=int, default=32, help='prompts of 24 tokens')
    args.add_argument('--budgets', type=int, nargs='*', default=BUDGETS)
    args.add_argument('--what', nargs='*', default=['long', 'short'])
    args = args.parse_args()
    model = bench.open_model(args.model)
    engine = make_engine(model, max_num_seqs=max(args.short, args.running + 1), max_model_len=4352 + LONG, num_blocks=700,
                         max_num_batched_tokens=max(args.budgets))
    scene = Scene(engine, bench.Workload(LONG, requests=64).prompts(model.config.vocab_size))
    cases = dict(long=(long, args.running), short=(short, args.short))
    for what in args.what:
        for row in rounds(scene, *cases[what], args, args.budgets):
            row = dict(what=what, model=args.model, device=Device.DEFAULT, **row)
            print(row)
            write_row(OUT, row | dict(machine=machine_name()))


if __name__ == '__main__':
    main()
