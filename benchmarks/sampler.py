"""What does the choice of a token cost, and how often does it differ from the one in float64?

    python benchmarks/sampler.py              # prints rows and adds them to benchmarks/results/sampler.jsonl
    python benchmarks/sampler.py --draws 0    # times only

The logits are SmolLM2's own, at the places of a text. `host` is `sampling.Sampler` in numpy, for one row;
`kernel` is one row of the kernel. They take turns; a row is the fastest of them. Then the draws: every
setting in turn, each with its own seed, and the ids of both compared.
"""
import argparse
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tinyvllm  # noqa: F401  picks device and compiler before tinygrad looks
from common import RESULTS, write_row
from tinygrad import Device, Tensor
from tinyvllm.models.llama import InputBatch, NoCache, dense_attend, load_model
from tinyvllm.measure import machine_name
from tinyvllm.runner.graphs import capture
from tinyvllm.kernels.sampler import pack_sampling_params, sample_tokens
from tinyvllm.kernels.top_tokens import find_top_tokens
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.sampling.sampler import Sampler, draw_uniform
from tinyvllm.models.tokenizer_files import load_tokenizer
from tinyvllm.models.hub import resolve

OUT = RESULTS / 'sampler.jsonl'
SETTINGS = {'greedy': dict(temperature=0), 'temperature 1': dict(), 'min-p 0.05': dict(min_p=0.05),
            'top-k 50': dict(top_k=50), 'top-p 0.9': dict(top_p=0.9), 'top-k 50, top-p 0.9': dict(top_k=50, top_p=0.9)}
ROWS, REPEAT = 25, 15


def real_logits(rows):
    "Logits (rows, V) of the next token, at the last places of a text."
    path = resolve('smollm2')
    text = (Path(__file__).parents[1] / 'nbs' / 'data' / 'prose.txt').read_text()
    ids = load_tokenizer(path).encode(text[:1000])[:64]
    batch = InputBatch.of(ids)
    batch.rows = Tensor(np.arange(len(ids) - rows, len(ids), dtype=np.int32))
    return load_model(path)(batch, NoCache(), dense_attend).numpy().astype(np.float32)


def drawn(logits, params, positions):
    "What the kernel chooses, for one setting a row."
    table = np.array([pack_sampling_params(p) for p in params], np.float32)
    table[:, 4] = [min(draw_uniform(p.seed, i), 1 - 2**-24) for p, i in zip(params, positions)]
    ids, parts = sample_tokens(logits, Tensor(table))
    Tensor.realize(ids, parts)
    return ids.numpy()


def fastest(*ways):
    "Seconds of each way, the best of several turns."
    best = [np.inf] * len(ways)
    for _ in range(REPEAT):
        for i, way in enumerate(ways):
            begin = time.perf_counter()
            way()
            best[i] = min(best[i], time.perf_counter() - begin)
    return best


def times(logits):
    "Microseconds of one row, on the host and in the kernel."
    x, row = Tensor(logits).realize(), logits[0]
    for name, setting in SETTINGS.items():
        params = SamplingParams(seed=1, **setting)
        table = np.array([pack_sampling_params(params)] * len(logits), np.float32)
        table[:, 4] = np.linspace(0, 0.99, len(logits))
        wanted = Tensor(table).realize()
        replay = capture(lambda: Tensor.realize(*sample_tokens(x, wanted)))
        host, kernel = fastest(lambda: Sampler(params)(row), replay)
        yield dict(what=name, host_us=round(host * 1e6), kernel_us=round(kernel / len(logits) * 1e6, 1))
    tops, = fastest(capture(lambda: Tensor.realize(*find_top_tokens(x, 20))))
    yield dict(what='20 likeliest', kernel_us=round(tops / len(logits) * 1e6, 1))


def agreement(logits, draws):
    "How many draws differ, of so many."
    x, different, settings = Tensor(logits).realize(), {name: 0 for name in SETTINGS}, list(SETTINGS.items())
    for turn in range(draws // len(logits)):
        name, setting = settings[turn % len(settings)]
        params = [SamplingParams(seed=turn * len(logits) + i, **setting) for i in range(len(logits))]
        ids = drawn(x, params, [0] * len(logits))
        different[name] += sum(Sampler(p)(row).token_id != int(i) for p, row, i in zip(params, logits, ids))
    return dict(what='draws', draws=draws, different=sum(different.values()), by_setting=different)


def main():
    args = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    args.add_argument('--draws', type=int, default=20_000, help='to compare with float64')
    args = args.parse_args()
    logits = real_logits(ROWS)
    rows = [*times(logits), *([agreement(logits, args.draws)] if args.draws else [])]
    about = dict(model='SmolLM2-135M', vocab=logits.shape[1], machine=machine_name(Device.DEFAULT),
                 device=Device.DEFAULT, tinygrad=version('tinygrad'))
    for row in rows:
        print(row)
        write_row(OUT, row | about)


if __name__ == '__main__':
    main()
