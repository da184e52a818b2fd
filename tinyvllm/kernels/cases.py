"""Random cases of kernels, each with its result in float64 numpy, and large inputs to time the same kernels.

An operation (`MATVEC`, `MATMUL`, `KV_WRITE`, `DECODE`, `PREFILL`, `PREFILL_STARTS`) has two methods: `make_case` draws
small inputs and computes what the kernel must return; `make_load` gives a chain of launches on inputs larger than a
cache. `shapes` says after how many cases all kinds of shapes were there, `variant` what the rows of a table call it.
In cases of attention block 0 and all slots without a token hold NaN: a kernel that reads them returns NaN.
`tinyvllm.cli.cases` has the operations of a model's step; they need what is built upon the kernels.
"""
from collections.abc import Callable
from dataclasses import dataclass, field
from math import gcd, prod

import numpy as np
from tinygrad import Tensor

from tinyvllm.kernels.sparse import SparseArray

__all__ = ['DECODE', 'KV_WRITE', 'MATMUL', 'MATVEC', 'PREFILL', 'PREFILL_STARTS', 'REAL', 'SIMULATED', 'AttentionCases',
           'Case', 'CaseLimits', 'KVWriteCases', 'MatmulCases', 'call_launcher', 'cancelling', 'chain_launches',
           'make_large_tensor', 'mixed_shape', 'reference_attention', 'relative_error']

HEAD_DIMS, GROUPS, BLOCK_SIZES = (64, 80, 96, 128), (1, 3, 4, 8), (8, 16, 32)


@dataclass(frozen=True)
class CaseLimits:
    "How large a case may be: a GPU takes large ones, a simulator small ones."
    context: int  # most tokens of a sequence
    tokens: int   # of a decode step
    chunk: int    # tokens of a prompt's step
    width: int    # rows and columns of a matrix, at most


REAL, SIMULATED = CaseLimits(320, 12, 100, 1536), CaseLimits(40, 3, 12, 160)


def call_launcher(
    launch: Callable, # of a kernel
    tensors: dict[str, Tensor], # its arguments, in its order
) -> Tensor | tuple[Tensor, ...]:
    "Call a launcher that takes tensors and nothing else."
    return launch(*tensors.values())


@dataclass(frozen=True)
class Case:
    "Arguments of a kernel, and the results that it must return."
    inputs: dict[str, np.ndarray | SparseArray]   # in the launcher's order
    want: tuple[np.ndarray | SparseArray, ...]    # float64, one for each output
    skip: int = 0                                 # rows of each output that may hold anything
    call: Callable = call_launcher                # (launch, tensors by name): how the launcher takes them
    simulation: dict = field(default_factory=dict)    # arguments of `metalsim.launching`, where METAL is simulated

    def __str__(self) -> str:
        return ', '.join(f'{name} {"x".join(map(str, x.shape))}' for name, x in self.inputs.items())


def relative_error(
    got: np.ndarray, # what a kernel wrote
    want: np.ndarray, # float64; NaN where a NaN must stay
) -> float:
    "Return the largest error as a share of the largest value; infinity where NaNs, infinities or shapes differ."
    got, want = got.astype(np.float64), want.astype(np.float64)
    if got.shape != want.shape or not np.array_equal(np.isnan(got), np.isnan(want)):
        return float('inf')
    endless, kept = np.isinf(got) | np.isinf(want), np.isfinite(got) & np.isfinite(want)
    if (got[endless] != want[endless]).any():
        return float('inf')
    return float(np.abs(got[kept] - want[kept]).max(initial=0) / np.abs(want[kept]).max(initial=1e-30))


def mixed_shape(n: int) -> tuple[int, int, int, int]:
    """Return head dimension, queries per KV head, KV heads and block size of the n-th of 48 shapes.

    The first four have every value, the first sixteen every head dimension with every group and block size.
    """
    return HEAD_DIMS[n % 4], GROUPS[(n + n // 4) % 4], (2, 1, 3, 2, 1)[n % 5], BLOCK_SIZES[n % 3]


def random_normal(rng: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    "Draw standard normal numbers, already rounded to the dtype, so that the oracle sees what the kernel sees."
    return rng.standard_normal(shape).astype(dtype)


def make_large_tensor(
    shape: tuple[int, ...], # of the tensor
    dtype: str, # 'float16' or 'float32'
    scale: float = 1.0, # the numbers' standard deviation
) -> Tensor: # a realized buffer on the default device
    "Fill a large tensor quickly: up to a million random numbers, repeated."
    n = prod(shape)
    block = random_normal(np.random.default_rng(0), dtype, gcd(n, 2**20)) * np.dtype(dtype).type(scale)
    return Tensor(block).realize().expand(n // len(block), -1).contiguous().reshape(shape).realize()


def cancelling(
    rng: np.random.Generator,
    w: np.ndarray, # (K,) weights
) -> np.ndarray: # (K,) float64 with few bits, for halves
    """Draw numbers whose products with w sum up to far more than a half can hold, and then back to 20,000.

    A sum in float32 keeps what is left; in half it is infinite by then."""
    up, down = slice(len(w) // 2), slice(len(w) // 2, None)
    x = 300 / np.abs(w).mean() * np.sign(w) * rng.uniform(2 / 3, 4 / 3, len(w))
    x[down] *= (20_000 - w[up] @ x[up]) / (w[down] @ x[down])
    return x


def chain_launches(
    launch: Callable, # of a tensor and an item: the next tensor
    first: Tensor, # the first launch reads
    items: list, # one for each launch, such as its matrix
) -> Callable[[], Tensor]: # realizes what the last launch writes
    "Return a function that launches once for each item, on what the launch before has written."
    def chain() -> Tensor:
        y = first
        for item in items:
            y = launch(y, item)
        return y.realize()
    return chain


@dataclass(frozen=True)
class MatmulCases:
    "`launch(w, x)`: `w @ x` for a vector x, or `x @ w.T` for up to `max_tokens` rows of x."
    max_tokens: int = 0   # 0: x is a vector
    columns: int = 0      # of a matrix of one row with a long sum; 0: many small matrices
    shapes = 4

    @property
    def variant(self) -> str:
        "Of sums that are long."
        return 'long' if self.columns else ''

    def make_case(self, rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw a matrix of 1, few, an odd number of or many rows; columns as heads and hidden sizes have them."
        if self.columns:
            w = random_normal(rng, dtype, 1, self.columns)
            x = cancelling(rng, w[0].astype(np.float64)).astype(dtype)
            return Case(dict(w=w, x=x[None] if self.max_tokens else x), (w.astype(np.float64) @ x,))
        rows = min((1, 8, 67, 576, 129)[n % 5], limits.width)
        columns = min((64, 576, 96, 1536, 128, 320)[n % 6], limits.width)
        tokens = (1 + n % self.max_tokens,) if self.max_tokens else ()
        w, x = random_normal(rng, dtype, rows, columns), random_normal(rng, dtype, *tokens, columns)
        return Case(dict(w=w, x=x), (x.astype(np.float64) @ w.astype(np.float64).T,))

    def make_load(self, launch: Callable, dtype: str) -> tuple[Callable, int, int]:
        "Return a chain of 64 products over 16 matrices, its launches, and the bytes that one must move."
        size, count = 2048, 16
        tokens = (self.max_tokens,) if self.max_tokens else ()
        x = make_large_tensor((*tokens, size), dtype)
        matrices = [make_large_tensor((size, size), dtype, size**-0.5) for _ in range(count)]
        chain = chain_launches(lambda y, w: launch(w, y), x, matrices * 4)
        return chain, 4 * count, matrices[0].nbytes() + 2 * x.nbytes()


class KVWriteCases:
    "`launch(k_pool, v_pool, k, v, slots)`: keys and values go into their slots; all other slots but block 0 stay."
    variant, shapes = '', 4

    @staticmethod
    def make_case(rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw tokens and slots; a fifth of the tokens is padding, which goes to slot 0."
        D, _, K, S = mixed_shape(n)
        tokens, num_slots = 1 + 5 * limits.tokens * (n % 3), (3 + 5 * limits.tokens * 2 // S) * S
        pools = [random_normal(rng, dtype, num_slots, K, D) for _ in 'kv']
        for pool in pools:
            pool[:S] = pool[rng.integers(0, num_slots, 3)] = np.nan
        k, v = (random_normal(rng, dtype, tokens, K, D) for _ in 'kv')
        slots = rng.permutation(np.arange(S, num_slots))[:tokens].astype(np.int32)
        padding = rng.random(tokens) < 0.2
        slots[padding], k[padding], v[padding] = 0, 1, 1   # alike, as in the engine
        want = [pool.astype(np.float64) for pool in pools]
        for pool, new in zip(want, (k, v)):
            pool[slots] = new
        inputs = dict(k_pool=pools[0], v_pool=pools[1], k=k, v=v, slots=slots)
        return Case(inputs, tuple(pool[S:] for pool in want), skip=S)

    @staticmethod
    def make_load(launch: Callable, dtype: str) -> tuple[Callable, int, int]:
        "Return a chain of 32 launches that write 2,048 tokens each, its launches, and the bytes that one must move."
        K, D, tokens, count = 8, 64, 2048, 16
        pools = [make_large_tensor((tokens * count, K, D), dtype) for _ in 'kv']
        new = [make_large_tensor((tokens, K, D), dtype) for _ in 'kv']
        order = np.random.default_rng(0).permutation(tokens * count).astype(np.int32)
        parts = [Tensor(part).realize() for part in order.reshape(count, tokens)]

        def chain() -> Tensor:
            k, v = pools
            for slots in parts * 2:
                k, v = launch(k, v, *new, slots)
            return k.realize(v)
        return chain, 2 * count, 4 * new[0].nbytes() + 4 * tokens


def reference_attention(q, k, v, tables, owners, positions, starts=None) -> np.ndarray:
    "Compute paged attention in float64, sequence by sequence: (T, H, D); tokens after the last start get 0."
    out, S, (K, D) = np.zeros(q.shape), k.shape[1], k.shape[2:]
    real = np.arange(len(q)) < (len(q) if starts is None else starts[-1])
    for owner in np.unique(owners[real]):
        rows = np.flatnonzero(real & (owners == owner))
        past = np.arange(positions[rows].max() + 1)
        at = tables[owner, past // S], past % S
        keys, values = (x[at].astype(np.float64).swapaxes(0, 1) for x in (k, v))             # (K, L, D)
        heads = q[rows].astype(np.float64).reshape(len(rows), K, -1, D).transpose(1, 2, 0, 3)  # (K, G, n, D)
        scores = heads @ keys[:, None].swapaxes(2, 3) * D**-0.5                              # (K, G, n, L)
        scores[..., past > positions[rows, None]] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        mean = p / p.sum(-1, keepdims=True) @ values[:, None]
        out[rows] = mean.transpose(2, 0, 1, 3).reshape(len(rows), -1, D)
    return out


def random_contexts(rng: np.random.Generator, count: int, S: int, most: int) -> np.ndarray:
    "Draw context lengths: one token, a full block, full blocks, the longest, any."
    choices = 1, S, S * rng.integers(1, most // S + 1), most, rng.integers(1, most + 1)
    return np.array([choices[i] for i in rng.permutation(5)[:count]])


def random_cache(rng: np.random.Generator, contexts, S: int, K: int, D: int, width: int, dtype: str):
    "Draw keys, values and block tables of some sequences; blocks are shuffled, all other slots hold NaN."
    used = [-(-n // S) for n in contexts]
    blocks = list(1 + rng.permutation(sum(used) + 3))   # 0 is for padding, three belong to no sequence
    tables = np.zeros((len(contexts) + 1, width), np.int32)   # the last row is padding
    k, v = np.full((2, len(blocks) + 1, S, K, D), np.nan, dtype)
    for table, n, count in zip(tables, contexts, used):
        table[:count] = [blocks.pop() for _ in range(count)]
        at = np.arange(n)
        k[table[at // S], at % S] = random_normal(rng, dtype, n, K, D)
        v[table[at // S], at % S] = random_normal(rng, dtype, n, K, D)
    return k, v, tables


def decode_tokens(rng: np.random.Generator, contexts: np.ndarray, room: int):
    "Draw owners and positions of `room` tokens: the last one of each sequence, then any; no starts."
    owners = np.append(np.arange(len(contexts)), rng.integers(0, len(contexts), room))[:room]
    positions = contexts[owners] - 1
    positions[len(contexts):] = rng.integers(0, contexts[owners[len(contexts):]])
    if room > len(contexts):
        owners[-1] = positions[-1] = 0   # padding
    return owners.astype(np.int32), positions.astype(np.int32), None


def prefill_tokens(rng: np.random.Generator, contexts: np.ndarray, room: int):
    "Draw owners, positions and starts: the last tokens of each context, as many as fit, then padding."
    (owners, positions), starts = np.zeros((2, room), np.int32), [0]
    for i, n in enumerate(contexts):
        most = min(n, room - starts[-1] - (len(contexts) - 1 - i))   # one is left for each of the others
        new = int(most if rng.random() < 0.3 else rng.integers(1, most + 1))
        here = slice(starts[-1], starts[-1] + new)
        owners[here], positions[here] = i, np.arange(n - new, n)
        starts.append(here.stop)
    return owners, positions, np.array(starts + starts[-1:], np.int32)   # the table's last row has no token


@dataclass(frozen=True)
class AttentionCases:
    "`launch(q, k, v, tables, owners, positions)`, and `starts` for kernels that take it: paged attention of a step."
    is_prefill: bool = False    # runs of tokens; else single tokens
    has_starts: bool = False    # the kernel takes the first token of each sequence, and writes 0 for padding
    context: int = 0            # of one sequence with long sums; 0: short sequences
    shapes = 4

    @property
    def variant(self) -> str:
        "Of a launcher that takes single tokens as well as runs of them, and of long sums."
        return 'long' if self.context else 'prefill' if self.is_prefill and not self.has_starts else ''

    def make_long_case(self, rng: np.random.Generator, dtype: str) -> Case:
        """Draw two sequences. In the first all keys score alike, and a sum of its values in half stalls: each is
        rounded down when it is added. In the second the largest score comes late."""
        S, D, T, contexts = 32, 128, 1 + 2 * self.is_prefill, np.array([self.context, 700])
        k, v, tables = random_cache(rng, contexts, S, 1, D, self.context // S, dtype)
        k[tables[0]], v[tables[0]] = random_normal(rng, dtype, D), 1.124
        q = random_normal(rng, dtype, 2 * T, 2, D)
        k[tables[1, 640 // S], 9, 0] = q[T, 0] / 2
        inputs = dict(q=q, k=k, v=v, tables=tables[:2], owners=np.repeat([0, 1], T).astype(np.int32),
                      positions=np.concatenate([np.arange(L - T, L) for L in contexts]).astype(np.int32))
        if self.has_starts:
            inputs['starts'] = np.array([0, T, 2 * T], np.int32)
        return Case(inputs, (reference_attention(**inputs),))

    def make_case(self, rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw up to three sequences of ragged lengths; most cases end in tokens of padding."
        if self.context: return self.make_long_case(rng, dtype)
        D, group, K, S = mixed_shape(n)
        width = -(-limits.context // S)
        contexts = random_contexts(rng, 1 + n % 3, S, width * S)
        k, v, tables = random_cache(rng, contexts, S, K, D, width, dtype)
        draw, room = (prefill_tokens, limits.chunk) if self.is_prefill else (decode_tokens, limits.tokens)
        owners, positions, starts = draw(rng, contexts, room)
        q = random_normal(rng, dtype, len(owners), K * group, D) * np.dtype(dtype).type(rng.integers(1, 3))
        inputs = dict(q=q, k=k, v=v, tables=tables, owners=owners, positions=positions)
        if self.has_starts:
            inputs['starts'] = starts
        return Case(inputs, (reference_attention(**inputs),))

    def make_load(self, launch: Callable, dtype: str) -> tuple[Callable, int, int]:
        "Return a chain over 8 sequences of 1,024 tokens, or a prompt of 512, with 32 query and 8 KV heads."
        H, K, D, S, count = 32, 8, 64, 16, 8
        seqs, context, T = (1, 512, 512) if self.is_prefill else (8, 1024, 8)
        k, v = (make_large_tensor((count * seqs * context // S, S, K, D), dtype) for _ in 'kv')
        order = np.random.default_rng(0).permutation(k.shape[0]).astype(np.int32)
        tables = [Tensor(x).realize() for x in order.reshape(count, seqs, context // S)]
        owners, positions = (np.zeros(T), np.arange(T)) if self.is_prefill else (np.arange(T), np.full(T, context - 1))
        extra = [owners, positions] + ([np.array([0, T])] if self.has_starts else [])
        extra, first = [Tensor(x.astype(np.int32)).realize() for x in extra], make_large_tensor((T, H, D), dtype)
        tables = tables[:4] if self.is_prefill else tables * 4
        chain = chain_launches(lambda q, table: launch(q, k, v, table, *extra), first, tables)
        return chain, len(tables), 2 * first.nbytes() + (k.nbytes() + v.nbytes()) // count


MATVEC, MATMUL, KV_WRITE = MatmulCases(), MatmulCases(max_tokens=9), KVWriteCases()
DECODE, PREFILL = AttentionCases(), AttentionCases(is_prefill=True)
PREFILL_STARTS = AttentionCases(is_prefill=True, has_starts=True)
