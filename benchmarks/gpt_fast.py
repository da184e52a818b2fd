"""What PyTorch makes of the same work: a LLaMA in the manner of gpt-fast, compiled, in CUDA graphs.

    python benchmarks/gpt_fast.py --json                       # the shape of TinyLlama-1.1B, on a CUDA GPU
    python benchmarks/gpt_fast.py --shape tiny --device cpu    # does it run? seconds on any machine

The recipe of gpt-fast (Pytorch Labs, 2023): a static cache for keys and values, one fused matrix for queries, keys
and values, a mask over the whole cache, greedy choice in the graph, `torch.compile` with `reduce-overhead` for one
decode step. Weights are random, from a seed. Every number is a median; decode times the host's loop too, as a user
would meet it. The rows: decode at each batch, prefill of 2048 tokens, and the two limits of the machine: a matrix
product of 8192 x 8192, and a copy. Most of its minutes are compilation. Needs torch alone.
"""
import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    "TinyLlama-1.1B."
    vocab: int = 32000
    hidden: int = 2048
    middle: int = 5632
    layers: int = 22
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 64


SHAPES = {'tinyllama-1.1b': Shape(), 'tiny': Shape(512, 64, 128, 2, 4, 2, 16)}


class Attention(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.qkv = nn.Linear(s.hidden, (s.heads + 2 * s.kv_heads) * s.head_dim, bias=False)
        self.o = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)

    def allocate(self, batch: int, length: int) -> None:
        "Zeros for the keys and values of `batch` sequences."
        like = self.o.weight
        shape = batch, self.s.kv_heads, length, self.s.head_dim
        for name in 'kv':    # buffers: a graph may write to them in place
            self.register_buffer(name, torch.zeros(shape, dtype=like.dtype, device=like.device), persistent=False)

    def forward(self, x: Tensor, rope: tuple, mask: Tensor, pos: Tensor) -> Tensor:  # (B, T, E)
        s, (B, T, _) = self.s, x.shape
        q, k, v = self.qkv(x).view(B, T, -1, s.head_dim).transpose(1, 2).split([s.heads, s.kv_heads, s.kv_heads], 1)
        q, k = rotate(q, rope), rotate(k, rope)
        self.k[:, :, pos], self.v[:, :, pos] = k, v
        if T == 1: k, v = self.k, self.v    # else the prompt itself is all there is
        k, v = (x.repeat_interleave(s.heads // s.kv_heads, dim=1) for x in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, None if T > 1 else mask, is_causal=T > 1)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


def rotate(x: Tensor, rope: tuple) -> Tensor:
    "Rotary positions, pairs (i, i + D/2)."
    (a, b), (cos, sin) = x.float().chunk(2, -1), rope
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.attention, self.norm1, self.norm2 = Attention(s), nn.RMSNorm(s.hidden, 1e-5), nn.RMSNorm(s.hidden, 1e-5)
        self.gate, self.up = (nn.Linear(s.hidden, s.middle, bias=False) for _ in range(2))
        self.down = nn.Linear(s.middle, s.hidden, bias=False)

    def forward(self, x, *args):
        x = x + self.attention(self.norm1(x), *args)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(s.vocab, s.hidden), nn.RMSNorm(s.hidden, 1e-5)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.head = nn.Linear(s.hidden, s.vocab, bias=False)
        self.head_dim = s.head_dim

    def allocate(self, batch: int, length: int) -> None:
        "Room for `batch` sequences of `length` tokens; rotary angles and the mask go with it."
        device = self.head.weight.device
        for layer in self.layers: layer.attention.allocate(batch, length)
        freqs = 10000.0 ** (-torch.arange(0, self.head_dim, 2, device=device) / self.head_dim)
        angles = torch.arange(length, device=device)[:, None] * freqs
        past = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        for name, table in dict(cos=angles.cos(), sin=angles.sin(), mask=past).items():
            self.register_buffer(name, table, persistent=False)

    def forward(self, tokens: Tensor, pos: Tensor) -> Tensor:  # (B, T), (T,) -> (B, 1) greedy ids
        x, rope = self.embedding(tokens), (self.cos[pos], self.sin[pos])
        for layer in self.layers: x = layer(x, rope, self.mask[pos], pos)
        return self.head(self.norm(x[:, -1:])).argmax(-1)


def build(shape: Shape, device: str, dtype: torch.dtype) -> Llama:
    "Seeded random weights."
    torch.manual_seed(0)
    with torch.device(device): model = Llama(shape).to(dtype).eval()
    for p in model.parameters():
        if p.dim() > 1: nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return model


def synchronize(device: str) -> None:
    if device == 'cuda': torch.cuda.synchronize()


def seconds(fn, device: str, repeat: int, warmup: int) -> float:
    "Median time of a call."
    times = []
    for _ in range(warmup + repeat):
        synchronize(device)
        start = time.perf_counter()
        fn()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:])


def decode(model: Llama, args, batch: int) -> dict:
    "Steps per second from `--context` on, in `--repeat` runs of `--tokens` steps."
    torch._dynamo.reset()
    model.allocate(batch, args.context + args.tokens)
    step = torch.compile(model, fullgraph=True, mode='reduce-overhead' if args.device == 'cuda' else 'default')
    first = torch.zeros(batch, 1, dtype=torch.int64, device=args.device)

    def run() -> None:
        token, pos = first, torch.tensor([args.context], device=args.device)
        for _ in range(args.tokens):
            token = step(token, pos).clone()    # the graph's output buffer is written again
            pos += 1
    start = time.perf_counter()
    run()
    synchronize(args.device)
    compile_s = time.perf_counter() - start
    step_s = seconds(run, args.device, args.repeat, warmup=2) / args.tokens
    read = sum(p.nbytes for n, p in model.named_parameters() if 'embedding' not in n)
    live = 2 * sum(layer.attention.k[:, :, :args.context].nbytes for layer in model.layers)
    return dict(what='decode', batch=batch, context=args.context, tokens=args.tokens, tok_s=round(batch / step_s, 1),
                ms_per_step=round(step_s * 1e3, 4), gb_s=round((read + live) / step_s / 1e9, 1),
                compile_s=round(compile_s, 1))


def prefill(model: Llama, args) -> dict:
    "One prompt of `--prompt` tokens to its first token."
    torch._dynamo.reset()
    model.allocate(1, args.prompt)
    step = torch.compile(model, fullgraph=True)
    tokens = torch.randint(model.head.out_features, (1, args.prompt), device=args.device)
    pos = torch.arange(args.prompt, device=args.device)
    spent = seconds(lambda: step(tokens, pos), args.device, args.repeat, warmup=3)
    flops = 2 * args.prompt * sum(p.numel() for n, p in model.named_parameters() if 'layers' in n and p.dim() > 1)
    return dict(what='prefill', context=args.prompt, tok_s=round(args.prompt / spent, 1), ms=round(spent * 1e3, 3),
                matrix_tflop_s=round(flops / spent / 1e12, 3))


def limits(args, dtype: torch.dtype) -> list[dict]:
    "What the machine can do at best: a large matrix product, and a copy."
    n, size = (8192, 2**30) if args.device == 'cuda' else (512, 2**26)
    a, b = (torch.randn(n, n, dtype=dtype, device=args.device) for _ in range(2))
    x = torch.ones(size, dtype=torch.uint8, device=args.device)
    y = torch.empty_like(x)
    product = seconds(lambda: a @ b, args.device, 20, warmup=5)
    copy = seconds(lambda: [y.copy_(x) for _ in range(8)], args.device, 10, warmup=3) / 8
    return [dict(what='matmul', size=n, tflop_s=round(2 * n**3 / product / 1e12, 2)),
            dict(what='copy', nbytes=size, gb_s=round(2 * size / copy / 1e9, 1))]


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--shape', default='tinyllama-1.1b', choices=list(SHAPES))
    p.add_argument('--device', default='cuda', choices=['cuda', 'cpu'])
    p.add_argument('--dtype', default='bfloat16', choices=['bfloat16', 'float16', 'float32'])
    p.add_argument('--batch', type=int, nargs='*', default=[1, 32, 256], help='for decode; default 1 32 256')
    p.add_argument('--context', type=int, default=200, help='tokens in the cache when decoding starts')
    p.add_argument('--tokens', type=int, default=56, help='steps of one run')
    p.add_argument('--prompt', type=int, default=2048, help='tokens of the prefill; 0 leaves it out')
    p.add_argument('--repeat', type=int, default=5, help='runs; medians count')
    p.add_argument('--no-limits', action='store_true', help='leave out product and copy')
    p.add_argument('--json', action='store_true', help='one JSON object a line')
    return p.parse_args()


def main() -> None:
    args = parse()
    if args.device == 'cuda' and not torch.cuda.is_available():
        sys.exit('gpt_fast.py: no CUDA GPU here; --device cpu --shape tiny shows that it runs')
    torch.set_grad_enabled(False)
    torch._inductor.config.coordinate_descent_tuning = args.device == 'cuda'    # as gpt-fast sets it
    dtype = getattr(torch, args.dtype)
    about = dict(shape=args.shape, dtype=args.dtype, torch=torch.__version__, median_of=args.repeat,
                 machine=torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU')
    model = build(SHAPES[args.shape], args.device, dtype)
    jobs = [lambda: limits(args, dtype)] * (not args.no_limits)
    jobs += [lambda b=b: [decode(model, args, b)] for b in args.batch]
    jobs += [lambda: [prefill(model, args)]] * (args.prompt > 0)
    for job in jobs:
        for row in job():
            row |= about
            print(json.dumps(row) if args.json else ', '.join(f'{k} {v}' for k, v in row.items()), flush=True)


if __name__ == '__main__':
    main()
