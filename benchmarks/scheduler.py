"""How long does a decision of the scheduler take?

    python benchmarks/scheduler.py            # prints rows and adds them to benchmarks/results/scheduler.jsonl

Steady decode: every running sequence gets one token per step, none ends, and each needs a new block every
16 tokens. A step is `schedule` and `update_from_output`; the tokens are made up, so no device is involved. A row is
the median over the steps, with the slowest one in a hundred beside it. The case with 1,000 waiting shows what a long
queue costs: nothing, since only its head is looked at.
"""
import argparse
import statistics
import time

from common import RESULTS, write_row
from tinyvllm.core.blocks import BlockManager
from tinyvllm.measure import machine_name
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.sampling.sampler import Sampled
from tinyvllm.core.scheduler import Scheduler
from tinyvllm.core.sequence import Sequence

OUT = RESULTS / 'scheduler.jsonl'
CASES = [(1, 0), (16, 0), (64, 0), (256, 0), (256, 1000)]    # running, waiting
STEPS, WARMUP, PROMPT, BLOCK = 1000, 20, 64, 16


def steady(running, waiting):
    "A scheduler in which `running` sequences decode and `waiting` more wait."
    blocks = running * -(-(PROMPT + STEPS + WARMUP + 2) // BLOCK) + 1
    scheduler = Scheduler(BlockManager(blocks, BLOCK), running, running * (PROMPT + 16))
    params = SamplingParams(max_tokens=STEPS + WARMUP + 2, ignore_eos=True)
    for i in range(running + waiting):    # prompts of 64 to 49 tokens: blocks fill at different steps
        scheduler.add(Sequence(i, [7] * (PROMPT - i % 16), params))
    return scheduler


def measure(running, waiting):
    "Seconds of `schedule` and of `update_from_output`, step by step."
    scheduler, token, times = steady(running, waiting), [Sampled(7, 0.0, None)], []
    for _ in range(WARMUP + STEPS):
        start = time.perf_counter()
        batch = scheduler.schedule()
        middle = time.perf_counter()
        tokens = [token] * len(batch.seqs)
        resume = time.perf_counter()
        scheduler.update_from_output(batch, tokens)
        times.append((middle - start, time.perf_counter() - resume))
    assert batch.num_tokens == running and not scheduler.preemptions
    assert len(scheduler.sequences) == running + waiting
    return times[WARMUP:]


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    about = dict(machine=machine_name())
    micro = lambda seconds: round(seconds * 1e6, 1)
    for running, waiting in CASES:
        times = measure(running, waiting)
        steps = sorted(map(sum, times))
        schedule, update = (statistics.median(t) for t in zip(*times))
        row = dict(running=running, waiting=waiting, median_of=STEPS,
                   step_us=micro(statistics.median(steps)), slow_us=micro(steps[STEPS * 99 // 100]),
                   schedule_us=micro(schedule), update_us=micro(update), **about)
        print(f"{running} running, {waiting} waiting: {row['step_us']} us a step "
              f"({row['schedule_us']} schedule, {row['update_us']} update; "
              f"99 of 100 within {row['slow_us']})")
        write_row(OUT, row)


if __name__ == '__main__':
    main()
