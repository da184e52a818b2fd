"""What do fewer bits cost? Perplexity and likeliest tokens of SmolLM2 on a text of ours, for every format.

    python benchmarks/quant_quality.py             # prints rows and adds them to benchmarks/results/quant.jsonl
    python benchmarks/quant_quality.py int4-g32    # some formats

The weights of each format are expanded to float32 and multiplied by the kernel of chapter 06b, so that nothing but the
rounding differs. Four bits are rounded with the columns' mean squares on `quant.calibrate.CALIBRATION_TEXT`, another text; `all alike` is
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
from tinyvllm.quant.calibrate import CALIBRATION_TEXT, calibrate_importance, log_likelihoods
from tinyvllm.quant.load import load_packed, packed_state
from tinyvllm.quant.pack import PackedLlama
from tinyvllm.kernels.cpu import cpu_attend, matmul
from tinyvllm.models.llama import Linear, Llama
from tinyvllm.models.tokenizer_files import load_tokenizer
from tinyvllm.models.weights import open_checkpoint
from tinyvllm.models.hub import resolve

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


def measured(config, source, name, ids, importance):
    "One row: what a text costs in this format."
    start = time.perf_counter()
    quant = None if name == 'stored' else name.split(',')[0]
    state = packed_state(source, quant, importance=None if 'alike' in name else importance)
    state, size = expanded(state)
    loaded = time.perf_counter() - start
    found, best = log_likelihoods(FastLlama(config, state), ids, cpu_attend)
    return {'format': name, 'perplexity': math.exp(-found.mean()), 'bytes': size, 'quantise_s': round(loaded, 1)}, found, best


def main(names):
    checkpoint = open_checkpoint(resolve('smollm2'))
    ids = load_tokenizer(checkpoint.path).encode(TEXT.read_text())
    config, _ = load_packed(checkpoint)
    importance = calibrate_importance(lambda: PackedLlama(config, packed_state(checkpoint)), checkpoint.path, CALIBRATION_TEXT)
    _, base, likeliest = measured(config, checkpoint, 'f16', ids, importance)
    for name in names:
        row, found, best = measured(config, checkpoint, name, ids, importance)
        row |= {'over_f16': math.exp(base.mean() - found.mean()) - 1, 'agree': float((best == likeliest).mean()),
                'largest_difference': float(np.abs(found - base).max()), 'tokens': len(found), 'text': TEXT.name,
                'model': 'SmolLM2-135M-Instruct Q4_1', 'tinygrad': version('tinygrad')}
        print(json.dumps(row), flush=True)
        write_row(OUT, row)


if __name__ == '__main__':
    main(sys.argv[1:] or FORMATS)
