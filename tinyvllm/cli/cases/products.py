"""Cases of what a matrix of weights is for: products, rows as numbers, and the norm before them, in every format.

The weights are drawn as they lie in memory, codes and scales; what they mean is computed in float64.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import lcm

import numpy as np
from tinygrad import Tensor, dtypes

from tinyvllm.cli.cases.sampling import replay_launches
from tinyvllm.kernels.cases import (SIMULATED, Case, CaseLimits, cancelling, chain_launches, make_large_tensor,
                                    random_normal)
from tinyvllm.quant.formats import Format, format_of, pack_2bit, pack_4bit
from tinyvllm.quant.pack import Packed

__all__ = ['EPS', 'FORMAT_NAMES', 'RMS_NORM', 'NormCases', 'ProductCases', 'RowCases', 'SwigluCases', 'call_product',
           'draw_product', 'expected_product', 'make_large_parts', 'pack_parts', 'random_parts', 'shrink_parts',
           'step_of', 'take_parts']

FORMAT_NAMES = ('f32', 'f16', 'bf16', 'int8', 'int8-g32', 'int4-g32', 'int4-g64', 'int4-g32-zp', 'q4_1', 'q4_k', 'q6_k')
EPS = 0.1      # of a norm: large, so that it shows
# What comes before and after a product: of queries, keys and values; of what is added to the residual; of neither.
EXTRAS = ('norm',), ('norm', 'bias'), ('add',), ('bias', 'add'), (), ('bias',)
TOKENS = {'lanes': (1, 3, 2, 5, 8, 4, 7, 11), 'tiles': (9, 33, 16, 40, 10, 8, 23, 70),
          'stream': (1, 3, 8, 17, 33, 64, 2, 9), '': (1, 7, 2, 13, 50, 3, 6, 61)}
ROWS = {True: (11, 24, 43, 67, 20, 1, 130, 30), False: (11, 576, 43, 1067, 130, 1, 2200, 96)}   # simulated: smaller
COLUMNS = (264, 1100, 40, 520, 136, 2080, 96, 1536)


def step_of(name: str) -> int:
    "A row in this format has a multiple of so many weights, and of 8: kernels of GPUs load 8."
    return lcm(8, format_of(name).step)


def random_halves(rng: np.random.Generator, *shape: int, scale: float = 0.1) -> np.ndarray:
    "Draw scales of both signs; none is so small that a half can hardly hold it."
    x = rng.standard_normal(shape) * scale
    return (x + np.sign(x) * scale / 8).astype(np.float16)


def repeat(x: np.ndarray, n: int) -> np.ndarray:
    "Give each of the n columns that share a number a copy of it, in float64."
    return np.repeat(x.astype(np.float64), n, axis=1)


def random_parts(
    rng: np.random.Generator,
    name: str, # of a format
    N: int, # rows
    K: int, # columns, a multiple of `step_of(name)`
) -> tuple[list[np.ndarray], np.ndarray]: # parts as `Packed` has them; weights (N, K), float64
    "Draw a matrix in a format, every code and every scale that it can have."
    f = format_of(name)
    if name == 'bf16':
        w = rng.standard_normal((N, K)).astype(np.float32).view(np.uint32) & 0xffff0000
        return [(w >> 16).astype(np.uint16)], w.view(np.float32).astype(np.float64)
    if f.bits >= 16:
        w = (rng.standard_normal((N, K)) / 2).astype(np.float16 if f.bits == 16 else np.float32)
        return [w], w.astype(np.float64)
    if '_k' in f.scales: return random_super_blocks(rng, f, N, K)
    group = f.group or K
    if f.bits == 8:
        q, d = rng.integers(-128, 128, (N, K)).astype(np.int8), random_halves(rng, N, K // group, scale=0.01)
        return [q, d], q * repeat(d, group)
    q, d = rng.integers(0, 16, (N, K)), random_halves(rng, N, K // group)
    if f.scales == 'scale': return [pack_4bit(q), d], (q - 8) * repeat(d, group)
    if f.scales == 'min':
        low = random_halves(rng, N, K // group)
        return [pack_4bit(q), np.stack([d, low], -1)], q * repeat(d, group) + repeat(low, group)
    zeros = rng.integers(0, 17, d.shape).astype(np.uint8)
    return [pack_4bit(q), d, zeros], (q - repeat(zeros, group)) * repeat(d, group)


def random_super_blocks(rng: np.random.Generator, f: Format, N: int, K: int) -> tuple[list[np.ndarray], np.ndarray]:
    "Draw a matrix whose groups' scales are whole numbers, scaled by one or two halves for 256 weights."
    if f.scales == 'q4_k':
        supers = random_halves(rng, N, K // 256, 2, scale=0.005)
        s, q = rng.integers(0, 64, (N, K // 32, 2)).astype(np.uint8), rng.integers(0, 16, (N, K))
        a, b = (repeat(supers[..., i], 8) * s[..., i] for i in range(2))
        return [pack_4bit(q), supers, s], q * repeat(a, 32) - repeat(b, 32)
    supers, q = random_halves(rng, N, K // 256, scale=5e-4), rng.integers(0, 64, (N, K))
    s = rng.integers(-128, 128, (N, K // 16)).astype(np.int8)
    high = pack_2bit((q >> 4).astype(np.uint8))
    return [pack_4bit(q & 15), high, supers, s], (q - 32) * repeat(repeat(supers, 16) * s, 16)


def pack_parts(
    name: str, # of a format
    parts: list[Tensor], # on a device
    K: int, # columns
) -> Packed:
    "Put parts together to a matrix; the bits of bfloat16 come as whole numbers."
    if name == 'bf16':
        parts = [parts[0].bitcast(dtypes.bfloat16)]
    return Packed(format_of(name), (parts[0].shape[0], K), tuple(parts))


def take_parts(tensors: dict[str, Tensor]) -> list[Tensor]:
    "Return the parts of the matrix among the arguments of a case."
    return [tensor for name, tensor in tensors.items() if name.startswith('part')]


def expected_product(
    w: np.ndarray, # (N, K) float64
    x: np.ndarray, # (T, K)
    gated: bool, # half of the rows are gates of the others
    eps: float, # of the norm
    norm: np.ndarray | None = None, # (K,)
    bias: np.ndarray | None = None, # (N,)
    add: np.ndarray | None = None, # (T, N)
) -> np.ndarray: # (T, N), or (T, N / 2)
    "Compute `rmsnorm(x) @ w.T + bias + add`, or `silu(gate) * up`, in float64."
    y = x.astype(np.float64)
    if norm is not None:
        y = y / np.sqrt((y * y).mean(-1, keepdims=True) + eps) * norm
    y = y @ w.T
    if gated:
        gate, up = np.split(y, 2, axis=1)
        y = gate / (1 + np.exp(-gate)) * up
    return sum((more.astype(np.float64) for more in (bias, add) if more is not None), y)


def draw_product(
    rng: np.random.Generator,
    n: int, # which tokens, rows and columns
    dtype: str, # of the tokens
    limits: CaseLimits,
    name: str, # of the format
    rung: str, # of the kernels for GPUs
    gated: bool, # half of the rows are gates of the others
    extras: tuple[str, ...], # of norm, bias and add
) -> Case:
    "Draw few or many tokens, rows that fill no tile, columns that fill no simdgroup's step."
    at = n % len(COLUMNS)
    K = -(-COLUMNS[at] // step_of(name)) * step_of(name)
    T, N, unit = TOKENS[rung][at], ROWS[limits is SIMULATED][at], 1.0
    if gated:    # gates of about 1, where silu bends
        N, unit = 2 * max(N, 24), 2 * K**-0.5
    parts, w = random_parts(rng, name, N, K)
    x = random_normal(rng, dtype, T, K)
    more = dict(norm=(unit * (1 + rng.standard_normal(K) / 4)).astype(np.float32),
                bias=(10 * rng.standard_normal(N)).astype(np.float32), add=10 * random_normal(rng, dtype, T, N))
    more = {key: value for key, value in more.items() if key in extras}
    inputs = {f'part {i}': part for i, part in enumerate(parts)} | dict(x=x) | more
    return Case(inputs, (expected_product(w, x, gated, EPS, **more),), call=partial(call_product, name, rung))


def call_product(
    name: str, # of the format
    rung: str, # of the kernels for GPUs; '': the launcher has none
    launch: Callable, # of linear or swiglu
    tensors: dict[str, Tensor], # of a case
) -> Tensor:
    "Put the matrix together; hand over what there is."
    more = {key: tensors[key] for key in ('norm', 'bias', 'add') if key in tensors}
    if 'norm' in more:
        more['eps'] = EPS
    if rung:
        more['rung'] = rung
    return launch(tensors['x'], pack_parts(name, take_parts(tensors), tensors['x'].shape[1]), **more)


@dataclass(frozen=True)
class ProductCases:
    "`launch(x, w, norm, eps, bias, add)`: a product with what a model has around it."
    format: str       # of the weights
    rung: str = ''    # of the kernels for GPUs: lanes, stream or tiles
    columns: int = 0  # of a row with a long sum; 0: many small matrices

    @property
    def shapes(self) -> int:
        "As many as there are sizes, and more than there are kinds of extras; long sums come with a norm and without."
        return 2 if self.columns else len(COLUMNS)

    @property
    def variant(self) -> str:
        "Which kernel of the family."
        return ' '.join(filter(None, (self.rung, self.format, 'long' if self.columns else '')))

    def make_case(self, rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw a small matrix; or a row whose sum is far beyond a half, before the second half of it takes that away."
        extras = EXTRAS[n % len(EXTRAS)]
        if not self.columns: return draw_product(rng, n, dtype, limits, self.format, self.rung, False, extras)
        columns, norm = self.columns >> (n % 2), {}
        parts, w = random_parts(rng, self.format, 1, columns)
        x = cancelling(rng, w[0]).astype(dtype)[None]
        if n % 2:
            norm['norm'] = (1 + rng.standard_normal(columns) / 4).astype(np.float32)
        inputs = {f'part {i}': part for i, part in enumerate(parts)} | dict(x=x) | norm
        want = expected_product(w, x, False, EPS, **norm)
        return Case(inputs, (want,), call=partial(call_product, self.format, self.rung))

    def make_load(self, launch: Callable, dtype: str) -> tuple[Callable, int, int]:
        "Return a chain of products over 16 matrices, its launches, and the bytes that one must move."
        size, count, T = 2048, 16, {'tiles': 128, 'stream': 8}.get(self.rung, 1)
        matrices = [pack_parts(self.format, make_large_parts(self.format, size, size), size) for _ in range(count)]
        x, how = make_large_tensor((T, size), dtype), dict(rung=self.rung) if self.rung else {}
        return chain_launches(partial(launch, **how), x, matrices), count, matrices[0].nbytes() + 2 * x.nbytes()


@dataclass(frozen=True)
class SwigluCases:
    "`launch(x, w, norm, eps)`: `silu(gate) * up`, in each format in turn."
    formats: tuple[str, ...]    # of the weights
    rung: str = ''              # of the kernels for GPUs

    @property
    def shapes(self) -> int:
        "One for each format."
        return len(self.formats)

    @property
    def variant(self) -> str:
        "Which kernel of the family."
        return self.rung

    def make_case(self, rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw a matrix in the n-th format, with a norm before it: as a model has it."
        return draw_product(rng, n, dtype, limits, self.formats[n % self.shapes], self.rung, True, ('norm',))

    def make_load(self, launch: Callable, dtype: str) -> tuple[Callable, int, int]:
        "Return launches over a matrix of 4,096 rows in 4 bits, and the bytes that one must move."
        size, T = 2048, {'tiles': 128, 'stream': 8}.get(self.rung, 1)
        w = pack_parts('int4-g32', make_large_parts('int4-g32', 2 * size, size), size)
        x, how = make_large_tensor((T, size), dtype), dict(rung=self.rung) if self.rung else {}
        return replay_launches(lambda: launch(x, w, **how), 8), 8, w.nbytes() + 2 * x.nbytes()


def shrink_parts(parts: list[np.ndarray], w: np.ndarray) -> list[np.ndarray]:
    "Scale a matrix so that a product is about as large as what goes in."
    shrink = 1 / np.sqrt((w * w).mean() * w.shape[1])
    return [(p * shrink).astype(p.dtype) if p.dtype.kind == 'f' else p for p in parts]


def make_large_parts(name: str, N: int, K: int) -> list[Tensor]:
    "Draw 64 rows of a matrix that changes no sizes, and repeat them."
    parts = shrink_parts(*random_parts(np.random.default_rng(0), name, 64, K))
    return [Tensor(p).realize().repeat(N // 64, *[1] * (p.ndim - 1)).contiguous().realize() for p in parts]


@dataclass(frozen=True)
class RowCases:
    "`launch(w, tokens, dtype)`, or `launch('all_rows', w, dtype)`: rows of a matrix, in each format in turn."
    formats: tuple[str, ...]    # of the weights
    picked: bool = True         # rows of tokens; else all of them
    unknown: str = ''           # a token that is none gives the nearest row ('clamped') or 'zeros'

    @property
    def variant(self) -> str:
        "Of a launcher that can do both."
        return '' if self.picked else 'all'

    @property
    def shapes(self) -> int:
        "One for each format."
        return len(self.formats)

    def make_case(self, rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw a matrix in the n-th format, first and last rows among the tokens; rows fill no threadgroup."
        name = self.formats[n % self.shapes]
        N, K = (13, 37)[n % 2], step_of(name) * (1 + n % 3)
        parts, w = random_parts(rng, name, N, K)
        inputs = {f'part {i}': part for i, part in enumerate(parts)}
        if not self.picked: return Case(inputs, (w,), call=partial(self.call, name, K, dtype))
        tokens = np.append([N - 1, 0, -3, N, N + 2], rng.integers(0, N, 1 + n)).astype(np.int32)
        rows = w[tokens.clip(0, N - 1)]
        if self.unknown == 'zeros':
            rows[2:5] = 0
        return Case(inputs | dict(tokens=tokens), (rows,), call=partial(self.call, name, K, dtype))

    @staticmethod
    def call(name: str, K: int, dtype: str, launch: Callable, tensors: dict[str, Tensor]) -> Tensor:
        "Put the matrix together, and say which type the rows are to have."
        w, kind = pack_parts(name, take_parts(tensors), K), getattr(dtypes, dtype)
        return launch(w, tensors['tokens'], kind) if 'tokens' in tensors else launch('all_rows', w, kind)

    def make_load(self, launch: Callable, dtype: str) -> tuple[Callable, int, int]:
        "Return launches over all rows of a matrix of 4 bits, or 2,048 of them, and the bytes that one must move."
        size, kind = 2048, getattr(dtypes, dtype)
        w = pack_parts('int4-g32', make_large_parts('int4-g32', size, size), size)
        order = np.random.default_rng(0).permutation(size).astype(np.int32)
        tokens = [Tensor(order).realize()] if self.picked else []

        names = [] if self.picked else ['all_rows']
        order = tokens + [kind] if self.picked else [kind]
        return replay_launches(lambda: launch(*names, w, *order), 8), 8, w.nbytes() + size * size * kind.itemsize


class NormCases:
    "`launch(x, norm, eps)`: RMSNorm of each token; numbers so large that a half cannot hold a square."
    variant, shapes = '', 4

    @staticmethod
    def make_case(rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw rows of 8 to a few thousand numbers, in the hundreds every other time."
        T, K = (5, 1, 3, 2)[n % 4], (72, 1032, 8, 4104)[n % 4]
        x = (random_normal(rng, 'float32', T, K) * (300 if n % 2 else 1)).astype(dtype)
        norm = (1 + rng.standard_normal(K) / 4).astype(np.float32)
        wide = x.astype(np.float64)
        want = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + EPS) * norm
        return Case(dict(x=x, norm=norm), (want,), call=lambda launch, tensors: launch(*tensors.values(), EPS))

    @staticmethod
    def make_load(launch: Callable, dtype: str) -> tuple[Callable, int, int]:
        "Return a chain of norms over 2,048 tokens, its launches, and the bytes that one must move."
        x, norm = make_large_tensor((2048, 2048), dtype), make_large_tensor((2048,), 'float32')
        chain = chain_launches(lambda y, weight: launch(y, weight, EPS), x, [norm] * 8)
        return chain, 8, 2 * x.nbytes() + norm.nbytes()


RMS_NORM = NormCases()
