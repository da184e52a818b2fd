"""The matrix kernels for GPUs: every format, before and after, against float64, whole and broken.

Metal's texts run in the simulator; CUDA's run there too, with simulated tensor cores (`support.linear_cores`)."""
import re
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from support.linear_cores import FORMATS, multiple, numbers, packed, simulate
from support.metal_cases import unlinted  # noqa: F401
from tinygrad import Tensor, TinyJit, dtypes

from tinyvllm.kernels import linear_gpu as module
from tinyvllm.cli.doctor import run_case
from tinyvllm.kernels.cases import Case
from tinyvllm.errors import BadInput
from tinyvllm.kernels import linear_tiles
from tinyvllm.kernels.linear_gpu import NORM_ROOM, gpu_embed, gpu_linear, gpu_swiglu, kernel_of, launch_rows, plan
from tinyvllm.kernels.linear_lanes import PAD, PARTS, kind_of
from tinyvllm.kernels.linear_tiles import rms_norm
from tinyvllm.kernels.metal import Kernel
from tinyvllm.metalsim import counting, lint

simulator = pytest.mark.skipif(sys.platform != 'linux', reason='a Mac has the real one')
pytestmark = simulator
few = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
EPS = 0.1      # large, so that it shows
TOLERANCE = {'float16': 2e-3, 'float32': 1e-5}
STREAMS = [dict(TILES=1, WARPS=2, DEPTH=2, RESIDENT=1), dict(TILES=2, WARPS=3, DEPTH=1, RESIDENT=1),
           dict(TILES=1, WARPS=1, DEPTH=3, RESIDENT=1), dict(TILES=1, WARPS=8, DEPTH=2, RESIDENT=1)]
BLOCKS = [dict(BM=32, BN=32, BK=32, STAGES=3, WM=1, WN=2, RESIDENT=1),
          dict(BM=32, BN=64, BK=64, STAGES=2, WM=2, WN=2, RESIDENT=1),
          dict(BM=64, BN=32, BK=32, STAGES=4, WM=2, WN=1, RESIDENT=1)]


@dataclass(frozen=True)
class Wanted:
    "A product of the family, but for its numbers."
    name: str                # of the format
    T: int
    N: int
    K: int
    norm: bool = False
    bias: bool = False
    add: bool = False
    gated: bool = False
    dtype: str = 'float16'


def case(wanted: Wanted, seed: int = 0) -> Case:
    "Random inputs; the answer in float64."
    rng, f = np.random.default_rng(seed), wanted
    parts, w = numbers(rng, f.name, f.N, f.K)
    x = rng.standard_normal((f.T, f.K)).astype(f.dtype)
    inputs, y = dict(x=x), x.astype(np.float64)
    if f.norm:
        inputs['norm'] = (1 + rng.standard_normal(f.K) / 4).astype(np.float32)
        y = y / np.sqrt((y * y).mean(-1, keepdims=True) + EPS) * inputs['norm']
    y = y @ w.T
    if f.gated:
        gate, up = np.split(y, 2, axis=1)
        y = gate / (1 + np.exp(-gate)) * up
    if f.bias:
        inputs['bias'] = (10 * rng.standard_normal(f.N)).astype(np.float32)
        y = y + inputs['bias']
    if f.add:
        inputs['add'] = (10 * rng.standard_normal(y.shape)).astype(f.dtype)
        y = y + inputs['add']
    return Case({f'part {i}': p for i, p in enumerate(parts)} | inputs, (y,))


def error(wanted: Wanted, seed: int = 0, **how) -> float:
    "Relative, with guard regions around every buffer and outputs that were NaN; raises what the simulator finds."
    found = case(wanted, seed)
    count = sum(name.startswith('part') for name in found.inputs)

    def launch(*tensors: Tensor) -> Tensor:
        w, (x, *rest) = packed(wanted.name, wanted.N, wanted.K, tensors[:count]), tensors[count:]
        extra = dict(zip([n for n in ('norm', 'bias', 'add') if getattr(wanted, n)], rest))
        if wanted.norm: extra['eps'] = EPS
        return (gpu_swiglu if wanted.gated else gpu_linear)(x, w, **extra, **how)
    return run_case(launch, found, 'METAL')


@contextmanager
def simulated_cuda(monkeypatch=None, text=lambda text: text):
    "Kernels written for CUDA run in the simulator meanwhile, perhaps with another text."
    real = kernel_of
    with pytest.MonkeyPatch.context() as patch:
        def kernel(rung, *variant):
            if rung not in ('stream', 'tiles'): return real(rung, *variant)
            return simulate(rung, text(real(rung, *variant).cuda))
        patch.setattr(module, 'kernel_of', cache(kernel))
        yield


# --- the same answer

@st.composite
def products(draw, tokens, rows=24, dtypes=('float16',), formats=tuple(FORMATS)):
    "A product of any shape and any format that the family takes."
    name = draw(st.sampled_from(formats))
    gated = draw(st.booleans())
    K = multiple(name) * draw(st.integers(1, 1 if '_k' in name else 5))
    T, N = draw(st.integers(*tokens)), draw(st.integers(1, rows)) * (1 + gated)
    norm, bias, add = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    return Wanted(name, T, N, K, norm, bias > gated, add > gated, gated, draw(st.sampled_from(dtypes)))


@few
@given(products((1, 11), dtypes=('float16', 'float32')))
def test_lanes(wanted):
    assert error(wanted, rung='lanes') <= TOLERANCE[wanted.dtype]


PACKED = tuple(name for name in FORMATS if name != 'f32')


@few
@given(products((9, 40), formats=PACKED))
def test_matrix_units(wanted):
    assert error(wanted, rung='tiles') <= 2e-3


@few
@given(products((1, 20), formats=PACKED), st.sampled_from(STREAMS))
def test_tensor_cores_on_a_stream(wanted, sizes):
    with simulated_cuda(): assert error(wanted, rung='stream', **sizes) <= 2e-3


@pytest.mark.parametrize('sizes', STREAMS, ids=str)
def test_warps_share_the_columns_of_rows(sizes):
    with simulated_cuda():
        assert error(Wanted('int4-g32', 3, 42, 416, norm=True), rung='stream', **sizes) <= 2e-3
        assert error(Wanted('f16', 10, 42, 200, norm=True, add=True), rung='stream', **sizes) <= 2e-3
        assert error(Wanted('int8', 17, 44, 192, gated=True), rung='stream', **sizes) <= 2e-3


@few
@given(products((1, 40), formats=('f16',)), st.sampled_from(BLOCKS))
def test_tensor_cores_on_tiles(wanted, sizes):
    with simulated_cuda(): assert error(wanted, rung='tiles', **sizes) <= 2e-3


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('rung', ['lanes', 'tiles', 'stream'])
def test_every_format(name, rung):
    if name == 'f32' and rung != 'lanes': pytest.skip('lanes read float32')
    wanted = Wanted(name, 3, 24, multiple(name), norm=True, add=True)
    if rung != 'stream': assert error(wanted, rung=rung) <= 2e-3
    else:
        with simulated_cuda(): assert error(wanted, rung=rung, **STREAMS[0]) <= 2e-3


@pytest.mark.parametrize('name', FORMATS)
def test_rows_as_numbers(name):
    rng, K = np.random.default_rng(1), multiple(name)
    parts, w = numbers(rng, name, 13, K)
    w_, tokens = packed(name, 13, K, tuple(map(metal, parts))), np.array([3, 12, 0, 3], np.int32)
    for dtype, limit in ((dtypes.half, 5e-4), (dtypes.float, 1e-6)):
        embedded, all_rows = gpu_embed(w_, metal(tokens), dtype), launch_rows('all_rows', w_, dtype)
        for got, want in ((embedded, w[tokens]), (all_rows, w)):
            assert got.dtype == dtype and np.abs(got.numpy() - want).max() <= limit * np.abs(w).max()


def metal(x): return Tensor(np.ascontiguousarray(x), device='METAL').realize()


def test_a_token_that_is_none_reads_nothing_outside():
    parts, w = numbers(np.random.default_rng(0), 'f16', 5, 8)
    got = gpu_embed(packed('f16', 5, 8, tuple(map(metal, parts))), metal(np.array([-3, 99], np.int32)), dtypes.half)
    assert np.array_equal(got.numpy(), w[[0, 4]])


@pytest.mark.parametrize('dtype', ['float16', 'float32'])
def test_norm_alone(dtype):
    rng = np.random.default_rng(0)
    x, n = (100 * rng.standard_normal((5, 72))).astype(dtype), rng.standard_normal(72).astype(np.float32)
    want = x.astype(np.float64) / np.sqrt((x.astype(np.float64)**2).mean(-1, keepdims=True) + 1e-6) * n
    found = Case(dict(x=x, norm=n), (want,))
    assert run_case(lambda x, norm: rms_norm(x, norm, 1e-6), found, 'METAL') <= TOLERANCE[dtype]


@pytest.mark.parametrize('rung', ['lanes', 'tiles', 'stream'])
def test_a_token_does_not_see_its_neighbours(rung):
    "Bitwise the same alone and among others, in one kernel."
    rng = np.random.default_rng(3)
    parts, _ = numbers(rng, 'int4-g32', 20, 160)
    w, x = packed('int4-g32', 20, 160, tuple(map(metal, parts))), rng.standard_normal((13, 160)).astype(np.float16)
    sizes = dict(stream=STREAMS[0]).get(rung, {})
    with simulated_cuda() if rung == 'stream' else warnings.catch_warnings():
        def y(x): return gpu_linear(metal(x), w, rung=rung, **sizes).numpy()
        together = y(x)
        assert all(np.array_equal(y(x[t:t + 1])[0], together[t]) for t in (0, 7, 12))
        assert np.array_equal(y(x[3:9]), together[3:9])


def test_large_and_small_numbers():
    "Outliers of a residual stream, and scales so small that halves hardly hold them."
    rng = np.random.default_rng(0)
    parts, w = numbers(rng, 'q4_k', 16, 256)
    parts[1] = (parts[1] / 500).astype(np.float16)
    scale = np.repeat(parts[1].astype(np.float64), 8, axis=1)
    q = np.concatenate([parts[0].reshape(16, 8, 16) & 15, parts[0].reshape(16, 8, 16) >> 4], axis=2).reshape(16, 256)
    w = q * np.repeat(scale[..., 0] * parts[2][..., 0], 32, 1) - np.repeat(scale[..., 1] * parts[2][..., 1], 32, 1)
    x, norm = rng.standard_normal((2, 256)).astype(np.float16), np.ones(256, np.float32)
    x[0, 7] = 30000
    y = x.astype(np.float64) / np.sqrt((x.astype(np.float64)**2).mean(-1, keepdims=True) + 1e-5)
    found = Case({str(i): p for i, p in enumerate((*parts, x, norm))}, (y @ w.T,))

    def launch(*t): return gpu_linear(t[3], packed('q4_k', 16, 256, t[:3]), norm=t[4], eps=1e-5, **how)
    for how in (dict(rung='lanes'), dict(rung='stream', **STREAMS[0])):
        with simulated_cuda(): assert run_case(launch, found, 'METAL') <= 2e-3


# --- what is read, and how often

def test_the_matrix_is_read_once_and_the_norm_costs_no_launch():
    for name in ('f16', 'int4-g32'):
        parts, _ = numbers(np.random.default_rng(0), name, 24, 256)
        w, x, n = packed(name, 24, 256, tuple(map(metal, parts))), metal(np.ones((2, 256), np.float16)), np.ones(256)
        with counting() as counts: gpu_swiglu(x, w, norm=metal(n.astype(np.float32)), eps=1e-5).realize()
        assert [d.name for d in counts] == ['linear_lanes']
        codes = counts[0].buffers['w' if name == 'f16' else 'codes']
        assert codes.bytes_read == parts[0].nbytes and counts[0].buffers['y'].bytes_written == 2 * 12 * 2


@pytest.mark.parametrize('T, kernels', [
    (1, ['linear_lanes']), (8, ['linear_lanes']), (9, ['rms_norm', 'linear_tiles'])])
def test_captured_and_resimulate(T, kernels):
    rng = np.random.default_rng(0)
    parts, w = numbers(rng, 'int8-g32', 24, 64)
    w_, norm = packed('int8-g32', 24, 64, tuple(map(metal, parts))), metal(np.ones(64, np.float32))
    step = TinyJit(lambda x: gpu_linear(x, w_, norm=norm, eps=1e-5).realize())
    for _ in range(4):
        x = rng.standard_normal((T, 64)).astype(np.float16)
        with counting() as counts: got = step(metal(x)).numpy()
        y = x.astype(np.float64) / np.sqrt((x.astype(np.float64)**2).mean(-1, keepdims=True) + 1e-5) @ w.T
        assert np.abs(got - y).max() <= 2e-3 * np.abs(y).max()
        assert [d.name for d in counts if d.name in ('linear_lanes', 'rms_norm', 'linear_tiles')] == kernels


# --- what no kernel takes

def test_refusals():
    def dense(t): return packed('f16', *t.shape, (t,))
    half, x = dtypes.half, Tensor.empty(2, 16, dtype='half', device='METAL')
    w = dense(Tensor.empty(4, 16, dtype=half, device='METAL'))
    bf16 = replace(w.format, name='bf16')
    for says, call in {
            'are not written for CPU': lambda: gpu_linear(x.to('CPU'), dense(w.parts[0].to('CPU'))),
            'half or float, not (int|i32)': lambda: gpu_linear(x.cast('int'), w),
            'half or float, not .*b': lambda: gpu_linear(x, w, norm=Tensor.empty(16, dtype='bfloat16', device='METAL')),
            '8 n numbers, not 12': lambda: gpu_linear(x[:, :12].contiguous(), dense(w.parts[0][:, :12].contiguous())),
            'reads the format bf16': lambda: gpu_linear(x, replace(w, format=bf16))}.items():
        with pytest.raises(NotImplementedError, match=says): call()
    with pytest.raises(BadInput, match='it is written for CUDA'): gpu_linear(x, w, rung='stream')


def test_the_dispatch_takes_them_without_a_warning():
    quant = pytest.importorskip('tinyvllm.quant.pack')
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((48, 64)).astype(np.float32), rng.standard_normal((3, 64)).astype(np.float16)
    for w in (quant.quantize(metal(weight), 'int4-g32'), quant.pack_dense(metal(weight.astype(np.float16)))):
        with warnings.catch_warnings(), counting() as counts:
            warnings.simplefilter('error')
            got, gated = quant.linear(metal(x), w).numpy(), quant.swiglu(metal(x), w).numpy()
            rows = quant.embed(w, metal(np.array([5, 0], np.int32)), dtypes.half).numpy()
        assert {d.name for d in counts} == {'linear_lanes', 'embed_rows'}
        dense = w.dequantize(dtypes.float).numpy().astype(np.float64)
        want = x.astype(np.float64) @ dense.T
        gate, up = np.split(want, 2, axis=1)
        assert np.abs(got - want).max() <= 2e-3 * np.abs(want).max()
        assert np.array_equal(rows, dense[[5, 0]].astype(np.float16))
        want = gate / (1 + np.exp(-gate)) * up
        assert np.abs(gated - want).max() <= 2e-3 * np.abs(want).max()


# --- broken kernels: each is caught

MEET = 'threadgroup_barrier(mem_flags::mem_threadgroup);'
MUTANTS = {
    'lanes': {
        'squares used before they are there': (MEET, '', 0), 'tokens used before they are there': (MEET, '', 1),
        'the last row of all forgotten': ('OUT - 1)', 'OUT - 2)'), 'no epsilon': ('+ EPS', ''),
        'ups from the gates': ('+ r / RESULTS * OUT', ''), 'rows of others written': ('&& n < OUT', ''),
        'tokens of others written': ('&& at < TOTAL', ''), 'one sum of squares missing': ('s < SIMDS', 's < SIMDS - 1'),
        'weights of the wrong step': ('k + 32 * STEP)', 'k + 31 * STEP)'),
        'the last columns left out': ('k < K; k += 32', 'k + STEP < K; k += 32'),
        'scale of the wrong group': ('k / GROUP]', 'k / GROUP / 2]'), 'zero of the format': ('-8.0f', '-7.0f'),
        'nibbles swapped': ('i / 4 * 4', '4 - i / 4 * 4'), 'one lane only': ('simd_sum(sums[r][t])', 'sums[r][t]'),
        'silu of the other': ('silu(v) * (up)', 'silu(up) * (v)'), 'tokens mixed up': ('dot(q, b[t])', 'dot(q, b[0])')},
    'matrix': {
        'tile used before it is there': (MEET, '', 0), 'next tile over this one': (MEET, '', 1),
        'sums read before they are there': (MEET, '', 2), 'not turned': ('ulong2(0), true', 'ulong2(0), false'),
        'tokens of others written': ('at < TOKENS && ', ''), 'rows of others written': (' && n < OUT', ''),
        'tokens of nobody read': ('t0 + r < TOKENS && ', ''), 'columns of nobody read': ('t0 + r < TOKENS && k0 + k < K', 't0 + r < TOKENS'),
        'gates and ups swapped': ('AFTER(v[0], v[8]', 'AFTER(v[8], v[0]'),
        'a wrong stride': ('k, WIDTH, ulong2', 'k, BK, ulong2'),
        'zero of the format': ('-8.0f', '-7.0f'),
        'codes without their scale': ('WEIGHT(weight[c], four(weight[c], q), 1.0f)', 'four(weight[c], q)'),
        'weights beyond the row': ('r < BN && k0 + k < K', 'r < BN')},
    'stream': {
        'squares used before they are there': ('meet();', '', 1),
        'tokens used before they are there': ('meet();', '', 2),
        'sums over tokens in use': ('meet();', '', 3), 'sums read before they are there': ('meet();', '', 4),
        'a warp forgotten': ('s < WARPS; s++) {', 's < WARPS - 1; s++) {'),
        'one step too few': ('step >= STEPS', 'step >= STEPS - 1'),
        'rows g and g + 8 swapped': ('{upper[0], lower[0]', '{lower[0], upper[0]'),
        'columns swapped': ('one, b[n].x, b[n].y', 'one, b[n].y, b[n].x'),
        'tokens of nobody read': ('t < TOKENS && at < K', 'at < K'),
        'columns beyond the row': ('if (AT(step) < K)', 'if (true)'),
        'tokens of others written': ('t < TOKENS && n < OUT)', 'n < OUT)'),
        'rows of others written': ('&& n < OUT)', ')'),
        'zero of the format': ('0x00080008u', '0x00070007u'), 'bytes out of order': ('0x3120', '0x3210', 0),
        'nibbles swapped': ('p < 2 ? minus', 'p >= 2 ? minus'), 'ups from the gates': ('(GATED ? (r) * OUT : 0)', '0'),
        'scaled twice': ('(1.0f / BOOST)', '1.0f'),
        'the next load in the wrong place': ('FETCH(d, step + DEPTH)', 'FETCH(d, step + 1)')},
    'tiles': {
        'copies awaited too late': ('arrived();', ''), 'a group never closed': ('commit();', '', 1),
        'tokens of nobody read': ('t0 + r0, step)', 't0, step)'),
        'rows of others written': ('OUT % 2 == 0 && at < OUT', 'OUT % 2 == 0'),
        'tokens of others written': ('if (t >= TOKENS) continue;', ''), 'no swizzle': ('^ turn_b', '^ 0'),
        'gates and ups swapped': ('AFTER(v[0], up[0]', 'AFTER(up[0], v[0]'),
        'columns beyond the row': ('K % BK == 0 ||', 'true ||'),
        'next tile over this one': ('FETCH(next, step', 'FETCH(now, step'),
        'ups from the gates': ('&& r0 % 16 >= 8 ? OUT', '&& r0 % 16 >= 8 ? 0'),
        'an odd row in pairs': ('OUT % 2 == 0', 'true'), 'one step too few': ('step < STEPS;', 'step < STEPS - 1;'),
        'halves of k swapped': ('lane / 16) ^ turn_a', '1 - lane / 16) ^ turn_a')}}
HOW = {'lanes': dict(rung='lanes', SIMDS=2, ROWS=2, TOKENS=2),
       'matrix': dict(rung='tiles', BM=16, BN=32, BK=32, WM=1, WN=2), 'stream': dict(rung='stream', **STREAMS[0]),
       'tiles': dict(rung='tiles', **BLOCKS[0])}
CASES = {'lanes': [Wanted('int4-g32', 3, 11, 1088, norm=True), Wanted('f16', 3, 22, 264, gated=True)],
         'matrix': [Wanted('int4-g32', 18, 43, 96, add=True), Wanted('f16', 9, 44, 40, gated=True)],
         'stream': [Wanted('int4-g32', 3, 43, 672, norm=True), Wanted('int4-g32', 3, 42, 96, gated=True)],
         'tiles': [Wanted('f16', 34, 45, 136), Wanted('f16', 9, 44, 136, gated=True), Wanted('f16', 31, 44, 200)]}


def replaced(text, old, new, which=None):
    "All places, or the n-th."
    assert old in text, old
    if which is None: return text.replace(old, new)
    parts = text.split(old)
    return old.join(parts[:which + 1]) + new + old.join(parts[which + 1:])


def trouble(rung, change=None) -> str:
    "What the simulator, the compiler or the oracle says; empty if nothing."
    def text(whole):
        if not change or whole.count(change[0]) <= (change[2] if len(change) > 2 else 0): return whole
        head = whole.index('multiply') if rung in ('stream', 'tiles') else 0
        return whole[:head] + replaced(whole[head:], *change)

    def kernel(kind, *variant):
        whole = real(kind, *variant)
        if rung in ('stream', 'tiles') and whole.cuda: return simulate(kind, text(whole.cuda))
        return Kernel(text(whole.metal)) if kind in ('lanes', 'tiles') else whole
    real = kernel_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'kernel_of', cache(kernel))
        try:
            errors = (error(wanted, **HOW[rung]) for wanted in CASES[rung])
            return next((f'error {e}' for e in errors if not e <= 2e-3), '')
        except Exception as found:    # of the simulator, the compiler or the guard regions
            return str(found)


@pytest.mark.parametrize('rung', MUTANTS)
def test_ten_mutants_and_more_are_caught(rung):
    assert trouble(rung) == ''
    assert len(MUTANTS[rung]) >= 10
    assert [name for name, change in MUTANTS[rung].items() if not trouble(rung, change)] == []


@pytest.mark.parametrize('kind', PARTS)
def test_lint(kind):
    constants = dict(T='half', T4='half4', N=64, K=256, NORM_T='float', NORM_T4='float4', BIAS_T='float', GROUP=32,
                     BIAS_T4='float4', GATED=0, NORM=1, EPS=1e-5)
    for rung, variant, more in (('lanes', (True, True, True), plan('lanes', 'METAL', 2, 64, False)[2]),
                                ('tiles', (False, True, True), plan('tiles', 'METAL', 40, 64, True)[2]),
                                ('embed_rows', (), dict(TOKENS=3)), ('all_rows', (), dict(TOKENS=64))):
        if kind == 'f32' and rung == 'tiles': continue
        assert lint(kernel_of(rung, kind, *variant).source('METAL', 128, constants | more)) == []


# --- sizes, and CUDA as far as it goes without a card

def variant(rung, name, T, N, K, gated=False, norm=False, bias=False, add=False, **sizes):
    "Source for CUDA."
    bits, group, scales = FORMATS[name]
    _, threads, c = plan(rung, 'CUDA', T, N, gated, **sizes)
    kind = kind_of(packed(name, N, K, (Tensor.empty(1),)))
    constants = dict(N=N, K=K, GATED=int(gated), EPS=1e-5, NORM=int(norm), GROUP=group or K, PAD=PAD,
                     BOOST=256.0 if group else 1.0, T='half', T4='half4', NORM_T='float', NORM_T4='float4',
                     BIAS_T='float', BIAS_T4='float4') | c
    return kernel_of(rung, kind, norm, bias, add).source('CUDA', threads, constants)


def nvrtc():
    try:
        from tinygrad.runtime.support.compiler_cuda import NVRTCCompiler
        return NVRTCCompiler('sm_90')
    except Exception as missing:
        pytest.skip(f'no NVRTC: {missing}')


@pytest.mark.parametrize('name', FORMATS)
def test_cuda_compiles(name):
    compiler = nvrtc()
    ptx = compiler.compile(variant('lanes', name, 2, 96, 512, norm=True)).decode()
    if name == 'f32': return
    variants = (1, dict(norm=True)), (8, dict(gated=True)), (8, dict(norm=True, gated=True)), (64, dict(add=True))
    for T, how in variants:
        ptx = compiler.compile(variant('stream', name, T, 2048, 2048, **how)).decode()
        assert 'mma.sync' in ptx and 'ld.global.L1::no_allocate.v4' in ptx
        assert ('rsqrt' in ptx) == ('norm' in how) and ptx.count('griddepcontrol.wait') == 1
        assert ptx.index('ld.global.L1::no_allocate') < ptx.index('griddepcontrol.wait')


@pytest.mark.parametrize('kind', [kind for kind in PARTS if kind != 'f32'])
def test_only_weights_are_read_before_the_wait_for_other_kernels(kind):
    others = re.compile(r'\b(x|norm|bias|add) ?[+\[]|\bTOKENS_AT\b|\bAFTER\b')
    for norm in (False, True):
        text = kernel_of('stream', kind, norm, True, True).cuda
        early, late = text[text.index('linear_stream('):].split('follow();')
        if not norm:
            late = re.sub(r'#if NORM\n.*?#endif', '', late, flags=re.S)
        assert 'FETCH(d, d)' in early and not others.search(early)
        assert others.search(late) and ('norm + k' in late) == norm


@pytest.mark.parametrize('gated', [False, True])
def test_cuda_tiles_compile(gated):
    compiler = nvrtc()
    for sizes in linear_tiles.TILE_SIZES:
        ptx = compiler.compile(variant('tiles', 'f16', 300, 512, 520, gated=gated, **sizes)).decode()
        assert 'mma.sync' in ptx and 'ldmatrix' in ptx and 'cp.async' in ptx


def test_sizes_fit():
    "Threads, registers' worth of warps, and threadgroup memory: 48 KB on CUDA, 32 KB on Metal."
    for T in (1, 2, 8, 9, 16, 17, 32, 33, 64):
        for rows in (64, 2048, 2560, 11264, 32000):
            c = plan('stream', 'CUDA', T, rows, False)[2]
            sums = c['WARPS'] * -(-T // 8) * 8 * 20 * 4
            assert sums <= 40960 and 32 * c['WARPS'] * c['RESIDENT'] <= 2048
    assert NORM_ROOM['stream'] + 16 * 8 * 4 <= 48 * 1024
    for c in linear_tiles.TILE_SIZES:
        assert c['STAGES'] * (c['BM'] + c['BN']) * c['BK'] * 2 <= 48 * 1024
        stride = 256 * c['WM'] * c['WN'] // c['BK']
        assert stride % 8 == 0 and c['BM'] % stride == c['BN'] % stride == 0 and c['BN'] // c['WN'] % 16 == 0
    for c in linear_tiles.MATRIX_SIZES.values():
        halves, sums = 2 * (c['BM'] + c['BN']) * (c['BK'] + 8), 4 * c['BM'] * (c['BN'] + 4)
        assert max(halves, sums) <= 32 * 1024 and c['BN'] // c['WN'] % 16 == 0
    assert NORM_ROOM['lanes'] + 1024 <= 32 * 1024
