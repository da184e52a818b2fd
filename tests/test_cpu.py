"The processor's kernels against float64 numpy, between guard regions, and broken in ten ways each."
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from support.c_kernels import Guarded, is_compiled, lanes, passes_in_child  # noqa: F401
from tinygrad import Tensor, TinyJit, dtypes

from tinyvllm.kernels import cpu
from tinyvllm.kernels.cpu import attend, kv_write, matmul, matvec
from tinyvllm.errors import BadInput
from tinyvllm.measure import counting
from tinyvllm.kernels.metal import Kernel

TYPES, TOLERANCE = {'float': np.float32, 'half': np.float16}, {'float': 1e-5, 'half': 2e-3}
every_width = pytest.mark.usefixtures('lanes')     # vectors of 4, 8 and 16 floats
many = settings(max_examples=220, deadline=None, suppress_health_check=list(HealthCheck))
MATRICES = [(kind, *shape) for kind in TYPES for shape in [
    (1, 1, 1), (1, 3, 7), (1, 37, 96), (1, 64, 75), (2, 6, 16), (3, 5, 33), (5, 9, 64), (8, 13, 40), (16, 4, 100)]]
POOLS = [(kind, *shape) for kind in TYPES for shape in [(1, 1, 16, 9), (6, 2, 48, 40), (7, 3, 5, 64), (32, 8, 16, 64)]]
# head size, group, KV heads, block size: all sizes with all groups, and each block size with each of both
HEADS = [(kind, D, G, 1 + (D + G) % 3, [8, 16, 32][(i + j) % 3]) for kind in TYPES
         for i, D in enumerate((64, 80, 96, 128)) for j, G in enumerate((1, 3, 4, 8))]
TOKENS, BLOCKS, SEQUENCES = 40, 12, 5    # of every step here: these too are compiled in


def tensors(arrays):
    return [Tensor(a, device='CPU').realize() for a in arrays]


def close(got, want, kind):
    return np.isfinite(got).all() and abs(got - want).max() <= TOLERANCE[kind] * abs(want).max()


def constants_of(name, launch, monkeypatch):
    "What a launcher would have compiled in."
    seen = {}

    def record(*tensors, **kw):
        seen.update({k: v for k, v in kw.items() if k not in ('ops', 'nbytes')})
        return tensors[:2] if name == 'KV_WRITE' else tensors[0]
    with monkeypatch.context() as patch:
        patch.setattr(cpu, name, record)
        launch()
    return seen


# products

def matrices(rng, kind, T, N, K):
    return [(rng.standard_normal((n, K)) * 2).astype(TYPES[kind]) for n in (N, T)]


def product(w, x):
    return x.astype('f8') @ w.astype('f8').T


@every_width
@many
@given(st.sampled_from(MATRICES), st.integers(0, 2**32 - 1))
def test_matmul_is_a_product(case, seed):
    kind, T, *_ = case
    w, x = matrices(np.random.default_rng(seed), *case)
    want = product(w, x)
    assert close(matmul(*tensors((w, x))).numpy(), want, kind)
    if T == 1:
        got = matvec(*tensors((w, x[0])))
        assert got.shape == w.shape[:1] and close(got.numpy(), want[0], kind)


@every_width
def test_a_long_sum_stays_exact():
    w, x = matrices(np.random.default_rng(0), 'half', 1, 8, 20000)
    assert close(matmul(*tensors((w, x))).numpy(), product(w, x), 'half')


# keys and values by slot

def writes(rng, kind, T, K, D, slots):
    pools = rng.standard_normal((2, slots, K, D)).astype(TYPES[kind])
    new = rng.standard_normal((2, T, K, D)).astype(TYPES[kind])
    where = rng.permutation(slots)[:T].astype(np.int32)
    where[1:4] = [-1, slots, 2**31 - 1][:len(where[1:4])]
    return *pools, *new, where


def scattered(k_pool, v_pool, k, v, slots):
    pools = k_pool.copy(), v_pool.copy()
    for pool, new in zip(pools, (k, v)):
        for t, slot in enumerate(slots):
            if 0 <= slot < len(pool):
                pool[slot] = new[t]
    return pools


@many
@given(st.sampled_from(POOLS), st.integers(0, 2**32 - 1))
def test_kv_write_is_a_scatter(case, seed):
    arrays = writes(np.random.default_rng(seed), *case)
    given_ = tensors(arrays)
    with counting() as c:
        k_after, v_after = kv_write(*given_)
        Tensor.realize(k_after, v_after)     # together: apart, each would launch the kernel
    got = k_after.numpy(), v_after.numpy()
    assert all(map(np.array_equal, got, scattered(*arrays))) and c.kernels == 1
    assert np.array_equal(given_[0].numpy(), got[0]), 'in place'


# attention

def step(rng, kind, D, G, K, size, tokens=TOKENS):
    "A step as the engine makes them, in shuffled blocks; all that no sequence owns is NaN, padding is not."
    heads, total = G * K, 0
    tables, owners, positions = np.zeros((SEQUENCES, BLOCKS), np.int32), [], []
    free = list(1 + rng.permutation(SEQUENCES * BLOCKS))
    pools = np.full((2, len(free) + 1, size, K, D), np.nan, TYPES[kind])
    for s in range(rng.integers(1, SEQUENCES + 1)):
        new = min(int(rng.choice([1, 1, 2, 3, 7, 8, 17, 33])), tokens - total)
        past = int(rng.choice([0, size - 1, size, rng.integers(0, size * BLOCKS - new)]))
        past, total = min(past, size * BLOCKS - new), total + new
        for t in range(past + new):
            tables[s, t // size] = tables[s, t // size] or free.pop()
            pools[:, tables[s, t // size], t % size] = rng.standard_normal((2, K, D))
        owners += [s] * new
        positions += range(past, past + new)
        if total == tokens:
            break
    padding = [0] * (tokens - total)
    q = rng.standard_normal((tokens, heads, D)).astype(TYPES[kind]) * 2
    return q, *pools, tables, np.array(owners + padding, np.int32), np.array(positions + padding, np.int32)


def attended(q, k, v, tables, owners, positions):
    (_, H, D), (_, size, K, _), out = q.shape, k.shape, np.empty(q.shape)
    for t, (owner, last) in enumerate(zip(owners, positions)):
        where = tables[owner, np.arange(last + 1) // size], np.arange(last + 1) % size
        keys, values = k[where].astype('f8'), v[where].astype('f8')                    # (L, K, D)
        s = np.einsum('kgd,lkd->kgl', q[t].astype('f8').reshape(K, H // K, D), keys) * D**-0.5
        p = np.exp(s - s.max(-1, keepdims=True))
        out[t] = np.einsum('kgl,lkd->kgd', p / p.sum(-1, keepdims=True), values).reshape(H, D)
    return out


@every_width
@settings(many, max_examples=260)
@given(st.sampled_from(HEADS), st.integers(0, 2**32 - 1))
def test_attend_is_attention(case, seed):
    arrays = step(np.random.default_rng(seed), *case)
    assert close(attend(*tensors(arrays)).numpy(), attended(*arrays), case[0])


@every_width
@pytest.mark.parametrize('scale', [1e-3, 30.0])
def test_scores_may_be_all_alike_or_far_apart(scale):
    q, *rest = step(np.random.default_rng(1), 'float', 64, 3, 2, 16)
    arrays = q * np.float32(scale), *rest
    assert close(attend(*tensors(arrays)).numpy(), attended(*arrays), 'float')


@every_width
def test_a_row_does_not_depend_on_later_tokens():
    "Queries of one token share a pass with later ones only within four rows: a NaN stays behind."
    rng = np.random.default_rng(2)
    q, k, v, tables, owners, positions = step(rng, 'float', 64, 4, 2, 16)
    tables[0], owners[:], positions[:] = 1 + np.arange(BLOCKS), 0, np.arange(TOKENS)
    k, v = (np.where(np.isnan(x), np.float32(0.5), x) for x in (k, v))
    broken = k.copy(), v.copy()
    for x in broken:
        x[tables[0, 20 // 16], 20 % 16] = np.nan
    got = attend(*tensors((q, *broken, tables, owners, positions))).numpy()
    want = attended(q, k, v, tables, owners, positions)
    assert close(got[:20], want[:20], 'float') and np.isnan(got[20:]).all()


# between guard regions, whole and broken

def guarded_cases(name, monkeypatch):
    "Cases of a kernel for `Guarded`: (constants, arrays in the signature's order, expected outputs, type)."
    rng = np.random.default_rng(7)
    if name == 'MATMUL':
        for case in MATRICES:
            w, x = matrices(rng, *case)
            constants = constants_of(name, lambda: matmul(*tensors((w, x))), monkeypatch)
            yield constants, (np.full((len(x), len(w)), np.nan, w.dtype), w, x), [product(w, x)], case[0]
    elif name == 'KV_WRITE':
        for case in POOLS:
            arrays = writes(rng, *case)
            constants = constants_of(name, lambda: kv_write(*tensors(arrays)), monkeypatch)
            yield constants, arrays, scattered(*arrays), case[0]
    else:
        for case in HEADS[1:16:4] + HEADS[18:32:5]:
            for _ in range(3):
                arrays = step(rng, *case)
                constants = constants_of(name, lambda: attend(*tensors(arrays)), monkeypatch)
                yield constants, (np.full_like(arrays[0], np.nan), *arrays), [attended(*arrays)], case[0]


def right(kernel, constants, arrays, want, kind):
    got = Guarded(kernel, constants)(*arrays)
    exact = kernel.signature.name == 'kv_write'
    return all(np.array_equal(g, w) if exact else close(g, w, kind) for g, w in zip(got, want))


def survives(kernel, cases):
    "Does a broken kernel pass them all?"
    cases = list(cases)
    for constants, *_ in cases:
        Guarded(kernel, constants)       # compiled here, not in the child
    return passes_in_child(lambda: all(right(kernel, *case) for case in cases))


@every_width
@pytest.mark.parametrize('name', ['MATMUL', 'KV_WRITE', 'ATTEND'])
def test_nothing_outside_is_written(name, monkeypatch):
    assert survives(getattr(cpu, name), guarded_cases(name, monkeypatch))


MUTANTS = {
    'MATMUL': [
        ('n + r < N ? n + r : N - 1', 'n + r'), ('r < ROWS && n + r < N', 'r < ROWS'),
        ('(t + c) * N + n + r', 't * N + n + r'), ('c < COLUMNS && t + c < TOKENS', 'c < COLUMNS'),
        ('k + LANES <= K', 'k < K'), ('k + LANES <= K', 'k + LANES < K'), ('K / LANES * LANES; k < K', 'K; k < K'),
        ('t + c < TOKENS ? t + c : TOKENS - 1', 't'), ('+= b * a[c]', '= b * a[c]'),
        ('(b.x + b.z) + (b.y + b.w)', '(b.x + b.z) + b.y'), ('n < N; n += ROWS', 'n + ROWS < N; n += ROWS'),
        ('row[r] + k)', 'row[0] + k)')],
    'KV_WRITE': [
        ('(uint)slots[t] >= SLOTS', 'slots[t] >= SLOTS'), ('(uint)slots[t] >= SLOTS', 'slots[t] < 0'),
        ('t < TOKENS', 't < TOKENS - 1'), ('>= SLOTS', '> SLOTS'), ('i < ROW', 'i < ROW - 1'),
        ('i < ROW', 'i <= ROW'), ('t < TOKENS', 't <= TOKENS'), ('value[i] = v[t', 'value[i] = k[t'),
        ('k_pool + (long)slots[t] * ROW', 'k_pool + (long)slots[t] * (ROW - 1)'), ('int t = 0', 'int t = 1'),
        ('k[t * ROW + i]', 'k[i]'), ('continue', 'return')],
    'ATTEND': [
        ('lane + j < valid, exp', 'lane + j <= valid, exp'),
        ('*sum *= keep, ', ''), ('*(vec*)(o + d) *= keep', '*(vec*)(o + d) *= 1'), ('* SCALE', ''),
        ('end = first + n', 'end = first + n - 1'), ('p % SLOTS) * KV', 'p % SLOTS) * GROUP'),
        ('owners[n] == *owners', '1'), ('&& positions[n] == *positions + n', ''),
        ('seen + i / GROUP, n), m', 'n, n), m'), ('seen + i / GROUP', 'seen + i'),
        ('table[known / SLOTS]', 'table[known / SLOTS + 1]'), ('owners[t] * B', 'owners[t]'),
        ('least(TILE, most)', 'TILE'), ('a->s[r][i] = 0', '0'), ('head / GROUP * D', '0'),
        ('k + h * D, a->now', 'k, a->now'), ('v + h * D, a->now', 'v, a->now'), ('a.o[r][d] / sum', 'a.o[r][d]'),
        ('k[a->now[j] + d]', 'k[a->now[0] + d]'), ('n * 1.42860677e-6f', '0.001f'),
        ('0, 2, 8, 10, 4, 6, 12, 14', '0, 2, 8, 10, 4, 6, 14, 12'),
        ('+ head + r % width) * D;\n        float', '+ r % width) * D;\n        float')],
}


ABSENT = {'0, 2, 8, 10, 4, 6, 12, 14'}     # not compiled for vectors of 4


@every_width
@pytest.mark.parametrize('name', MUTANTS)
def test_broken_kernels_are_caught(name, monkeypatch):
    text, cases, survivors = getattr(cpu, name).c, list(guarded_cases(name, monkeypatch)), []
    sample = {'MATMUL': (2, 3, 5), 'KV_WRITE': (1, 6), 'ATTEND': (0, 1, 2, 6, 7, 8)}[name]   # compiling takes longest
    cases = [cases[i] for i in sample]
    for old, new in MUTANTS[name]:
        assert old in text, f'{old}: not in the kernel any more'
        broken = Kernel(c=text.replace(old, new, 1))
        if not is_compiled(getattr(cpu, name), broken, cases[0][0]):
            assert old in ABSENT, f'{old}: not compiled'
        elif survives(broken, cases):
            survivors.append((old, new))
    assert not survivors and len(MUTANTS[name]) >= 10


# what the compiler makes of them

@pytest.mark.parametrize('target, conversion', [
    ('--target=x86_64-none-unknown-elf -march=haswell', r'vcvtph2ps\s+.*ymm'),
    ('--target=aarch64-none-unknown-elf -mcpu=apple-m1', 'fcvtl')])
def test_halves_become_floats_eight_at_a_time_and_nothing_is_called(target, conversion, monkeypatch, tmp_path):
    cases = {'MATMUL': (lambda: matmul(*tensors(matrices(np.random.default_rng(0), 'half', 1, 64, 64)))),
             'ATTEND': (lambda: attend(*tensors(step(np.random.default_rng(0), 'half', 64, 3, 2, 16))))}
    for name, launch in cases.items():
        source = getattr(cpu, name).source('CPU', 1, constants_of(name, launch, monkeypatch))
        flags = f'{target} -S -x c -O2 -fPIC -ffreestanding -fno-math-errno -nostdlib - -o {tmp_path}/a.s'
        done = subprocess.run([os.environ.get('CC', 'clang'), *flags.split()], input=source.encode(),
                              capture_output=True)
        if done.returncode:
            pytest.skip('this compiler has no such target')
        text = (tmp_path / 'a.s').read_text()
        assert re.search(conversion, text) and not re.search(r'^\s+(callq?|bl)\s', text, re.M)
        assert re.findall(r'\.globl\s+(\w+)', text) == [getattr(cpu, name).signature.name]


# in the graph

def test_wrong_tensors_are_refused_by_name():
    def ones(*shape, dtype=dtypes.float):
        return Tensor.ones(*shape, dtype=dtype, device='CPU').contiguous().realize()
    q, k, tables, one = ones(2, 6, 32), ones(3, 16, 2, 32), ones(1, 2, dtype=dtypes.int), ones(2, dtype=dtypes.int)
    pool, row, slots = ones(8, 2, 4), ones(3, 2, 4), ones(3, dtype=dtypes.int)
    for call, message in {
        lambda: matvec(ones(4, 8), ones(9)): "matvec: 'x' has shape",
        lambda: matvec(ones(4), ones(4)): "matvec: 'w' has shape",
        lambda: matmul(ones(4, 8), ones(8)): "matmul: 'x' has shape",
        lambda: matmul(ones(4, 8), ones(0, 8)): "matmul: 'x' is empty",
        lambda: matmul(ones(4, 8, dtype=dtypes.int), ones(1, 8)): "'w' is int",
        lambda: matmul(ones(4, 8), ones(1, 8, dtype=dtypes.half)): "'x' is half",
        lambda: kv_write(pool, pool[:4], row, row, slots): "'v_pool' has shape",
        lambda: kv_write(pool, ones(8, 2, 4), row, row[:2], slots): "'v' has shape",
        lambda: kv_write(pool, ones(8, 2, 4), row, row, slots.float()): "'slots' is float",
        lambda: kv_write(pool + 1, ones(8, 2, 4), row, row, slots): "'k_pool' is written",
        lambda: attend(q[..., :24], k[..., :24], k[..., :24], tables, one, one): 'multiple of 16',
        lambda: attend(q[:, :3], k, k, tables, one, one): 'multiple of the KV heads',
        lambda: attend(q, k, k.half(), tables, one, one): "'v' is half",
        lambda: attend(q, k[0], k[0], tables, one, one): "'k' has shape",
        lambda: attend(q, k, k, tables.float(), one, one): "'tables' is float",
        lambda: attend(q, k, k, tables, one[:1], one): "'owners' has shape",
        lambda: attend(q, k, k, tables, one, one.reshape(1, 2)): "'positions' has shape",
    }.items():
        with pytest.raises(BadInput, match=message):
            call()


def test_it_waits_in_the_graph_and_replays():
    q, k, v, *numbers = tensors(step(np.random.default_rng(3), 'float', 64, 3, 2, 16))
    with counting() as c:
        lazy = attend(q, k, v, *numbers)
    assert c.kernels == 0
    replay = TinyJit(lambda q: (attend(q, k, v, *numbers) * 2).realize())
    for _ in range(4):
        with counting() as c:
            got = replay(q).numpy()
    assert c.compiled == 0 and np.allclose(got, 2 * lazy.numpy(), atol=1e-6)


def test_bytes_are_counted_once():
    w, x = tensors(matrices(np.random.default_rng(0), 'half', 4, 64, 128))
    with counting() as c:
        matmul(w, x).realize()
    assert (c.kernels, c.nbytes) == (1, w.nbytes() + x.nbytes() + 2 * 64 * 4) and c.flops == 2 * 4 * 64 * 128


ENGINE = """
import json, sys
from tinyvllm.kernels.cpu import cpu_attend
from tinyvllm.engine.llm import LLM
from tinyvllm.kv_cache.paged import paged_attend
from tinyvllm.sampling.params import SamplingParams
items = json.load(open(sys.argv[1]))['items'][:2]
llm = LLM('smollm2', dtype='float32', attend=cpu_attend, max_model_len=512, num_blocks=40)
out = llm.generate([i['prompt_ids'] for i in items], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
                   use_tqdm=False)
print(json.dumps([o.outputs[0].token_ids == i['greedy_ids'][:20] for o, i in zip(out, items)]))
"""


@pytest.mark.slow
def test_smollm2_gives_the_golden_tokens():
    golden = Path(__file__).parent / 'golden/smollm2.json'
    env = {**os.environ, 'DEV': 'CPU', 'PYTHONPATH': str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, '-c', ENGINE, golden], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1]) == [True, True], done.stderr[-2000:]
