"Faults of kernels that run, and what is said: division, overruns, alignment, ranges, publication, denormals."
import mmap
import sys

import numpy as np
import pytest
from support.metal_cases import TOP

from tinyvllm.metalsim import Library, MetalError, launching

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='a Mac has the real one')
CHECKS = pytest.mark.parametrize('check', [True, False], ids=['checked', 'plain'])
DIVIDE = TOP + """kernel void divide(device T* o, device const T* a, device const T* b,
                  uint i [[thread_position_in_grid]]) { o[i] =
    a[i] OP b[i];
}
"""
NUMPY = {'int': 'i4', 'uint': 'u4', 'long': 'i8', 'ulong': 'u8', 'short': 'i2', 'uchar': 'u1'}


def division(kind, op, check, top, bottom):
    "Divide 64 numbers; those of thread 37 are `top` and `bottom`."
    scalar = kind.rstrip('234')
    n = int(kind[len(scalar):] or 1)
    a, b = (np.full(64, x, NUMPY[scalar]) for x in (7, 3))
    a[37], b[37], out = top, bottom, np.full(64, 99, NUMPY[scalar])
    kernel = Library(DIVIDE.replace('T*', f'{kind}*').replace('OP', op), check)['divide']
    kernel([out, a, b], (1,), (64 // n,))
    return out


@pytest.mark.parametrize('op', '/%')
@pytest.mark.parametrize('kind', ['int', 'ulong', 'uchar', 'short', 'int4', 'ulong2'])
def test_a_division_by_zero_is_told_by_its_line(kind, op):
    thread = 37 // int(kind[-1]) if kind[-1].isdigit() else 37
    with pytest.raises(MetalError, match=rf'integer division by zero.* thread \({thread},0,0\).* at kernel\.metal:5'):
        division(kind, op, True, 7, 0)
    left = np.delete(division(kind, op, False, 7, 0), 37)  # without checks the process lives on
    assert (left == (2 if op == '/' else 1)).all()


@pytest.mark.parametrize('op', '/%')
@pytest.mark.parametrize('kind', ['int', 'long', 'int2'])
def test_the_smallest_number_by_minus_one_is_told_too(kind, op):
    smallest = np.iinfo(NUMPY[kind.rstrip('2')]).min
    with pytest.raises(MetalError, match=r'of the smallest number by -1 .* at kernel\.metal:5'):
        division(kind, op, True, smallest, -1)
    assert len(division(kind, op, False, smallest, -1)) == 64


def test_a_division_without_checks_gives_zero():
    text = TOP + ('kernel void both(device int* o, device const int* a) {\n'
                  '  threadgroup_barrier(mem_flags::mem_none);\n'
                  '  o[0] = 7 / a[0];\n  o[1] = 7 % a[0];\n  o[2] = a[1] / a[0] + a[2];\n}\n')
    out = np.full(3, 99, np.int32)
    Library(text, check=False)['both']([out, np.array([0, 8, 5], np.int32)], (1,), (1,))
    assert out.tolist() == [0, 0, 5]


def test_the_handlers_of_signals_are_put_back():
    import signal
    before = [signal.getsignal(s) for s in (signal.SIGFPE, signal.SIGILL, signal.SIGTRAP)]
    with pytest.raises(MetalError):
        division('int', '/', True, 1, 0)
    assert [signal.getsignal(s) for s in (signal.SIGFPE, signal.SIGILL, signal.SIGTRAP)] == before


# ---------------------------------------------------------------- arrays of a thread, and constant ones
ARRAYS = TOP + """constant float tab[4] = {1, 2, 3, 4}; constant float tab2[2][2] = {{1, 2}, {3, 4}};
constant float tab8[8] = {1, 2, 3, 4, 5, 6, 7, 8};
float get(thread const float* p, int n) { return p[n]; }
float look(constant float* p, int n) { return p[n]; }
template <typename T> T row(thread T (&p)[4], int n) { return p[n]; }
struct Middle { float v[4]; float w[8]; };
struct Last { float w[8]; float v[4]; };
kernel void k(device float* o, constant int& n) {
  BODY
}
"""
FOUR = 'float a[4] = {1, 2, 3, 4}; '
INDEX, POINTER = r'index -?\d+ is out of bounds of ', 'out-of-bounds access to an array of the thread, or to a constant'
EITHER = f'({INDEX}|{POINTER})'  # as old and new compilers see it
# what: the body of a kernel with n = 5, and what the message must say with which line
OVERRUNS = {
    'loop': ('float a[4]; for (int j = 0; j < n; j++) a[j] = j; o[0] = a[2];', INDEX + r"'float\[4\]'.*:11"),
    'loop to a constant': ('float a[4]; for (int j = 0; j <= 4; j++) a[j] = j; o[0] = a[2];', INDEX + '.*:11'),
    'constant index': (FOUR + 'o[0] = a[4];', INDEX + '.*:11'),
    'read': (FOUR + 'o[0] = a[n];', INDEX + '.*:11'),
    'write': (FOUR + 'a[n] = 3; o[0] = a[1];', INDEX + '.*:11'),
    'negative': (FOUR + 'o[0] = a[-n];', 'index -5 is out .*:11'),
    'inner dimension': ('float a[4][3] = {}; o[0] = a[1][n];', INDEX + r"'float\[3\]'.*:11"),
    'outer dimension': ('float a[4][3] = {}; o[0] = a[n][1];', INDEX + '.*:11'),
    'of a vector': ('float4 v = float4(1); o[0] = v[n];', INDEX + '.*float4.*:11'),
    'of vectors': ('float4 v[4] = {}; o[0] = v[n].x;', INDEX + '.*:11'),
    'of halves': ('half a[8] = {}; o[0] = a[n + 4];', INDEX + '.*:11'),
    'of threadgroup memory': ('threadgroup float a[4]; a[n] = 2; o[0] = a[n];', INDEX + "threadgroup array 'a'.*:11"),
    'in a struct': ('Middle s = {}; s.w[n] = 1; o[0] = s.v[n];', INDEX + '.*:11'),
    'at the end of a struct': ('Last s = {}; s.w[n] = 1; o[0] = s.v[n];', EITHER + '.*:11'),
    'array<T, N>': ('array<float, 4> a; a[0] = 1; o[0] = a[n];', EITHER + '.*:11'),
    'pointer': (FOUR + 'thread float* p = a; o[0] = p[n];', POINTER + '.*:11'),
    'pointer, before': (FOUR + 'thread float* p = a + 1; o[0] = p[-n];', POINTER + '.*:11'),
    'pointer that walks': (FOUR + 'thread float* p = a; for (int j = 0; j < n; j++) o[0] += *p++;', POINTER + '.*:11'),
    'helper with a pointer': (FOUR + 'o[0] = get(a, n);', POINTER + '.*:5'),
    'helper with an array': (FOUR + 'o[0] = row(a, n);', INDEX + '.*:7'),
    'table': ('o[0] = tab[n];', INDEX + r"'const float\[4\]'.*:11"),
    'table, before': ('o[0] = tab[-n];', INDEX + '.*:11'),
    'table of two dimensions': ('o[0] = tab2[n][0];', INDEX + '.*:11'),
    'pointer to a table': ('constant float* p = tab; o[0] = p[n];', POINTER + '.*:11'),
    'helper with a table': ('o[0] = look(tab, n);', POINTER + '.*:6'),
    'nothing': ('float a[8] = {}; a[n] = 2; o[0] = a[n] + get(a, n) + tab8[n] + look(tab8, n);', ''),
}


@pytest.mark.parametrize('what', OVERRUNS)
def test_the_end_of_an_array_is_known(what):
    body, message = OVERRUNS[what]
    kernel, out = Library(ARRAYS.replace('BODY', body))['k'], np.zeros(1, np.float32)
    if message:
        with pytest.raises(MetalError, match=message.replace('.*:', r'.* at kernel\.metal:') + '$'):
            kernel([out, 5], (1,), (1,))
    else:
        kernel([out, 5], (1,), (1,))
        assert out[0] == 2 + 2 + 6 + 6


# ---------------------------------------------------------------- where threadgroup variables lie
PLACE = TOP + """float mean(float4 v) { return (v.x + v.y + v.z + v.w) / 4; }
kernel void place(device float* o, uint i [[thread_position_in_threadgroup]]) {
  DECLARE
  for (int j = 0; j < 64; j++) x[j] = j / 4;
  o[i] = mean(float4(READ));
}
"""
HALF4, FLOAT4 = '((threadgroup half4*)x)[1]', '((threadgroup float4*)x)[1]'
# declarations, what is read, and what is wrong
PLACES = {
    'halves read as half4': ('threadgroup half x[64];', HALF4, r'misaligned 8-byte read \(address % 8 = 2\)'),
    'floats read as float4': ('threadgroup float x[64];', FLOAT4, r'misaligned 16-byte read \(address % 16 = '),
    'floats read as float2': ('threadgroup float x[64];', '((threadgroup float2*)x)[1].xyxy', 'misaligned 8-byte'),
    'an odd array before': ('threadgroup char y[3]; threadgroup float x[64]; y[0] = 1;', FLOAT4, 'misaligned 16-byte'),
    'a wide one before': ('threadgroup float4 y[3]; threadgroup half x[64];', HALF4, 'misaligned 8-byte'),
    'the second of two': ('threadgroup half y[4], x[64];', HALF4, 'misaligned 8-byte'),
    'too little': ('alignas(8) threadgroup float x[64];', FLOAT4, r'misaligned 16-byte read \(address % 16 = 8\)'),
    'alignas': ('alignas(16) threadgroup half x[64];', HALF4, ''),
    'alignas behind the space': ('threadgroup alignas(16) float x[64];', FLOAT4, ''),
    'alignas of a type': ('alignas(float4) threadgroup float x[64];', FLOAT4, ''),
    'alignas of an expression': ('alignas(2 * sizeof(float2)) threadgroup float x[64];', FLOAT4, ''),
    'alignas of two': ('alignas(16) threadgroup half y[5], x[64];', HALF4, ''),
    'an attribute': ('threadgroup __attribute__((aligned(8))) half x[64];', HALF4, ''),
    'an attribute at the end': ('threadgroup half x[64] __attribute__((aligned(8)));', HALF4, ''),
    'vectors': ('threadgroup char y[3]; threadgroup float4 x[64];', 'x[4]', ''),
    'packed reads': ('threadgroup float x[64];', '((threadgroup packed_float4*)x)[1]', ''),
}


@pytest.mark.parametrize('what', PLACES)
def test_a_threadgroup_variable_is_aligned_as_declared_and_no_better(what):
    declare, read, message = PLACES[what]
    text, out = PLACE.replace('DECLARE', declare).replace('READ', read), np.zeros(1, np.float32)
    if message:
        with pytest.raises(MetalError, match=message + r'.* at kernel\.metal:7'):
            Library(text)['place']([out], (1,), (1,))
    else:
        Library(text)['place']([out], (1,), (1,))
        assert out[0] == 1
    Library(text, check=False)['place']([out], (1,), (1,))
    assert out[0] in (0, 1)


# ---------------------------------------------------------------- ranges above 2**31 bytes
ROOM = 1 << 33


def sparse(size):
    "Bytes that cost memory only where they are touched, with room on both sides that belongs to nobody."
    space = mmap.mmap(-1, size + 2 * ROOM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    return np.frombuffer(space, np.uint8)[ROOM:ROOM + size]


GATHER = TOP + """kernel void gather(device half* o, device const half* x, constant uint& row, constant uint& width,
                   uint i [[thread_position_in_grid]]) {
  o[i] = x[INDEX];
}
"""


def gather(index, row, width=1 << 26):
    "The start of a row, of 10 GiB of halves; what an index without its upper half reads is -1."
    x, out = sparse(10 << 30).view(np.float16), np.zeros(32, np.float16)
    x[row * width % (1 << 32):][:32] = -1
    x[row * width:][:32] = np.arange(1, 33)
    arrays = [out, x, *(np.array([n], np.uint32) for n in (row, width))]
    kernel = Library(GATHER.replace('INDEX', index))['gather']
    kernel.launch([a.ctypes.data for a in arrays], [a.nbytes for a in arrays], (1,), (32,))
    return out.tolist()


@pytest.mark.parametrize('row', [3, 36, 70])
def test_an_index_of_64_bits_reaches_all_of_a_large_buffer(row):
    assert gather('(ulong)row * width + i', row) == list(range(1, 33))


def test_an_index_of_32_bits_that_overflows_is_out_of_bounds():
    with pytest.raises(MetalError, match=r"out-of-bounds read: 2 bytes at byte -3758096384 of buffer 'x' .*metal:5"):
        gather('(int)(row * width) + (int)i', 36)


def test_an_index_without_sign_that_overflows_reads_other_values():
    assert gather('row * width + i', 36) == list(range(1, 33)) and gather('row * width + i', 70) == [-1] * 32


def test_a_small_view_of_a_large_buffer_needs_no_access_history():
    x, out = sparse(5 << 30), np.zeros(32, np.float16)
    view, one = x[1 << 32:][:64], np.array([0], np.uint32)
    arrays = [view, x, one, one]
    Library(GATHER.replace('INDEX', 'i'))['gather'].launch(
        [a.ctypes.data for a in arrays], [a.nbytes for a in arrays], (1,), (32,))
    assert not out.any() and not view.any()


# ---------------------------------------------------------------- a word that announces data
PUBLISH = TOP + """kernel void publish(device int* slots, device int* counter, device const int* ids,
                    uint me [[thread_index_in_threadgroup]], uint group [[threadgroup_position_in_grid]]) {
  const int step = counter[0];
  for (int i = me; i < 600; i += 256) slots[1 + i] = ids[i];
  threadgroup_barrier(mem_flags::mem_device);
  if (me == 0) { slots[0] = step; counter[0] = step + 1; }
}
"""
BARRIER = '  threadgroup_barrier(mem_flags::mem_device);\n'
# what: changes, threadgroups, what the message must say
TOO_EARLY = {
    'no barrier': ([(BARRIER, '')], 1, r'with no barrier for it between .*:7'),
    'a barrier for the other memory': ([('mem_device', 'mem_threadgroup')], 1, r'with no barrier for it between .*:8'),
    'the word first': ([('{ slots[0] = step; ', '{ '), ('  for (', '  if (me == 0) slots[0] = step;\n  for (')], 1,
                       r"write of 'slots' byte \d+ after its publication .*:7"),
    'some data after it': ([('step + 1; }', 'step + 1; }\n  slots[650] = 3;')], 1,
                           r"write of 'slots' byte 2600 after its publication .*:9"),
    'another threadgroup': ([('me == 0', 'me == 0 && group == 1')], 2, 'another threadgroup has written'),
    'not at all': ([('slots[0] = step;', '')], 1, 'nothing was published'),
}


def publish(text, groups=1):
    slots, ids = np.zeros(700, np.int32), np.arange(600, dtype=np.int32)
    args = [slots, np.array([4], np.int32), ids]
    Library(text)['publish'].verify(args, (groups,), (256,), outs=[0], publish=(0, 0, 4))
    return slots


def test_data_before_its_announcement_passes():
    slots = publish(PUBLISH)
    assert slots[0] == 4 and slots[1:601].tolist() == list(range(600))


@pytest.mark.parametrize('what', TOO_EARLY)
def test_an_announcement_before_its_data_is_caught(what):
    changes, groups, message = TOO_EARLY[what]
    text = PUBLISH
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    with pytest.raises(MetalError, match=message):
        publish(text, groups)


# ---------------------------------------------------------------- denormals, half
@CHECKS
def test_denormals_of_single_precision_are_zero_and_those_of_half_are_kept(check):
    text = TOP + ('kernel void f(device float* o, device half* h, device const float* x, device const half* y, '
                  'uint i [[thread_position_in_grid]]) { o[i] = x[i] * 0.5f; h[i] = y[i] * 0.5h; }\n')
    x, y = np.array([2e-38, 1e-39, 2, -2e-38], np.float32), np.array([1e-4, 2e-7, 2, -6e-5], np.float16)
    kernel, half = Library(text, check)['f'], np.float32(0.5)
    for flush in (True, False):
        out, halves = np.full(4, 9, np.float32), np.full(4, 9, np.float16)
        kernel([out, halves, x, y], (1,), (4,), flush=flush)
        assert out.tolist() == ([0, 0, 1, 0] if flush else (x * half).tolist())
        assert halves.tolist() == (y * np.float16(0.5)).tolist()
        assert (np.float32(2e-38) * half) > 0  # Python's own arithmetic is as it was


@CHECKS
def test_a_sum_in_half_loses_what_one_in_float_keeps(check):
    text = TOP + ('kernel void add(device half* o, device const half* x, constant int& n) {\n'
                  '  T sum = 0;\n  for (int i = 0; i < n; i++) sum += x[i];\n  o[0] = (half)sum;\n}\n')
    found = []
    for kind in ('half', 'float'):
        out = np.zeros(1, np.float16)
        Library(text.replace('T sum', f'{kind} sum'), check)['add']([out, np.ones(4096, np.float16), 4096], (1,), (1,))
        found.append(float(out[0]))
    assert found == [2048, 4096]


# ---------------------------------------------------------------- launches that others make
@CHECKS
def test_a_block_changes_how_kernels_are_launched(check):
    text = TOP + ('kernel void where(device int* o, uint2 g [[threadgroup_position_in_grid]], '
                  'uint2 n [[threadgroups_per_grid]]) { o[g.y * n.x + g.x] += 1; }\n')
    kernel, out = Library(text, check)['where'], np.zeros((5, 4), np.int32)
    with launching('where', origin=(2, 3, 0)), launching('another', origin=(9, 9, 9)):
        kernel([out], (4, 5), (1,))
    assert out.tolist() == [[0] * 4] * 3 + [[0, 0, 1, 1]] * 2
    kernel([out], (4, 5), (1,))
    assert out.sum() == 24
    if check:
        with launching(publish=(0, 4, 4)), pytest.raises(MetalError, match='another threadgroup has written'):
            kernel([out], (4, 5), (1,))
