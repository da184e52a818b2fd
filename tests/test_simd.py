"""Matvec, writes by slot and the first paged attention, against float64 numpy.

The kernels run on CUDA or on a Mac where that is the default device, else in the simulator, which
also tells of races and of reads and writes outside. There a dozen cases have to do."""
import sys
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tinygrad import Device, Tensor, TinyJit, dtypes

from tinyvllm import metalsim

from tinyvllm.kernels import simd
from tinyvllm.errors import BadInput
from tinyvllm.models.llama import Llama, model_config
from tinyvllm.kv_cache.paged import PagedBatch, PagedKVCache
from tinyvllm.kernels.simd import (DECODE_SIMPLE, KV_WRITE, MATVEC_COALESCED, MATVEC_NAIVE, MATVEC_ROWS, MATVEC_VECTOR,
                           KernelKVCache, decode_simple, kv_write, matvec, matvec_sizes, simple_attend)
from tinyvllm.models.weights import tiny_checkpoint

DEVICE = 'CUDA' if Device.DEFAULT.startswith('CUDA') else 'METAL'
SIMULATED = DEVICE == 'METAL' and sys.platform != 'darwin'
RUNGS = MATVEC_NAIVE, MATVEC_COALESCED, MATVEC_VECTOR, MATVEC_ROWS
TOLERANCE = {np.dtype(np.float16): 2e-3, np.dtype(np.float32): 1e-5}
simulator = pytest.mark.skipif(not SIMULATED, reason='counts and complaints come from the simulator')
cases = settings(max_examples=12 if SIMULATED else 200, deadline=None, derandomize=True,
                 suppress_health_check=list(HealthCheck))
seeds, types = st.integers(0, 2**32 - 1), st.sampled_from([np.float16, np.float32])


def tensor(x):
    return Tensor(np.ascontiguousarray(x), device=DEVICE).realize()


@pytest.fixture(autouse=True, scope='module')
def poisoned():
    "Outputs hold NaN before: a number that is not written shows."
    def empty(*shape, dtype, device):
        return Tensor(np.full(shape, np.nan, {dtypes.half: 'e', dtypes.float: 'f'}[dtype]), device=device).realize()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simd, 'Tensor', SimpleNamespace(empty=empty))
        yield


def assert_close(got, want, dtype):
    got = got.numpy()
    assert got.shape == want.shape and got.dtype == dtype
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error <= TOLERANCE[np.dtype(dtype)], error   # False for NaN


# --- matvec

def check_matvec(rows, columns, dtype=np.float16, rung=None, seed=0, **sizes):
    rng = np.random.default_rng(seed)
    w, x = rng.standard_normal((rows, columns)).astype(dtype), rng.standard_normal(columns).astype(dtype)
    got = matvec(tensor(w), tensor(x), rung or simd.MATVEC_ROWS, **sizes)
    assert_close(got, w.astype(np.float64) @ x.astype(np.float64), dtype)


@cases
@given(st.integers(1, 40 if SIMULATED else 3000), st.integers(1, 40 if SIMULATED else 600),
       st.sampled_from([1, 3, 4, 8, 16]), types, st.sampled_from(RUNGS), seeds)
def test_matvec_of_any_shape(rows, columns, multiple, dtype, rung, seed):
    check_matvec(rows, columns * multiple, dtype, rung, seed)


@pytest.mark.parametrize('sizes', [dict(SIMDS=1, ROWS=1, UNROLL=1), dict(SIMDS=4, ROWS=3, UNROLL=8)])
def test_sizes_do_not_change_the_answer(sizes):
    check_matvec(23, 264, **sizes)


@pytest.mark.parametrize('device', ['METAL', 'CUDA', 'CUDA:1'])
def test_sizes_fit_into_a_threadgroup(device):
    for rows in (1, 2048, 128256):
        assert 1 <= 32 * matvec_sizes(device, rows)['SIMDS'] <= 256


@simulator
@pytest.mark.parametrize('dtype, pack', [(np.float16, 8), (np.float32, 4)])
def test_matvec_reads_what_the_formula_says(dtype, pack):
    N, K, R = 13, 96, matvec_sizes(DEVICE, 13)['ROWS']
    groups = -(-N // R)
    formula = {MATVEC_NAIVE: (N * K, N * K), MATVEC_COALESCED: (N * K, N * K),
               MATVEC_VECTOR: (N * K // pack, N * K // pack),
               MATVEC_ROWS: (groups * R * K // pack, groups * K // pack)}
    for rung, (of_w, of_x) in formula.items():
        with metalsim.counting() as counts:
            check_matvec(N, K, dtype, rung)
        w, x, y = (counts[-1].buffers[name] for name in 'wxy')
        assert (w.reads, x.reads, y.writes) == (of_w, of_x, N) and not w.writes + x.writes + y.reads


@pytest.mark.parametrize('w, x, says', [
    ((4, 8), (7,), "'x' has shape (7,); it takes (8,)"), ((4, 8, 1), (8,), "'w' has shape (4, 8, 1)"),
    ((8,), (8,), "'w' has shape (8,)"), ((4, 8), (8, 1), "'x' has shape (8, 1)")])
def test_matvec_refuses_shapes(w, x, says):
    with pytest.raises(BadInput) as refused:
        matvec(tensor(np.zeros(w, np.float16)), tensor(np.zeros(x, np.float16)))
    assert says in str(refused.value)


def test_matvec_refuses_types():
    w, x = tensor(np.zeros((4, 8), np.int32)), tensor(np.zeros(8, np.float32))
    with pytest.raises(BadInput, match="'w' is int; it takes half or float"):
        matvec(w, x)
    with pytest.raises(BadInput, match="'x' is float; it takes half"):
        matvec(w.half(), x)


# --- writes by slot

def check_kv_write(tokens=5, K=2, D=16, slots=24, dtype=np.float16, seed=0):
    rng = np.random.default_rng(seed)
    k_pool, v_pool, (k, v) = *rng.standard_normal((2, slots, K, D)).astype(dtype), \
        rng.standard_normal((2, tokens, K, D)).astype(dtype)
    new_slots = 1 + rng.permutation(slots - 1)[:tokens].astype(np.int32)
    new_slots[0] = 1                                   # the first slot that is not padding's
    new_slots[1:][new_slots[1:] == 1] = 0
    new_slots[tokens // 2 + 1:tokens // 2 + 3] = 0     # padding, several times
    got = kv_write(*map(tensor, (k_pool, v_pool, k, v, new_slots)))
    for pool, new in ((k_pool, k), (v_pool, v)):
        pool[new_slots[new_slots > 0]] = new[new_slots > 0]
    assert [g.dtype for g in got] == [tensor(k).dtype] * 2
    assert all(np.array_equal(g.numpy(), want) for g, want in zip(got, (k_pool, v_pool)))


@cases
@given(st.integers(1, 9 if SIMULATED else 200), st.integers(1, 4), st.sampled_from([16, 64, 80, 96, 128]), types, seeds)
def test_kv_write_is_a_scatter(tokens, K, D, dtype, seed):
    check_kv_write(tokens, K, D, tokens + 7, dtype, seed)


def test_kv_write_of_a_head_of_odd_size():
    check_kv_write(D=7)


@simulator
def test_kv_write_is_one_launch_that_touches_each_number_once():
    pools = [tensor(np.zeros((9, 2, 16), np.float16)) for _ in 'kv']
    new = [tensor(np.ones((3, 2, 16), np.float16)) for _ in 'kv']
    slots = tensor(np.array([4, 0, 2], np.int32))
    with metalsim.counting() as counts:
        Tensor.realize(*kv_write(*pools, *new, slots))
    (launch,), written = counts, 2 * 2 * 16 * 2   # two tokens, the third is padding
    assert [launch.buffers[name].bytes_read for name in ('k', 'v')] == [written] * 2
    assert [launch.buffers[name].bytes_written for name in ('k_pool', 'v_pool')] == [written] * 2


@pytest.mark.parametrize('change, says', [
    (dict(k_pool=(9, 2, 8)), "'k_pool' has shape (9, 2, 8); it takes (9, 2, 16)"),
    (dict(v_pool=(8, 2, 16)), "'v_pool' has shape (8, 2, 16); it takes (9, 2, 16)"),
    (dict(v=(2, 2, 16)), "'v' has shape (2, 2, 16); it takes (3, 2, 16)"),
    (dict(slots=(4,)), "'slots' has shape (4,); it takes (3,)")])
def test_kv_write_refuses_shapes(change, says):
    shapes = dict(k_pool=(9, 2, 16), v_pool=(9, 2, 16), k=(3, 2, 16), v=(3, 2, 16), slots=(3,)) | change
    arguments = {name: tensor(np.zeros(s, np.int32 if name == 'slots' else np.float16)) for name, s in shapes.items()}
    with pytest.raises(BadInput) as refused:
        kv_write(**arguments)
    assert says in str(refused.value)


@pytest.fixture(scope='module')
def model():
    config, state = tiny_checkpoint(seed=0)
    return lambda device: Llama(model_config(config), {n: t.to(device).realize() for n, t in state.items()})


def written(cache, model, device, tokens=5):
    rng, c = np.random.default_rng(1), model.config
    shape = tokens, c.num_key_value_heads, c.head_dim
    k, v = (Tensor(rng.standard_normal(shape, np.float32), device=device) for _ in 'kv')
    slots = Tensor(np.array([20, 3, 4, 47, 31], np.int32), device=device)
    return [pool.numpy()[1:] for pool in cache.write(1, k, v, PagedBatch(None, None, None, slots=slots))]


def test_the_cache_writes_as_the_portable_one_does(model):
    m = model(DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ours, portable = (written(kind(m, 6, 8), m, DEVICE) for kind in (KernelKVCache, PagedKVCache))
    assert all(a.shape == (5, 8, 2, 16) and np.array_equal(a, b) for a, b in zip(ours, portable))


def test_the_cache_warns_once_and_falls_back(model):
    m = model('CPU')
    cache = KernelKVCache(m, 6, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        ours = [written(cache, m, 'CPU') for _ in range(2)]
    assert [str(w.message) for w in caught] == [
        'kernel kv_write has no source for CPU: the portable kernels write keys and values']
    portable = written(PagedKVCache(m, 6, 8), m, 'CPU')
    assert all(np.array_equal(a, b) for pools in ours for a, b in zip(pools, portable))


# --- attention

def check_decode(D=80, H=4, K=2, S=8, dtype=np.float16, seed=0, last=(0, 15, 20), order=(2, 0, 1, 2)):
    "Tokens of some sequences in any order; slots without a token hold NaN, and so does block 0."
    rng, width = np.random.default_rng(seed), max(last) // S + 2
    blocks = 1 + rng.permutation(len(last) * width)
    k, v = np.full((2, len(blocks) + 1, S, K, D), np.nan, dtype)
    tables, owners = np.zeros((len(last), width), np.int32), np.array(order, np.int32)
    positions = np.array(last, np.int32)[owners]
    positions[-1] = rng.integers(0, positions[-1] + 1)
    q, want = rng.standard_normal((len(order), H, D)).astype(dtype), np.zeros((len(order), H, D))
    for row, end in enumerate(last):
        used, past = end // S + 1, np.arange(end + 1)
        tables[row, :used] = blocks[row * width:][:used]
        at = tables[row, past // S], past % S
        k[at], v[at] = rng.standard_normal((2, end + 1, K, D))
    for t, (row, end) in enumerate(zip(owners, positions)):
        past = np.arange(end + 1)
        at = tables[row, past // S], past % S
        keys, values = (np.repeat(x[at].astype(np.float64), H // K, axis=1) for x in (k, v))
        scores = np.einsum('hd,lhd->lh', q[t].astype(np.float64), keys) / np.sqrt(D)
        p = np.exp(scores - scores.max(0))
        want[t] = np.einsum('lh,lhd->hd', p / p.sum(0), values)
    assert_close(decode_simple(*map(tensor, (q, k, v, tables, owners, positions))), want, dtype)


@cases
@given(st.sampled_from([64, 80, 96, 128]), st.sampled_from([1, 3, 4, 8]), st.integers(1, 2), st.sampled_from([8, 16, 32]),
       types, st.lists(st.integers(0, 40 if SIMULATED else 700), min_size=1, max_size=3), seeds)
def test_decode_of_any_shape(D, group, K, S, dtype, last, seed):
    order = np.random.default_rng(seed).integers(0, len(last), 3)
    check_decode(D, group * K, K, S, dtype, seed, tuple(last), tuple(order))


@pytest.mark.parametrize('last', [0, 7, 8, 15])
def test_decode_at_the_borders_of_blocks(last):
    check_decode(D=16, last=(last,), order=(0,))


@simulator
def test_decode_reads_each_key_and_value_once_per_head():
    with metalsim.counting() as counts:
        check_decode(D=80, H=4, K=2, last=(20, 0), order=(0, 1))    # 21 positions, and 1
    seen = counts[-1].buffers
    assert seen['k'].reads == seen['v'].reads == 22 * 4 * 20 and seen['k'].bytes_read == 22 * 4 * 80 * 2
    assert seen['q'].reads == seen['out'].writes == 2 * 4 * 20 and seen['tables'].reads == 22 * 4 * 32


@pytest.mark.parametrize('shapes, says', [
    (((2, 4, 24), (3, 8, 2, 24)), 'the head dimension is 24; it takes multiples of 16 up to 128'),
    (((2, 4, 256), (3, 8, 2, 256)), 'the head dimension is 256'),
    (((2, 3, 16), (3, 8, 2, 16)), '3 query heads cannot share 2 KV heads'),
    (((2, 4, 16), (3, 8, 2, 32)), "'k' has shape (3, 8, 2, 32); it takes (3, 8, 2, 16)")])
def test_decode_refuses_shapes(shapes, says):
    q, k = (tensor(np.zeros(s, np.float16)) for s in shapes)
    numbers = [tensor(np.zeros(s, np.int32)) for s in ((2, 3), (2,), (2,))]
    with pytest.raises(BadInput) as refused:
        decode_simple(q, k, k, *numbers)
    assert says in str(refused.value)


def test_decode_refuses_types():
    q, k = tensor(np.zeros((2, 4, 16), np.float16)), tensor(np.zeros((3, 8, 2, 16), np.float32))
    numbers = [tensor(np.zeros(s, np.int32)) for s in ((2, 3), (2,), (2,))]
    with pytest.raises(BadInput, match="'k' is float; it takes half"):
        decode_simple(q, k, k, *numbers)
    with pytest.raises(BadInput, match="'q' is int; it takes half or float"):
        decode_simple(q.cast(dtypes.int), k, k, *numbers)


def test_a_layer_replays_without_python():
    rng, ran = np.random.default_rng(0), []
    pools = [tensor(rng.standard_normal((32, 2, 16), np.float32)) for _ in 'kv']
    fixed = [tensor(np.array(x, np.int32)) for x in ([[2, 3], [1, 0]], [0, 1], [9, 3])]
    w = tensor(rng.standard_normal((64, 64), np.float32))

    @TinyJit
    def layer(x, k, v, slots):
        ran.append(1)
        blocks = [p.reshape(4, 8, 2, 16) for p in kv_write(*pools, k, v, slots)]
        out = decode_simple(x.reshape(2, 4, 16), *blocks, *fixed)
        return matvec(w, out[0].flatten()).realize()
    for step in range(4):
        x, k, v = (tensor(rng.standard_normal((2, heads, 16), np.float32)) for heads in (4, 2, 2))
        slots = tensor(np.array([25, 11], np.int32))
        got = layer(x, k, v, slots).numpy()
        blocks = [p.reshape(4, 8, 2, 16) for p in pools]
        want = decode_simple(x, *blocks, *fixed).numpy()[0].flatten() @ w.numpy().T
        assert np.abs(got - want).max() < 1e-4 and np.array_equal(pools[0].numpy()[[25, 11]], k.numpy())
    assert len(ran) == 2


# --- ten ways to break each

ROWS_MUTANTS = [
    ('min(first + r, N - 1)', 'first + r'),                    # rows past the end are read
    (' && first + r < N', ''),                                 # and written
    ('(group * SIMDS + simd) * ROWS', 'group * SIMDS * ROWS'), # simdgroups do the same rows
    ('if (first >= N) return', 'if (first + lane >= N) return'),   # lanes leave before simd_sum
    ('simd_sum(sums[r])', 'sums[r]'),                          # one lane's part of the sum
    ('k += 32', 'k += 16'),                                    # numbers count twice
    ('k < K / PACK', 'k <= K / PACK'),                         # one load too many
    ('k < K / PACK', 'k < K / PACK - 1'),                      # one too few
    ('sums[r] += product', 'sums[r] = product'),               # the last step only
    ('xs[k]', 'xs[lane]'),                                     # x starts again at each step
    ('* K);', '* (K - PACK));'),                               # wrong stride
    ('dot(high(a), high(b))', 'dot(high(a), low(b))'),         # halves of a load mixed up
    ('(device const pack*)x', '(const pack*)x'),               # address space forgotten
]
KV_MUTANTS = [
    ('if (i >= TOKENS * ROW) return;', ''), ('i >= TOKENS', 'i > TOKENS'), ('slots[i / ROW]', 'slots[i % ROW]'),
    ('long(slot) * ROW', 'long(slot) * TOKENS'), ('+ i % ROW', '+ i'), ('v_pool[to] = v[i];', ''),
    ('v_pool[to] = v[i]', 'v_pool[to] = k[i]'), ('if (slot < FIRST) return;', ''), ('slot < FIRST', 'slot <= FIRST'),
    ('k_pool[to]', 'k_pool[i]'), ('= k[i]', '= k[to]'), ('slot < FIRST', 'slot > FIRST'),
]
DECODE_MUTANTS = [
    ('p <= last', 'p < last'), ('p <= last', 'p <= last + 1'), ('int p = 0', 'int p = 1'), ('table[p / S]', 'table[0]'),
    ('+ p % S', ''), ('owners[token] * B', 'token * B'), ('owners[token] * B', 'owners[token]'),
    ('head / (H / KV)', 'head % KV'), (' * SCALE', ''), ('mine ? dot(query, float4(k[at])) : 0.0f', 'dot(query, float4(k[at]))'),
    ('if (mine) out', 'out'), ('mean * keep', 'mean'), ('weight * keep + add', 'weight + add'), ('top = higher;', ''),
    ('* H + head) * LANES', '* H + head) * 32'), ('mean / weight', 'mean'),
]


def caught(name, mutant, check, monkeypatch):
    "By the simulator, by lint, or by the answer."
    (old, new), kernel = mutant, getattr(simd, name)
    assert kernel.metal.count(old) == 1, old
    broken = replace(kernel, metal=kernel.metal.replace(old, new))
    sources = []
    monkeypatch.setattr(type(kernel), 'source', lambda *a, f=type(kernel).source: sources.append(f(*a)) or sources[-1])
    monkeypatch.setattr(simd, name, broken)
    try:
        check()
    except (AssertionError, metalsim.MetalError, BadInput):
        return True
    return any(metalsim.lint(source) for source in sources if new in source)


@simulator
@pytest.mark.parametrize('name, mutants, check', [
    ('MATVEC_ROWS', ROWS_MUTANTS, partial(check_matvec, 11, 320)), ('KV_WRITE', KV_MUTANTS, check_kv_write),
    ('DECODE_SIMPLE', DECODE_MUTANTS, check_decode)])
def test_ten_ways_to_break_it_are_caught(name, mutants, check):
    check()
    survivors = []
    for mutant in mutants:
        with pytest.MonkeyPatch.context() as patch, np.errstate(all='ignore'):
            if not caught(name, mutant, check, patch):
                survivors.append(mutant)
    assert len(mutants) >= 10 and not survivors


@simulator
@pytest.mark.parametrize('T', ['half', 'float'])
def test_metals_compiler_would_take_the_text(T):
    sizes = dict(T=T, V=f'{T}4', N=9, K=96, PACK=8 if T == 'half' else 4, **matvec_sizes('METAL', 9))
    heads = dict(V=f'{T}4', H=4, KV=2, S=8, B=3, LANES=20, SCALE=0.125)
    write = dict(V=f'{T}4', TOKENS=3, ROW=8, FIRST=1)
    for kernel, constants in [*((rung, sizes) for rung in RUNGS), (KV_WRITE, write), (DECODE_SIMPLE, heads)]:
        assert metalsim.lint(kernel.source('METAL', 64, constants)) == []
