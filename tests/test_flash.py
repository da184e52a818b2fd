"Flash attention, tile by tile: every rung in the simulator, against float64, whole and broken."
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tinygrad import Device, GlobalCounters, Tensor, TinyJit, dtypes
from support.metal_cases import unlinted  # noqa: F401
from support.tensor_cores import simulate

from tinyvllm.kernels import flash as module
from tinyvllm.kernels.cpu import cpu_attend
from tinyvllm.cli.doctor import run_case
from tinyvllm.kernels.cases import Case, reference_attention
from tinyvllm.errors import BadInput
from tinyvllm.kernels.flash import FLASH_MATRIX, FLASH_TILED, choose_tile, flash, flash_attend
from tinyvllm.kernels.flash_cuda import FLASH_CUDA, FLASH_CUDA_TEXT
from tinyvllm.engine import defaults
from tinyvllm.engine.defaults import best_attend, best_cache
from tinyvllm.models.llama import Llama, model_config, rope_table
from tinyvllm.kernels.metal import PTX, Kernel, find_refusal
from tinyvllm.metalsim import counting, lint
from tinyvllm.metalsim.source import strip_comments
from tinyvllm.kv_cache.paged import PagedBatch, PagedKVCache, paged_attend
from tinyvllm.models.weights import tiny_checkpoint

simulator = pytest.mark.skipif(sys.platform != 'linux', reason='a Mac has the real one')
TOLERANCE = {'float16': 2e-3, 'float32': 1e-5}


def step(rng, new, past, H=4, K=2, D=16, S=8, padding=0, dtype='float16', scale=1.0) -> Case:
    "New tokens at the end of their pasts, in shuffled blocks; slots without a token hold NaN."
    lengths = np.add(new, past)
    free = list(1 + rng.permutation(sum(-(-lengths // S)) + 2))
    tables = np.zeros((len(new), max(-(-lengths // S)) + 1), np.int32)
    k, v = np.full((2, len(free) + 1, S, K, D), np.nan, dtype)
    for table, n in zip(tables, lengths):
        table[:-(-n // S)] = [free.pop() for _ in range(-(-n // S))]
        at = np.arange(n)
        for pool in (k, v):
            pool[table[at // S], at % S] = rng.standard_normal((n, K, D))
    owners = np.append(np.repeat(np.arange(len(new)), new), np.zeros(padding)).astype(np.int32)
    positions = np.concatenate([*(np.arange(p, p + n) for p, n in zip(past, new)), np.zeros(padding)])
    inputs = dict(q=(scale * rng.standard_normal((len(owners), H, D))).astype(dtype), k=k, v=v, tables=tables,
                  owners=owners, positions=positions.astype(np.int32), starts=np.cumsum([0, *new]).astype(np.int32))
    return Case(inputs, (reference_attention(**inputs),))


def error(case, device='METAL', **how):
    "Relative, with guard regions around every buffer; raises what the simulator finds."
    return run_case(lambda *tensors: flash(*tensors, **how), case, device)


def tensors(case, device='METAL'):
    return [Tensor(x, device=device).realize() for x in case.inputs.values()]


# --- the same result

@st.composite
def steps(draw):
    "Up to three sequences, up to 40 new tokens each, pasts to 70, and padding."
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 3))
    new = [draw(st.sampled_from([0, 1, 8, 16, 31, 40])) for _ in range(count)]
    past = [draw(st.sampled_from([0, 1, 31, 32, 63, 70])) for _ in range(count)]
    new[draw(st.integers(0, count - 1))] += 1       # a step without tokens is none
    group, K = draw(st.sampled_from([(1, 2), (3, 1), (4, 1), (8, 1)]))
    return rng, new, past, dict(H=group * K, K=K, D=draw(st.sampled_from([16, 64, 80])),
                                S=draw(st.sampled_from([8, 16, 32])), padding=draw(st.sampled_from([0, 5, 40])))


@simulator
@settings(max_examples=8, deadline=None)
@given(steps(), st.sampled_from(['float16', 'float32']))
def test_tiled(drawn, dtype):
    rng, new, past, sizes = drawn
    assert error(step(rng, new, past, dtype=dtype, **sizes), rung=FLASH_TILED) <= TOLERANCE[dtype]


@simulator
@settings(max_examples=8, deadline=None)
@given(steps(), st.sampled_from([dict(STAGES=1, KEYS=32), dict(STAGES=2, KEYS=16)]))
def test_matrix(drawn, tile):
    rng, new, past, sizes = drawn
    assert error(step(rng, new, past, **sizes), rung=FLASH_MATRIX, **tile) <= 2e-3


SIMULATED = simulate()
CUDA_TILES = [dict(SIMDS=1, ROWS=16, KEYS=16, STAGES=1), dict(SIMDS=2, ROWS=16, KEYS=64, STAGES=1),
              dict(SIMDS=2, ROWS=16, KEYS=32, STAGES=2), dict(SIMDS=1, ROWS=32, KEYS=32, STAGES=2)]


@simulator
@settings(max_examples=8, deadline=None)
@given(steps(), st.sampled_from(CUDA_TILES))
def test_simulated_tensor_cores(drawn, tile):
    rng, new, past, sizes = drawn
    assert error(step(rng, new, past, **sizes), rung=SIMULATED, **tile) <= 2e-3


@simulator
@pytest.mark.parametrize('heads', [1, 2, 4])
def test_a_tile_may_hold_some_heads_of_a_group(heads):
    case = step(np.random.default_rng(heads), (9, 21), (3, 0), H=8, K=2, padding=2)
    assert error(case, rung=FLASH_TILED, HEADS=heads) <= 2e-3


@simulator
def test_large_groups_are_cut():
    q = Tensor.empty(1, 96, 16, dtype='half', device='METAL')
    assert choose_tile(FLASH_TILED, q, 96) | dict(HEADS=32, TOKENS=1) == choose_tile(FLASH_TILED, q, 96)
    case = step(np.random.default_rng(0), (3,), (2,), H=48, K=1)
    assert error(case, rung=FLASH_TILED) <= 2e-3


@simulator
@pytest.mark.parametrize('rung', [FLASH_TILED, FLASH_MATRIX, SIMULATED], ids=['tiled', 'matrix', 'simulated'])
def test_large_scores_do_not_overflow(rung):
    case = step(np.random.default_rng(0), (20, 1), (0, 33), scale=60.0)
    assert error(case, rung=rung, **(CUDA_TILES[0] if rung is SIMULATED else {})) <= 2e-3


# --- broken kernels: each is caught

TILED, MATRIX = FLASH_TILED.metal, FLASH_MATRIX.metal
BARRIER = 'threadgroup_barrier(mem_flags::mem_threadgroup);'
EVERYWHERE = {
    'a token sees one key too few': ('<= past +', '< past +'),
    'a token sees one key too many': ('<= past +', '<= 1 + past +'),
    'a key behind the end is read': ('k0) + r <= last', 'k0) + r <= last + 1'),
    'rows of the cache too close': ('(long)(KV * D)', '(long)D'),
    'slots in the wrong order': ('(at) % S)', '(S - 1 - (at) % S))'),
    'heads of another group': ('kv = head / (H / KV)', 'kv = head % KV'),
    'sequences found one tile late': ('+ middle <= tile', '+ middle < tile'),
    'padding not cleared': ('o[ROW(i / D) + i % D] = T(0.0f);', ';'),
    'the scale forgotten': ('* SCALE', '* 1.0f'),
    'the last key left out': ('k0 <= last;', 'k0 < last;'),
    'shorter sequences': ('const int end = s < sequences ? starts[s + 1] : tokens',
                          'const int end = s < sequences ? starts[s + 1] - 1 : tokens'),
}
MUTANTS = {
    'tiled': {
        'keys over values in use': (BARRIER, '', 0), 'keys used before they are there': (BARRIER, '', 1),
        'values over keys in use': (BARRIER, '', 2), 'values used before they are there': (BARRIER, '', 3),
        'a key behind the end is read': ('k0 + r <= last', 'k0 + r <= last + 1'),
        'queries of other tiles': ('i / D < rows ? q[ROW(i / D) + i % D] : T(0.0f)', 'q[ROW(i / D) + i % D]'),
        'sum not rescaled': ('sum[r] * fix', 'sum[r]'), 'total not rescaled': ('total[r][c] *= fix', ';'),
        'rows of others written': ('mine + r < rows && ', ''),
        'one value too many': ('j < 32;', 'j < 33;'), 'columns beyond the head': ('&& lane + 32 * c < D', ''),
    },
    'matrix': {
        'tile used before it is there': (BARRIER, '', 0), 'next tile over this one': (BARRIER, '', 1),
        'keys not transposed': ('ulong2(0), true', 'ulong2(0), false'), 'a row in two lanes': ('simd_shuffle_xor(m, 8)', 'm'),
        'total not rescaled': ('thread_elements()[e] *= fix', 'thread_elements()[e] *= 1.0f'),
        'sum not rescaled': ('sum *= fix', ';'), 'a wrong stride': ('[i * 8], D + 8);', '[i * 8], D);'),
        'rows of others written': ('    if (row < rows)\n', ''), 'another layout': ('lane % 2 * 2;', 'lane % 2;'),
        'queries of other tiles': ('row < rows ? *two : half2(0.0f)', '*two'),
    },
    'simulated': {
        'keys used before they are there': ('fetched();', '', 0), 'values used before they are there': ('fetched();', '', 1),
        'keys transposed': ('load8x8(key', 'load8x8_transposed(key'), 'values not transposed': ('load8x8_transposed(value', 'load8x8(value'),
        'another order of matrices': ('n + lane % 16][d + lane / 16 * 8]', 'n + lane / 16 * 8 + lane % 8][d + lane / 8 % 2 * 8]'),
        'a row in two lanes': ('x = fmaxf(x, across(x, 2));', ''), 'sum not rescaled': ('sum[r] *= fix', ';'),
        'no mask on the diagonal': ('if (k0 + KEYS - 1 > past)', 'if (k0 > past)'),
        'the two halves of a pair swapped': ('[r % 2 * 2] / sum[r], total[r / 2][d][r % 2 * 2 + 1]',
                                             '[r % 2 * 2 + 1] / sum[r], total[r / 2][d][r % 2 * 2]'),
        'rows of others written': ('if (row < rows) *(uint*)(o', '*(uint*)(o'),
        'a key behind the end is read': ('at <= last;', 'at <= last + 1;'),
        'queries of other tiles': ('row < rows ? *(const uint*)(q + ROW(row) + d + column) : 0',
                              '*(const uint*)(q + ROW(row) + d + column)'),
    }}
TEXTS = {'tiled': TILED, 'matrix': MATRIX, 'simulated': FLASH_CUDA_TEXT}
TILE = {'tiled': dict(SIMDS=2, ROWS=4), 'matrix': dict(SIMDS=2, KEYS=16), 'simulated': dict(SIMDS=2, ROWS=16, KEYS=16)}
CASES = [step(np.random.default_rng(1), (13, 1, 9), (7, 56, 0), H=4, K=2, padding=3),
         step(np.random.default_rng(2), (33,), (32,), H=2, K=2, D=48)]   # ends with the tokens, a key in the last tile


def replaced(text, old, new, which=None):
    "Replace all occurrences, or the n-th."
    assert old in text, old
    if which is None: return text.replace(old, new)
    parts = text.split(old)
    return old.join(parts[:which + 1]) + new + old.join(parts[which + 1:])


def broken(rung):
    "Name -> text, for the bugs that this rung can have."
    inside = TEXTS[rung].removeprefix(PTX)     # simulated by other functions
    changes = {name: change for name, change in EVERYWHERE.items() if change[0] in inside} | MUTANTS[rung]
    return {name: replaced(TEXTS[rung], *change) for name, change in changes.items()}


def trouble(rung, text, **tile):
    "What the simulator, the linter or the oracle says; empty if nothing."
    kernel = simulate(text) if rung == 'simulated' else Kernel(text)
    try:
        errors = (error(case, rung=kernel, **TILE[rung] | tile) for case in CASES)
        return next((f'error {e}' for e in errors if not e <= 2e-3), '')
    except Exception as found:    # of the simulator, the compiler or the guard regions
        return str(found)


@simulator
@pytest.mark.parametrize('rung', TEXTS)
def test_ten_mutants_and_more_are_caught(rung):
    assert trouble(rung, TEXTS[rung]) == ''
    mutants = broken(rung)
    assert len(mutants) >= 10
    assert [name for name, text in mutants.items() if not trouble(rung, text)] == []


@simulator
@pytest.mark.parametrize('rung', ['matrix', 'simulated'])
def test_double_buffering_needs_its_second_buffer(rung):
    assert trouble(rung, TEXTS[rung], STAGES=2) == ''
    assert trouble(rung, replaced(TEXTS[rung], 'KEYS, 1 - now', 'KEYS, now'), STAGES=2)


@simulator
@pytest.mark.parametrize('kernel', [FLASH_TILED, FLASH_MATRIX])
def test_lint(kernel):
    q = Tensor.empty(1, 4, 64, dtype='half', device='METAL')
    c = choose_tile(kernel, q, 4) | dict(T='half', T4='half4', H=4, KV=1, D=64, S=16, SCALE=0.18)
    assert lint(kernel.source('METAL', 128, c)) == []


# --- CUDA, as far as it goes without a card

def nvrtc():
    try:
        from tinygrad.runtime.support.compiler_cuda import NVRTCCompiler
        return NVRTCCompiler('sm_90')
    except Exception as missing:
        pytest.skip(f'no NVRTC: {missing}')


@pytest.mark.parametrize('D', [64, 80, 96, 128])
def test_cuda_compiles(D):
    compiler = nvrtc()
    for kernel, kind, rows in ((FLASH_TILED, 'half', 8), (FLASH_TILED, 'float', 4), (FLASH_CUDA, 'half', 16)):
        where = kernel.signature.name, 'CUDA'
        c = module.TILES[where] | dict(ROWS=rows) | module.TILES.get((*where, D), {})
        c |= dict(HEADS=4, TOKENS=16, T=kind, T4=f'{kind}4', H=8, KV=2, D=D, S=16, SCALE=0.125)
        ptx = compiler.compile(kernel.source('CUDA', 32 * c['SIMDS'], c)).decode()
        if kernel is FLASH_CUDA: assert 'mma.sync' in ptx and 'ldmatrix' in ptx and 'cp.async' in ptx


@pytest.mark.parametrize('D', [64, 80, 96, 128])
def test_threadgroup_memory_fits(D):
    for (name, device), c in ((key, c) for key, c in module.TILES.items() if len(key) == 2):
        c = c | module.TILES.get((name, device, D), {})
        tiles = 2 * c.get('STAGES', 1) * c.get('KEYS', 0) * (D + 8) * 2     # keys and values
        if name == 'flash_tiled': tiles = max((4 * rows * D + 32 * (D + 4)) * size for size, rows in ((2, 8), (4, 4)))
        assert tiles <= (48 if device == 'CUDA' else 32) * 1024


# --- the launcher

def test_refusals():
    case = step(np.random.default_rng(0), (3,), (0,))
    q, k, v, tables, owners, positions, starts = tensors(case, 'METAL')
    wrong = {
        'head dimension is 24': (Tensor.empty(3, 4, 24, dtype='half', device='METAL'), k, v, tables, owners, positions, starts),
        'head dimension is 144': (Tensor.empty(3, 4, 144, dtype='half', device='METAL'), k, v, tables, owners, positions, starts),
        "'q' is": (q.cast(dtypes.bfloat16), k, v, tables, owners, positions, starts),
        "'k' is float": (q, k.float(), v, tables, owners, positions, starts),
        '3 query heads cannot share 2': (q[:, :3], k, v, tables, owners, positions, starts),
        "'v' has shape": (q, k, v[:1], tables, owners, positions, starts),
        "'starts' has shape": (q, k, v, tables, owners, positions, owners),
        "'owners' has shape": (q, k, v, tables, starts, positions, starts),
        "'tables' is on CPU": (q, k, v, tables.to('CPU'), owners, positions, starts),
        'has no source for CPU': (q.to('CPU'), *(x.to('CPU') for x in (k, v, tables, owners, positions, starts)))}
    for message, arguments in wrong.items():
        with pytest.raises(BadInput, match=message): flash(*arguments)
    with pytest.raises(BadInput, match='matrix units take half'):
        flash(q.float(), k.float(), v.float(), tables, owners, positions, starts, rung=FLASH_MATRIX)


@simulator
def test_one_program_serves_all_steps():
    before = find_refusal.cache_info().misses
    for new, past, padding in (((3,), (0,), 0), ((9, 1), (5, 40), 6), ((40, 2, 1), (0, 0, 70), 1)):
        assert error(step(np.random.default_rng(0), new, past, H=10, K=2, padding=padding)) <= 2e-3
    assert find_refusal.cache_info().misses - before <= 1


@simulator
def test_captured_and_replayed():
    cases = [step(np.random.default_rng(n), *shape, padding=3) for n, shape in
             enumerate((((9, 4), (8, 30)), ((1, 12), (0, 14)), ((5, 8), (33, 1)), ((7, 6), (20, 31))))]
    widest = max(case.inputs['tables'].shape[1] for case in cases)
    jitted = TinyJit(lambda *args: flash(*args).realize())
    for case in cases:
        tables = np.pad(case.inputs['tables'], ((0, 0), (0, widest - case.inputs['tables'].shape[1])))
        pools = [np.pad(case.inputs[x], ((0, 20 - len(case.inputs[x])), (0, 0), (0, 0), (0, 0))) for x in 'kv']
        arguments = [case.inputs['q'], *pools, tables, *list(case.inputs.values())[4:]]
        with counting() as counts:
            got = jitted(*(Tensor(x, device='METAL').realize() for x in arguments)).numpy()
        assert abs(got - case.want[0]).max() <= 2e-3 * abs(case.want[0]).max()
        assert [d.name for d in counts if d.name.startswith('flash')] == ['flash_matrix']


@simulator
def test_keys_are_read_once_per_tile_and_group():
    case = step(np.random.default_rng(0), (40, 3), (5, 64), H=8, K=2, padding=5)
    starts, positions = case.inputs['starts'].tolist(), case.inputs['positions'].tolist()
    for rung in (FLASH_TILED, FLASH_MATRIX):
        arguments = tensors(case)
        tile = choose_tile(rung, arguments[0], 4)['TOKENS']
        lasts = [positions[min(t + tile, end) - 1] for first, end in zip(starts, starts[1:]) for t in range(first, end, tile)]
        with counting() as counts: flash(*arguments, rung=rung).realize()
        traffic = counts[-1].buffers
        assert traffic['k'].bytes_read == traffic['v'].bytes_read == sum(n + 1 for n in lasts) * 2 * 16 * 2
        assert traffic['q'].bytes_read == 43 * 8 * 16 * 2 and traffic['o'].bytes_written == 48 * 8 * 16 * 2


@simulator
@pytest.mark.parametrize('T', [32, 256])
def test_no_memory_beside_the_result(T):
    arguments, allocator, sizes = tensors(step(np.random.default_rng(0), (T,), (0,))), Device['METAL'].allocator, []
    flash(*arguments).realize()      # the sizes of the step
    alloc = allocator.alloc
    allocator.alloc = lambda size, *args: sizes.append(size) or alloc(size, *args)
    try: out = flash(*arguments).realize()
    finally: allocator.alloc = alloc
    assert sizes == [out.nbytes()]


# --- the seam

def batch_of(case, device):
    q, k, v, tables, owners, positions, starts = tensors(case, device)
    return q, k, v, PagedBatch(None, positions, None, tables=tables, owners=owners, starts=starts)


@simulator
@pytest.mark.parametrize('new,kernel', [((1, 1, 1), 'decode'), ((2, 1), 'flash')])
def test_single_tokens_are_decoded_and_runs_are_tiled(new, kernel):
    case = step(np.random.default_rng(0), new, (40, 3, 70)[:len(new)])
    with counting() as counts: got = flash_attend(*batch_of(case, 'METAL')).numpy()
    assert abs(got - case.want[0]).max() <= 2e-3 * abs(case.want[0]).max()
    assert any(kernel in d.name for d in counts) and any('flash' in d.name for d in counts) == (kernel == 'flash')


def model(device, **config):
    config, state = tiny_checkpoint(seed=0, **config)
    return Llama(model_config(config), {name: t.to(device) for name, t in state.items()})


def test_the_best_of_each_device():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert best_attend(model('CPU')) is cpu_attend
        if sys.platform == 'linux': assert best_attend(model('METAL')) is flash_attend


def warning_of(chosen):
    "The one warning of `best_attend`."
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter('always')
        assert best_attend(chosen) is paged_attend
    assert len(messages) == 1
    return str(messages[0].message)


@simulator
def test_the_portable_one_where_kernels_refuse(monkeypatch):
    assert 'head dimension is 24' in warning_of(model('METAL', head_dim=24))
    odd = model('METAL')
    odd.embedding = odd.embedding.cast(dtypes.bfloat16)
    assert 'it takes half or float' in warning_of(odd)
    monkeypatch.setattr(module, 'FLASH_TILED', Kernel(replaced(TILED, 'simd_sum', 'simd_some')))
    assert 'does not compile for METAL' in warning_of(model('METAL')) and 'simd_some' in warning_of(model('METAL'))
    monkeypatch.setattr(defaults, 'ATTENDS', {})
    assert 'no attention kernel is written for METAL' in warning_of(model('METAL'))


def test_texts_say_what_they_mean():
    "Each comment in a kernel is short enough to be read beside its line."
    for text in (TILED, MATRIX, FLASH_CUDA_TEXT):
        assert max(map(len, text.splitlines())) <= 100 and strip_comments(text) != text


# --- a layer of the model, recorded

def decoded(model, device, cache, attend):
    "Five steps of two sequences through a layer under TinyJit: outputs, calls of Python, kernels and graphs."
    calls, outputs, kernels, graphs = [], [], [], []

    def ints(x): return Tensor(np.array(x, np.int32), device=device).realize()
    tables, owners, starts = ints([[1, 2], [3, 4]]), ints([0, 1]), ints([0, 1, 2])

    @TinyJit
    def step(x, positions, slots):
        calls.append(1)
        batch = PagedBatch(None, positions, None, 0, slots, tables, owners, starts)
        return model.layers[0](x, rope_table(model.freqs, positions), batch, cache, attend).realize()
    for p in range(5):
        x = Tensor(np.random.default_rng(p).standard_normal((2, 64)).astype(np.float32), device=device).realize()
        positions, slots = ints([p, p]), ints([16 + p, 48 + p])
        GlobalCounters.reset()
        with counting() as counts: outputs.append(step(x, positions, slots).numpy())
        kernels.append(GlobalCounters.kernel_count)
        graphs.append(list(counts.graphs))
    return np.array(outputs), len(calls), kernels, graphs


@simulator
@pytest.mark.parametrize('device', ['CPU', 'METAL'])
def test_a_layer_is_recorded_with_its_kernels(device, monkeypatch):
    if device == 'CPU': monkeypatch.setattr(Device['CPU'], 'graph', None)    # an engine may have given it one
    config, state = tiny_checkpoint(seed=0, num_hidden_layers=1)
    model = Llama(model_config(config), {name: t.to(device).realize() for name, t in state.items()})
    ours = decoded(model, device, best_cache(model, 6), best_attend(model))
    portable = decoded(model, device, PagedKVCache(model, 6), paged_attend)
    assert np.abs(ours[0] - portable[0]).max() < 1e-5
    assert ours[1] == portable[1] == 2                        # Python runs twice, then never again
    if device == 'CPU': assert (ours[2][-1], portable[2][-1]) == (14, 20)
    else: assert (ours[3][-1], portable[3][-1]) == ([14], [20])    # one call, all kernels
