"""What HTTP costs: the same trace by the engine alone, through `tinyvllm serve`, and through llama.cpp's server.

    python benchmarks/serve_speed.py                    # adds rows to benchmarks/results/serve_speed.jsonl
    python benchmarks/serve_speed.py --bin BUILD/bin    # llama-server too; how to build it: top of llama_cpp.py

The trace is nano-vllm's, scaled (`trace.py`): all requests at the start, answered token by token over HTTP, each on a
connection of its own. All sides get the same token ids, `ignore_eos` and as many slots; both servers stream to the
same client, on the same machine, so its work is part of both numbers. Each side serves the trace once before, to
compile. Rounds alternate the sides. A row holds, for each side, tokens and requests per second and the percentiles of
the time to the first token and between tokens, all from its best round (what else runs on a machine only takes away),
the tokens per second of every round under `runs`, and the ratios. `others` is the largest share of the machine that
other programs used meanwhile.
"""
import argparse
import http.client
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import tinyvllm  # noqa: F401  picks device and compiler before tinygrad looks
from llama_cpp import FORMATS, model_file
from common import RESULTS, Failed, our_environment, tinyvllm_bench, watched, write_row
from tinyvllm.cli.measurements import Trace, latencies
from tinyvllm.measure import Stopwatch, machine_name
from trace import VOCAB, serve, server


@contextmanager
def our_server(*options):
    "`tinyvllm serve` in a process of its own; yields it and its port once it is ready."
    command = [sys.executable, '-m', 'tinyvllm', 'serve', '--port', '0', '--quiet', *map(str, options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=our_environment())
    try:
        for line in process.stderr:
            if found := re.search(r'http://127.0.0.1:(\d+)', line): break
        else: raise Failed('tinyvllm serve ended: ' + line)
        port = int(found[1])
        while get(port, '/health')[0] != 200:
            if process.poll() is not None: raise Failed('tinyvllm serve ended while it loaded')
            time.sleep(0.1)
        yield process, port
    finally:
        process.terminate()
        process.communicate()


def get(port: int, path: str) -> tuple[int, bytes]:
    "Status and body."
    connection = http.client.HTTPConnection('127.0.0.1', port)
    try:
        connection.request('GET', path)
        response = connection.getresponse()
        return response.status, response.read()
    except OSError:
        return 0, b''


def ask(port: int, prompt: list, answer: int, seed: int) -> Stopwatch:
    "Stream one answer; a lap for each event that says something. Raises `Failed` unless all tokens were counted."
    watch, told = Stopwatch(), 0
    connection = http.client.HTTPConnection('127.0.0.1', port)
    body = dict(prompt=prompt, max_tokens=answer, ignore_eos=True, stream=True, temperature=0.6, seed=seed,
                stream_options={'include_usage': True})
    connection.request('POST', '/v1/completions', json.dumps(body), {'Content-Type': 'application/json'})
    for line in connection.getresponse():
        if b'"choices":[{' in line: watch.lap()
        elif line.startswith(b'data: {'): told = json.loads(line[6:]).get('usage', {}).get('completion_tokens', 0)
    if told != answer: raise Failed(f'asked for {answer} tokens, got {told}')
    return watch


def through_http(port: int, trace: list) -> dict:
    "Answer all requests at once."
    with ThreadPoolExecutor(len(trace)) as pool:
        start = time.perf_counter()
        watches = list(pool.map(lambda job: ask(port, job[1][1], job[1][2], job[0]), enumerate(trace)))
    seconds = time.perf_counter() - start
    tokens = sum(answer for *_, answer in trace)
    return dict(seconds=round(seconds, 3), tok_s=round(tokens / seconds, 3), **latencies(watches))


def sides(args, trace: Trace):
    "Name: a function that serves the trace and returns its numbers."
    file, drawn = model_file(args.bin or Path(), args.format), trace.draw(VOCAB)
    room = trace.longest_prompt + trace.longest_answer

    def engine():
        return tinyvllm_bench('serve-trace', '--no-count', '--scale', str(args.scale), '--model', str(file),
                              '--batch', str(args.slots), '--device', 'CPU')

    def ours():
        with our_server('--model', file, '--max-num-seqs', args.slots, '--max-model-len', room, '--device', 'CPU',
                        '--max-queue', len(drawn)) as (process, port):
            through_http(port, drawn)
            return through_http(port, drawn)

    def theirs():
        with server(args.bin, file, args.slots, room, args.threads) as (process, port):
            serve(port, drawn)
            return serve(port, drawn)
    return dict(engine=engine, server=ours) | ({'llama.cpp': theirs} if args.bin else {})


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--bin', type=Path, help='where llama-server lies; none: it is left out')
    p.add_argument('--scale', type=float, default=0.125)
    p.add_argument('--slots', type=int, default=16, help='requests at the same time')
    p.add_argument('--format', default='Q4_0', choices=FORMATS)
    p.add_argument('--threads', type=int, default=os.cpu_count(), help='of llama.cpp')
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--out', type=Path, default=RESULTS / 'serve_speed.jsonl', help='rows are added here')
    args = p.parse_args()
    trace = Trace().scaled(args.scale)
    runs, shares = {}, []
    for _ in range(args.rounds):
        for name, run in sides(args, trace).items():
            start = time.perf_counter()
            row, others = watched(run)
            shares.append(others)
            runs.setdefault(name, []).append(row)
            print(f"{name}: {row['tok_s']:.1f} tok/s, first token {row['ttft_ms']}, between {row['between_ms']}, "
                  f'{time.perf_counter() - start:.0f} s', flush=True)
    keep = 'seconds', 'tok_s', 'ttft_ms', 'between_ms', 'end_to_end_ms'
    best = {name: max(rows, key=lambda row: row['tok_s']) for name, rows in runs.items()}
    table = {name: {k: row[k] for k in keep} for name, row in best.items()}
    for side in table.values(): side['requests_s'] = round(trace.requests / side['seconds'], 3)
    row = dict(model=f'smollm2 {args.format}', slots=args.slots, scale=args.scale, requests=trace.requests,
               rounds=args.rounds, others=round(max(shares), 3), sides=table, runs={n: [r['tok_s'] for r in rows] for n, rows in runs.items()},
               server_over_engine=round(table['server']['tok_s'] / table['engine']['tok_s'], 3))
    if 'llama.cpp' in table:
        row['server_over_llama_cpp'] = round(table['server']['tok_s'] / table['llama.cpp']['tok_s'], 3)
    write_row(args.out, row | dict(machine=machine_name('CPU')))
    print(json.dumps({k: row[k] for k in row if k.startswith('server_over')}))


if __name__ == '__main__':
    main()
