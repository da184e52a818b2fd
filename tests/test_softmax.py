"Partials merge in any order; paged decode in one pass and in parts, against float64 numpy; mutants."
import re
import sys
from dataclasses import replace
from fractions import Fraction
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tinygrad import Tensor, TinyJit

from tinyvllm import metalsim
from tinyvllm.errors import BadInput
from tinyvllm.metalsim import MetalError
from tinyvllm.kv_cache.paged import PagedBatch
from tinyvllm.kernels.softmax import (DECODE, FULL_GRID, MERGE_PARTIALS, MERGE_SIMDS, Partial, choose_part_size, decode,
                                      decode_attend, decode_sizes, decode_split, merge, single_key)

SPLIT = dict(O4='float4', SPLIT=1)   # as `decode_split` compiles the kernel
TOLERANCE = {np.float16: 2e-3, np.float32: 1e-5}
# D, H, KV, S, dtype: head dims, groups 1, 3, 4, 8 and 9, block sizes 4 to 32
SHAPES = [(64, 4, 1, 8, np.float16), (80, 3, 1, 16, np.float32), (96, 2, 2, 32, np.float16),
          (128, 8, 1, 16, np.float16), (16, 9, 1, 4, np.float32), (32, 6, 2, 8, np.float32)]
WIDTH = 160   # keys that a table has room for

simulated = pytest.mark.skipif(sys.platform == 'darwin', reason='a Mac does not count, and does not check')


def case(rng, contexts, D, H, KV, S, dtype, width=WIDTH, scale=1.0):
    "Sequences in shuffled blocks and in any order; slots without a token hold NaN, padding is block 0."
    B, T = -(-width // S), len(contexts)
    k, v = np.full((2, 2 + T * B, S, KV, D), np.nan, dtype)
    tables, owners = np.zeros((T + 1, B), np.int32), rng.permutation(T).astype(np.int32)
    free = list(1 + rng.permutation(1 + T * B))
    for owner, n in zip(owners, contexts):
        past, used = np.arange(n), -(-n // S)
        tables[owner, :used] = [free.pop() for _ in range(used)]
        at = tables[owner, past // S], past % S
        k[at], v[at] = rng.standard_normal((2, n, KV, D))
    q = (rng.standard_normal((T, H, D)) * scale).astype(dtype)
    return q, k, v, tables, owners, np.array(contexts, np.int32) - 1


def exact(q, k, v, tables, owners, positions):
    "Paged attention in float64."
    out, group, S = np.zeros(q.shape), q.shape[1] // k.shape[2], k.shape[1]
    for t, past in enumerate(map(np.arange, positions + 1)):
        at = tables[owners[t], past // S], past % S
        keys, values = (np.repeat(pool[at].astype(np.float64), group, axis=1) for pool in (k, v))
        x = np.einsum('hd,lhd->lh', q[t].astype(np.float64), keys) * q.shape[2]**-0.5
        p = np.exp(x - x.max(0))
        out[t] = np.einsum('lh,lhd->hd', p / p.sum(0), values)
    return out


def error(got, args):
    "Share of the largest value; NaN if there is a NaN, which is below no tolerance."
    want = exact(*args)
    return np.abs(got - want).max() / np.abs(want).max()


def metal(args):
    return [Tensor(x, device='METAL').realize() for x in args]


numbers = st.tuples(st.integers(-60, 60), st.integers(-1000, 1000))


@settings(max_examples=200, deadline=None)
@given(st.lists(numbers, min_size=3, max_size=12), st.data())
def test_merging_is_exact_in_any_order_and_grouping(pairs, data):
    parts = [single_key(Fraction(x), Fraction(v)) for x, v in pairs]
    a, b, c = parts[:3]
    assert merge(merge(a, b), c) == merge(a, merge(b, c)) and merge(a, b) == merge(b, a)
    cut = data.draw(st.integers(1, len(parts) - 1))
    mixed = data.draw(st.permutations(parts))
    whole = merge(reduce(merge, mixed[:cut]), reduce(merge, mixed[cut:]))
    weights = [Fraction(2) ** x for x, _ in pairs]
    assert whole.o / whole.s == sum(w * v for w, (_, v) in zip(weights, pairs)) / sum(weights)
    assert whole.m == max(x for x, _ in pairs) and 1 <= whole.s <= len(pairs)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-1, 1)), min_size=2, max_size=30))
def test_merging_floats_does_not_overflow(pairs):
    left, right = reduce(merge, (single_key(*p) for p in pairs)), reduce(merge, (single_key(*p) for p in pairs[::-1]))
    x, v = np.array(pairs).T
    w = np.exp2(x - x.max())
    for part in (left, right):
        assert isinstance(part, Partial) and abs(part.o / part.s - (w @ v) / w.sum()) < 1e-9


contexts = st.lists(st.sampled_from([1, 8, 16, 31, 32, 33, 63, 64, 65, 96, 128, WIDTH]) | st.integers(1, WIDTH),
                    min_size=1, max_size=3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(SHAPES), contexts, st.sampled_from([0.1, 1, 4]))
def test_decode_is_attention(seed, shape, lengths, scale):
    args = case(np.random.default_rng(seed), lengths, *shape, scale=scale)
    inputs, limit = metal(args), TOLERANCE[shape[-1]]
    assert error(decode(*inputs).numpy(), args) <= limit
    assert error(decode_split(*inputs, part=64).numpy(), args) <= limit


def test_sixteen_thousand_keys_in_parts_and_blocks_of_an_odd_size():
    rng = np.random.default_rng(0)
    args = case(rng, [16384, 5], 64, 2, 1, 16, np.float16, width=16384)
    assert error(decode_split(*metal(args)).numpy(), args) <= 2e-3
    args = case(rng, [37, 60], 32, 5, 5, 7, np.float32, width=63)
    assert error(decode_split(*metal(args), part=32).numpy(), args) <= 1e-5


def test_extreme_scores_stay_finite():
    args = list(case(np.random.default_rng(1), [70], 64, 2, 1, 8, np.float32))
    args[0] = args[0] * 1e4      # one key has all the weight, others underflow
    got = decode_split(*metal(args), part=32).numpy()
    assert error(got, args) <= 1e-5


@simulated
@pytest.mark.parametrize('lengths', [[96], [64, 1, 33]])
def test_each_key_is_read_once_for_its_group(lengths):
    D, H, KV, S, dtype = 64, 8, 2, 16, np.float16
    args = case(np.random.default_rng(2), lengths, D, H, KV, S, dtype)
    with metalsim.counting() as counts:
        decode(*metal(args), HEADS=4).realize()
        decode_split(*metal(args), part=64).realize()
    tiles = sum(-(-n // 32) for n in lengths)     # the last one repeats a key instead of reading beyond
    for dispatch in counts:
        if dispatch.name == 'paged_decode':
            b = dispatch.buffers
            assert b['k'].bytes_read == b['v'].bytes_read == tiles * 32 * KV * D * 2
            assert b['tables'].bytes_read == tiles * 32 * KV * 4
    parts = sum(-(-n // 64) for n in lengths)     # what no key belongs to is neither written nor read
    partials, merged = counts[-2], counts[-1]
    assert partials.buffers['out'].bytes_written == parts * H * (D + 4) * 4
    assert partials.buffers['q'].bytes_read == parts * H * D * 2
    assert merged.buffers['out'].bytes_written == len(lengths) * H * D * 2


def test_wrong_input_is_refused_by_name():
    q, k, v, tables, owners, positions = metal(case(np.random.default_rng(3), [9], 64, 4, 2, 16, np.float16))
    good = q, k, v, tables, owners, positions
    wrong = [('head dimension is 24', [q[..., :24], k[..., :24], v[..., :24], *good[3:]]),
             ('head dimension is 144', [q.repeat(1, 1, 3)[..., :144], k.repeat(1, 1, 1, 3)[..., :144], v, *good[3:]]),
             ('3 query heads cannot share 2', [q[:, :3], *good[1:]]),
             ("'q' is int", [q.cast('int'), *good[1:]]), ("'k' is float", [q, k.float(), *good[2:]]),
             ("'k' has shape", [q, k[..., :32], *good[2:]]), ("'v' has shape", [q, k, v[1:], *good[3:]]),
             ("'q' has shape", [q[0], *good[1:]]), ("'k' has shape", [q, k[0], v, *good[3:]]),
             ("'tables' has shape", [q, k, v, tables[0], owners, positions]),
             ("'owners' has shape", [q, k, v, tables, owners.repeat(2), positions]),
             ("'positions' has shape", [*good[:5], positions.repeat(2)]),
             ("'positions' is", [*good[:5], positions.float()])]
    for launch in (decode, decode_split):
        for message, inputs in wrong:
            with pytest.raises(BadInput, match=message):
                launch(*inputs)
    with pytest.raises(BadInput, match='no source for CPU'):
        decode(*(t.to('CPU') for t in good))


def shapes_of(T, H, KV, D, context, S=16, device='METAL'):
    return [Tensor.empty(*shape, dtype='half', device=device) for shape in
            ((T, H, D), (4, S, KV, D), (T, -(-context // S)))]


@pytest.mark.parametrize('D', [16, 48, 64, 80, 96, 112, 128])
@pytest.mark.parametrize('group', [1, 2, 3, 4, 6, 7, 8, 9, 12, 16, 32])
def test_every_shape_fits_a_threadgroup(D, group):
    c = decode_sizes(*shapes_of(3, 2 * group, 2, D, 4096))
    memory = 16 * c['D4'] * c['HEADS'] * (1 + c['SIMDS'] * c['ROWS']) + 8 * c['SIMDS'] * c['HEADS']
    assert memory <= 32768 and 32 * c['SIMDS'] <= 512 and group % c['HEADS'] == 0
    assert c['D4'] % c['LANES'] == 0 and c['ROWS'] * c['D4'] <= 32 and 32 % (c['TILE'] * c['ROWS']) == 0


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([1, 2, 8, 32, 256]), st.sampled_from([(8, 8), (8, 2), (32, 4), (9, 3)]),
       st.integers(1, 20000), st.sampled_from([8, 16, 32]))
def test_parts_cover_the_context_and_fill_the_device(T, heads, context, S):
    q, k, tables = shapes_of(T, *heads, 64, context, S)
    part, room = choose_part_size(q, k, tables), tables.shape[1] * S
    c = decode_sizes(q, k, tables, part)
    assert 0 < part <= room and c['PARTS'] * part >= room > (c['PARTS'] - 1) * part
    if part < room:
        assert part % 32 == 0 and part >= 32 * c['SIMDS']
        groups = T * heads[0] // c['HEADS']
        assert groups < FULL_GRID['METAL'] and groups * (c['PARTS'] - 1) < FULL_GRID['METAL']


@simulated
def test_one_pass_or_parts_by_what_fills_the_device():
    def kernels(T, context, H=4, KV=1):
        args = case(np.random.default_rng(4), [context] + [1] * (T - 1), 32, H, KV, 16, np.float16, width=context)
        q, k, v, tables, owners, positions = metal(args)
        batch = PagedBatch(None, positions, None, tables=tables, owners=owners)
        with metalsim.counting() as counts:
            got = decode_attend(q, k, v, batch).numpy()
        assert error(got, args) <= 2e-3
        return [d.name for d in counts]
    assert kernels(1, 512) == ['paged_decode', 'merge_partials']
    assert kernels(1, 96) == kernels(FULL_GRID['METAL'], 512) == ['paged_decode']


@simulated
def test_replayed_without_python():
    args = case(np.random.default_rng(5), [40, 90], 32, 4, 2, 16, np.float16)
    q, *rest = metal(args)
    step = TinyJit(lambda q: decode_split(q + 0, *rest, part=32).realize())
    for n in range(4):
        with metalsim.counting() as counts:
            got = step(Tensor(args[0] * (n + 1), device='METAL').realize()).numpy()
        scaled = args[0] * np.float16(n + 1), *args[1:]
        assert error(got, scaled) <= 2e-3
    assert counts.graphs == [3]      # the sum, the parts, the merge


# --- mutants: each kernel broken in one place, and something must notice

def run(kernel, text, buffers, grid, simds):
    "The outputs, checked under five orders of threads."
    library = metalsim.Library(text)
    library[kernel.signature.name].verify(buffers, grid, (32 * simds,), outs=[0], nan_ok=True)


def decode_with(texts, args, part):
    "Decode, or parts and their merge, from sources."
    q, k, tables = Tensor(args[0]), Tensor(args[1]), Tensor(args[3])
    c, T, (H, D) = decode_sizes(q, k, tables, part) | dict(SIMDS=2), len(args[0]), args[0].shape[1:]
    grid, out = (H // c['HEADS'], T, c['PARTS']), np.full(args[0].shape, np.nan, args[0].dtype)
    decode = replace(DECODE, metal=texts.get('decode', DECODE.metal))
    if part is None:
        run(DECODE, decode.source('METAL', 256, c), [out, *args], grid, c['SIMDS'])
        return out
    parts = np.full((T, H, c['PARTS'], D + 4), np.nan, np.float32)
    run(DECODE, decode.source('METAL', 256, c | SPLIT), [parts, *args], grid, c['SIMDS'])
    merge = replace(MERGE_PARTIALS, metal=texts.get('merge', MERGE_PARTIALS.metal))
    text = merge.source('METAL', 256, c | dict(SIMDS=MERGE_SIMDS))
    run(MERGE_PARTIALS, text, [out, parts, args[-1]], (H, T), MERGE_SIMDS)
    return out


def caught(texts, part):
    "Does an error of the simulator or a wrong result show it? One shape has idle lanes, one rows of several keys."
    for D, H, KV in ((80, 6, 2), (32, 4, 2)):
        args = case(np.random.default_rng(7), [1, 70, 150], D, H, KV, 8, np.float16)
        assert list(args[4]) != [0, 1, 2]
        try:
            if not error(decode_with(texts, args, part), args) <= 2e-3:
                return True
        except MetalError:
            return True
    return False


BARRIER = 'threadgroup_barrier(mem_flags::mem_threadgroup);'
DECODE_MUTANTS = {
    'no barrier behind the queries': (BARRIER + '\n  float4 o', '\n  float4 o'),
    'no barrier before the merge': (BARRIER + '\n  for (int n = index', '\n  for (int n = index'),
    'the last key is missing': ('positions[t] + 1', 'positions[t]'),
    'a key too many': ('positions[t] + 1', 'positions[t] + 2'),
    'some threads leave early': ('if (first >= last) return', 'if (first + i >= last) return'),
    'the table of another sequence': ('owners[t] * B', 't * B'),
    'all heads on the first KV head': ('kv = head / (H / KV)', 'kv = 0'),
    'no scale': ('float4(q[(t * H + head) * D4 + n]) * SCALE', 'float4(q[(t * H + head) * D4 + n])'),
    'repeated keys count': ('tile + i < last ? x[g][0] : MASKED', 'x[g][0]'),
    'reads beyond the last key': ('min((tile) + i, last - 1)', 'min((tile) + i, B * S - 1)'),
    'sums of lanes go astray': ('simd_shuffle_xor(give, w)', 'simd_shuffle_xor(give, 1)'),
    'the wrong half is kept': ('keep = l & w ? high : low', 'keep = low'),
    'a largest score per lane': ('simd_max(score)', 'score'),
    'values do not shrink': ('o[g] *= shrink;', ''),
    'weights do not shrink': ('s[g] * shrink + p[g]', 's[g] + p[g]'),
    'half a tile of values': ('r < 32; r += TILE * ROWS', 'r < 16; r += TILE * ROWS'),
    'the weight of another key': ('simd_shuffle(p[g], r + j * ROWS + row)', 'simd_shuffle(p[g], r + j * ROWS)'),
    'idle lanes write': ('if (busy) parts', 'parts'),
    'simdgroups share a tile': ('tile += 32 * SIMDS', 'tile += 32'),
    'not divided': ('O4(all / sum)', 'O4(all)')}
SPLIT_MUTANTS = {
    'every part begins at 0': ('decode', 'first = tg.z * PART', 'first = 0'),
    'parts overlap': ('decode', 'first + PART)', 'B * S)'),
    'parts side by side in a row': ('decode', '(t * H + head + g) * PARTS + (int)tg.z', '(t * H + head + g) + (int)tg.z'),
    'heads on top of each other': ('decode', '(t * H + head + g)', '(t * H + head)'),
    'no largest score written': ('decode', 'float4(top, sum', 'float4(0.0f, sum'),
    'sum of one simdgroup': ('decode', 'sum += f * sums[a][g]', 'sum = f * sums[a][g]'),
    'a part too many': ('merge', '+ PART - 1) / PART', '+ PART) / PART + 1'),
    'a part too few': ('merge', '+ PART - 1) / PART', ') / PART'),
    'stride without the sums': ('merge', 'row * PARTS * (D4 + 1)', 'row * PARTS * D4'),
    'a largest score per lane': ('merge', '  top = simd_max(top);\n', ''),
    'sums of one lane': ('merge', '  sum = simd_sum(sum);\n', ''),
    'parts are not shifted': ('merge', 'part[a * (D4 + 1) + i] * fast::exp2(part[a * (D4 + 1) + D4].x - top)',
                              'part[a * (D4 + 1) + i]'),
    'every simdgroup takes all parts': ('merge', 'a += SIMDS', 'a++'),
    'no barrier': ('merge', '  ' + BARRIER + '\n', ''),
    'leaves before the barrier': ('merge', '  ' + BARRIER + '\n  if (sg > 0 || i >= D4) return;',
                                  '  if (sg > 0 || i >= D4) return;\n  ' + BARRIER),
    'one simdgroup is forgotten': ('merge', 'int a = 1; a < SIMDS', 'int a = 2; a < SIMDS')}


def mutated(text, old, new):
    assert text.count(old) == 1, old
    return text.replace(old, new)


@simulated
def test_the_kernels_themselves_pass():
    assert not caught({}, None) and not caught({}, 64)


@simulated
@pytest.mark.parametrize('name', DECODE_MUTANTS)
def test_mutants_of_decode_are_caught(name):
    assert caught({'decode': mutated(DECODE.metal, *DECODE_MUTANTS[name])}, None)


@simulated
@pytest.mark.parametrize('name', SPLIT_MUTANTS)
def test_mutants_of_split_and_merge_are_caught(name):
    which, old, new = SPLIT_MUTANTS[name]
    text = {'decode': DECODE, 'merge': MERGE_PARTIALS}[which].metal
    assert caught({which: mutated(text, old, new)}, 64)


@simulated
def test_lint_has_no_complaint():
    c = decode_sizes(*shapes_of(1, 8, 2, 64, 256), 64)
    for kernel, extra in ((DECODE, {}), (DECODE, SPLIT), (MERGE_PARTIALS, {})):
        assert metalsim.lint(kernel.source('METAL', 256, c | extra)) == []


def test_sources_compile_for_cuda():
    "Where NVIDIA's compiler is: it needs no GPU. 16-bit rows are read 8 bytes at a time, nothing is spilled to memory."
    from tinygrad.runtime.support.compiler_cuda import NVRTCCompiler
    try:
        compiler = NVRTCCompiler('sm_90')
    except Exception as missing:
        pytest.skip(f'no NVRTC: {missing}')
    for T4, load in (('half4', r'ld\.global(\.nc)?\.v2\.u32'), ('float4', r'ld\.global(\.nc)?\.v4')):
        c = decode_sizes(*shapes_of(1, 8, 2, 128, 4096), 512) | dict(T4=T4, O4=T4)
        for kernel, extra in ((DECODE, {}), (DECODE, SPLIT), (MERGE_PARTIALS, {})):
            text = compiler.compile(kernel.source('CUDA', 32 * c['SIMDS'], c | extra)).decode()
            assert '.local' not in text
            if kernel is not MERGE_PARTIALS:
                assert re.search(load, text), load
