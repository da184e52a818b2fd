"The processor's products in every format against float64 numpy, between guards, broken, and token by token."
import os
import re
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from support.c_kernels import Guarded, is_compiled, lanes, passes_in_child  # noqa: F401
from tinygrad import Tensor, TinyJit, dtypes

from tinyvllm.kernels import rows_cpu as module
from tinyvllm.kernels.linear_cpu import cpu_linear, cpu_swiglu
from tinyvllm.kernels.rows_cpu import cpu_embed
from tinyvllm.measure import counting
from tinyvllm.kernels.metal import Kernel

every_width = pytest.mark.usefixtures('lanes')     # vectors of 4, 8 and 16 floats
many = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
DENSE = ['f32', 'f16', 'bf16']
PACKED = ['int8', 'int8-g32', 'int8-g64', 'int4-g32', 'int4-g64', 'int4-g128', 'int4-g96', 'int4-g32-zp', 'int4-g128-zp',
          'q4_1', 'q4_k', 'q6_k']


# weights of every format as numpy arrays: codes first, and what they mean in float64

def halves(rng, *shape):
    return (rng.standard_normal(shape) * 0.05).astype(np.float16)


def spread(scales, K):
    "Each scale (N, groups) once for each weight of its group."
    return scales.astype('f8').repeat(K // scales.shape[1], 1)


def dense(rng, name, N, K):
    w = rng.standard_normal((N, K)).astype(np.float16 if name == 'f16' else np.float32)
    if name != 'bf16':
        return (w.itemsize * 8, 0, 'none'), [w], w.astype('f8')
    upper = (w.view(np.uint32) >> 16).astype(np.uint16)
    return (16, 0, 'none'), [upper], (upper.astype(np.uint32) << 16).view(np.float32).astype('f8')


def four_bits(rng, N, K):
    codes = rng.integers(0, 256, (N, K // 2)).astype(np.uint8)
    parts = codes.reshape(N, -1, 16)
    return codes, np.concatenate([parts & 15, parts >> 4], 2).reshape(N, K).astype('f8')


def packed(rng, name, N, K):
    "(bits, group, scales) of a format, its parts, and the weights they stand for."
    if name in DENSE:
        return dense(rng, name, N, K)
    group = int(re.search(r'-g(\d+)', name)[1]) if '-g' in name else 0
    if name.startswith('int8'):
        q, d = rng.integers(-128, 128, (N, K)).astype(np.int8), halves(rng, N, K // (group or K))
        return (8, group, 'scale'), [q, d], q * spread(d, K)
    codes, q = four_bits(rng, N, K)
    if name == 'q6_k':
        high = rng.integers(0, 256, (N, K // 4)).astype(np.uint8)
        upper = np.concatenate([high.reshape(N, -1, 8) >> s & 3 for s in (0, 2, 4, 6)], 2).reshape(N, K)
        d, sc = halves(rng, N, K // 256), rng.integers(-128, 128, (N, K // 16)).astype(np.int8)
        return (6, 16, 'q6_k'), [codes, high, d, sc], spread(d, K) * spread(sc, K) * (q + 16 * upper - 32)
    if name == 'q4_k':
        d, sc = halves(rng, N, K // 256, 2), rng.integers(0, 64, (N, K // 32, 2)).astype(np.uint8)
        scale, least = (spread(d[..., i], K) * spread(sc[..., i], K) for i in (0, 1))
        return (4, 32, 'q4_k'), [codes, d, sc], scale * q - least
    if name == 'q4_1':
        d = halves(rng, N, K // 32, 2)
        return (4, 32, 'min'), [codes, d], spread(d[..., 0], K) * q + spread(d[..., 1], K)
    d = halves(rng, N, K // group)
    if name.endswith('-zp'):
        z = rng.integers(0, 17, d.shape).astype(np.uint8)
        return (4, group, 'zero'), [codes, d, z], spread(d, K) * (q - spread(z, K))
    return (4, group, 'scale'), [codes, d], spread(d, K) * (q - 8)


def tensor(a):
    "On the processor; a bfloat16 one from its bits, which no kernel of tinygrad's touches."
    if a.dtype != np.uint16:
        return Tensor(a, device='CPU').realize()
    t = Tensor.empty(*a.shape, dtype=dtypes.bfloat16, device='CPU').realize()
    t.uop.base.buffer.ensure_allocated().as_memoryview(allow_zero_copy=True).cast('B')[:] = a.tobytes()
    return t


def duck(name, kind, parts, N, K):
    "What the launchers look at of a `quant.Packed`."
    bits, group, scales = kind
    return SimpleNamespace(format=SimpleNamespace(name=name, bits=bits, group=group, scales=scales),
                           shape=(N, K), parts=tuple(tensor(p) for p in parts))


# what a launch must give, in float64

def normalised(x, norm, eps):
    x = x.astype('f8')
    return x if norm is None else x / np.sqrt((x * x).mean(1, keepdims=True) + eps) * norm


def expected(w, x, norm=None, eps=0, bias=None, add=None, gated=False):
    y = normalised(x, norm, eps) @ w.T
    if gated:
        gate, up = np.split(y, 2, 1)
        return gate / (1 + np.exp(np.clip(-gate, None, 700))) * up
    return y + (0 if bias is None else bias) + (0 if add is None else add)


def close(got, want, tolerance=3e-6):
    return got.shape == want.shape and np.isfinite(got).all() and abs(got - want).max() <= tolerance * abs(want).max()


# name, tokens, rows, columns, which of norm, bias and add
K_OF = {'q4_k': 512, 'q6_k': 512, 'int4-g128': 256, 'int4-g128-zp': 384, 'int4-g96': 96, 'int8-g64': 320, 'int4-g64': 64}
CASES = [(name, T, N, K_OF.get(name, K), extras)
         for i, name in enumerate(DENSE + PACKED)
         for T, N, K, extras in [(1 + i % 7, 37 + i, 576, 'norm' * (i % 2)), (7 + i % 5, 5 + i, 160, 'norm add'),
                                 (26, 64, 64, 'norm bias add')][:3 - i % 2]]
CASES += [(name, T, N, K, extras) for name in DENSE for T, N, K, extras in
          [(1, 1, 1, ''), (2, 9, 7, 'norm'), (50, 33, 75, 'norm bias'), (63, 6, 17, 'add')]]
GATED = [(name, T, 2 * F, K_OF.get(name, K), 'norm' * (T % 2)) for i, name in enumerate(DENSE + PACKED)
         for T, F, K in [(1 + 2 * (i % 2), 17, 96), (9 + i % 2, 32 - i % 3, 64)]]
GATED += [(name, 50, 2, 13, 'norm') for name in DENSE]


def arguments(seed, name, T, N, K, extras):
    rng = np.random.default_rng(seed)
    kind, parts, w = packed(rng, name, N, K)
    x = rng.standard_normal((T, K)).astype(np.float32)
    given_ = dict(norm=rng.standard_normal(K), bias=rng.standard_normal(N), add=rng.standard_normal((T, N)))
    given_ = {key: a.astype(np.float32) for key, a in given_.items() if key in extras.split()}
    return duck(name, kind, parts, N, K), parts, w, x, given_ | (dict(eps=1e-2) if 'norm' in given_ else {})


def called(launch, x, weights, given_):
    return launch(tensor(x), weights, **{k: tensor(a) if k != 'eps' else a for k, a in given_.items()}).numpy()


@every_width
@many
@given(st.sampled_from(CASES), st.integers(0, 2**32 - 1))
def test_linear_is_a_product(case, seed):
    weights, _, w, x, given_ = arguments(seed, *case)
    assert close(called(cpu_linear, x, weights, given_), expected(w, x, **given_))


@every_width
@settings(many, max_examples=80)
@given(st.sampled_from(GATED), st.integers(0, 2**32 - 1))
def test_swiglu_is_a_gated_product(case, seed):
    weights, _, w, x, given_ = arguments(seed, *case)
    assert close(called(cpu_swiglu, x / 4, weights, given_), expected(w, x / 4, gated=True, **given_))


@every_width
@pytest.mark.parametrize('name', DENSE + PACKED)
def test_rows_are_the_formats_numbers_to_the_last_bit(name):
    rng, N, K = np.random.default_rng(3), 21, K_OF.get(name, 96 if name not in DENSE else 75)
    kind, parts, w = packed(rng, name, N, K)
    tokens = np.array([3, 0, 20, 3, -1, 21, 2**31 - 1], np.int32)
    got = cpu_embed(duck(name, kind, parts, N, K), tensor(tokens), dtypes.float).numpy()
    assert np.array_equal(got[:4], w[[3, 0, 20, 3]].astype(np.float32)) and not got[4:].any()


@every_width
@pytest.mark.parametrize('name', ['f32', 'f16', 'int8', 'q4_1', 'int4-g64', 'q6_k'])
def test_a_token_does_not_know_its_batch(name):
    "Bit for bit: alone, with others, in either way to multiply, in any block, beside NaN; and rows in any order."
    rng, K, T = np.random.default_rng(5), K_OF.get(name, 96 if name != 'f32' else 75), 64
    (kind, parts, _), x = packed(rng, name, 36, K), rng.standard_normal((T, K)).astype(np.float32)
    norm, bias = (tensor(rng.standard_normal(n).astype(np.float32)) for n in (K, 36))
    weights, order = duck(name, kind, parts, 36, K), rng.permutation(36)
    shuffled = duck(name, kind, [p[order] for p in parts], 36, K)

    def product(rows, w=weights, b=bias):
        return cpu_linear(tensor(rows), w, norm=norm, eps=1e-6, bias=b).numpy()

    def gated(rows):
        return cpu_swiglu(tensor(rows), weights, norm=norm, eps=1e-6).numpy()
    whole, both = product(x), gated(x)
    for n in (1, 3, 8, 25, 61):
        assert np.array_equal(product(x[T - n:]), whole[T - n:]) and np.array_equal(gated(x[:n]), both[:n])
    broken = x.copy()
    broken[::2] = np.nan
    assert np.array_equal(product(broken)[1::2], whole[1::2])
    assert np.array_equal(product(x, shuffled, tensor(bias.numpy()[order])), whole[:, order])


@every_width
def test_silu_is_exact_enough_everywhere():
    x = np.linspace(-80, 80, 40, dtype=np.float32).reshape(-1, 1)
    one = duck('f32', (32, 0, 'none'), [np.ones((2, 1), np.float32)], 2, 1)
    wide = np.concatenate([x, x + 0.37, np.float32([[0], [1e-30], [-1e-30], [88.5], [1e4]])])
    want = wide.astype('f8') ** 2 / (1 + np.exp(-wide.astype('f8')))
    assert np.allclose(cpu_swiglu(tensor(wide), one).numpy(), want, rtol=1e-6, atol=1e-37)


@every_width
def test_norms_of_nothing_and_of_little():
    w = duck('f32', (32, 0, 'none'), [np.eye(40, dtype=np.float32)], 40, 40)
    x = np.zeros((3, 40), np.float32)
    x[1:] = np.float32([[1e-12], [1e12]])
    got = cpu_linear(tensor(x), w, norm=tensor(np.ones(40, np.float32)), eps=1e-5).numpy()
    assert np.allclose(got, expected(np.eye(40), x, np.ones(40), 1e-5), rtol=2e-6)


# between guard regions

def texts(kernel, launch, monkeypatch):
    "The kernel and the constants that a launch would have used."
    seen = []

    class Recorded(Kernel):
        def __call__(self, *tensors, grid=(1,), threads=(1,), ops=0, nbytes=None, **constants):
            seen.append((Kernel(c=self.c), constants))
            return tensors[0]
    module.compose_kernel.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(module, 'Kernel', Recorded)
        launch()
    module.compose_kernel.cache_clear()
    return seen[0]


def guarded_case(monkeypatch, case, gated=False, seed=7):
    "(kernel, constants, arrays in the signature's order, the expected output) of one launch."
    weights, parts, w, x, given_ = arguments(seed, *case)
    kernel, constants = texts('linear', lambda: (cpu_swiglu if gated else cpu_linear)(
        tensor(x), weights, **{k: tensor(a) if k != 'eps' else a for k, a in given_.items()}), monkeypatch)
    y = np.full((len(x), len(w) // (1 + gated)), np.nan, np.float32)
    extra = [given_[k] for k in ('norm', 'bias', 'add') if k in given_]
    return kernel, constants, (y, x, *parts, *extra), expected(w, x, gated=gated, **given_)


def embed_case(monkeypatch, name, N=9, K=None):
    rng, K = np.random.default_rng(1), K or K_OF.get(name, 96)
    kind, parts, w = packed(rng, name, N, K)
    tokens = np.array([8, -1, 0, 9, 4], np.int32)
    kernel, constants = texts('embed', lambda: cpu_embed(duck(name, kind, parts, N, K), tensor(tokens)), monkeypatch)
    want = np.where(((tokens >= 0) & (tokens < N))[:, None], w[tokens % N], 0)
    return kernel, constants, (np.full((5, K), np.nan, np.float32), *parts, tokens), want


def right(kernel, constants, arrays, want):
    got, = Guarded(kernel, constants)(*arrays)
    return close(got, want)


def survives(cases):
    "Does a broken kernel pass them all?"
    for kernel, constants, *_ in cases:
        Guarded(kernel, constants)       # compiled here, not in the child
    return passes_in_child(lambda: all(right(*case) for case in cases))


@every_width
def test_nothing_outside_is_touched(monkeypatch):
    cases = [guarded_case(monkeypatch, case) for case in CASES[::5]]
    cases += [guarded_case(monkeypatch, case, gated=True) for case in GATED[1::3]]
    cases += [embed_case(monkeypatch, name) for name in ['bf16', 'int8', 'q4_1', 'int4-g96', 'q6_k']]
    cases += [embed_case(monkeypatch, 'f16', K=75)]
    assert survives(cases)


# what each broken text must fail on: name, tokens, rows, columns, extras
BLOCKS, TAIL, EIGHT = ('f16', 63, 6, 17, 'norm add'), ('f32', 2, 11, 75, 'norm bias'), ('int8-g32', 10, 70, 576, 'bias add')
GATES = ('f16', 3, 10, 40, 'norm')
MUTANTS = [
    ('0, 2, 8, 10, 4', '0, 2, 8, 10, 6', TAIL), ('0, 1, 4, 5)', '0, 1, 4, 4)', TAIL),
    ('k + STEP <= K', 'k + STEP < K', EIGHT), ('k + STEP <= K', 'k < K', TAIL), ('K / STEP * STEP', 'K', TAIL),
    ('sum[c][r] += w', 'sum[c][r] = w', EIGHT), ('panel + r * K + k', 'panel + k', EIGHT), ('x + i / VECS * K', 'x', TAIL),
    ('(out + c * PANEL) = ', '(out) = ', TAIL), ('s / K + EPS', 's / K', TAIL), ('s * load(norm + k)', 's', TAIL),
    ('s * norm[k]', 's', TAIL), ('s += x[k] * x[k]', 's += 0', TAIL), ('many == LANES', '1', TAIL),
    ('least(LANES, N - n - i)', 'LANES', EIGHT), ('add + n + i', 'add + i', EIGHT), ('bias + n + i', 'bias + i', EIGHT),
    ('bias[n + j]', 'bias[i]', TAIL), ('f : f + N', 'f : f', GATES), ('e) / (1 + e)', '1) / (1 + e)', GATES),
    ('least(n + r % OUTPUTS, N - 1)', 'n + r % OUTPUTS', GATES), ('out + OUTPUTS + i', 'out + i', GATES),
    ('x + (t + c) * K, norm', 'x + c * K, norm', BLOCKS), ('add + (t + c) * N', 'add + c * N', BLOCKS),
    ('y + (t + c) * N', 'y + c * N', BLOCKS), ('least(BLOCK, TOKENS - t)', 'BLOCK', BLOCKS),
    ('panel + i * K, row', 'panel, row', EIGHT), ('TOKENS % COLUMNS &&', '0 &&', EIGHT),
    ('row_of(n, r + i)', 'row_of(n, r)', EIGHT), ('* row->scale[k / GROUP]', '* row->scale[0]', EIGHT),
    ('int at = least(i, n - LANES)', 'int at = i', EIGHT), ('scales + n * GROUPS', 'scales + n', EIGHT),
    ('k / 2, 8', 'k / 2, 7', ('int4-g32', 1, 9, 64, '')), ('scale[0], scale[1]', 'scale[0], 0', ('q4_1', 1, 9, 64, '')),
    ('k / GROUP * 2', 'k / GROUP', ('q4_1', 1, 9, 64, '')), ('zeros[n * GROUPS + g]', 'zeros[g]', ('int4-g32-zp', 1, 9, 64, '')),
    ('? -(float)d[1]', '? (float)d[1]', ('q4_k', 1, 9, 512, '')), ('/ 8 * 2', '/ 16 * 2', ('q4_k', 1, 9, 512, '')),
    ('0, 2, 4, 6', '0, 2, 4, 2', ('q6_k', 1, 9, 512, '')), ('- 32)', '- 31)', ('q6_k', 1, 9, 512, '')),
    ('k / 16 + i * LANES / 16', 'k / 16', ('q6_k', 1, 9, 512, '')), ('high + n * (K / 4)', 'high', ('q6_k', 1, 9, 512, '')),
    ('index & 15', 'index', ('int4-g32', 1, 9, 64, '')), ('b - zero * a', 'b', ('int4-g32', 1, 9, 64, '')),
    ('tokens[t] >= N', 'tokens[t] > N', 'embed'), ('(uint)tokens[t] >= N', 'tokens[t] >= N', 'embed'),
    ('PARTS, tokens[t]', 'PARTS, t', 'embed'), ('y[t * K + k] = 0', '0', 'embed'), ('k + UNIT <= K', 'k + UNIT < K', EIGHT)]


# not compiled for some width, or for a processor with a table of sixteen
ABSENT = {'0, 2, 8, 10, 4', '0, 1, 4, 5)', 'index & 15', 'b - zero * a'}


@every_width
def test_broken_kernels_are_caught(monkeypatch):
    survivors, known = [], {}
    for old, new, case in MUTANTS:
        if case not in known:
            known[case] = (embed_case(monkeypatch, 'f16', K=32) if case == 'embed' else
                           guarded_case(monkeypatch, case, case is GATES))
        kernel, constants, *rest = known[case]
        old, new = (x.replace('PARTS', 'weight') for x in (old, new))
        assert old in kernel.c, f'{old}: not in the kernel any more'
        broken = Kernel(c=kernel.c.replace(old, new))
        if not is_compiled(kernel, broken, constants):
            assert old in ABSENT, f'{old}: not compiled'
        elif survives([(broken, constants, *rest)]):
            survivors.append((old, new))
    assert not survivors


# what the compiler makes of them

@pytest.mark.parametrize('target, wanted', [
    ('--target=x86_64-none-unknown-elf -march=haswell', {'q4_1': r'vfmadd.*ymm', 'f16': r'vcvtph2ps\s+.*ymm'}),
    ('--target=x86_64-none-unknown-elf -march=icelake-server', {'q4_1': r'vperm(d|ps)\s+.*zmm', 'f16': r'vcvtph2ps\s+.*zmm'}),
    ('--target=aarch64-none-unknown-elf -mcpu=apple-m1', {'q4_1': r'fmla', 'f16': 'fcvtl'})])
def test_one_function_of_wide_instructions_and_nothing_is_called(target, wanted, monkeypatch, tmp_path):
    for name, instruction in wanted.items():
        for T in (1, 32):
            kernel, constants, *_ = guarded_case(monkeypatch, (name, T, 64, 64, 'norm add'))
            flags = f'{target} -S -x c -O2 -fPIC -ffreestanding -fno-math-errno -nostdlib - -o {tmp_path}/a.s'
            done = subprocess.run([os.environ.get('CC', 'clang'), *flags.split()], capture_output=True,
                                  input=kernel.source('CPU', 1, constants).encode())
            if done.returncode:
                pytest.skip('this compiler has no such target')
            text = (tmp_path / 'a.s').read_text()
            assert re.search(instruction, text) and not re.search(r'^\s+(callq?|bl)\s', text, re.M)
            assert re.findall(r'\.globl\s+(\w+)', text) == ['linear']


# in the graph

def test_what_has_no_kernel_is_refused():
    rng = np.random.default_rng(0)
    f16 = duck('f16', *packed(rng, 'f16', 8, 64)[:2], 8, 64)
    odd = duck('int3', (3, 32, 'scale'), [rng.integers(0, 9, (8, 64)).astype(np.uint8)], 8, 64)
    x, tokens = tensor(np.ones((2, 64), np.float32)), tensor(np.zeros(2, np.int32))
    for launch, said in {lambda: cpu_linear(x, odd): 'int3 weights', lambda: cpu_swiglu(x, odd): 'int3 weights',
                         lambda: cpu_embed(odd, tokens): 'int3 weights', lambda: cpu_linear(x.half(), f16): 'x is half',
                         lambda: cpu_linear(x, f16, norm=x[0].half()): 'norm is half',
                         lambda: cpu_linear(x, f16, add=x[:, :8].half()): 'add is half',
                         lambda: cpu_embed(f16, tokens, dtypes.half): 'rows of half',
                         lambda: cpu_embed(f16, tokens.float()): 'tokens of float'}.items():
        with pytest.raises(NotImplementedError, match=said):
            launch()


def test_one_kernel_that_waits_replays_and_counts_each_byte_once():
    weights, parts, w, x, given_ = arguments(1, 'q4_1', 3, 40, 64, 'norm add')
    x, norm, add = tensor(x), tensor(given_['norm']), tensor(given_['add'])

    def launch(x):
        return cpu_linear(x, weights, norm=norm, eps=1e-2, add=add)
    with counting() as c:
        lazy = launch(x)
    assert c.kernels == 0
    with counting() as c:
        want = lazy.numpy()
    moved = sum(p.nbytes for p in parts) + x.nbytes() + norm.nbytes() + 2 * add.nbytes()
    assert (c.kernels, c.nbytes, c.flops) == (1, moved, 2 * 3 * 40 * 64)
    replay = TinyJit(lambda x: (launch(x) * 2).realize())
    for _ in range(4):
        with counting() as c:
            got = replay(x).numpy()
    assert c.compiled == 0 and np.array_equal(got, 2 * want)
    tokens = tensor(np.array([1, 7], np.int32))
    with counting() as c:
        cpu_embed(weights, tokens).realize()
    assert (c.kernels, c.nbytes) == (1, 2 * (64 // 2 + 64 // 32 * 4) + 2 * 64 * 4 + 8)
