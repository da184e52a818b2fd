"Metal on the CPU: kernels against float64, half bit for bit, counts, and the compilers it works with."
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.metal_cases import CASES, TOP, halves, paged_answer, paged_cache, source

from tinyvllm.device import zig_wrapper
from tinyvllm.errors import BadInput
from tinyvllm.metalsim import Library, MetalCompileError, MetalError, compiler as compilers, counting
from tinyvllm.metalsim.lines import LineProgram, line_of, section, units

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='a Mac has the real one')
CHECKS = pytest.mark.parametrize('check', [True, False], ids=['checked', 'plain'])


def numbers(n):
    return np.random.default_rng(0).standard_normal(n).astype(np.float32)


def copies(args):
    return [a.copy() if isinstance(a, np.ndarray) else a for a in args]


@CHECKS
@pytest.mark.parametrize('name', CASES)
def test_kernels_agree_with_float64(name, check):
    case = CASES[name]()
    args, kernel = copies(case.args), Library(source(case.file), check)[case.kernel]
    kernel(args, case.grid, case.threads)
    assert np.abs(args[case.out] - case.answer).max() < case.tolerance


@pytest.mark.parametrize('name', CASES)
def test_kernels_do_not_depend_on_the_order_of_threads(name):
    case = CASES[name]()
    Library(source(case.file))[case.kernel].verify(case.args, case.grid, case.threads, outs=[case.out])
    assert np.abs(case.args[case.out] - case.answer).max() < case.tolerance  # it writes what it found


@CHECKS
def test_two_kernels_in_a_row(check):
    "Partial sums of 128 keys each by one, merged by the other."
    rng, lens = np.random.default_rng(0), np.array([1, 130, 257, 640], np.int32)
    keys, values, table = paged_cache(rng, lens, 2, 128, 16, 40)
    q = halves(rng, 4, 8, 128)
    part, stats = np.full((4, 8, 5, 128), np.nan, np.float32), np.full((4, 8, 5, 2), np.nan, np.float32)
    out, library = np.full_like(q, np.nan), Library(source('paged_decode_gqa'), check)
    first, second = [part, stats, q, keys, values, table, lens], [out, part, stats, lens]
    library['paged_gqa_1'](first, (2, 4, 5), (32, 4))
    library['paged_gqa_2'](second, (8, 4), (32,))
    assert np.abs(out - paged_answer(q, keys, values, table, lens)).max() < 2e-3
    if check:
        library['paged_gqa_1'].verify(first, (2, 4, 5), (32, 4), outs=[0, 1], nan_ok=True)
        library['paged_gqa_2'].verify(second, (8, 4), (32,), outs=[0])


HALF = TOP + """
kernel void f(device const half* a [[buffer(0)]], device const half* b [[buffer(1)]], device half* o [[buffer(2)]],
              device half4* v [[buffer(3)]], device bfloat* w [[buffer(4)]], device float* z [[buffer(5)]],
              uint i [[thread_position_in_grid]]) {
  half x = a[i], y = b[i];
  o[i] = (x * y + x) * y - x / (y + 2.0h) + (half)0.1;
  half4 q = half4(x, y, x, 1.0h);
  v[i] = q * y + q.wzyx * x;
  w[i] = bfloat(x) * bfloat(y);
  z[i] = 1.0 / 3.0 + (float)(char)(i + 100);
}
"""


def bfloat(x):
    "The upper halves of float32, rounded to nearest, ties to even."
    bits = x.view(np.uint32)
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16


@CHECKS
def test_half_and_bfloat_round_as_numpy_does(check):
    n, rng, h = 4096, np.random.default_rng(3), np.float16
    a, b = (halves(rng, n) * h(4) for _ in range(2))
    o, v, w, z = np.zeros(n, h), np.zeros((n, 4), h), np.zeros(n, np.uint16), np.zeros(n, np.float32)
    Library(HALF, check)['f']([a, b, o, v, w, z], (n // 32,), (32,))
    np.testing.assert_array_equal(o, (a * b + a) * b - a / (b + h(2)) + h(np.float32(0.1)))
    q = np.stack([a, b, a, np.ones(n, h)], 1)
    np.testing.assert_array_equal(v, q * b[:, None] + q[:, ::-1] * a[:, None])
    x, y = ((bfloat(s.astype(np.float32)) << 16).astype(np.uint32).view(np.float32) for s in (a, b))
    np.testing.assert_array_equal(w, bfloat(x * y).astype(np.uint16))
    third = np.float32(1) / np.float32(3)  # a literal is float, and char has a sign
    np.testing.assert_array_equal(z, third + (np.arange(n) + 100).astype(np.int8).astype(np.float32))


def test_reads_writes_and_bytes_are_counted():
    n, kernel = 1000, Library(source('add'))['add']
    with counting() as counts:
        kernel([numbers(n), numbers(n), numbers(n), n], (4,), (256,))
    (seen,) = counts
    assert (seen.name, seen.grid, seen.threads, seen.num_threads) == ('add', (4, 1, 1), (256, 1, 1), 1024)
    assert seen.buffers['a'] == seen.buffers['b'] == (n, 0, 4 * n, 0) and seen.buffers['o'] == (0, n, 0, 4 * n)
    assert counts.total == (2 * n, n, 8 * n, 4 * n) and counts.total.bytes == 12 * n and counts.graphs == []
    kernel([numbers(n), numbers(n), numbers(n), n], (4,), (256,))
    assert len(counts) == 1  # nothing is counted outside of the block


def test_a_matrix_kernel_reads_what_the_formula_says():
    "Each of 3 x 2 threadgroups has four simdgroups, each of which reads 16 rows of A and 16 columns of B."
    case = CASES['mma']()
    with counting() as counts:
        Library(source('mma'))['mma'](case.args, case.grid, case.threads)
    assert counts[0].buffers['A'].bytes_read == counts[0].buffers['B'].bytes_read == 6 * 4 * 16 * 72 * 2
    assert counts[0].buffers['C'] == (0, 64 * 96, 0, 64 * 96 * 4)


def test_plain_mode_counts_dispatches_only():
    with counting() as counts:
        Library(source('add'), check=False)['add']([numbers(8), numbers(8), numbers(8), 8], (1,), (32,))
    assert [d.name for d in counts] == ['add'] and not counts[0].buffers


@CHECKS
def test_source_that_does_not_compile_is_told_by_its_own_lines(check):
    bad = TOP + 'kernel void k(device float* o,\n  uint i [[thread_position_in_grid]]) {\n  o[i] = nothing;\n}\n'
    with pytest.raises(MetalCompileError, match=r'^mine\.metal:5:10: error: use of undeclared identifier'):
        Library(bad, check, name='mine.metal')
    bad = TOP + 'kernel void k(device float4* o) {\n  o[0] = float4(float3(1.0f), 2.0f, 3.0f);\n}\n'
    with pytest.raises(MetalCompileError, match=r'^mine\.metal:4:10: error: .*wrong number of components'):
        Library(bad, check, name='mine.metal')


def test_arguments_are_checked_before_the_launch():
    add, n = Library(source('add'))['add'], numbers(8)
    with pytest.raises(MetalError, match='add takes 4 buffers, got 3'):
        add([n, n, n], (1,), (8,))
    with pytest.raises(MetalError, match="the array for 'b' is not contiguous"):
        add([n, numbers(16)[::2], n, 8], (1,), (8,))
    with pytest.raises(MetalError, match=r'2048 threads, max_total_threads_per_threadgroup is 1024'):
        add([n, n, n, 8], (1,), (2048,))
    with pytest.raises(MetalError, match="has no kernel 'sub'; it has add, add_oob"):
        Library(source('add'))['sub']


def test_atomics_add_up_and_know_their_bounds():
    text = TOP + ('kernel void count(device atomic_uint* n, device const uint* x, uint i [[thread_position_in_grid]]) '
                  '{\n  atomic_fetch_add_explicit(&n[x[i]], 1, memory_order_relaxed);\n}\n')
    kernel, bins = Library(text)['count'], np.zeros(5, np.uint32)
    values = np.random.default_rng(0).integers(0, 5, 256).astype(np.uint32)
    kernel.verify([bins, values], (4,), (64,), outs=[0])
    assert bins.tolist() == np.bincount(values).tolist()
    values[17] = 5
    with pytest.raises(MetalError, match=r"out-of-bounds write: 4 bytes at byte 20 of buffer 'n' .* kernel\.metal:4"):
        kernel([bins, values], (4,), (64,))


def test_memory_of_a_dynamic_size():
    text = TOP + ('kernel void reverse(device int* x, threadgroup int* t [[threadgroup(0)]], '
                  'uint i [[thread_position_in_threadgroup]], uint n [[threads_per_threadgroup]]) {\n'
                  '  t[i] = x[i];\n  threadgroup_barrier(mem_flags::mem_threadgroup);\n  x[i] = t[n - 1 - i];\n}\n')
    kernel, x = Library(text)['reverse'], np.arange(64, dtype=np.int32)
    kernel([x], (1,), (64,), dynamic=(256,))
    assert x.tolist() == list(range(63, -1, -1))
    with pytest.raises(MetalError, match='out-of-bounds write of threadgroup memory'):
        kernel([x], (1,), (64,), dynamic=(128,))


def test_a_line_is_found_in_the_table_of_the_object():
    path = Library(source('add')).path
    table = [row for unit in units(section(path.read_bytes(), b'.debug_line')) for row in LineProgram(unit)]
    assert {6, 11} <= {line for _, line in table}
    at, line = next(row for row in table if row[1] == 11)
    assert line_of(path, at) == line and line_of(path, 0) == 0


def fresh(code, **env):
    "Run a script in a process of its own."
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1]), **env}
    return subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)


ZIG = """
import sys, numpy as np
sys.path.insert(0, sys.argv[0] or 'tests')
from support.metal_cases import CASES, source
from tinyvllm.metalsim import Library, MetalError, lint
from tinyvllm.metalsim.compiler import compiler
assert compiler().is_zig
case = CASES['split']()
for check in (True, False):
    args = [a.copy() if isinstance(a, np.ndarray) else a for a in case.args]
    Library(source(case.file), check)[case.kernel](args, case.grid, case.threads)
    assert abs(args[case.out] - case.answer).max() < case.tolerance
try:
    Library(source('add'))['add_oob']([np.ones(4, np.float32)] * 3 + [4], (1,), (5,))
except MetalError as error:
    print(error)
print(lint(source('flash_prefill').replace('*(threadgroup half4*)(&qt', '*(device half4*)(&qt')))
"""


@pytest.mark.skipif(zig_wrapper() is None, reason='needs the ziglang wheel')
def test_the_ziglang_wheel_does_all_that_clang_does():
    done = fresh(ZIG.replace('sys.argv[0]', repr(str(Path(__file__).parent))), METALSIM_CC=zig_wrapper())
    assert not done.stderr
    assert 'out-of-bounds read: 4 bytes at byte 16' in done.stdout and 'kernel.metal:11' in done.stdout
    assert 'kernel.metal:19' in done.stdout and 'address spaces' in done.stdout


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compilers, 'zig_wrapper', lambda: None)
    monkeypatch.setattr(compilers.shutil, 'which', lambda name: None)
    compilers.compiler.cache_clear()
    try:
        with pytest.raises(BadInput, match='install clang .14 or newer., or `pip install ziglang`'):
            Library(source('add'))
    finally:
        compilers.compiler.cache_clear()


def test_two_processes_may_fill_one_cache(tmp_path):
    code = ("import sys; sys.path.insert(0, 'TESTS')\n"
            'from support.metal_cases import CASES, source\nfrom tinyvllm.metalsim import Library\n'
            "case = CASES['qmv']()\nLibrary(source('qmv'))['qmv4'](case.args, case.grid, case.threads)\n"
            'print(abs(case.args[3] - case.answer).max() < case.tolerance)\n')
    code = code.replace('TESTS', str(Path(__file__).parent))
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1]), 'TINYVLLM_CACHE': str(tmp_path)}
    both = [subprocess.Popen([sys.executable, '-c', code], env=env, stdout=subprocess.PIPE) for _ in range(2)]
    assert [p.communicate()[0] for p in both] == [b'True\n'] * 2
    assert sorted(p.name.split('-')[0] for p in (tmp_path / 'metalsim').iterdir()) == ['kernel', 'runtime']
