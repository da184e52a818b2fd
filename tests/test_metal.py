"""Kernels of our own in tinygrad's graph: C on the CPU, Metal in the simulator (or on a Mac), CUDA as text.

On a machine with CUDA (`DEV=CUDA`) the translation runs too; with NVRTC alone it is compiled.
"""
import ctypes
import os
import re
import sys
import threading
import warnings
from dataclasses import fields
from types import SimpleNamespace

from tinyvllm import metalsim  # before tinygrad: the package settles the compiler
from tinyvllm.kernels import metal
import numpy as np
import pytest
from hypothesis import given, strategies as st
from tinygrad import Device, Tensor, TinyJit, UOp, dtypes
from tinygrad.codegen import to_program
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import KernelInfo, Ops, ProgramInfo

from tinyvllm.device import allow_threads
from tinyvllm.errors import BadInput
from tinyvllm.measure import counting
from tinyvllm.kernels.metal import Kernel, format_defines, parse_element_type, parse_signature, translate_to_cuda
from tinyvllm.metalsim.source import POSITIONS, INDICES, SIMD_WIDTH, Parameter, signatures

DEVICES = sorted({'CPU', 'METAL', Device.DEFAULT})
simulated = pytest.mark.skipif(sys.platform != 'linux', reason='a Mac cannot be made to refuse')
AXPY = Kernel('''kernel void axpy(device T* y, device const T* x, device const T* z,
                 uint i [[thread_position_in_grid]]) {
  if (i < N) y[i] = A * x[i] + z[i];
}''', c='''kernel void axpy(device T* y, device const T* x, device const T* z) {
  for (int i = 0; i < N; i++) y[i] = A * x[i] + z[i];
}''')
ADD_TO = Kernel('''kernel void add_to(device float* y, device const float* x, uint i [[thread_position_in_grid]]) {
  y[i] += x[i];
}''', c='kernel void add_to(device float* y, device const float* x) { for (int i = 0; i < 8; i++) y[i] += x[i]; }')
SPLIT = Kernel('''kernel void split(device int* tens, device int* ones, device const int* x,
                  uint i [[thread_position_in_grid]]) {
  tens[i] = x[i] / 10; ones[i] = x[i] % 10;
}''', c='''kernel void split(device int* tens, device int* ones, device const int* x) {
  for (int i = 0; i < 4; i++) { tens[i] = x[i] / 10; ones[i] = x[i] % 10; }
}''')
# A sum over a threadgroup, with everything that the translation must understand.
SUMS = '''#define SQUARE(v) ((v) * (v))
inlined float squares(float4 v) { return SQUARE(v.x) + SQUARE(v.y) + SQUARE(v.z) + SQUARE(v.w); }
kernel void sums(device float* y, device const V* x,   // a vector per thread
                 uint group [[threadgroup_position_in_grid]], uint i [[thread_index_in_threadgroup]],
                 uint lane [[thread_index_in_simdgroup]], uint simd [[simdgroup_index_in_threadgroup]]) {
  threadgroup float parts[SIMDS];
  /* the sum of a simdgroup */
  float sum = simd_sum(squares(float4(x[group * 32 * SIMDS + i])));
  if (lane == 0) parts[simd] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float best = -INFINITY, all = 0;
  for (int s = 0; s < SIMDS; s++) { all += parts[s]; best = max(best, parts[s]); }
  if (i == 0) y[group] = best > all ? best : all;
}'''


def buffer(values, device, dtype=np.float32):
    return Tensor(np.asarray(values, dtype), device=device).realize()


def axpy(x, z, a=3.0, threads=4, **how):
    n = x.numel()
    return AXPY(x.empty_like(), x, z, grid=(-(-n // threads),), threads=(threads,), T=x.dtype.name, A=a, N=n, **how)


def refusal(call, *args, **how):
    with pytest.raises(BadInput) as caught:
        call(*args, **how)
    return str(caught.value)


# --- the same numbers everywhere

@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [np.float32, np.float16])
def test_axpy(device, dtype):
    rng = np.random.default_rng(0)
    for n in (1, 4, 5, 63):
        x, z = (rng.standard_normal(n).astype(dtype) for _ in 'xz')
        got = axpy(buffer(x, device, dtype), buffer(z, device, dtype)).numpy()
        assert got.dtype == dtype and np.allclose(got, 3 * x.astype(float) + z, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize('device', DEVICES)
def test_two_outputs_come_as_a_tuple(device):
    x = buffer([12, 34, 50, 7], device, np.int32)
    tens, ones = SPLIT(x.empty_like(), x.empty_like(), x, threads=(4,))
    assert (tens.tolist(), ones.tolist()) == ([1, 3, 5, 0], [2, 4, 0, 7])


@pytest.mark.parametrize('device', DEVICES)
def test_views_and_values_are_made_buffers_when_they_are_read(device):
    x = buffer(np.arange(12).reshape(3, 4), device)
    part, turned, value = x[1], x.T[2, :], x[0] * 2
    assert axpy(part, value).tolist() == [12, 17, 22, 27]
    assert axpy(turned, turned).tolist() == [8, 24, 40]


@pytest.mark.parametrize('device', sorted({'METAL', Device.DEFAULT} - {'CPU'}))
@pytest.mark.parametrize('simds', [1, 3])
@pytest.mark.parametrize('vector', ['float4', 'half4'])
def test_threads_that_meet(device, simds, vector):
    dtype = np.float32 if vector == 'float4' else np.float16
    x = np.random.default_rng(simds).standard_normal((2, 128 * simds)).astype(dtype)
    got = Kernel(SUMS)(Tensor.empty(2, device=device), buffer(x, device, dtype), grid=(2,), threads=(32 * simds,),
                       V=vector, SIMDS=simds).numpy()
    assert np.allclose(got, (x.astype(float)**2).sum(1), rtol=1e-3)


@pytest.mark.parametrize('device', sorted({'METAL', Device.DEFAULT} - {'CPU'}))
def test_where_a_thread_stands(device):
    "Every attribute that the translation knows, against a loop in Python."
    grid, threads = (3, 2, 2), (4, 5, 2)
    positions = [p for p in metal._CUDA_BUILTINS if p in POSITIONS]
    indices = [p for p in metal._CUDA_BUILTINS if p not in POSITIONS]
    arguments = [f'uint3 p{n} [[{p}]]' for n, p in enumerate(positions)]
    arguments += [f'uint i{n} [[{p}]]' for n, p in enumerate(indices)]
    body = ''.join(f'o[{3 * n + i}] = p{n}.{axis}; ' for n in range(len(positions)) for i, axis in enumerate('xyz'))
    body += ''.join(f'o[{3 * len(positions) + n}] = i{n}; ' for n in range(len(indices)))
    width, total = 3 * len(positions) + len(indices), np.prod(grid) * np.prod(threads)
    at = '((p0.z * p5.y + p0.y) * p5.x + p0.x)'.replace('p5', f'p{positions.index("threads_per_grid")}')
    text = (f'kernel void stand(device uint* out, {", ".join(arguments)}) {{'
            f'device uint* o = out + {at} * {width}; {body} }}')
    out = Tensor.empty(int(total), width, dtype=dtypes.uint32, device=device)
    got = Kernel(text)(out, grid=grid, threads=threads).numpy()
    for (x, y, z), want in standing(grid, threads):
        row = got[(z * grid[1] * threads[1] + y) * grid[0] * threads[0] + x]
        assert row.tolist() == [*np.ravel([want[p] for p in positions]), *(want[p] for p in indices)]


def standing(grid, threads):
    "Each thread's place in the grid, and what its attributes are."
    size = tuple(g * t for g, t in zip(grid, threads))
    for z, y, x in np.ndindex(size[::-1]):
        group, inside = zip(*(divmod(p, t) for p, t in zip((x, y, z), threads)))
        index = inside[0] + threads[0] * (inside[1] + threads[1] * inside[2])
        yield (x, y, z), dict(
            thread_position_in_grid=(x, y, z), threadgroup_position_in_grid=group, threads_per_grid=size,
            thread_position_in_threadgroup=inside, threads_per_threadgroup=threads, threadgroups_per_grid=grid,
            thread_index_in_threadgroup=index, thread_index_in_simdgroup=index % 32,
            simdgroup_index_in_threadgroup=index // 32, threads_per_simdgroup=32,
            simdgroups_per_threadgroup=-(-int(np.prod(threads)) // 32))


def test_where_a_thread_stands_in_cuda():
    "The same without a GPU: the translation's expressions, computed by Python."
    def xyz(values):
        return SimpleNamespace(**dict(zip('xyz', values)))
    grid, threads = (3, 2, 2), (4, 5, 2)
    for _, want in standing(grid, threads):
        known = dict(blockIdx=xyz(want['threadgroup_position_in_grid']), blockDim=xyz(threads), gridDim=xyz(grid),
                     threadIdx=xyz(want['thread_position_in_threadgroup']))
        for name, value in want.items():
            text = metal.format_cuda_argument(Parameter(f'uint{3 if name in POSITIONS else ""} p [[{name}]]'))
            got = eval(text.replace('/', '//'), dict(known, uint=lambda a: a, uint3=lambda *a: a))
            assert got == value, name


# --- in the graph

@pytest.mark.parametrize('device', DEVICES)
def test_nothing_runs_before_the_result_is_read(device):
    x, z = buffer(range(5), device), buffer(range(5), device)
    with counting() as call:
        y = axpy(x, z)
    with counting() as run:
        assert y.tolist() == [0, 4, 8, 12, 16]
    assert (call.kernels, run.kernels) == (0, 1)


@pytest.mark.parametrize('device', DEVICES)
def test_neighbours_fuse_and_kernels_follow_each_other(device):
    x, z = buffer(range(6), device), buffer(np.ones(6), device)
    with counting() as c:
        y = axpy((x + 1) * 2 - 1, z)                 # one kernel before ours
        y = (axpy(y, z, a=2.0) * 0.5 + 1).realize()  # another of ours at once, one after it
    assert c.kernels == 4
    assert np.allclose(y.numpy(), (2 * (3 * ((np.arange(6) + 1) * 2 - 1) + 1) + 1) * 0.5 + 1)


@pytest.mark.parametrize('device', DEVICES)
def test_jit_replays_without_python(device):
    ran = []

    @TinyJit
    def layer(x, z):
        ran.append(1)
        return (axpy(axpy(x + 1, z), z * 2) - 1).realize()
    launches = []
    for n in range(5):
        x, z = buffer(np.arange(7) * n, device), buffer(np.full(7, n), device)
        with counting() as c, metalsim.counting() as simulated:
            y = layer(x, z)
        launches.append((c.kernels, c.compiled, len(simulated)))
        assert np.allclose(y.numpy(), 3 * (3 * (np.arange(7) * n + 1) + n) + 2 * n - 1)
    assert len(ran) == 2 and launches[0][0] == 5
    assert launches[2] == launches[3] == launches[4] and launches[4][1] == 0
    if simulated:
        assert simulated.graphs == [5] and launches[4] == (1, 0, 5)  # one graph of five kernels


@pytest.mark.parametrize('device', DEVICES)
def test_in_place_across_replays(device):
    total, seen = buffer(np.zeros(8), device), []

    @TinyJit
    def step(x):
        return (ADD_TO(total, x, threads=(8,)) * 10).realize()   # reads what the kernel has left
    for n in range(1, 6):
        seen.append(step(buffer(np.full(8, n), device))[0].item())
    assert seen == [10 * n * (n + 1) // 2 for n in range(1, 6)] and total.tolist() == [15] * 8


@pytest.mark.parametrize('device', DEVICES)
def test_written_twice_in_one_graph(device):
    pool = after = buffer(np.zeros(8), device)
    for n in (1, 2, 3):
        after = ADD_TO(after, buffer(np.full(8, n), device), threads=(8,))
    with counting() as c:
        after.realize()
    assert c.kernels == 3 and after.tolist() == pool.tolist() == [6] * 8    # nothing is copied


def test_the_program_says_what_it_is_given_and_what_it_writes():
    "Graphs order kernels by this; arguments are taken from the parameters in LINEAR."
    x = buffer([1, 2, 3, 4], 'METAL', np.int32)
    tens, ones = SPLIT(x.empty_like(), x.empty_like(), x, grid=(2, 3), threads=(4,))
    program = tens.uop.src[1].src[0]
    assert (program.arg.globals, program.arg.outs, program.arg.ins) == ((0, 1, 2), (0, 1), (0, 1, 2))
    assert (program.arg.global_size, program.arg.local_size) == ((2, 3, 1), (4, 1, 1))
    assert [u.arg.slot for u in program.src[1].src if u.op is Ops.PARAM] == [0, 1, 2]
    assert ones.uop.src[1] is tens.uop.src[1]      # one call, two results


@pytest.mark.parametrize('device', DEVICES)
def test_counters(device):
    x = buffer(range(4), device)
    with counting() as c:
        axpy(x, x).realize()
    assert (c.nbytes, c.flops) == (3 * 16, 0)
    with counting() as c:
        axpy(x, x, nbytes=5, ops=7).realize()
    assert (c.nbytes, c.flops) == (5, 7)


@pytest.mark.parametrize('device', DEVICES)
def test_a_kernel_is_compiled_once_for_each_set_of_constants(device, monkeypatch):
    x, compiler, texts = buffer(range(9), device), Device[device].compiler, []
    compile_cached = compiler.compile_cached
    monkeypatch.setattr(compiler, 'compile_cached', lambda text: (texts.append(text), compile_cached(text))[1])
    metal.find_refusal.cache_clear()
    for a in (3.25, 3.25, 4.25, 3.25):
        with counting() as c:
            assert axpy(x, x, a=a).tolist()[1] == a + 1
    assert len(set(texts)) == 2 and c.compiled == 0 and all('axpy' in text for text in texts)
    first = [t for t in texts if '3.25f' in t]
    assert len(first) <= 2      # once by the call, and once more by tinygrad, which looks into its cache


# --- what is refused, and how

def test_tensors_are_refused_by_name():
    def call(*tensors, **constants):
        return refusal(AXPY, *tensors, **dict(T='float', A=1.0, N=4) | constants)
    x, other = buffer(range(4), 'CPU'), buffer(range(4), 'METAL')
    out = x.empty_like()
    assert call(out, x) == 'kernel axpy takes 3 tensors (y, x, z), not 2'
    assert call() == 'kernel axpy takes 3 tensors (y, x, z), not 0'
    assert call(out, x, x.half()) == "kernel axpy: 'z' is half; it takes float"
    assert call(out, x.int(), x) == "kernel axpy: 'x' is int; it takes float"
    assert call(out, x, x, T='half') == "kernel axpy: 'y' is float; it takes half"
    assert call(out, other, x) == "kernel axpy: 'x' is on METAL, 'y' on CPU"
    assert call(out, x, x, T='double') == ("kernel axpy: 'y' points to T, which is no tensor's type; "
                                           "name one, as T='float'")
    for view in (x + 1, Tensor.empty(8, device='CPU')[2:6], x.reshape(2, 2).T, x.flip(0)):
        assert call(view, x, x).startswith("kernel axpy: 'y' is written, and is no buffer but a view or a value;")
    for whole in (out.reshape(2, 2), Tensor.empty(2, 2, device='CPU'), Tensor.zeros(4, device='CPU')):
        assert AXPY(whole, x, x, T='float', A=1.0, N=4).flatten().tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize('sizes', [dict(grid=(0,)), dict(threads=(0,)), dict(threads=(1025,)), dict(threads=(32, 64)),
                                   dict(grid=(1, 1, 1, 1)), dict(grid=(-1,))])
def test_sizes_are_refused(sizes):
    x = buffer(range(4), 'METAL')
    message = refusal(AXPY, x.empty_like(), x, x, T='float', A=1.0, N=4, **sizes)
    assert message.startswith('kernel axpy: grid (') and '1024 threads at most' in message


def test_a_kernel_may_limit_its_threads():
    text = AXPY.metal.replace('kernel', '[[max_total_threads_per_threadgroup(64)]] kernel')
    x = buffer(range(4), 'METAL')
    assert '64 threads at most' in refusal(Kernel(text), x.empty_like(), x, x, threads=(65,), T='float', A=1.0, N=4)
    assert Kernel(text)(x.empty_like(), x, x, threads=(64,), T='float', A=1.0, N=4).tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize('texts, why', [
    ([''], 'one kernel'), (['void f(device float* y) {}'], 'one kernel'),
    (['kernel void f(device int* y) {} kernel void g(device int* y) {}'], 'one kernel'),
    (['kernel void f(device const int* y) {}'], 'kernel f writes nothing'),
    (['kernel void f(device int* y, constant int& n) {}'], "'n' is no plain buffer"),
    (['kernel void f(device int* y, int n) {}'], "'n' is no plain buffer"),
    (['kernel void f(device int* y, threadgroup int* s [[threadgroup(0)]]) {}'], "'s' is no plain buffer"),
    (['kernel void f(device int* y [[buffer(1)]], device int* x [[buffer(0)]]) {}'], "'y' is no plain buffer"),
    (['kernel void f(device int* y) {}', 'kernel void g(device int* y) {}'], 'differs between Metal and C'),
    (['kernel void f(device int* y) {}', 'kernel void f(device int* z) {}'], 'differs between Metal and C'),
    (['kernel void f(device int* y, device int* x) {}', 'kernel void f(device int* y, device const int* x) {}'],
     'differs between Metal and C')])
def test_texts_are_refused(texts, why):
    assert why in refusal(parse_signature, *texts)
    assert why in refusal(Kernel(*texts), Tensor.empty(1))


def test_the_same_types_may_be_wider_in_c():
    kernel = parse_signature('kernel void f(device T* y, device const half4* x, uint i [[thread_position_in_grid]]) {}',
                          'kernel void f(device T* y, device const half16* x) {}')
    assert [p.name for p in kernel.slots.values()] == ['y', 'x']


def test_a_device_without_a_text():
    x = buffer(range(4), 'CPU')
    message = refusal(Kernel(AXPY.metal), x.empty_like(), x, x, T='float', A=1.0, N=4)
    assert message == 'kernel axpy has no source for CPU'
    x = buffer(range(4), 'METAL')
    message = refusal(Kernel(c=AXPY.c), x.empty_like(), x, x, T='float', A=1.0, N=4)
    assert message == 'kernel axpy has no source for METAL'


@pytest.mark.parametrize('device', DEVICES)
def test_compile_errors_have_our_lines_and_nothing_is_printed(device, capfd):
    x = buffer(range(4), device)
    wrong = Kernel(AXPY.metal.replace('z[i];', 'zz[i];'), AXPY.c.replace('z[i];', 'zz[i];'))
    message = refusal(wrong, x.empty_like(), x, x, T='float', A=1.0, N=4)
    line = 2 if device == 'CPU' else 3
    assert message.startswith(f'kernel axpy does not compile for {device}:\n')
    assert re.search(rf"axpy[:(]{line}\b.*'?zz", message), message
    assert 'undeclared' in message or 'undefined' in message
    message = refusal(AXPY, x.empty_like(), x, x, T='float', N=4)      # a constant is missing
    assert re.search(rf'axpy[:(]{line}\b.*\bA\b', message), message
    out, err = capfd.readouterr()
    assert not out and 'error' not in err
    assert axpy(x, x).tolist() == [0, 4, 8, 12]                     # and all goes on


# --- pipelines

@simulated
def test_a_kernel_declares_its_threads_and_its_lines_stay():
    text = 'inlined float twice(float x) { return 2 * x; }\n// a kernel void of words\nkernel void f(device float* y) { y[0] = zero; }'
    kernel, y = Kernel(text), buffer([1.0], 'METAL')
    for threads in (1, 96):
        source = kernel.source('METAL', threads, {})
        assert source.endswith(text.replace('\nkernel', f'\n[[max_total_threads_per_threadgroup({threads})]] kernel'))
        assert [k.max_threads for k in signatures(source)] == [threads]
        assert 'f:3:' in refusal(kernel, y, threads=(threads,))
    own = Kernel('[[max_total_threads_per_threadgroup(128)]] kernel void f(device float* y) { y[0] = 1; }')    # as it says
    assert own.source('METAL', 32, {}).endswith(own.metal)
    assert '128 threads at most' in refusal(own, y, threads=(256,))


@simulated
@pytest.mark.parametrize('most, name, why', [
    (64, '', '96 threads do not fit, 64 do'), (1024, 'axpy', 'axpy: Compiler encountered an internal error')])
def test_what_the_driver_refuses_is_refused_at_the_call(most, name, why, monkeypatch):
    "Its pipeline is built once, before anything runs, and the answer is kept."
    monkeypatch.setenv('METALSIM_REFUSE', name)
    monkeypatch.setattr('tinyvllm.metalsim.pipelines.MAX_THREADS', re.compile('no kernel declares its threads'))
    monkeypatch.setenv('METALSIM_MAX_THREADS', str(most))
    metal.find_refusal.cache_clear()
    x = buffer(range(8), 'METAL')
    for _ in range(2):
        assert refusal(axpy, x, x, threads=96) == f'kernel axpy cannot run on METAL: {why}'
    assert metal.find_refusal.cache_info().misses == 1
    metal.find_refusal.cache_clear()


def test_devices_that_run_the_kernels(monkeypatch):
    for device, has in (('CPU', True), ('CUDA:1', True), ('WEBGPU', False)):
        assert metal.has_kernels(device) == has
    for family, old in (('Apple7', False), ('Apple5', True), ('Mac2', True)):
        monkeypatch.setattr(metal, 'Device', {'METAL': SimpleNamespace(arch=family)})
        metal.has_kernels.cache_clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            assert [metal.has_kernels('METAL') for _ in range(3)] == [not old] * 3
        assert len(told) == old and all(f'Apple7 (M1) or later, and this one is {family}' in str(w.message) for w in told)
    metal.has_kernels.cache_clear()


def test_the_error_stream_survives_compilations_in_many_threads():
    allow_threads()
    before, message = os.fstat(2), []

    def compile_wrong(n):
        message.append(refusal(metal.check_compiles, 'f', f'wrong{n}', 'CPU'))
    threads = [threading.Thread(target=compile_wrong, args=(n,)) for n in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert os.path.samestat(before, os.fstat(2))
    assert {*map(str, range(6))} == {n for text in message for n in re.findall(r"'wrong(\d)'", text)}
    assert all(len(set(re.findall(r'wrong\d', text))) == 1 for text in message)     # each its own


# --- constants and types

@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_is_a_float_literal(x):
    text = format_defines(dict(A=x, B=np.float64(x), C=np.float32(0.1)))
    a, b, c = re.findall(r'#define \w (\S+)\n', text)
    assert a == b and a.endswith('f') and float(a[:-1]) == x and float(c[:-1]) == np.float32(0.1)
    assert re.fullmatch(r'-?\d+(\.\d+)?(e[+-]?\d+)?f', a) and ('.' in a or 'e' in a)


def test_other_constants():
    text = format_defines(dict(N=5, NEG=-3, YES=True, NO=False, M=np.int64(7), T='half', EXPRESSION='(a + b)'))
    assert text == ('#define N 5\n#define NEG -3\n#define YES 1\n#define NO 0\n#define M 7\n'
                    '#define T half\n#define EXPRESSION (a + b)\n')


@pytest.mark.parametrize('text, dtype', [
    ('device const half* x', dtypes.half), ('device half4* x', dtypes.half), ('device const float16* x', dtypes.float),
    ('device const bfloat* x', dtypes.bfloat16), ('device const uint2* x', dtypes.uint32),
    ('device const uchar8* x', dtypes.uint8), ('device T* x', dtypes.half), ('device const V* x', dtypes.float),
    ('device const long* x', dtypes.int64), ('device const bool* x', dtypes.bool), ('device float3* x', None),
    ('device atomic_uint* x', None), ('device W* x', None)])
def test_element_types(text, dtype):
    assert parse_element_type(Parameter(text), dict(T='half', V='float4')) == dtype


# --- CUDA, as text

def test_the_translation_keeps_lines_and_drops_address_spaces():
    text = translate_to_cuda(SUMS, parse_signature(SUMS), 96)
    head, entry = text[:text.rindex('}\nextern')], text[text.rindex('extern'):]
    namespace, line, *body = head.splitlines()
    assert namespace == 'namespace metal {' and line == '#line 1 "sums"' and len(body) == len(SUMS.splitlines())
    for ours, theirs in zip(SUMS.splitlines(), body):
        if 'SQUARE' in ours:
            assert ours == theirs
    assert not re.search(r'\b(device|threadgroup)\b', text) and '[[' not in text and 'a vector' not in text
    assert 'MSL_TG(parts, [SIMDS], float);' in body[5]
    assert re.sub(r'\s+', ' ', entry) == (
        'extern "C" __global__ void __launch_bounds__(96, RESIDENT) sums( float* y, const V* x) { '
        'follow(); metal::sums(y, x, uint(blockIdx.x), '
        'uint((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z))), '
        'uint((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32), '
        'uint((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) / 32)); } ')


def test_every_attribute_of_the_simulator_is_translated():
    synonyms = {'dispatch_threads_per_threadgroup', 'dispatch_simdgroups_per_threadgroup'}
    assert {*POSITIONS, *INDICES, SIMD_WIDTH} - synonyms == set(metal._CUDA_BUILTINS)


def test_what_each_device_gets():
    constants = dict(T='half', N=4)
    for device, prelude in (('METAL', metal.METAL_PRELUDE), ('CPU', metal.C_PRELUDE), ('CUDA', metal.CUDA_PRELUDE)):
        text = AXPY.source(device, 32, constants)
        head = '#define RESIDENT 0\n' * (device == 'CUDA') + '#define T half\n#define N 4\n'
        assert text.startswith(prelude + head) and '#line 1 "axpy"\n' in text
    declared = AXPY.metal.replace('kernel void', '[[max_total_threads_per_threadgroup(32)]] kernel void')
    assert AXPY.source('METAL', 32, constants).endswith(declared)
    own = Kernel(AXPY.metal, cuda='extern "C" __global__ void axpy(T* y) {}')
    assert own.source('CUDA', 32, {'T': 'float'}) == f'#define T float\n#line 1 "axpy"\n{own.cuda}'


@pytest.fixture
def nvrtc():
    "The CUDA compiler: it needs no GPU."
    from tinygrad.runtime.support.compiler_cuda import NVRTCCompiler
    try:
        return NVRTCCompiler('sm_90')
    except (OSError, AttributeError, RuntimeError, ctypes.ArgumentError, TypeError) as error:
        pytest.skip(f'no NVRTC here: {error}')


def test_the_translation_compiles(nvrtc):
    for kernel, constants in ((AXPY, dict(T='half', A=0.5, N=100)), (Kernel(SUMS), dict(V='half4', SIMDS=2))):
        code = nvrtc.compile(kernel.source('CUDA', 64, constants)).decode()
        assert f'.entry {kernel.signature.name}(' in code and '.maxntid 64' in code
    every = ', '.join(f'uint a{n} [[{name}]]' for n, name in enumerate(metal._CUDA_BUILTINS))
    total = ' + '.join(f'a{n}' for n in range(len(metal._CUDA_BUILTINS)))
    nvrtc.compile(Kernel(f'kernel void f(device uint* y, {every}) {{ y[0] = {total}; }}').source('CUDA', 32, {}))


def test_nvrtc_errors_have_our_lines_and_no_noise(nvrtc):
    from tinygrad.device import CompileError
    wrong = Kernel(AXPY.metal.replace('z[i];', 'zz[i];'))
    with pytest.raises(CompileError) as caught:
        nvrtc.compile(wrong.source('CUDA', 64, dict(T='half', A=0.5, N=100)))
    assert re.search(r'axpy\(3\): error: identifier "zz" is undefined', str(caught.value))
    assert 'warning' not in str(caught.value)


# --- what tinygrad must go on doing

def same(found, expected, what):
    assert found == expected, (f'tinygrad has changed: {what} is {found!r} and was {expected!r}; '
                               'adapt `call_kernel` in nbs/05_metal.ipynb, the only place that depends on it')


def names(cls):
    return [f.name for f in fields(cls)]


def test_the_internals_of_tinygrad_that_kernels_stand_on():
    same(names(ProgramInfo), ['name', 'global_size', 'local_size', 'vars', 'globals', 'outs', 'ins', 'target'],
         'what a PROGRAM says about itself (ProgramInfo)')
    same({'name', 'estimates'} <= set(names(KernelInfo)), True, 'KernelInfo with a name and estimates')
    same(names(Estimates), ['ops', 'lds', 'mem'], 'the order of Estimates')
    # custom_kernel: placeholders go in, buffers "after" a CALL of the PROGRAM come out
    x, given_to = buffer(np.ones((2, 3)), 'CPU'), []
    info = ProgramInfo('pinned', (1, 1, 1), (1, 1, 1), globals=(0, 1), outs=(0,), ins=(0, 1),
                       target=Device['CPU'].renderer.target)
    source = 'void pinned(float* y, float* x) { for (int i = 0; i < 6; i++) y[i] = x[i] + 41; }'

    def body(*placeholders):
        given_to.extend(placeholders)
        buffers = tuple(p.base for p in placeholders)
        sink = UOp.sink(*buffers, arg=KernelInfo('pinned', estimates=Estimates()))
        parts = sink, UOp(Ops.LINEAR, src=(*buffers, sink)), UOp(Ops.SOURCE, arg=source)
        return UOp(Ops.PROGRAM, src=parts, arg=info)
    done = UOp.custom_kernel(Tensor.empty(2, 3, device='CPU').uop, x.uop, fxn=body)
    same([p.base.op for p in given_to], [Ops.PARAM] * 2, 'the base of a placeholder')
    same([p.base.arg.slot for p in given_to], [0, 1], "a placeholder's slot")
    same([d.op for d in done], [Ops.AFTER] * 2, 'what custom_kernel returns')
    call = done[0].src[1]
    same((call.op, call.src[0].op), (Ops.CALL, Ops.PROGRAM), 'what the buffers wait for')
    same(Tensor(done[0]).uop.has_buffer_identity(after_ok=True), True, 'a written buffer is a buffer')
    same((x + 1).uop.has_buffer_identity(after_ok=True), False, 'a value is no buffer')
    # a PROGRAM with SINK, LINEAR and SOURCE is compiled by `compile_cached`, and nothing else is done to it
    program = to_program(call.src[0], Device['CPU'].renderer)
    same([u.op for u in program.src], [Ops.SINK, Ops.LINEAR, Ops.SOURCE, Ops.BINARY], 'a compiled PROGRAM')
    same(program.src[2].arg, source, 'the SOURCE that was compiled')
    same(program.src[3].arg, Device['CPU'].compiler.compile_cached(source), 'the code that compile_cached gives')
    same([s[1] for s in program.to_elf().signature], [0, 1], 'the arguments, taken from the PARAMs in LINEAR')
    same(Tensor(done[0]).tolist(), [[42.0] * 3] * 2, 'what the kernel computes')
