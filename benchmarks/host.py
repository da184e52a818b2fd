"""What does Python do for a step, part by part?

    python benchmarks/host.py                   # prints rows and adds them to benchmarks/results/host.jsonl
    python benchmarks/host.py --old FOLDER      # in turns with another checkout: rows 'before' and 'after'
    python benchmarks/host.py --trials          # objects that are used again, and no garbage collection

A model of one layer and 32 channels, greedy sequences that decode, 100 tokens each. `host_us` is the time of a
step that Python did not wait for the device (on a processor the call of a graph counts as waiting). Each round
is a fresh process; a row is the median of its rounds, and `lowest_us` the fastest one. `parts` come from rounds
of their own, with a clock around each call. Of two checkouts, each runs its own copy of this script.
"""
import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import wraps
from itertools import cycle
from pathlib import Path

import tinyvllm  # noqa: F401  picks device and compiler before tinygrad looks
from common import RESULTS, write_row
from tinyvllm.cli import measurements as bench
from tinyvllm.core.scheduler import Scheduler
from tinyvllm.engine.defaults import make_engine
from tinyvllm.engine.llm import LLMEngine
from tinyvllm.runner import jit
from tinyvllm.runner.graphs import CPUGraph
from tinyvllm.runner.inputs import StagingBuffer
from tinyvllm.runner.sampled_tokens import SampledTokenBuffer
from tinyvllm.core.sequence import Batch, Sequence
from tinyvllm.models.fused import fused
from tinyvllm.models.llama import Llama, model_config
from tinyvllm.measure import commit, machine_name
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.sampling.sampler import Sampled
from tinyvllm.models.weights import tiny_checkpoint

OUT, HERE = RESULTS / 'host.jsonl', Path(__file__).resolve().parents[1]
SEQS, STEPS, TOKENS = (1, 8, 32, 128), (1, 8), 100
TINY = dict(seed=3, max_position_embeddings=1024, num_hidden_layers=1, hidden_size=32)


# --- a clock around the parts --------------------------------------------------------------------------

class Clock:
    "Seconds of each part, without those of the parts inside it."
    def __init__(self):
        self.seconds, self.inside, self.put_back = Counter(), [], []

    def wrap(self, owner, name: str, part: str) -> None:
        "Count the seconds of a method for a part."
        call = getattr(owner, name)

        @wraps(call)
        def clocked(*args, **more):
            self.inside.append(0.0)
            start = time.perf_counter()
            try:
                return call(*args, **more)
            finally:
                seconds = time.perf_counter() - start
                self.seconds[part] += seconds - self.inside.pop()
                if self.inside:
                    self.inside[-1] += seconds
        self.put_back.append((owner, name, owner.__dict__[name]))
        setattr(owner, name, clocked)


@contextmanager
def clocked():
    "The parts of a step."
    clock = Clock()
    clock.wrap(Scheduler, 'schedule', 'schedule')
    clock.wrap(StagingBuffer, 'fill', 'fill')
    clock.wrap(jit.JitRunner, '__call__', 'launch')
    clock.wrap(CPUGraph, '__call__', 'device')
    clock.wrap(SampledTokenBuffer, 'read', 'read')
    clock.wrap(jit.AsyncModelRunnerOutput, 'read_step', 'read')
    clock.wrap(jit.AsyncModelRunnerOutput, '__iter__', 'read')
    clock.wrap(Scheduler, 'update_from_output', 'update')
    clock.wrap(LLMEngine, 'process_outputs', 'report')
    try:
        yield clock
    finally:
        for owner, name, call in clock.put_back:
            setattr(owner, name, call)


# --- rounds ----------------------------------------------------------------------------------------------

def make(seqs: int, steps: int):
    "An engine and a load for it; warm, so that every graph is there."
    config, state = tiny_checkpoint(**TINY)
    model = fused(Llama(model_config(config), state))
    load = bench.Load(batch=seqs, context=40, tokens=TOKENS)
    made = make_engine(model, **load.sizes, num_scheduler_steps=steps)
    prompts = load.prompts(model.config.vocab_size)
    bench.decode(made, prompts, load)
    return made, prompts, load


def host_us(made, prompts, load) -> float:
    "Microseconds of Python for a step."
    run = bench.decode(made, prompts, load)
    return (run.seconds - run.waited) / run.steps * 1e6


def parts_us(made, prompts, load) -> dict[str, float]:
    "The same, divided. What no part claims is the loop around the step, and the clock itself."
    with clocked() as clock:
        answers = bench.begin(made, prompts, load.sizes['max_model_len'] - load.context)
        while not all(answers):
            bench.step(made)
        clock.seconds.clear()
        before, start, waited = len(answers[0]), time.perf_counter(), made.runner.waited
        while len(answers[0]) - before < load.tokens:
            bench.step(made)
        steps = len(answers[0]) - before
        all_of_it = time.perf_counter() - start - (made.runner.waited - waited)
        parts = {name: s for name, s in clock.seconds.items() if name != 'device'}
        bench.end(made)
    parts['rest'] = max(0, all_of_it - sum(parts.values()))
    return {name: s / steps * 1e6 for name, s in parts.items()}


def one_round(sizes) -> list[dict]:
    "All sizes once."
    rows = []
    for seqs, steps in sizes:
        made = make(seqs, steps)
        us = [host_us(*made) for _ in range(3)]
        rows.append(dict(seqs=seqs, num_scheduler_steps=steps, us=us, parts=parts_us(*made), package=commit()))
    return rows


def in_a_process(folder: Path, args) -> list[dict]:
    "A round of the package in a folder."
    script = folder / 'benchmarks' / 'host.py'
    command = [sys.executable, script, '--round', '--seqs', *map(str, args.seqs), '--steps', *map(str, args.steps)]
    env = os.environ | {'PYTHONPATH': str(folder)}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def turns(args) -> list[dict]:
    "Rounds of both versions in turns; a row for each version and size."
    folders = {'before': args.old, 'after': HERE} if args.old else {'after': HERE}
    rounds = {what: [] for what in folders}
    for _ in range(args.rounds):
        for what, folder in folders.items():
            rounds[what].append(in_a_process(folder, args))
    rows = []
    for what, samples in rounds.items():
        for same in zip(*samples):
            us = [u for row in same for u in row['us']]
            parts = {p: round(statistics.median(row['parts'].get(p, 0) for row in same), 1) for p in same[0]['parts']}
            rows.append(dict(what=what, seqs=same[0]['seqs'], num_scheduler_steps=same[0]['num_scheduler_steps'],
                             host_us=round(statistics.median(us), 1), lowest_us=round(min(us), 1), samples=len(us),
                             parts=parts, package=same[0]['package']))
    return rows


# --- trials: what if objects were used again? ------------------------------------------------------------

@contextmanager
def replaced(owner, name, value):
    "Another attribute for a while."
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


@contextmanager
def no_collection():
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def frozen():
    "What lives now is never looked at again."
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Reused:
    "Four objects in turn. Their lists are emptied, not made anew."
    def __init__(self, renew, *objects):
        self.objects, self.renew = cycle(objects), renew

    def __call__(self, *args):
        self.renew(it := next(self.objects), *args)
        return it


def renew_output(output, buffer, batch, step_ids, rows, errors, decision) -> None:
    output.__dict__.pop('tokens', None)
    output.buffer, output.batch, output.step_ids, output.rows = buffer, batch, step_ids, rows
    output.errors, output.decision = errors, decision


def blank(cls, n):
    "Objects without their first values."
    return [cls.__new__(cls) for _ in range(n)]


def output_pool():
    return Reused(renew_output, *blank(jit.AsyncModelRunnerOutput, 4))


WAYS = {'as it is': nullcontext, 'the same again': nullcontext, 'no collection': no_collection, 'frozen heap': frozen,
        'outputs used again': lambda: replaced(jit, 'AsyncModelRunnerOutput', output_pool())}


def trials(args) -> list[dict]:
    "Each way in turn on the same warm engine; `gain_us` is the median of what it saved, round by round."
    rows = []
    for seqs, steps in sizes(args):
        made, us = make(seqs, steps), {way: [] for way in WAYS}
        for _ in range(5 * args.rounds):
            for way, context in WAYS.items():
                with context():
                    us[way].append(host_us(*made))
        for way, samples in us.items():
            gains = [plain - tried for plain, tried in zip(us['as it is'], samples)]
            rows.append(dict(what='trial', way=way, seqs=seqs, num_scheduler_steps=steps, samples=len(samples),
                             host_us=round(statistics.median(samples), 1), lowest_us=round(min(samples), 1),
                             gain_us=round(statistics.median(gains), 1)))
    return rows


def makings(n: int = 32) -> list[dict]:
    "Microseconds to make what a step of `n` sequences makes, to renew it, and of what no step can leave out."
    entries = [(Sequence(i, [1], SamplingParams(temperature=0)), 1, [1]) for i in range(n)]
    batch = Batch.of(entries, 16)
    ids, logprobs, none = list(range(n)), [0.0] * n, [None] * n
    old_output, answers, call_c = output_pool(), [[] for _ in ids], ctypes.CDLL(None).labs
    calls = {
        'a batch, made': lambda: Batch.of(entries, 16),
        'an output, made': lambda: jit.AsyncModelRunnerOutput(None, batch, [], n),
        'an output, renewed': lambda: old_output(None, batch, [], n, {}, batch),
        f'{n} tokens, made': lambda: list(map(Sampled, ids, logprobs, none)),
        f'{n} ids, appended': lambda: [answer.append(7) for answer in answers],
        'a call into C': lambda: call_c(ctypes.c_uint64(7))}
    rows = []
    for way, call in calls.items():
        times = []
        for _ in range(200):
            start = time.perf_counter()
            for _ in range(100):
                call()
            times.append((time.perf_counter() - start) / 100)
        rows.append(dict(what='making', way=way, seqs=n, us=round(statistics.median(times) * 1e6, 2)))
    return rows


# --- rows ----------------------------------------------------------------------------------------------

def sizes(args) -> list[tuple[int, int]]:
    return [(seqs, steps) for seqs in args.seqs for steps in args.steps]


def main():
    args = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    args.add_argument('--seqs', type=int, nargs='*', default=SEQS, help='sequences that decode')
    args.add_argument('--steps', type=int, nargs='*', default=STEPS, help='num_scheduler_steps')
    args.add_argument('--rounds', type=int, default=3, help='processes of each version')
    args.add_argument('--old', type=Path, help='another checkout, the one before')
    args.add_argument('--trials', action='store_true', help='time objects that are used again')
    args.add_argument('--round', action='store_true', help=argparse.SUPPRESS)
    args = args.parse_args()
    if args.round:
        return print(json.dumps(one_round(sizes(args))))
    for row in [*trials(args), *makings()] if args.trials else turns(args):
        print(row)
        write_row(OUT, row | dict(machine=machine_name()))


if __name__ == '__main__':
    main()
