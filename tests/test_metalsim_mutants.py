"Bugs put into good kernels, one at a time: each is caught, by its message and its line."
import sys
from dataclasses import replace

import numpy as np
import pytest
from support.metal_cases import TOP, decode, edited, mma, prefill, qmv, source, split, with_args

from tinyvllm.metalsim import Library, MetalError

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='a Mac has the real one')
BARRIER = 'threadgroup_barrier(mem_flags::mem_threadgroup)'


def bad_table(case):
    "A block number behind the end of the cache."
    table = case.args[3].copy()
    table[1, 2] = len(case.args[1])
    return with_args(case, a3=table)


def ones(case):
    "No input of zeros or noise: what is not initialised shows."
    return with_args(case, a1=np.ones_like(case.args[1]), a2=np.ones_like(case.args[2]))


def longer(case):
    "Some room behind x, so that a misaligned read is not out of bounds too."
    return with_args(case, a2=np.concatenate([case.args[2], case.args[2][:8]]))


def wider(case):
    "A has columns that its K does not count."
    return with_args(mma(80), a5=72, a1=case.args[1])


def last_barrier(text):
    at = text.rindex(f'    {BARRIER};\n')
    return text[:at] + text[at + len(f'    {BARRIER};\n'):]


# name: case, (old text, new text)..., what the message must say
MUTANTS = {
    'block table points past the cache': (
        bad_table(decode()), [], r"out-of-bounds read: 8 bytes at byte 196608 of buffer 'kc' .*kernel\.metal:32"),
    'next row of the block table': (
        decode(), [('table[b * max_blocks + t0 / BS]', 'table[(b + 1) * max_blocks + t0 / BS]')],
        r"out-of-bounds read: 4 bytes at byte 96 of buffer 'table' .*kernel\.metal:27"),
    'no barrier before the merge': (
        split(), [(f'  {BARRIER};\n', '')], "read of uninitialised threadgroup memory 'pm' at byte 4"),
    'a barrier for the other memory': (
        split(), [(BARRIER, 'threadgroup_barrier(mem_flags::mem_device)')],
        "data race: read of 'pm' byte 4, written by threadgroup #0 thread #32 .* with no barrier between"),
    'half the simdgroups launched': (
        split((128,)), [], "read of uninitialised threadgroup memory 'pm' at byte 16"),
    'partial sums read beyond their number': (
        split(), [('lane < NS ? ps[lane] * f : 0.0f', 'ps[lane] * f')],
        r"index 8 is out of bounds of threadgroup array 'ps' .*kernel\.metal:68"),
    'simd_sum in a branch': (
        qmv(8), [('const float t = simd_sum(acc[r]);', 'float t = 0; if (lane < 31) t = simd_sum(acc[r]);')],
        'simd_sum at line 25 is called by lanes 7fffffff only'),
    'a lane returns before simd_sum': (
        qmv(8), [('float acc[ROWS]', 'if (lane == 7) return; float acc[ROWS]')],
        'simd_sum at line 25 is called by lanes ffffff7f only'),
    'accumulator not initialised': (
        ones(qmv(8)), [('float acc[ROWS] = {0.0f};', 'float acc[ROWS];')], r"NaN in output buffer 3 \('y'\)"),
    'rows not guarded': (
        qmv(6), [('if (row0 + r >= N) continue;', '')], r"out-of-bounds read: .* of buffer 'w' .*kernel\.metal:18"),
    'two threadgroups write the same rows': (
        qmv(16), [('y[row0 + r] = half(t)', 'y[row0 % 12 + r] = half(t)')],
        r"data race: write of 'y' byte 0, written \(other value\) by threadgroup #0 .*kernel\.metal:26"),
    'half4 read from an odd place': (
        longer(qmv(8)), [('(x + k))', '(x + k + 1))')], r'misaligned 8-byte read .* kernel\.metal:14'),
    'next tile loaded too early': (
        prefill(), last_barrier, r"data race: write of '[kv]t' byte \d+, read by threadgroup"),
    'query rows not guarded': (
        prefill(), [('q0 + r < T ? *(device const half4*)(q + ((q0 + r) * H + h) * D + c) : half4(0.0h)',
                     '*(device const half4*)(q + ((q0 + r) * H + h) * D + c)')],
        r"out-of-bounds read: .* of buffer 'q' .*kernel\.metal:20"),
    'one simdgroup leaves the loop early': (
        prefill(), [('last = min(q0 + BQ, T);', 'last = min(q0 + BQ, T) - (sg == 3 ? BK : 0);')],
        'threadgroup_barrier at line 35 reached by 96 of 128 threads'),
    'half of the tile loaded': (
        prefill(), [('i < BK * D / 4; i += SG * 32', 'i < BK * D / 8; i += SG * 32')],
        "read of uninitialised threadgroup memory 'kt'"),
    'more than 32 KB of threadgroup memory': (
        prefill(), [('half kt[BK][D + 4]', 'half kt[BK * 8][D + 4]')], 'threadgroup memory 36864 bytes > 32768'),
    'simdgroup_load past the end': (
        mma(), [('B + k * N + c', 'B + (k + 8) * N + c')], r"out-of-bounds read: .* of buffer 'B' .*kernel\.metal:17"),
    'simdgroup_load from an address of its own in each lane': (
        wider(mma()), [('uint sg [[', 'uint lane [[thread_index_in_simdgroup]], uint sg [['),
                       ('A + (r + i * 8) * K + k, K)', 'A + (r + i * 8) * K + k + lane, K)')],
        r'simdgroup_load/store arguments differ between lanes .*kernel\.metal:16'),
    'broadcast from a lane that is not there': (
        split(), [('simd_broadcast(f, i)', 'simd_broadcast(f, i + 30)')],
        r'reads a lane that is not active .*kernel\.metal:70'),
}


@pytest.mark.parametrize('name', MUTANTS)
def test_a_bug_is_caught_when_it_runs(name):
    case, change, message = MUTANTS[name]
    text = source(case.file)
    for pair in [] if callable(change) else change:
        text = edited(text, *pair)
    text = change(text) if callable(change) else text
    case = replace(case, args=[a.copy() if isinstance(a, np.ndarray) else a for a in case.args])
    with pytest.raises(MetalError, match=message):
        Library(text)[case.kernel].verify(case.args, case.grid, case.threads, outs=[case.out])
