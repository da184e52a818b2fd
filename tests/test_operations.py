"What kernels' texts become: operations by kind, and no array of a thread in memory."
import sys

import pytest
import tinyvllm  # noqa: F401  finds device and compiler
from tinygrad import Tensor

from tinyvllm.kernels.flash import FLASH_MATRIX, FLASH_TILED, choose_tile
from tinyvllm.kernels.linear_gpu import kernel_of, plan
from tinyvllm.kernels.linear_lanes import PARTS
from tinyvllm.kernels.metal import METAL_PRELUDE
from tinyvllm.kernels.simd import MATVEC_ROWS, matvec_sizes
from tinyvllm.kernels.softmax import DECODE, decode_sizes
from tinyvllm.metalsim import MetalCompileError, count_operations

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='the simulator and its compiler run on Linux')
HEAD = METAL_PRELUDE + 'kernel void k(device float* y, device const float* x, uint i [[thread_position_in_grid]]) {\n'


def empty(*shape, dtype='half'):
    return Tensor.empty(*shape, dtype=dtype, device='METAL')


# --- texts of ours, with sizes as models have them

def decode_text(D, group, dtype='half', part=None):
    q, k, tables = empty(64, 4 * group, D, dtype=dtype), empty(99, 16, 4, D, dtype=dtype), empty(64, 64, dtype='int')
    c = decode_sizes(q, k, tables, part)
    return DECODE.source('METAL', 32 * c['SIMDS'], c)


def flash_text(kernel, D, group, dtype='half'):
    c = choose_tile(kernel, empty(512, 4 * group, D, dtype=dtype), group)
    sizes = dict(T=dtype, T4=f'{dtype}4', H=4 * group, KV=4, D=D, S=16, SCALE=D**-0.5)
    return kernel.source('METAL', 32 * c['SIMDS'], sizes | c)


def product_text(rung, kind, T, norm=False, gated=False):
    _, threads, c = plan(rung, 'METAL', T, 4096, gated)
    sizes = dict(N=4096, K=1024, GROUP=32, GATED=int(gated), EPS=1e-5, NORM=int(norm), T='half', T4='half4',
                 NORM_T='half', NORM_T4='half4')
    return kernel_of(rung, kind, norm).source('METAL', threads, sizes | c)


def matvec_text(K):
    sizes = dict(T='half', V='half4', N=4096, K=K, PACK=8 if K % 8 == 0 else 1)
    return MATVEC_ROWS.source('METAL', 64, sizes | matvec_sizes('METAL', 4096))


TEXTS = {
    **{f'decode {D} {group} {dtype}': (decode_text, D, group, dtype) for D, group, dtype in (
        (64, 4, 'half'), (64, 3, 'float'), (80, 2, 'half'), (96, 1, 'half'), (128, 8, 'half'), (128, 1, 'float'))},
    'a part': (decode_text, 128, 4, 'half', 256),
    **{f'tiled {D} {dtype}': (flash_text, FLASH_TILED, D, 4, dtype)
       for D, dtype in ((64, 'float'), (80, 'half'), (128, 'half'))},
    **{f'matrix {D}': (flash_text, FLASH_MATRIX, D, 4) for D in (64, 96, 128)},
    **{f'lanes {kind} {T}': (product_text, 'lanes', kind, T, T == 4, T == 1) for kind in PARTS for T in (1, 4, 8)},
    **{f'tiles {kind} {T}': (product_text, 'tiles', kind, T) for kind in PARTS if kind != 'f32' for T in (16, 64)},
    'matvec': (matvec_text, 1024), 'matvec of odd rows': (matvec_text, 1023)}


@pytest.mark.parametrize('name', TEXTS)
def test_no_array_of_a_thread_is_in_memory(name):
    make, *args = TEXTS[name]
    found = count_operations(make(*args))
    assert found.arrays == () and found.kinds['thread'] == 0 and found.total > 30


@pytest.mark.parametrize('name, arrays', [
    ('decode 64 4 half', {'o', 'm', 's', 'x', 'p'}), ('decode 128 8 half', {'o', 'm', 's', 'x', 'p'}),
    ('tiled 128 half', {'top', 'sum', 'total', 'p'}), ('matrix 128', {'query', 'total', 'p'}),
    ('lanes f16 8', {'sums', 'part'}), ('lanes q4_k 4', {'next', 'now', 'ones'}), ('tiles scale 64', {'total', 'a'}),
    ('matvec', {'sums', 'ws'})])
def test_without_the_word_arrays_fall_into_memory(name, arrays):
    make, *args = TEXTS[name]
    found = count_operations(make(*args).replace('unrolled for', 'for'))
    assert arrays <= {array.split()[0].rstrip('0123456789') for array in found.arrays}
    assert found.kinds['thread'] > 0


# --- the count itself

COUNTED = {
    'a product': ('y[i] = x[i] * 2;', dict(device=2, float=1)),
    'of four': ('((device float4*)y)[i] = ((device const float4*)x)[i] * 2;', dict(device=2, float=4)),
    'contracted': ('y[i] = x[i] * 3.0f + x[i + 1];', dict(device=3, float=1)),
    'fast': ('y[i] = fast::exp2(x[i]);', {'device': 2, 'fast exp': 1}),
    'precise': ('y[i] = exp(x[i]) + precise::exp2(x[i]);', {'device': 2, 'exp': 2, 'float': 1}),
    'sums': ('y[i] = simd_sum(x[i]) + simd_shuffle_xor(x[i], 1);', dict(device=2, simd=2, float=1)),
    'halves': ('y[i] = float(((device const half*)x)[i]);', dict(device=2, convert=1)),
    'shared': ('threadgroup float t[32]; t[i] = x[i]; threadgroup_barrier(mem_flags::mem_threadgroup); '
               'y[i] = t[31 - i];',
               dict(device=2, threadgroup=2, barrier=1)),
    'a loop': ('float s = 0; for (uint j = 0; j < i; j++) s += x[j]; y[i] = s;', dict(device=2, float=1)),
    'a loop written out': ('float s = 0; unrolled for (int j = 0; j < 40; j++) s += x[j]; y[i] = s;',
                           dict(device=41, float=40)),
    '64 bits': ('long at = long(i) * 12345678; y[at] = 1.0f;', dict(device=1, long=2)),
    'matrices': ('simdgroup_float8x8 a, b = make_filled_simdgroup_matrix<float, 8, 8>(1.0f); simdgroup_load(a, x, 8); '
                 'simdgroup_multiply_accumulate(b, a, a, b); simdgroup_store(b, y, 8);', dict(matrix=3)),
    'an array': ('float a[8] = {}; a[i % 8] = x[i]; y[i] = a[(i + 1) % 8];', dict(device=2, thread=2))}


@pytest.mark.parametrize('name', COUNTED)
def test_operations_are_counted_by_kind(name):
    body, want = COUNTED[name]
    kinds = count_operations(f'{HEAD}{body}\n}}').kinds
    ignored = {'address', 'branch', 'int', 'select', 'long', 'thread'} - set(want)
    assert {kind: n for kind, n in kinds.items() if kind not in ignored} == want


def test_fast_functions_are_used_where_numbers_are_finite():
    for name in ('decode 128 8 half', 'tiled 128 half', 'matrix 128'):
        kinds = count_operations(TEXTS[name][0](*TEXTS[name][1:])).kinds
        assert kinds['fast exp'] > 0 and kinds['exp'] == 0


def test_errors_name_the_line():
    with pytest.raises(MetalCompileError, match=r'^kernel\.metal:\d+:\d+: error: use of undeclared identifier .z.'):
        count_operations(f'{HEAD}y[i] = z;\n}}')
