"What Metal's compiler refuses and what it takes, text by text; how the lint answers, and what it costs."
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from support.metal_cases import TOP, edited, source
from tinygrad import Tensor
from tinygrad.device import CompileError, Device

from tinyvllm.metalsim import capturing, lint, linter, opencl

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='a Mac has the real one')
CASES = {f"{name}: {case['name']}": case for name in ('pitfalls', 'valid', 'more')
         for case in json.loads((Path(__file__).parent / f'metal/cases/{name}.json').read_text())}
# Nobody knows Apple's verdict, or it depends on the version of the system; what the lint says is not checked.
OPEN = {
    'ptr-to-ptr: thread ptr to device ptr, inner AS dropped': 'two address spaces for one pointer',
    '32 threadgroup variables': 'the limit is known of parameters only',
    'bfloat at metal3.0 (macOS 13)': 'the lint reads Metal 3.1, for macOS 14 and later',
    'function pointer variable': 'taken since Metal 2.3',
    'lambda': 'taken since Metal 3.2, and one of the valid texts',
    'union': 'the specification lists them',
    '__builtin_memcpy across AS': 'no verdict',
    'no using namespace: float4': 'generators of Metal write metal::float4, which proves nothing',
    'component counts differ (uint + uint3)': 'MSL 5.2.3.6 may mean vectors only; the lint refuses it',
    'ushort tid-in-tg with uint index_in_tg': 'MSL 5.2.3.6 speaks of the reverse',
    'missing return in non-void': 'a warning',
}


KNOWN = [name for name, case in CASES.items() if case['name'] not in OPEN]
MORE = [name for name in KNOWN if name.startswith('more')]


@pytest.mark.parametrize('name', [pytest.param(name, marks=pytest.mark.slow) if name in set(MORE) - set(MORE[::4]) else name
                                  for name in KNOWN])
def test_each_text_is_refused_or_taken_as_on_a_mac(name):
    case = CASES[name]
    found = list(linter.complaints(case['source']))
    assert bool(found) == (case['right'] != 'accept'), found


def test_verdicts_that_are_not_checked_are_those_that_nobody_knows():
    known = 'accept', 'refuse', 'pipeline'
    assert {case['name'] for case in CASES.values() if case['right'] not in known} == set(OPEN)


# file, old text, new text, what lint must say first
TYPOS = {
    'pointer without address space': (
        'paged_decode', 'device const half* kp', 'const half* kp', ":28: pointer or reference without an address"),
    'threadgroup pointer taken for device': (
        'flash_prefill', '*(threadgroup half4*)(&qt[r][c])', '*(device half4*)(&qt[r][c])',
        ':19: C-style cast from \'threadgroup half *\' to \'device half4 *\''),
    'write through const': ('qmv', 'device half* y', 'device const half* y', ':26: read-only variable'),
    'double': ('qmv', 'float t = simd_sum', 'double t = simd_sum', ':25: double is not in MSL'),
    'float4 put into half4': (
        'paged_decode', 'half4(acc / s)', '(acc / s)', ":38: assigning to 'half4' from incompatible type 'float4'"),
    'max of float and int': ('paged_decode', 'max(m, score)', 'max(m, 0)', ":33: call to 'max' is ambiguous"),
    'three components for four': (
        'qmv', 'uint4(q, q >> 4, q >> 8, q >> 12)', 'uint4(q, q >> 4, q >> 8)', ':19: wrong number of components'),
}


@pytest.mark.parametrize('name', TYPOS)
def test_a_complaint_has_the_line_and_speaks_of_metal(name):
    file, old, new, message = TYPOS[name]
    text = source(file)
    assert lint(text) == []
    (complaint, *_) = lint(edited(text, old, new))
    assert complaint.startswith('kernel.metal') and message in complaint and '__' not in complaint


BODY = 'uint t [[thread_position_in_grid]]) { '
KERNEL = 'kernel void k(device float* o, ' + BODY
RULES = {
    'components differ': (
        'kernel void k(device int* o, uint t [[thread_position_in_grid]],\n'
        'uint3 n [[threads_per_grid]]) { o[t] = n.x; }',
        ':4: positions and sizes must all have the same number of components'),
    'helper takes a pointer': (
        'float f(float* p) { return *p; }\n' + KERNEL + 'float x[2] = {1.0f, 2.0f}; o[t] = f(x); }',
        ":3: pointer or reference without an address space: 'p'"),
    'constexpr at program scope': (
        'constexpr int N = 4;\n' + KERNEL + 'o[t] = N; }', ':3: program-scope variable must be'),
    'initialised threadgroup variable': (
        KERNEL + 'threadgroup int x = 3; o[t] = x; }', ':3: a threadgroup variable is'),
    'C++ header': ('#include <cmath>\n' + KERNEL + 'o[t] = 1; }', ":3: 'cmath' file not"),
    'number by value': (
        'kernel void k(device float* o, int n, ' + BODY + 'o[t] = n; }', ":3: parameter 'n' is a number"),
    'index used twice': ('kernel void k(device float* o [[buffer(0)]],\ndevice float* p [[buffer(0)]], ' + BODY
                         + 'o[t] = p[t]; }', ':4: two parameters have buffer index 0'),
    'too much threadgroup memory': (
        KERNEL + 'threadgroup float a[8000], b[193]; a[t] = 1; b[t] = 1; o[t] = a[t] + b[t]; }',
        ':3: 32772 bytes of threadgroup variables'),
    'the line that #line says': ('#line 7 "gadget"\n' + KERNEL + '\no[t] = f(1); }', 'gadget:8: '),
}


@pytest.mark.parametrize('name', RULES)
def test_a_rule_names_what_is_wrong(name):
    text, message = RULES[name]
    assert any(message in complaint for complaint in lint(TOP + text)), lint(TOP + text)


def test_an_answer_takes_one_process_and_the_second_none(monkeypatch, tmp_path):
    monkeypatch.setattr(linter, 'writable_dir', lambda: tmp_path)
    opencl.precompiled()
    calls, run = [], subprocess.run
    monkeypatch.setattr(subprocess, 'run', lambda *args, **more: calls.append(args) or run(*args, **more))
    text = TOP + 'kernel void k(device float* o) { o[0] = f(1); }'
    first = lint(text)
    assert len(calls) == 1 and len(first) == 1
    assert lint(text, 'other.metal') == ['other' + first[0].removeprefix('kernel')] and len(calls) == 1
    assert len(lint(text + ' ')) == 1 and len(calls) == 2


def test_a_compiler_without_the_dialect_is_named_once_and_words_are_checked(monkeypatch, tmp_path):
    def precompiled():
        raise opencl.OpenCLMissing('old clang reads no C++ for OpenCL')
    monkeypatch.setattr(linter, 'writable_dir', lambda: tmp_path)
    monkeypatch.setattr(opencl, 'precompiled', precompiled)
    linter.warn_once.cache_clear()
    with pytest.warns(UserWarning, match='looks at words only: old clang'):
        assert lint(TOP + 'kernel void k(device float* o) { double x = 1; o[0] = x; }') == [
            'kernel.metal:3: double is not in MSL']
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert lint(TOP + 'kernel void k(device float* o) { auto p = new float; }') == [
            'kernel.metal:3: new/delete are not in MSL']
    linter.warn_once.cache_clear()


def test_the_device_refuses_what_lint_refuses():
    compile = Device['METAL'].compiler.compile
    good = TOP + 'kernel void k(device float* o, uint i [[thread_position_in_grid]]) { o[i] = max(o[i], 0.0f); }'
    assert compile(good)
    with pytest.raises(CompileError, match='pointer or reference without an address space'):
        compile(good.replace('o[i] = max', 'float* p = &o[i]; *p = max'))


def test_sources_are_captured_when_they_are_compiled_or_run():
    def run():
        return (Tensor([1.0, 2.0], device='METAL') * 3).numpy()
    with capturing() as sources:
        run()
    with capturing() as again:
        run()
    assert sources and dict(again) == dict(sources)
    assert all(name.startswith(('E_', 'r_')) and name in text for text, names in sources.items() for name in names)
    assert sources.kernels == [name for names in sources.values() for name in names]


def test_no_source_of_an_engine_is_refused():
    "Every source that its compiler sees, ours and tinygrad's, for all formats, samplers and constraints."
    program = Path(__file__).parent / 'support/captured_sources.py'
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    assert seen['refused'] == {} and seen['sources'] > 200
    ours = {name for name in seen['kernels'] if not name.startswith(('E_', 'r_'))}
    assert ours >= {'publish', 'prepare', 'rms_norm', 'rope_write'}, ours
