"""nano-vllm's trace, scaled to this machine: tinyvllm, one request at a time, and llama.cpp's server.

    python benchmarks/trace.py --bin BUILD/bin                  # adds rows to benchmarks/results/trace.jsonl
    python benchmarks/trace.py --bin BUILD/bin --scale 0.25 --slots 32 --samples 3

256 requests of 100 to 1024 tokens, answered with 100 to 1024, all at the start, from a seed; `--scale 0.125`
takes an eighth of each: 32 requests, 12 to 128 tokens. Each side gets the same token ids, `ignore_eos`, and as
many slots as the other. The server streams over HTTP, as its users have it; how to build it is at the top of
`llama_cpp.py`. The sides alternate, and a sample counts only while the machine is otherwise idle. `tok_s` counts
generated tokens.
"""
import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import tinyvllm  # noqa: F401  picks device and compiler before tinygrad looks
from llama_cpp import FORMATS, model_file
from common import QUIET, RESULTS, Busy, Failed, quiet_sample, tinyvllm_bench, write_row
from tinyvllm.cli.measurements import Trace, latencies
from tinyvllm.measure import Stopwatch, machine_name

VOCAB = 49152    # of SmolLM2


@contextmanager
def server(tools: Path, file: Path, slots: int, room: int, threads: int):
    "A llama-server that answers; yields its process and port."
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    command = [tools / 'llama-server', '-m', file, '-t', threads, '-tb', threads, '-np', slots, '-c', slots * room,
               '--host', '127.0.0.1', '--port', port]
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(process, port)
        yield process, port
    finally:
        process.terminate()
        process.wait()


def wait_until_ready(process, port: int, patience: float = 60) -> None:
    "Raises `Failed` if the server ends or says nothing."
    for _ in range(int(patience / 0.2)):
        time.sleep(0.2)
        if process.poll() is not None:
            break
        try:
            connection = http.client.HTTPConnection('127.0.0.1', port, timeout=5)
            connection.request('GET', '/health')
            if connection.getresponse().status == 200:
                return
        except OSError:
            continue
    raise Failed('llama-server does not answer')


def ask(port: int, prompt: list, answer: int, seed: int) -> Stopwatch:
    "Stream one answer; a lap for each token."
    watch = Stopwatch()
    connection = http.client.HTTPConnection('127.0.0.1', port)
    body = dict(prompt=prompt, n_predict=answer, ignore_eos=True, stream=True, cache_prompt=False, temperature=0.6,
                seed=seed)
    connection.request('POST', '/completion', json.dumps(body), {'Content-Type': 'application/json'})
    for line in connection.getresponse():
        if line.startswith(b'data: {') and not json.loads(line[6:]).get('stop'):
            watch.lap()
    return watch


def serve(port: int, trace: list) -> dict:
    "Answer all requests at once."
    with ThreadPoolExecutor(len(trace)) as pool:
        start = time.perf_counter()
        asked = [pool.submit(ask, port, prompt, answer, i) for i, (_, prompt, answer) in enumerate(trace)]
        watches = [a.result() for a in asked]
    seconds = time.perf_counter() - start
    tokens = sum(len(w.stamps) - 1 for w in watches)
    wanted = sum(answer for *_, answer in trace)
    return dict(seconds=round(seconds, 3), tok_s=round(wanted / seconds, 3), streamed=tokens, generated_tokens=wanted,
                **latencies(watches))


def sides(args):
    "Name: a function that serves the trace once and returns its row."
    trace, tools = Trace().scaled(args.scale), args.bin.resolve()
    drawn, room = trace.draw(VOCAB), trace.longest_prompt + trace.longest_answer
    common = 'serve-trace', '--no-count', '--scale', str(args.scale), '--device', 'CPU', '--model'

    def theirs(kind, slots):
        file = model_file(tools, kind)
        with server(tools, file, slots, room, args.threads) as (process, port):
            ask(port, drawn[0][1], 4, 0)
            return quiet_sample(lambda: serve(port, drawn), [process.pid], args.busy, args.patience)

    def ours(kind, slots):
        words = *common, str(model_file(tools, kind)), '--batch', str(slots)
        return quiet_sample(lambda: tinyvllm_bench(*words), (), args.busy, args.patience)
    for kind in args.formats:
        for slots in dict.fromkeys([args.slots, 1] if args.sequential else [args.slots]):
            yield f'llama.cpp {kind}', kind, slots, theirs
            if not args.theirs_only:
                yield f'tinyvllm {kind}', kind, slots, ours


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--bin', required=True, type=Path, help='where llama-server lies')
    p.add_argument('--scale', type=float, default=0.125)
    p.add_argument('--slots', type=int, default=16, help='requests at the same time')
    p.add_argument('--formats', nargs='+', default=['Q4_0', 'F16'], choices=FORMATS)
    p.add_argument('--threads', type=int, default=os.cpu_count(), help="of the server")
    p.add_argument('--samples', type=int, default=1)
    p.add_argument('--sequential', action='store_true', help='one slot too')
    p.add_argument('--theirs-only', action='store_true')
    p.add_argument('--busy', type=float, default=QUIET, help='share of the machine that others may use')
    p.add_argument('--patience', type=float, default=1800, help='seconds to wait for an idle machine, per sample')
    p.add_argument('--out', type=Path, default=RESULTS / 'trace.jsonl', help='rows are added here')
    args = p.parse_args()
    if not (args.bin / 'llama-server').is_file():
        p.error(f'{args.bin} holds no llama-server; see the top of llama_cpp.py for how to build it')
    for _ in range(args.samples):
        for name, kind, slots, run in sides(args):
            try:
                row, others = run(kind, slots)
            except (Busy, Failed) as error:
                print(f'{name}, {slots} slots: {error}', file=sys.stderr)
                continue
            keep = 'seconds', 'tok_s', 'generated_tokens', 'ttft_ms', 'between_ms', 'end_to_end_ms', 'ms_per_step'
            row = dict(engine=name.split()[0], format=kind, slots=slots, scale=args.scale, threads=args.threads,
                       **{k: row[k] for k in keep if k in row}, others=round(others, 3), machine=machine_name('CPU'))
            write_row(args.out, row)
            print(f"{name}, {slots} slots: {row['tok_s']:.1f} tok/s, first token {row['ttft_ms']}", flush=True)


if __name__ == '__main__':
    main()
