"The simulated METAL under tinygrad: generated kernels, raw Metal in the graph, TinyJit, a whole engine."
import ast
import ctypes
import inspect
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tinygrad
from support.metal_cases import TOP, attention, edited, halves, in_graph, source
from tinygrad import Device, Tensor, TinyJit, Variable, dtypes
from tinygrad.device import Allocator, CompileError, Compiled, Compiler, LRUAllocator, Program, TinyELF
from tinygrad.engine.jit import GraphRunner
from tinygrad.engine.realize import estimate_uop
from tinygrad.uop.ops import ProgramInfo

from tinyvllm.engine.llm import LLM
from tinyvllm.errors import BadInput
from tinyvllm.kernels.metal import Kernel
from tinyvllm.models.llama import Llama, model_config
from tinyvllm.metalsim import MetalError, counting
from tinyvllm.metalsim.command_buffers import M1_FLOPS, SHARE, to_ns_str, wait_check
from tinyvllm.metalsim.device import MTLBuffer
from tinyvllm.metalsim.pipelines import build_pipeline
from tinyvllm.runner.graphs import Replay, capture
from tinyvllm.runner.shared_memory import allocate_shared, wait_for_command_buffer
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.models.weights import tiny_checkpoint

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='a Mac has the real one')


def run(code, *args, **env):
    "Run a script in a process of its own, on METAL."
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'DEV': 'METAL', **env}
    return subprocess.run([sys.executable, '-c', code, *args], env=env, capture_output=True, text=True)


def metal(x, dtype=None):
    return Tensor(np.asarray(x), device='METAL', dtype=dtype).realize()


# ---------------------------------------------------------------- the device

def test_metal_is_there():
    done = run('import tinyvllm; from tinygrad import Tensor; print((Tensor([1, 2]) + 1).tolist())')
    assert done.stdout == '[2, 3]\n', done.stderr


def test_nothing_is_loaded_and_nothing_chosen_before_it_is_asked_for():
    code = ("import sys, tinyvllm; print('tinygrad' in sys.modules, 'numpy' in sys.modules)\n"
            'from tinygrad import Device; print(Device.DEFAULT, Device.DEFAULT == "METAL")')
    done = run(code, DEV='')
    assert done.stdout.split()[:2] == ['False', 'False'] and done.stdout.endswith('False\n'), done.stderr
    assert run('import tinygrad, tinyvllm; print(tinygrad.Device.DEFAULT == "METAL")', DEV='').stdout == 'False\n'


def test_without_a_compiler_the_command_line_says_what_to_install(tmp_path):
    code = ("import tinyvllm.device as device; device.zig_wrapper = lambda: None\n"
            "import os, sys; os.environ['CC'] = ''\n"
            "from tinyvllm.cli.main import main; sys.exit(main(['info', '--device', 'METAL']))")
    done = run(code, PATH=str(tmp_path), CC='', METALSIM_CC='')
    assert done.returncode == 2 and not done.stdout and 'Traceback' not in done.stderr
    assert 'install clang (14 or newer), or `pip install ziglang`' in done.stderr


def test_fresh_memory_is_not_a_number():
    size = 12347    # a size of its own: memory that was used before comes back as it was
    assert np.isnan(Tensor.empty(size, device='METAL').contiguous().numpy()).all()


def test_parts_of_buffers_and_copies_between_devices():
    x = metal(np.arange(1000))
    assert x[100:200].contiguous().tolist() == list(range(100, 200))
    assert x.to('CPU')[7:9].tolist() == [7, 8] and x.to('METAL:1')[-2:].tolist() == [998, 999]


# ---------------------------------------------------------------- kernels that tinygrad writes

@pytest.mark.parametrize('dtype', [np.float32, np.float16])
def test_matrices(dtype):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((64, 72)).astype(dtype), rng.standard_normal((72, 64)).astype(dtype)
    found = metal(a).matmul(metal(b), dtype=dtypes.float).numpy()
    np.testing.assert_allclose(found, a.astype(np.float64) @ b.astype(np.float64), atol=1e-4)


def test_half_matrices_use_the_tensor_cores(monkeypatch):
    sources, compiler = [], type(Device['METAL'].renderer.compiler)
    compile = compiler.compile
    monkeypatch.setattr(compiler, 'compile', lambda self, src: sources.append(src) or compile(self, src))
    x = metal(np.ones((64, 32), np.float16))
    assert x.matmul(x.transpose(), dtype=dtypes.float).tolist() == [[32.] * 64] * 64
    assert any('simdgroup_multiply_accumulate' in src for src in sources)


def test_reductions_softmax_and_attention():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 301)).astype(np.float32)
    np.testing.assert_allclose(metal(x).sum(0).numpy(), x.astype(np.float64).sum(0), atol=1e-5)
    np.testing.assert_array_equal(metal(x).max(1).numpy(), x.max(1))
    np.testing.assert_array_equal(metal(x).argmax(1).numpy(), x.argmax(1))
    np.testing.assert_allclose(metal(x).cumsum(1).numpy(), x.astype(np.float64).cumsum(1), atol=1e-4)
    e = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    np.testing.assert_allclose(metal(x).softmax(1).numpy(), e / e.sum(1, keepdims=True), atol=1e-6)
    q, k, v = (halves(rng, 1, 2, 33, 64) for _ in range(3))
    found = metal(q).scaled_dot_product_attention(metal(k), metal(v), is_causal=True).numpy()
    answer = np.stack([attention(q[0, h], k[0, h], v[0, h], np.tri(33, dtype=bool)) for h in range(2)])[None]
    np.testing.assert_allclose(found, answer, atol=4e-3)


@pytest.mark.parametrize('dtype', [dtypes.bfloat16, dtypes.half, dtypes.uint8, dtypes.int64, dtypes.bool])
def test_casts(dtype):
    x = np.array([0., 1., 2.5, 100.3], np.float32)
    assert metal(x).cast(dtype).cast(dtypes.float).tolist() == Tensor(x).cast(dtype).cast(dtypes.float).tolist()


def test_random_numbers_are_the_cpus():
    "Threefry: the same bits on every device."
    numbers = []
    for device in ('METAL', 'CPU'):
        Tensor.manual_seed(5)
        numbers.append(Tensor.rand(100, device=device).numpy())
    np.testing.assert_array_equal(*numbers)


# ---------------------------------------------------------------- raw Metal in the graph

SCALED = TOP + """
kernel void scaled(device float* o [[buffer(0)]], device const float* a [[buffer(1)]],
                   device const float* b [[buffer(2)]], constant int& n [[buffer(3)]],
                   constant int& k [[buffer(4)]], uint i [[thread_position_in_grid]]) {
  o[i] = (int)i < n ? a[i] * k + b[i] : -1.0f;
}
"""
N, K = Variable('n', 1, 64), Variable('k', 0, 9)


def scaled(x, n, k):
    "Lazy tensors go in, a lazy tensor comes out."
    out = Tensor.empty(64, device='METAL')
    out, = in_graph('scaled', SCALED, [out], [x + 1, x * 3], grid=(2, 1, 1), threads=(32, 1, 1), variables=(n, k))
    return (out * 2).contiguous().realize()


def scaled_answer(x, n, k):
    return np.where(np.arange(64) < n, (x + 1) * k + x * 3, -1) * 2


def test_raw_metal_in_the_lazy_graph():
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    np.testing.assert_allclose(scaled(metal(x), N.bind(10), K.bind(3)).numpy(), scaled_answer(x, 10, 3), rtol=1e-5)


def test_a_replay_is_one_graph_of_all_kernels():
    jitted, rng = TinyJit(scaled), np.random.default_rng(0)
    for step, (n, k) in enumerate([(5, 1), (6, 2), (64, 3), (1, 4), (33, 9)]):
        x = rng.standard_normal(64).astype(np.float32)
        tensor = metal(x)
        with counting() as counts:
            found = jitted(tensor, N.bind(n), K.bind(k))
        np.testing.assert_allclose(found.numpy(), scaled_answer(x, n, k), rtol=1e-5)
        assert counts.graphs == ([] if step == 0 else [4]) and len(counts) == 4
        assert [d.name for d in counts].count('scaled') == 1


GROUPS = TOP + """
kernel void groups(device int* o [[buffer(0)]], constant int& n [[buffer(1)]],
                   uint t [[threadgroup_position_in_grid]], uint all [[threadgroups_per_grid]]) {
  o[t] = n * 100 + (int)all;
}
"""


def test_launch_sizes_follow_a_variable():
    def groups(o, n):
        return (in_graph('groups', GROUPS, [o], grid=((n.src[0] + 7) // 8, 1, 1), variables=(n,))[0] + 0).realize()
    jitted = TinyJit(groups)
    for n in (1, 8, 9, 64, 17):
        found = jitted(metal(np.zeros(8, np.int32)), N.bind(n)).tolist()
        count = (n + 7) // 8
        assert found == [n * 100 + count] * count + [0] * (8 - count)


WRITE = TOP + """
kernel void write(device int* cache [[buffer(0)]], device const int* x [[buffer(1)]], constant int& n [[buffer(2)]]) {
  cache[n] = x[0];
}
"""


@pytest.mark.parametrize('argument', [True, False], ids=['argument', 'closed over'])
def test_a_cache_is_written_in_place_under_jit(argument):
    cache = metal(np.zeros(8, np.int32))

    def write(kept, x, n):
        return (in_graph('write', WRITE, [kept], [x], variables=(n,))[0] * 1).realize()
    step = TinyJit(write if argument else lambda x, n: write(cache, x, n))
    for i in range(1, 6):
        more = metal(np.array([10 * i], np.int32)), Variable('n', 1, 7).bind(i)
        found = step(*((cache, *more) if argument else more)).tolist()
        assert found == cache.tolist() == [0, *(10 * j for j in range(1, i + 1)), *[0] * (7 - i)]


def groups_once(name='groups', text=GROUPS, **how):
    return in_graph(name, text, [Tensor.empty(8, dtype=dtypes.int, device='METAL')], variables=(N.bind(3),), **how)


@pytest.mark.parametrize('error, message, call', [
    (MetalError, 'groups: not bound: n .bound are .0..', lambda: groups_once(signed=False)),
    (MetalError, "no kernel 'nope'; it has groups", lambda: groups_once('nope')),
    (RuntimeError, 'local size .* bigger than 1024', lambda: groups_once(threads=(2048, 1, 1))),
    (RuntimeError, 'bigger than 256', lambda: groups_once(
        text=edited(GROUPS, 'kernel', '[[max_total_threads_per_threadgroup(256)]] kernel'), threads=(512, 1, 1))),
    (CompileError, 'buffer index 31, the last one is 30', lambda: in_graph(
        'groups', edited(GROUPS, 'buffer(1)', 'buffer(31)'),
        [Tensor.empty(8, dtype=dtypes.int, device='METAL') for _ in range(31)], variables=(N.bind(3),))),
    (MetalError, "groups: 'n' has 8 bytes, 4 are bound", lambda: groups_once(
        text=edited(GROUPS, 'constant int&', 'constant long&'))),
], ids=['no signature', 'name', 'threads', 'own limit', 'too many buffers', 'size of a number'])
def test_binding_rules(error, message, call):
    with pytest.raises(error, match=message):
        call()[0].realize()


def test_a_bug_in_the_graph_is_told_with_its_line():
    with pytest.raises(MetalError, match=r"groups: out-of-bounds write: .* of buffer 'o' \(32 bytes\) .*:6$"):
        groups_once(grid=(9, 1, 1))[0].realize()
    with pytest.raises(CompileError, match=r"kernel\.metal:6: use of undeclared identifier 'm'"):
        groups_once(text=edited(GROUPS, 'n * 100', 'm * 100'))[0].realize()


def test_environment_variables(monkeypatch):
    "Read when a kernel is compiled: each source here is a new one."
    wild, helper = edited(GROUPS, 'o[t]', 'o[t + 0]'), 'int two(int* p) { return 2; }\nkernel'
    monkeypatch.setenv('METALSIM_CHECK', '0')
    with counting() as counts:
        assert groups_once(text=wild)[0].tolist()[0] == 301
    assert counts[-1].name == 'groups' and not counts[-1].buffers
    refused = edited(GROUPS, 'kernel', helper)
    with pytest.raises(CompileError, match='kernel.metal:4: pointer or reference without an address space'):
        groups_once(text=refused)[0].realize()
    monkeypatch.setenv('METALSIM_LINT', '0')
    assert groups_once(text=refused)[0].tolist()[0] == 301
    code = 'import tinyvllm; from tinygrad import Device; print(bool(Device["METAL"].renderer.tensor_cores))'
    assert [run(code, METALSIM_ARCH=arch).stdout for arch in ('Apple6', 'Apple7')] == ['False\n', 'True\n']


# ---------------------------------------------------------------- pipelines

WIDE = TOP + """
kernel void wide(device int* o [[buffer(0)]], uint i [[thread_position_in_grid]]) { o[i] = i; }
"""
DECLARED = edited(WIDE, 'kernel', '[[max_total_threads_per_threadgroup(64)]] kernel')


def wide(text):
    "64 numbers by 64 threads of a threadgroup, and what comes of them in a graph: the next kernel counts from 1."
    out = Tensor.empty(64, dtype=dtypes.int, device='METAL')
    return in_graph('wide', text, [out], threads=(64, 1, 1))[0]


@pytest.fixture
def lowered(monkeypatch):
    "Pipelines of kernels that declare no maximum take 32 threads."
    monkeypatch.setenv('METALSIM_MAX_THREADS', '32')


def test_outside_of_a_graph_too_many_threads_are_an_error(lowered):
    with pytest.raises(RuntimeError, match=r'local size \(64, 1, 1\) bigger than 32'):
        wide(WIDE + '// eager').realize()
    assert wide(DECLARED).tolist() == list(range(64))    # built for as many as it declares


def test_in_a_graph_they_are_dropped_and_nothing_is_said(lowered):
    text, kept = WIDE + '// in a graph', metal(np.full(64, 7, np.int32))

    @capture
    def step():
        filled, = in_graph('wide', text, [kept], threads=(64, 1, 1))
        Tensor.realize((filled * 2).contiguous(), filled)
    with counting() as counts:
        step()
    assert counts.graphs == [2] and [d.name for d in counts if d.name == 'wide'] == []
    assert kept.tolist() == [7] * 64 and not Device['METAL'].mtl_buffers_in_flight


def test_the_engine_says_what_a_graph_drops(lowered):
    text, kept = WIDE + '// in a step', metal(np.zeros(64, np.int32))

    def step():
        filled, = in_graph('wide', text, [kept], threads=(64, 1, 1))
        Tensor.realize((filled * 2).contiguous(), filled)
    with pytest.raises(RuntimeError, match='wide has 64 threads in a threadgroup, and METAL drops it .* above 32'):
        Replay(step)()


REDUCED = edited(WIDE, 'o[i] = i', 'o[i] = simd_sum(i)')
MATRIX = edited(WIDE, '{ o[i] = i; }', '{ simdgroup_float8x8 m(0); o[i] = i; }')
SHUFFLED = edited(WIDE, 'o[i] = i', 'o[i] = simd_shuffle(i, 0)')


@pytest.mark.parametrize('text, function, families', [
    (WIDE, None, 'Apple1 Apple5 Apple9 Mac1 Mac2'), (SHUFFLED, 'simd_shuffle', 'Apple6 Apple7 Mac2'),
    (REDUCED, 'simd_sum', 'Apple7 Apple9 Mac2'), (MATRIX, 'simdgroup_float8x8', 'Apple7 Apple8'),
    (edited(WIDE, '#include', '// simd_sum(simdgroup_float8x8)\n#include'), None, 'Apple1 Mac1')])
def test_each_family_has_what_apples_table_says(text, function, families):
    "What the compiler takes and this GPU lacks is refused when the pipeline is built (llama.cpp#2564)."
    for family in 'Apple1 Apple5 Apple6 Apple7 Apple8 Apple9 Mac1 Mac2'.split():
        has = function is None or family in families.split() or int(family[-1]) > 7
        if has:
            assert build_pipeline(text, 'wide', family) == 1024
        else:
            with pytest.raises(RuntimeError, match=f'unlowered function call to air.{function}'):
                build_pipeline(text, 'wide', family)


def test_a_pipeline_may_be_refused(monkeypatch):
    monkeypatch.setenv('METALSIM_REFUSE', 'other,wide')
    with pytest.raises(RuntimeError, match='wide: Compiler encountered an internal error'):
        wide(WIDE + '// refused').realize()
    monkeypatch.setenv('METALSIM_REFUSE', 'other')
    assert wide(WIDE + '// refused').tolist() == list(range(64))


# ---------------------------------------------------------------- command buffers, and buffers

def test_each_call_is_a_command_buffer_until_the_device_is_waited_for():
    device, x = Device['METAL'], metal(np.arange(4))
    step = Replay(lambda: ((x + 1).contiguous().realize() * 2).contiguous().realize())
    device.synchronize()
    step()
    last = step()
    (x * 3).realize()
    labels = [buffer.label for buffer in device.mtl_buffers_in_flight]
    assert labels[:2] == ['batched 2'] * 2 and len(labels) == 3 and device.mtl_buffers_in_flight[1] is last
    wait_for_command_buffer('METAL', last)    # and forget it and those before
    assert [buffer.label for buffer in device.mtl_buffers_in_flight] == labels[2:]
    assert last.error is None and last.thread is threading.current_thread()
    device.synchronize()
    assert device.mtl_buffers_in_flight == []


def test_a_command_buffer_that_takes_too_long_is_stopped():
    "An M1 would take eight seconds: the second kernel does not run, and whoever waits is told."
    x, ops = metal(np.zeros(64, np.int32)), int(4 * SHARE * M1_FLOPS)
    add = Kernel('kernel void add(device int* x, device const int* y, uint i [[thread_position_in_grid]]) '
                 '{ x[i] = y[i] + 1; }')
    first, second = (metal(np.zeros(64, np.int32)) for _ in range(2))
    step = Replay(lambda: Tensor.realize(
        add(second, add(first, x, threads=(64,), ops=ops), threads=(64,), ops=ops)))
    command_buffer = step()
    assert command_buffer.seconds == pytest.approx(8, rel=0.01)
    for wait in (Device['METAL'].synchronize, second.tolist, lambda: wait_for_command_buffer('METAL', command_buffer)):
        with pytest.raises(RuntimeError, match='Caused GPU Timeout Error .00000002:kIOGPUCommandBufferCallbackError'):
            wait()
    assert (first.tolist(), second.tolist()) == ([1] * 64, [0] * 64)


def test_kernels_may_run_as_late_as_they_are_waited_for(monkeypatch):
    "What the host changes before it waits, they see changed: a GPU may be late."
    device, (x, host), (y, seen) = Device['METAL'], allocate_shared(4, 'METAL'), allocate_shared(4, 'METAL')
    move = Kernel('kernel void move(device int* y, device const int* x, uint i [[thread_position_in_grid]]) { y[i] = x[i]; }')
    monkeypatch.setenv('METALSIM_DEFER', '1')
    host[:] = 1
    for _ in range(2):
        move(y, x, threads=(4,)).realize()
    early, late = device.mtl_buffers_in_flight[-2:]
    host[:] = 2
    assert seen.tolist() == [0] * 4 and device.mtl_queue == [early, late]
    wait_check(early)
    assert seen.tolist() == [2] * 4 and device.mtl_queue == [late]
    host[:] = 3
    device.synchronize()
    assert seen.tolist() == [3] * 4 and device.mtl_queue == []
    groups_once(grid=(9, 1, 1))[0].realize()
    with pytest.raises(MetalError, match='out-of-bounds'):
        device.synchronize()
    device.synchronize()    # it is told once


def test_an_engine_waits_for_what_it_reads(monkeypatch):
    config, state = tiny_checkpoint(seed=0, num_hidden_layers=1)
    found = []
    for late in '01':
        monkeypatch.setenv('METALSIM_DEFER', late)
        llm = LLM(Llama(model_config(config), {name: t.to('METAL') for name, t in state.items()}), num_blocks=16)
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        outputs = llm.generate([[1, 2, 3], [4] * 20], params, use_tqdm=False)
        found.append([out.outputs[0].token_ids for out in outputs])
    assert found[0] == found[1]


def test_an_external_pointer_is_a_buffer_object():
    x = metal(np.arange(8, dtype=np.int32))
    handle = x.uop.base.buffer._buf.buf.value
    again = Tensor.from_blob(handle, (8,), dtype=dtypes.int, device='METAL')
    assert again.tolist() == list(range(8))
    x.assign(x + 1).realize()
    assert again.tolist() == list(range(1, 9))
    host = np.arange(4, dtype=np.int32)
    for wrong in (host.ctypes.data, handle + 8):
        with pytest.raises(BadInput, match='is no MTLBuffer'):
            Tensor.from_blob(wrong, (4,), dtype=dtypes.int, device='METAL').tolist()
    wrapped = MTLBuffer((ctypes.c_uint8 * host.nbytes).from_address(host.ctypes.data))    # as newBufferWithBytesNoCopy
    assert Tensor.from_blob(wrapped.value, (4,), dtype=dtypes.int, device='METAL').tolist() == [0, 1, 2, 3]


# ---------------------------------------------------------------- what dies with a thread

def in_thread(call, name='short-lived'):
    "What `call` returns on a thread of its own, which has ended then."
    found = []
    thread = threading.Thread(target=lambda: found.append(call()), name=name)
    thread.start()
    thread.join()
    return found[0]


def add_one():
    return (metal(np.arange(4)) + 1).tolist()


def test_a_thread_that_used_metal_must_not_end():
    "Its pool releases what tinygrad has released: the use after that is told once, whoever it is."
    assert in_thread(add_one) == [1, 2, 3, 4]
    with pytest.raises(MetalError, match='the autorelease pool of thread short-lived drained when it ended'):
        Device['METAL'].synchronize()
    assert add_one() == [1, 2, 3, 4]


def test_a_thread_that_lives_may_be_followed_by_others():
    "A parked thread keeps its pool; so does one that never used METAL."
    done, park = threading.Event(), threading.Event()
    parked = threading.Thread(target=lambda: (add_one(), done.set(), park.wait()), daemon=True)
    parked.start()
    done.wait()
    in_thread(lambda: sum(range(10)))
    assert add_one() == [1, 2, 3, 4]
    park.set()
    parked.join()
    with pytest.raises(MetalError, match='drained'):
        Device['METAL'].synchronize()


@pytest.mark.parametrize('use', [
    lambda graph: wait_check(graph.command_buffer), lambda graph: graph.command_buffer.label, lambda graph: graph((), {})],
    ids=['waiting', 'its label', 'a replay'])
def test_a_graph_whose_command_buffer_died(use):
    x = metal(np.arange(4))
    replay = Replay(lambda: ((x + 1).contiguous().realize() * 2).contiguous().realize())
    in_thread(replay, 'warm-up')
    with pytest.raises(MetalError, match='crashed: the autorelease pool of thread warm-up'):
        Device['METAL'].synchronize()
    with pytest.raises(MetalError, match="MTLCommandBuffer 'batched 2' is used .* pool of thread warm-up drained"):
        use(replay.graph)
    Device['METAL'].mtl_buffers_in_flight.clear()


def test_strings_are_kept_for_all_threads_and_die_with_one():
    assert to_ns_str('one name') is to_ns_str('one name')
    in_thread(lambda: to_ns_str('another name'))
    with pytest.raises(MetalError, match="NSString 'another name' is used after its end: .* short-lived drained"):
        to_ns_str('another name').text
    with pytest.raises(MetalError, match='drained when it ended, and released 1 objects'):
        Device['METAL'].synchronize()
    assert to_ns_str('another name').text == 'another name'


# ---------------------------------------------------------------- a transformer, and the engine

KV_WRITE = TOP + """
kernel void kv_write(device half* kc [[buffer(0)]], device half* vc [[buffer(1)]], device const half* k [[buffer(2)]],
                     device const half* v [[buffer(3)]], device const int* slot [[buffer(4)]],
                     uint t [[threadgroup_position_in_grid]], uint i [[thread_index_in_threadgroup]],
                     uint n [[threads_per_threadgroup]]) {
  const int s = slot[t];
  if (s < 0) return;
  ((device half4*)kc)[s * n + i] = ((device const half4*)k)[t * n + i];
  ((device half4*)vc)[s * n + i] = ((device const half4*)v)[t * n + i];
}
"""
H, KVH, D, BLOCK, BATCH, DIM, LAYERS = 4, 2, 128, 16, 2, 64, 2
TABLE = np.array([[3, 7, 1], [4, 0, 9]], np.int32)


def decode_text():
    "The kernel of `paged_decode.metal` with its output first, and its numbers as constants."
    text = source('paged_decode').split('// split-K')[0]
    numbers = f'constant constexpr int H = {H}, KVH = {KVH}, max_blocks = 3;\n'
    numbers += f'constant constexpr float scale = {D ** -.5:.9g}f;\n'
    text = re.sub(r'constant (int|float)& \w+ \[\[buffer\(\d\)\]\],', '', text)
    text = re.sub(r'buffer\((\d)\)', lambda m: f'buffer({(int(m.group(1)) + 1) % 6})', text)
    return edited(text, '#ifndef D', numbers + '#ifndef D')


class TwoLayers:
    "A small transformer that decodes one token of each of two sequences, with keys and values in blocks."

    def __init__(self):
        rng = np.random.default_rng(1)
        sizes = dict(q=(DIM, H * D), k=(DIM, KVH * D), v=(DIM, KVH * D), o=(H * D, DIM), g=(DIM, 128), d=(128, DIM))
        self.layers = [{n: (rng.standard_normal(s) / s[0] ** .5).astype(np.float16) for n, s in sizes.items()}
                       for _ in range(LAYERS)]
        self.embedding = halves(rng, 50, DIM)
        self.tensors = [{n: metal(w) for n, w in layer.items()} for layer in self.layers]
        self.table, self.text, self.e = metal(TABLE), decode_text(), metal(self.embedding)
        shape = 12, BLOCK, KVH, D
        self.caches = [[metal(np.zeros(shape, np.float16)) for _ in 'kv'] for _ in range(LAYERS)]
        self.seen = [[([], []) for _ in range(LAYERS)] for _ in range(BATCH)]

    def step(self, tokens, slots, lens):
        x = self.e[tokens]
        for w, caches in zip(self.tensors, self.caches):
            h = normed(x)
            q, k, v = ((h @ w[n]).contiguous() for n in 'qkv')
            caches = in_graph('kv_write', KV_WRITE, caches, [k, v, slots], (BATCH, 1, 1), (KVH * D // 4, 1, 1))
            out = Tensor.empty(BATCH, H, D, dtype=dtypes.half, device='METAL')
            inputs = [q.reshape(BATCH, H, D), *caches, self.table, lens]
            out, = in_graph('paged_decode', self.text, [out], inputs, (H, BATCH, 1), (32, 1, 1))
            x = x + out.reshape(BATCH, H * D) @ w['o']
            x = x + (normed(x) @ w['g']).silu() @ w['d']
        return (normed(x) @ self.e.T).float().realize()

    def answer(self, b, token):
        "The logits of sequence `b` in float64."
        x = self.embedding[token].astype(np.float64)
        for w, (keys, values) in zip(self.layers, self.seen[b]):
            h = x / np.sqrt((x * x).mean() + 1e-5)
            keys.append((h @ w['k']).reshape(KVH, D))
            values.append((h @ w['v']).reshape(KVH, D))
            q, k, v = (h @ w['q']).reshape(H, D), np.array(keys), np.array(values)
            out = [attention(q[i][None], k[:, i // 2], v[:, i // 2])[0] for i in range(H)]
            x = x + np.concatenate(out) @ w['o']
            g = x / np.sqrt((x * x).mean() + 1e-5) @ w['g']
            x = x + g / (1 + np.exp(-g)) @ w['d']
        return x / np.sqrt((x * x).mean() + 1e-5) @ self.embedding.T


def normed(x):
    return (x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt()).half()


def test_a_transformer_with_kernels_of_its_own():
    model, rng = TwoLayers(), np.random.default_rng(2)
    step = TinyJit(model.step)
    for position in range(20):
        tokens = rng.integers(0, 50, BATCH).astype(np.int32)
        slots = TABLE[:, position // BLOCK] * BLOCK + position % BLOCK
        inputs = [metal(x) for x in (tokens, slots, np.full(BATCH, position + 1, np.int32))]
        with counting() as counts:
            found = step(*inputs)
        answer = np.stack([model.answer(b, t) for b, t in enumerate(tokens)])
        np.testing.assert_allclose(found.numpy(), answer, atol=0.02 * answer.std())
        assert sum(counts.graphs) == (len(counts) if position else 0)


def tiny_answers():
    "Greedy tokens of two prompts, by an engine on the default device."
    config, state = tiny_checkpoint(seed=0, max_position_embeddings=1024, num_hidden_layers=1)
    llm = LLM(Llama(model_config(config), state), num_blocks=16)
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    outputs = llm.generate([rng.integers(0, 512, n).tolist() for n in (3, 5)], params, use_tqdm=False)
    return [out.outputs[0].token_ids for out in outputs]


def test_the_engine_says_on_metal_what_it_says_on_the_cpu():
    code = ('import json, sys; sys.path.insert(0, sys.argv[1])\n'
            'import test_metalsim_device as t; print(json.dumps(t.tiny_answers()))')
    done = run(code, str(Path(__file__).parent))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == tiny_answers()


# ---------------------------------------------------------------- what it stands in for

METHODS = {
    'runtime/ops_metal.py': {
        'MetalDevice.__init__': 'self, device', 'MetalDevice.synchronize': 'self',
        'MetalCompiler.__init__': 'self', 'MetalCompiler.__reduce__': 'self', 'MetalCompiler.compile': 'self, src',
        'MetalCompiler.disassemble': 'self, lib',
        'MetalProgram.__init__': 'self, dev, obj',
        'MetalProgram.__call__': 'self, *bufs, global_size=(1, 1, 1), local_size=(1, 1, 1), vals=(), wait=False, **kw',
        'MetalBuffer.__init__': 'self, buf, size, offset=0',
        'MetalAllocator._alloc': 'self, size, options', 'MetalAllocator._free': 'self, opaque, options',
        'MetalAllocator._transfer': 'self, dest, src, sz, src_dev, dest_dev',
        'MetalAllocator._cp_mv': 'self, dst, src, prof_desc', 'MetalAllocator._as_buffer': 'self, src',
        'MetalAllocator._copyin': 'self, dest, src', 'MetalAllocator._copyout': 'self, dest, src',
        'MetalAllocator._offset': 'self, buf, size, offset'},
    'runtime/graph/metal.py': {
        'MetalGraph.__init__': 'self, linear, input_uops=()',
        'MetalGraph.__call__': 'self, input_uops, var_vals, wait=False',
        'MetalGraph.collect_timestamps': 'self', 'MetalGraph.__del__': 'self',
        'MetalGraph.supports_uop': 'batch_devs, new_call'}}
USED = {
    Compiled.__init__: ['device', 'allocator', 'renderers', 'runtime', 'graph', 'arch'],
    Compiler.__init__: ['cachekey'], Compiler.compile: ['src'], Program.__init__: ['dev', 'obj'],
    LRUAllocator.__init__: ['dev', 'kwargs'], Allocator._offset: ['buf', 'size', 'offset'],
    GraphRunner.__init__: ['linear', 'input_uops'], GraphRunner.updated_launch_dims: ['var_vals'],
    ProgramInfo.launch_dims: ['var_vals'], estimate_uop: ['call']}


def methods(path):
    "The methods of a file's classes, without annotations."
    found = {}
    for kind in ast.parse(path.read_text()).body:
        for method in kind.body if isinstance(kind, ast.ClassDef) else []:
            if isinstance(method, ast.FunctionDef):
                for arg in ast.walk(method.args):
                    if isinstance(arg, ast.arg):
                        arg.annotation = None
                found[f'{kind.name}.{method.name}'] = ast.unparse(method.args)
    return found


@pytest.mark.parametrize('file', METHODS)
def test_tinygrads_metal_has_the_methods_that_ours_has(file):
    found, known = methods(Path(tinygrad.__file__).parent / file), METHODS[file]
    changed = sorted(name for name in found.keys() | known.keys() if found.get(name) != known.get(name))
    assert not changed, f'tinygrad changed {changed} in {file}: look whether tinyvllm/metalsim/device.py must follow'


OWNERSHIP = {  # what `metalsim.command_buffers` says about tinygrad: what it releases, and does not own
    'runtime/support/objc.py': ["setattr(self, 'retain', True)", 'if self.retain and not self._is_finalizing(): self.release()'],
    'runtime/ops_metal.py': ['@functools.cache\ndef to_ns_str', 'mtl_queue.commandBuffer().retained()',
                             'command_buffer.computeCommandEncoder().retained()', 'self.dev.mtl_buffers_in_flight.append'],
    'runtime/graph/metal.py': ['mtl_queue.commandBuffer().retained()', 'self.icb.indirectComputeCommandAtIndex(j).retained()']}


@pytest.mark.parametrize('file', OWNERSHIP)
def test_tinygrad_still_releases_what_it_does_not_own(file):
    text = (Path(tinygrad.__file__).parent / file).read_text()
    changed = [line for line in OWNERSHIP[file] if line not in text]
    assert not changed, f'tinygrad changed {changed} in {file}: may a thread that has used METAL end now?'
    assert 'msg("retain")' not in text and 'objc_autoreleasePool' not in text


def test_tinygrads_base_classes_are_as_ours_use_them():
    for function, names in USED.items():
        found = [name for name in inspect.signature(function).parameters if name != 'self']
        assert found == names, f'tinygrad changed {function.__qualname__}{found}'
    fields = ['lib', 'name', 'target', 'signature', 'profile_key']
    assert list(TinyELF.__dataclass_fields__) == fields, 'tinygrad changed TinyELF'
    graph = set(GraphRunner.__init__.__code__.co_names)
    missing = {'calls', 'runtimes', 'uop_replace', 'vars', 'device'} - graph
    assert not missing, f'tinygrad changed GraphRunner: no {missing}'


def test_tinygrad_imported_first_and_without_a_compiler(tmp_path):
    "It has no device until tinyvllm gives it the CPU; the simulated one is there and not chosen."
    code = ('import tinygrad, tinyvllm, sys; from tinyvllm.metalsim import StandIn; '
            'print(StandIn in sys.meta_path, tinygrad.Device.DEFAULT == "METAL")')
    environment = {'PATH': str(tmp_path), 'HOME': str(tmp_path), 'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
    assert done.stdout == 'True False\n', done.stderr
