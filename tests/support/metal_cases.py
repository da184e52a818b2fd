"Kernels in `metal/*.metal` with inputs, launch sizes and answers in float64; raw Metal in tinygrad's graph."
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Device, Tensor, UOp, dtypes
from tinygrad.dtype import AddrSpace
from tinygrad.uop.ops import KernelInfo, Ops, ProgramInfo

TOP = '#include <metal_stdlib>\nusing namespace metal;\n'


def source(name):
    return (Path(__file__).parents[1] / 'metal' / f'{name}.metal').read_text()


@pytest.fixture(scope='module', autouse=True)
def unlinted():
    "CUDA's texts are simulated with the simulator's own words, which Metal has not; `test_lint` looks at Metal's."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('METALSIM_LINT', '0')
        yield


@dataclass
class Case:
    "A kernel of a file, and how it is called."
    file: str
    kernel: str
    args: list
    grid: tuple
    threads: tuple
    out: int  # index of the output
    answer: np.ndarray | None = None
    tolerance: float = 0.0


def halves(rng, *shape):
    return rng.standard_normal(shape).astype(np.float16)


def attention(q, k, v, mask=None):
    "Softmax attention of one head, in float64: (T, D), (S, D), (S, D) -> (T, D)."
    scores = q.astype(np.float64) @ k.astype(np.float64).T * q.shape[-1] ** -.5
    if mask is not None:
        scores[~mask] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v.astype(np.float64)


def paged_cache(rng, lens, kv_heads, dim, block_size, blocks, spare=0):
    "Keys, values and a shuffled table; what lies behind the context is NaN, as stale memory may be."
    num = len(lens) * blocks + spare
    keys, values = halves(rng, num, block_size, kv_heads, dim), halves(rng, num, block_size, kv_heads, dim)
    table = rng.permutation(num)[:len(lens) * blocks].reshape(len(lens), blocks).astype(np.int32)
    for row, length in zip(table, lens):
        for i, block in enumerate(row):
            keys[block, max(0, length - i * block_size):] = np.nan
            values[block, max(0, length - i * block_size):] = np.nan
    return keys, values, table


def paged_answer(q, keys, values, table, lens):
    "(B, H, D)"
    out = np.zeros(q.shape)
    for b, length in enumerate(lens):
        k, v = (x[table[b]].reshape(-1, *x.shape[2:])[:length] for x in (keys, values))
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            out[b, h] = attention(q[b, h][None], k[:, g], v[:, g])[0]
    return out


def decode(kernel='paged_decode', threads=(32,)):
    rng, lens = np.random.default_rng(0), np.array([1, 37, 128], np.int32)
    keys, values, table = paged_cache(rng, lens, 2, 128, 16, 8)
    q = halves(rng, 3, 8, 128)
    args = [q, keys, values, table, lens, np.full_like(q, np.nan), 8, 2, 8, 128 ** -.5]
    answer = paged_answer(q, keys, values, table, lens)
    return Case('paged_decode', kernel, args, (8, 3), threads, 5, answer, 2e-3)


def split(threads=(256,)):
    return decode('paged_decode_split', threads)


def prefill():
    rng, (length, heads, kv_heads, dim) = np.random.default_rng(0), (70, 4, 2, 64)
    q, k, v = (halves(rng, length, h, dim) for h in (heads, kv_heads, kv_heads))
    causal = np.tri(length, dtype=bool)
    answer = np.stack([attention(q[:, h], k[:, h // 2], v[:, h // 2], causal) for h in range(heads)], 1)
    args = [q, k, v, np.full_like(q, np.nan), length, heads, kv_heads, dim ** -.5]
    return Case('flash_prefill', 'flash_prefill', args, ((length + 15) // 16, heads), (128,), 3, answer, 2e-3)


def mma(k=72):
    rng = np.random.default_rng(0)
    a, b = halves(rng, 64, k), halves(rng, k, 96)
    args = [a, b, np.full((64, 96), np.nan, np.float32), 64, 96, k]
    return Case('mma', 'mma', args, (3, 2), (128,), 2, a.astype(np.float64) @ b.astype(np.float64), 1e-4)


def qmv(rows=70):
    rng, k = np.random.default_rng(0), 512
    w, scales, x = rng.integers(0, 16, (rows, k)), rng.random((rows, k // 32)).astype(np.float16) / 10, halves(rng, k)
    packed = sum(w[:, i::8].astype(np.uint32) << np.uint32(4 * i) for i in range(8))
    answer = ((w - 8) * np.repeat(scales.astype(np.float64), 32, 1)) @ x.astype(np.float64)
    args = [packed, scales, x, np.full(rows, np.nan, np.float16), rows, k]
    return Case('qmv', 'qmv4', args, ((rows + 7) // 8,), (64,), 3, answer, 5e-2)


CASES = {'decode': decode, 'split': split, 'prefill': prefill, 'mma': mma, 'qmv': qmv}


def in_graph(
    name,  # of the kernel
    text,  # Metal
    outs, ins=(),  # tensors for buffers 0, 1, ...; outputs first
    grid=(1, 1, 1), threads=(1, 1, 1),  # grid may hold expressions of the variables
    variables=(),  # bound: they follow the buffers as `constant int&`
    signed=True,  # list the parameters, as a kernel must
):
    "The outputs, after a kernel that tinygrad schedules as one of its own."
    tensors, plain = (*outs, *ins), [v.src[0] for v in variables]
    n = len(tensors)

    def program(*placeholders):
        buffers = tuple(p.base for p in placeholders[:n])
        numbers = tuple(UOp.param(n + i, dtypes.int32, (), vmin_vmax=(v.vmin, v.vmax), name=v.expr,
                                  addrspace=AddrSpace.ALU) for i, v in enumerate(plain))
        sizes = tuple(x.substitute(dict(zip(plain, numbers))) if isinstance(x, UOp) else x for x in grid)
        sink = UOp.sink(*buffers, *numbers, arg=KernelInfo(name=name))
        linear = UOp(Ops.LINEAR, src=(*buffers, *numbers, sink) if signed else ())
        info = ProgramInfo(name=name, global_size=sizes, local_size=threads, vars=numbers, globals=tuple(range(n)),
                           outs=tuple(range(len(outs))), ins=tuple(range(n)), target=Device['METAL'].renderer.target)
        return UOp(Ops.PROGRAM, src=(sink, linear, UOp(Ops.SOURCE, arg=text)), arg=info)
    after = UOp.custom_kernel(*(t.uop for t in tensors), *variables, fxn=program)
    return [Tensor(u) for u in after[:len(outs)]]


def edited(text, old, new):
    "The text with one thing changed."
    assert old in text, old
    return text.replace(old, new, 1)


def with_args(case, **changes):
    "The case with some arguments replaced: `a3=...`."
    args = [changes.get(f'a{i}', a) for i, a in enumerate(case.args)]
    return replace(case, args=args)
