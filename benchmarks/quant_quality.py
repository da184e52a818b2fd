"""What do fewer bits cost? Perplexity and likeliest tokens of SmolLM2 on a text of ours, for every format.

    python benchmarks/quant_quality.py             # prints rows and adds them to benchmarks/results/quant.jsonl
    python benchmarks/quant_quality.py int4-g32    # some formats

The weights of each format are expanded to float32 and multiplied by the kernel of chapter 06b, so that nothing but the
rounding differs. Four bits are rounded with the columns' mean squares on `quant.SAMPLE`, another text; `all alike` is
without. `agree` is the share of the text's positions where the likeliest next token is the same as with f16.
The file holds four-bit weights already (Q4_1): what is measured is what a second rounding does to them.
"""
import json
import math
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ['DEV'] = 'CPU'
import tinyvllm  # noqa: F401  picks the compiler before tinygrad looks
import numpy as np
from common import RESULTS, write_row
from tinygrad import Tensor
from tinyvllm.quant import pack as Q
from tinyvllm.kernels.cpu import cpu_attend, matmul
from tinyvllm.models.llama import Linear, Llama
from tinyvllm.models.tokenizer import load_tokenizer
from tinyvllm.models.weights import open_checkpoint, resolve

ROOT = Path(__file__).resolve().parents[1]
OUT = RESULTS / 'quant.jsonl'
TEXT = ROOT / 'nbs' / 'data' / 'prose.txt'
FORMATS = ['f32', 'f16', 'stored', 'int8', 'int8-g32', 'q4_1', 'int4-g32', 'int4-g64', 'int4-g32-zp',
           'int4-g32, all alike']


class FastLinear(Linear):
    def __call__(self, x):
        y = matmul(self.weight, x)
        return y if self.bias is None else y + self.bias


class FastLlama(Llama):
    def __init__(self, config, state):
        super().__init__(config, state)
        for part in (self, *(p for layer in self.layers for p in (layer.attention, layer.mlp))):
            for name, old in vars(part).items():
                if isinstance(old, Linear):
                    setattr(part, name, FastLinear(old.weight, old.bias))


def expanded(state):
    "Every matrix as float32, and the bytes that a token reads of them packed."
    size = sum(p.nbytes() for p in state.values())
    for name, p in state.items():
        state[name] = p if isinstance(p, Tensor) else p.dequantize().contiguous().realize()
    return state, size


def measured(config, source, name, ids, care):
    "One row: what a text costs in this format."
    start = time.perf_counter()
    quant = None if name == 'stored' else name.split(',')[0]
    state = Q.packed_state(source, quant, care=None if 'alike' in name else care)
    state, size = expanded(state)
    loaded = time.perf_counter() - start
    said, best = Q.log_likelihoods(FastLlama(config, state), ids, cpu_attend)
    return {'format': name, 'perplexity': math.exp(-said.mean()), 'bytes': size, 'quantise_s': round(loaded, 1)}, said, best


def main(names):
    checkpoint = open_checkpoint(resolve('smollm2'))
    ids = load_tokenizer(checkpoint.path).encode(TEXT.read_text())
    config, _ = Q.load_packed(checkpoint)
    care = Q.sampled_care(checkpoint, config, Q.SAMPLE, None)
    _, base, likeliest = measured(config, checkpoint, 'f16', ids, care)
    for name in names:
        row, said, best = measured(config, checkpoint, name, ids, care)
        row |= {'over_f16': math.exp(base.mean() - said.mean()) - 1, 'agree': float((best == likeliest).mean()),
                'largest_difference': float(np.abs(said - base).max()), 'tokens': len(said), 'text': TEXT.name,
                'model': 'SmolLM2-135M-Instruct Q4_1', 'tinygrad': version('tinygrad')}
        print(json.dumps(row), flush=True)
        write_row(OUT, row)


if __name__ == '__main__':
    main(sys.argv[1:] or FORMATS)
