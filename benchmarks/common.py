"""What the benchmarks share: rows of results, an idle machine, two programs in turn.

A row names its machine, and `write_row` adds commit, day and command. A sample of a comparison counts only if all
other processes together used less than 5 % of the machine while it ran. A program that waits at a barrier loses far
more than that to one busy neighbour, and the ratio would be about the neighbour.
"""
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import psutil

RESULTS = Path(__file__).parent / 'results'
QUIET = 0.05    # share of the machine that others may use
NOT_WORK = ('idle', 'iowait', 'guest', 'guest_nice')    # guests are counted as user time too


class Busy(Exception):
    "The machine was never idle for a whole sample."


class Failed(Exception):
    "A program refused to run; the message is its last line."


def machine_seconds() -> float:
    "Processor seconds that this machine has worked, other guests of its host included."
    times = psutil.cpu_times()._asdict()
    return sum(seconds for name, seconds in times.items() if name not in NOT_WORK)


def own_seconds(pids=()) -> float:
    "Processor seconds of this process, of its children that have ended, and of those in `pids`."
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    alive = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(u.ru_utime + u.ru_stime for u in usages) + sum(t.user + t.system for t in alive)


def watched(fn, pids=()):
    "The result of a call, and the share of the machine that others used meanwhile."
    start, machine, own = time.perf_counter(), machine_seconds(), own_seconds(pids)
    result = fn()
    worked = machine_seconds() - machine - (own_seconds(pids) - own)
    return result, max(0.0, worked / (time.perf_counter() - start) / os.cpu_count())


def quiet_sample(fn, pids=(), most=QUIET, patience=1800):
    "Call until others leave the machine alone; returns result and their share. Raises `Busy`."
    give_up = time.monotonic() + patience
    while time.monotonic() < give_up:
        while watched(lambda: time.sleep(0.5), pids)[1] > most and time.monotonic() < give_up:
            time.sleep(1)
        result, others = watched(fn, pids)
        if others <= most:
            return result, others
        print(f'  others used {others:.0%} of the machine: again', file=sys.stderr)
    raise Busy(f'others used more than {most:.0%} of this machine for {patience:.0f} s')


def output(command, **options) -> str:
    "What a program prints. Raises `Failed`."
    run = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if run.returncode:
        raise Failed((run.stderr.strip() or f'{command[0]} ended with {run.returncode}').splitlines()[-1])
    return run.stdout


def tinyvllm_bench(*args, **options) -> dict:
    "The JSON of `tinyvllm bench ...`, in a process of its own. Raises `Failed`."
    command = [sys.executable, '-m', 'tinyvllm', 'bench', *args, '--json']
    return json.loads(output(command, env=our_environment(), **options).splitlines()[-1])


def our_environment() -> dict:
    "For a process that imports tinyvllm from this checkout."
    path = str(Path(__file__).parents[1]), *filter(None, [os.environ.get('PYTHONPATH')])
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(path)}


def in_turn(sides, samples, **gate):
    "Sample programs one after the other, round by round; returns name -> median, runs, others' share, error."
    runs, errors, shares = {name: [] for name in sides}, {}, [0.0]
    for i in range(samples):
        for name, fn in sides.items():
            if name in errors:
                continue
            try:
                value, others = quiet_sample(fn, **gate)
            except (Busy, Failed) as error:
                errors[name] = str(error)
                print(f'  {name}: {error}', file=sys.stderr)
                continue
            runs[name].append(value)
            shares.append(others)
            print(f'  {name}: {value:,.1f}', file=sys.stderr)
    medians = {name: round(statistics.median(r), 2) if r else None for name, r in runs.items()}
    return medians, dict(best={n: round(max(r), 2) for n, r in runs.items() if r}, others=round(max(shares), 3),
                         errors=errors, runs={n: [round(v, 2) for v in r] for n, r in runs.items()})


def write_row(path, row) -> None:
    "Add a line to a result file, with the command, and the commit and the day if the row has none of its own."
    from tinyvllm.measure import commit
    command = ' '.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *map(portable, sys.argv[1:])])
    path.parent.mkdir(exist_ok=True)
    with path.open('a', encoding='utf-8') as file:
        about = dict(commit=row.get('commit', commit()), date=row.get('date', date.today().isoformat()))
        file.write(json.dumps(row | about | dict(command=command)) + '\n')


def portable(word: str) -> str:
    "A folder of this machine is nobody else's business."
    return 'FOLDER' if os.path.isabs(word) else word
