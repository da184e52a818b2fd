"""llama.cpp and tinyvllm on the same processor, in turn.

    python benchmarks/llama_cpp.py --bin BUILD/bin          # adds rows to benchmarks/results/llama_cpp.jsonl
    python benchmarks/llama_cpp.py --bin BUILD/bin --only decode --formats Q4_0 Q4_1 --threads 1

llama.cpp is not a dependency. Its source is in the source archive of llama-cpp-python; a native build:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B BUILD -DCMAKE_BUILD_TYPE=Release -DGGML_OPENMP=OFF \\
      -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DBUILD_SHARED_LIBS=OFF
    cmake --build BUILD --target llama-bench llama-batched-bench llama-quantize llama-server

Columns: decoding one sequence behind a prompt of 64 tokens, reading 512 tokens, decoding 8, 16 and 32 sequences.
One sample is one process; theirs and ours alternate, and a sample counts only while the machine is otherwise idle
(`peers.py`). A row has the medians, their ratio, and the share of the measured read bandwidth that each reaches:
weights once a step and the live keys and values, times steps per second. SmolLM2 is written in the other formats by
`llama-quantize`, once, beside the model in the cache. Both sides read the same file, and compute with what is in it.
"""
import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

import tinyvllm  # noqa: F401  picks device and compiler before tinygrad looks
from common import QUIET, RESULTS, in_turn, output, quiet_sample, tinyvllm_bench, write_row
from tinyvllm.measure import machine_name, read_bandwidth
from tinyvllm.models.hub import cache_dir, resolve

FORMATS = 'Q4_0', 'Q4_1', 'Q8_0', 'F16', 'F32'
CONTEXT, TOKENS, PROMPT = 64, 32, 512
BATCHES = 8, 16, 32
KV_ELEMENTS = 2 * 30 * 3 * 64    # of one token of SmolLM2-135M


def model_file(tools: Path, kind: str) -> Path:
    "SmolLM2 in one of llama.cpp's formats."
    source = resolve('smollm2')
    if kind == 'Q4_1':
        return source
    path = cache_dir() / 'llama.cpp' / f'smollm2-{kind}.gguf'
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix('.part')
        output([tools / 'llama-quantize', '--allow-requantize', source, part, kind, '1'])
        part.rename(path)
    return path


def llama_bench(tools: Path, file: Path, threads: int, *what) -> float:
    "Tokens per second of `llama-bench`."
    text = output([tools / 'llama-bench', '-m', file, '-t', threads, '-r', '1', '-o', 'json', *what])
    return json.loads(text)[0]['avg_ts']


def llama_batched(tools: Path, file: Path, threads: int, batch: int) -> float:
    "Total tokens per second of decoding in `llama-batched-bench`."
    text = output([tools / 'llama-batched-bench', '-m', file, '-t', threads, '-tb', threads, '-npp', CONTEXT,
                   '-ntg', TOKENS, '-npl', batch, '-c', batch * (CONTEXT + TOKENS), '--output-format', 'jsonl'])
    return next(json.loads(s)['speed_tg'] for s in text.splitlines() if s.startswith('{'))


def ours(file: Path, what: str, *args) -> float:
    "Tokens per second of `tinyvllm bench`."
    return tinyvllm_bench(what, '--model', str(file), '--repeat', '1', '--device', 'CPU', '--no-count',
                          *args)['tok_s']


def columns(tools: Path, file: Path, threads: int) -> dict:
    "Column: (sequences, tokens in the cache, their call, our call)."
    decode = '--context', str(CONTEXT), '--tokens', str(TOKENS)
    bench = partial(llama_bench, tools, file, threads)
    table = {
        'decode': (1, CONTEXT + TOKENS // 2, lambda: bench('-p', '0', '-n', TOKENS, '-d', CONTEXT),
                   lambda: ours(file, 'decode', *decode)),
        'prefill': (1, 0, lambda: bench('-p', PROMPT, '-n', '0'),
                    lambda: ours(file, 'prefill', '--context', str(PROMPT))),
    }
    for b in BATCHES:
        table[f'batch {b}'] = (b, CONTEXT + TOKENS // 2, partial(llama_batched, tools, file, threads, b),
                               partial(ours, file, 'decode', *decode, '--batch', str(b)))
    return table


def share(tok_s, weights, batch, context, kv_size, bandwidth):
    "Of the read bandwidth, for what has to be read."
    return tok_s and round(tok_s * (weights / batch + context * KV_ELEMENTS * kv_size) / bandwidth, 3)


def measure(args, tools, kind, threads, bandwidth) -> None:
    "All columns of one format and number of threads."
    file = model_file(tools, kind)
    version = output([tools / 'llama-bench', '-m', file, '-p', '0', '-n', '1', '-r', '1', '-o', 'json'])
    about = json.loads(version)[0]
    for column, (batch, context, theirs, mine) in columns(tools, file, threads).items():
        if args.only and column.split()[0] not in args.only:
            continue
        print(f'{column}, {kind}, {threads} threads', file=sys.stderr)
        sides = {'llama.cpp': theirs} | ({} if args.theirs_only else {'tinyvllm': mine})
        speed, notes = in_turn(sides, args.samples, most=args.busy, patience=args.patience)
        them, us = speed['llama.cpp'], speed.get('tinyvllm')
        reads = partial(share, weights=about['model_size'], batch=batch, context=context, bandwidth=bandwidth)
        row = dict(column=column, format=kind, threads=threads, llama_cpp=them, tinyvllm=us,
                   ratio=them and us and round(us / them, 3), read_gb_s=round(bandwidth / 1e9, 1),
                   llama_cpp_share=None if column == 'prefill' else reads(them, kv_size=2),
                   tinyvllm_share=None if column == 'prefill' else reads(us, kv_size=4),
                   median_of=args.samples, machine=machine_name('CPU'), **notes,
                   peer=f"llama.cpp {about['build_commit']} of llama-cpp-python 0.3.36")
        write_row(args.out, row)
        print(f"{column:10} {kind:5} {threads} threads: llama.cpp {them and round(them, 1)}, "
              f"tinyvllm {us and round(us, 1)}, ratio {row['ratio']}", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--bin', required=True, type=Path, help='folder of llama-bench and the others')
    p.add_argument('--formats', nargs='+', default=list(FORMATS[:4]), choices=FORMATS)
    p.add_argument('--threads', nargs='+', type=int, default=sorted({1, os.cpu_count()}))
    p.add_argument('--only', nargs='+', choices=['decode', 'prefill', 'batch'], help='these columns')
    p.add_argument('--samples', type=int, default=3, help='of each side; medians count')
    p.add_argument('--theirs-only', action='store_true', help='measure llama.cpp alone')
    p.add_argument('--out', type=Path, default=RESULTS / 'llama_cpp.jsonl', help='rows are added here')
    p.add_argument('--busy', type=float, default=QUIET, help='share of the machine that others may use')
    p.add_argument('--patience', type=float, default=1800, help='seconds to wait for an idle machine, per sample')
    args = p.parse_args()
    missing = [n for n in ('llama-bench', 'llama-batched-bench', 'llama-quantize') if not (args.bin / n).is_file()]
    if missing:
        p.error(f'{args.bin} holds no {", no ".join(missing)}; see the top of this file for how to build them')
    for threads in args.threads:
        read = partial(read_bandwidth, threads=threads)
        bandwidth = quiet_sample(read, most=args.busy, patience=args.patience)[0]
        for kind in args.formats:
            measure(args, args.bin.resolve(), kind, threads, bandwidth)


if __name__ == '__main__':
    main()
