"""The graph of the processor, a replay without tinygrad's checks, and memory that host and device share."""
import sys
from types import SimpleNamespace

import pytest
from tinygrad import Device, Tensor, TinyJit

from tinyvllm.kernels.metal import Kernel
from tinyvllm.measure import counting
from tinyvllm.runner import shared_memory
from tinyvllm.runner.graphs import ARGUMENTS, CPUGraph, Replay, check_threads, without_running
from tinyvllm.runner.shared_memory import wait_for_command_buffer

cpu_only = pytest.mark.skipif(Device.DEFAULT != 'CPU', reason='the graph of the CPU')


@cpu_only
def test_the_graph_of_the_cpu_is_one_call_and_takes_new_inputs(monkeypatch):
    monkeypatch.setattr(Device['CPU'], 'graph', CPUGraph)
    calls, call = [], CPUGraph.__call__
    monkeypatch.setattr(CPUGraph, '__call__', lambda self, *a, **k: calls.append(len(self.calls)) or call(self, *a, **k))

    @TinyJit
    def f(x):
        y = (x * 2).contiguous()
        return ((y + 1).contiguous() * x).realize()
    for i in range(5):
        x = Tensor.full((100,), float(i)).contiguous().realize()
        assert f(x).tolist() == [(2 * i + 1) * i] * 100
    assert calls == [3] * 4


@cpu_only
def test_a_kernel_with_many_buffers_stays_outside_the_graph(monkeypatch):
    monkeypatch.setattr(Device['CPU'], 'graph', CPUGraph)
    n = ARGUMENTS + 1
    names = [f'x{i}' for i in range(n)]
    wide = Kernel(c='kernel void wide(device float* y, ' + ', '.join(f'device const float* {x}' for x in names) + ') { y[0] = '
                  + ' + '.join(f'{x}[0]' for x in names) + '; }')
    parts = [Tensor([float(i)]).realize() for i in range(n)]
    total = TinyJit(lambda x: (wide((Tensor.empty(1)), *parts[:-1], x) + 1).realize())
    for i in range(4):
        assert total(Tensor([float(i)]).realize()).item() == sum(range(n - 1)) + i + 1


def test_metal_is_waited_for_by_command_buffer(monkeypatch):
    "A slot may be torn until the command buffer of its step has ended; later ones are not waited for."
    waited = []

    class Buffer:
        pass
    first, second, third = buffers = [Buffer() for _ in range(3)]
    device = SimpleNamespace(mtl_buffers_in_flight=[*buffers])
    monkeypatch.setitem(sys.modules, 'tinygrad.runtime.ops_metal', SimpleNamespace(wait_check=waited.append))
    monkeypatch.setattr(shared_memory, 'Device', {'METAL': device})
    wait_for_command_buffer('METAL', second)
    assert waited == [first, second] and device.mtl_buffers_in_flight == [third]    # the first may have failed
    wait_for_command_buffer('METAL', first)    # tinygrad has forgotten it already
    assert waited == [first, second, first] and device.mtl_buffers_in_flight == [third]


def test_what_is_recorded_without_running_has_not_run():
    x, calls = Tensor([1.0, 2.0]).realize(), []
    with without_running():
        calls.append(x.assign(x * 2).realize())
    assert x.tolist() == [1, 2] and len(calls) == 1
    with pytest.raises(ZeroDivisionError), without_running():
        (x + 1).realize(), 1 / 0
    assert (x + 1).tolist() == [2, 3]    # and afterwards all runs again


@pytest.mark.parametrize('threads, most, fits', [((32, 2, 1), 64, True), ((33, 2, 1), 64, False), (None, 1, True), ((9,), 0, True)])
def test_a_graph_is_looked_at_for_kernels_that_metal_drops(threads, most, fits):
    program = SimpleNamespace(arg=SimpleNamespace(local_size=threads))
    runtime = SimpleNamespace(name='wide', **(dict(max_total_threads=most) if most else {}))    # CUDA has no such number
    graph = SimpleNamespace(calls=[(0, program, [], {})], runtimes=[runtime], device='METAL')
    if fits:
        return check_threads(graph)
    with pytest.raises(RuntimeError, match='wide has 66 threads in a threadgroup, and METAL drops it .* above 64'):
        check_threads(graph)


def test_a_replay_does_not_wait_for_the_one_before():
    "Metal's graph would, because it might have to change; it returns a command buffer."
    graph = SimpleNamespace(command_buffer='old', estimates=SimpleNamespace(mem=3, ops=5))
    seen = []

    def call(*args):
        seen.append((args, graph.command_buffer))
        graph.command_buffer = 'new'
    replay = Replay(lambda: None)
    replay.graph = type('Graph', (), {'__call__': lambda self, *args: call(*args), 'estimates': graph.estimates,
                                      'command_buffer': property(lambda self: graph.command_buffer,
                                                                 lambda self, x: setattr(graph, 'command_buffer', x))})()
    with counting() as counts:
        assert replay() == 'new'
    assert seen == [(((), {}), None)] and (counts.kernels, counts.nbytes) == (1, 3)
