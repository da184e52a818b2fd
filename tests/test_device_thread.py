"""What a Mac asks of threads and waits: one that has used the device never ends, and no wait is without end.

Whole servers run on METAL, which `tinyvllm.metalsim` plays in processes of their own: it fails where a Mac would crash.
"""
import asyncio
import gc
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.engines import eventually, greedy
from tinygrad import Device
from tinyvllm.core.blocks import BlockManager
from tinyvllm.core.scheduler import Scheduler
from tinyvllm.engine.async_llm import AsyncLLM, DeviceThread, EngineThread, complete_future
from tinyvllm.engine.core import EngineCore
from tinyvllm.engine.defaults import load_engine
from tinyvllm.engine.llm import LLMEngine
from tinyvllm.errors import DeviceError
from tinyvllm.models.llama import model_config
from tinyvllm.models.weights import tiny_checkpoint
from tinyvllm.runner import sampled_tokens, shared_memory
from tinyvllm.runner.inputs import StepState
from tinyvllm.runner.sampled_tokens import SampledTokenBuffer
from tinyvllm.sampling.sampler import Sampled

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60    # seconds for anything: these tests are about what happens, not how fast


# --- device threads ------------------------------------------------------------------------------------------

def device_threads():
    return {thread for thread in threading.enumerate() if isinstance(thread, DeviceThread)}


def parked(thread):
    return thread in DeviceThread.parked


def test_calls_in_turn_need_one_thread_and_calls_at_once_need_more():
    first = DeviceThread.submit(threading.current_thread).result()
    eventually(lambda: parked(first))
    known = device_threads()
    for _ in range(20):
        thread = DeviceThread.submit(threading.current_thread).result()
        eventually(lambda: parked(thread))
    assert device_threads() == known
    release = threading.Event()
    busy = [DeviceThread.submit(lambda: (release.wait(PATIENCE), threading.current_thread())) for _ in range(len(known) + 1)]
    assert not DeviceThread.parked
    release.set()
    assert len({thread for _, thread in (call.result() for call in busy)}) == len(busy)
    eventually(lambda: set(DeviceThread.parked) == device_threads())


def test_a_call_made_on_a_device_thread_stays_there():
    "Behind what that thread is doing, and before it is anyone else's."
    done = []

    def load():
        later = DeviceThread.submit(lambda: done.append(threading.current_thread()))
        done.append(threading.current_thread())
        return later
    DeviceThread.submit(load).result().result()
    assert done[0] is done[1] and isinstance(done[0], DeviceThread)


@pytest.mark.parametrize('error', [ValueError, SystemExit, KeyboardInterrupt])
def test_no_fault_ends_a_device_thread(error):
    threads = []

    def fail():
        threads.append(threading.current_thread())
        raise error('on purpose')
    with pytest.raises(error, match='on purpose'):
        DeviceThread.submit(fail).result()
    eventually(lambda: parked(threads[0]))
    assert threads[0].is_alive()


# --- engines on them -----------------------------------------------------------------------------------------

def add_digits(batch):
    return [[Sampled(sum(seq.token_ids) % 10, 0.0, None)] if samples else [] for seq, samples in zip(batch.seqs, batch.samples)]


def toy(runner=add_digits):
    "An engine that needs no device."
    config = model_config(tiny_checkpoint(seed=0, num_hidden_layers=1)[0])
    return LLMEngine(EngineCore(Scheduler(BlockManager(256)), runner), config)


async def read(engine, prompt, length=3):
    async for out in engine.generate(prompt, greedy(length)):
        pass
    return out.outputs[0].token_ids


def failure(engine, *prompts, length=3):
    "The errors with which requests end that are asked at once."
    async def ask():
        return await asyncio.gather(*(read(engine, prompt, length) for prompt in prompts), return_exceptions=True)
    return asyncio.run(asyncio.wait_for(ask(), PATIENCE))


def test_engines_follow_each_other_on_a_thread_and_leave_nothing_behind():
    threads, cores = set(), []
    for _ in range(3):
        engine = AsyncLLM(toy())
        cores.append(weakref.ref(engine.engine.core))
        assert failure(engine, [3, 1, 4]) == [[8, 6, 2]]
        thread = engine.thread.call(threading.current_thread).result()
        engine.shutdown()
        eventually(lambda: parked(thread))
        threads.add(thread)
    del engine
    gc.collect()
    assert len(threads) == 1 and not any(core() for core in cores)


def test_engines_at_once_have_a_thread_each():
    engines = [AsyncLLM(toy()) for _ in range(3)]
    assert len({engine.thread.call(threading.current_thread).result() for engine in engines}) == 3
    assert [failure(engine, [3, 1, 4]) for engine in engines] == [[[8, 6, 2]]] * 3
    for engine in engines:
        engine.shutdown()


class Fault(BaseException):
    "What no part of an engine expects."


@pytest.mark.parametrize('error', [DeviceError('a kernel hangs'), Fault('of the thread')], ids=repr)
def test_what_no_step_survives_ends_the_engine_and_not_its_thread(error, caplog):
    def fail(batch): raise error
    engine = AsyncLLM(toy(fail))
    thread = engine.thread.call(threading.current_thread).result()
    errors = failure(engine, [1], [2], [3])
    assert error in errors and all(e is error or 'shut down' in str(e) for e in errors) and not engine.is_alive
    assert 'shut down' in str(failure(engine, [1])[0])    # whatever comes later, at once
    eventually(lambda: parked(thread))
    assert thread.is_alive() and 'the engine has died' in caplog.text and str(error) in caplog.text
    engine.shutdown()


def test_a_core_that_cannot_even_fail_keeps_no_reader_waiting():
    engine = AsyncLLM(toy(lambda batch: 1 / 0))
    engine.engine.core.fail_sequences = lambda error: {}['scheduler']
    errors = failure(engine, [1], [2])
    assert {type(error) for error in errors} <= {KeyError, RuntimeError} and not engine.is_alive


def test_a_call_that_ends_the_program_fails_its_caller_alone():
    engine = AsyncLLM(toy())
    with pytest.raises(SystemExit):
        engine.thread.call(sys.exit).result(PATIENCE)
    assert failure(engine, [3, 1, 4]) == [[8, 6, 2]]
    engine.shutdown()


def test_a_step_that_does_not_end_is_given_up():
    "The reader that it answers gets the error, the one that waits to be accepted is refused, and when it ends all ends."
    release, begun = threading.Event(), threading.Event()

    def hang(batch):
        begun.set()
        assert release.wait(PATIENCE)
        return add_digits(batch)
    engine = AsyncLLM(toy(hang))
    thread = engine.thread.call(threading.current_thread).result()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(failure, engine, [1])
        assert begun.wait(PATIENCE)
        second = pool.submit(failure, engine, [2])
        eventually(lambda: not engine.thread.calls.empty())
        with pytest.raises(DeviceError, match='has not ended within 0.01 s'):
            engine.thread.stop(0.01)
        assert type(first.result()[0]) is DeviceError and 'shut down' in str(second.result()[0])
    assert not engine.is_alive and not parked(thread)
    engine.shutdown()    # does not wait again
    release.set()
    eventually(lambda: parked(thread))


def begin(url, body):
    "A connection whose request has been sent, nothing read."
    connection = http.client.HTTPConnection(url.removeprefix('http://'), timeout=PATIENCE)
    connection.request('POST', '/v1/completions', json.dumps(body), {'Content-Type': 'application/json'})
    return connection


def test_a_server_ends_though_its_step_does_not(folder, monkeypatch):
    pytest.importorskip('uvicorn')
    from tinyvllm.server.run import serve_in_background
    monkeypatch.setattr(EngineThread, 'stop', partialmethod(EngineThread.stop, 0.1))
    engine, release = load_engine(folder, num_blocks=8), threading.Event()
    engine.core.runner = lambda batch: release.wait(PATIENCE)
    with pytest.raises(DeviceError, match='has not ended'), serve_in_background(engine) as server:
        connection = begin(server.url, dict(prompt='a', max_tokens=3, stream=True))
        eventually(lambda: engine.scheduler.sequences)
    assert b'"error"' in connection.getresponse().read()
    release.set()


UNFINISHED = """
import asyncio, atexit, sys
sys.path.insert(0, sys.argv[1])
import test_device_thread as t
atexit.register(lambda: print(engine.is_alive))    # the last of all
engine = t.AsyncLLM(t.toy())
async def main():
    await engine.submit([1], t.greedy(10**6))
asyncio.run(main())
print(engine.is_alive)
"""


def test_python_ends_between_two_steps():
    "A program that never stops its engine ends well: no step runs while Python takes itself down."
    done = subprocess.run([sys.executable, '-c', UNFINISHED, str(ROOT / 'tests')], capture_output=True, text=True,
                          timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, 'True\nFalse\n', '')


# --- the wait for a step -------------------------------------------------------------------------------------

@pytest.fixture
def buffer(monkeypatch):
    "One that has launched nothing yet, and is not patient."
    monkeypatch.setattr(sampled_tokens, 'FAST_LOOKS', 3)
    monkeypatch.setattr(sampled_tokens, 'MOST_LOOKS', 9)
    return SampledTokenBuffer(StepState(2, 'CPU'))


def test_a_step_without_its_last_kernel_is_an_error(buffer):
    with pytest.raises(DeviceError, match='step 1 has ended and left no tokens: .* dropped a kernel.* doctor'):
        buffer.read(buffer.state.reserve(0))


def test_a_device_that_hangs_is_an_error(buffer, monkeypatch):
    asked = []
    monkeypatch.setattr(sampled_tokens, 'has_finished', asked.append)
    with pytest.raises(DeviceError, match='step 1 has not ended .* hangs.* doctor'):
        buffer.read(buffer.state.reserve(0))
    assert asked == ['CPU'] * 7    # from the third look on


@pytest.mark.parametrize('wait, command_buffers', [('has_finished', {}), ('wait_for_command_buffer', {1: 'of step 1'})])
def test_a_device_that_fails_says_in_which_step(buffer, monkeypatch, wait, command_buffers):
    def fail(*given): raise RuntimeError('Caused GPU Timeout Error')
    monkeypatch.setattr(sampled_tokens, wait, fail)
    buffer.command_buffers |= command_buffers
    with pytest.raises(DeviceError, match='the device has failed in step 1: Caused GPU Timeout Error'):
        buffer.read(buffer.state.reserve(0))


def test_a_step_that_ends_while_the_device_is_asked_is_read(buffer, monkeypatch):
    step_id = buffer.state.reserve(0)

    def finish(device):
        buffer.slots[step_id, :2] = step_id, 7
        return True
    monkeypatch.setattr(sampled_tokens, 'has_finished', finish)
    assert buffer.read(step_id)[1] == 7


def test_a_mac_is_waited_for_by_command_buffer(buffer, monkeypatch):
    "When it has ended the step has too: no look more than one."
    waited = []
    monkeypatch.setattr(sampled_tokens, 'wait_for_command_buffer', lambda *given: waited.append(given))
    monkeypatch.setattr(sampled_tokens, 'has_finished', lambda device: pytest.fail('asked'))
    buffer.command_buffers[1] = 'of step 1'
    with pytest.raises(DeviceError, match='step 1 has ended and left no tokens'):
        buffer.read(buffer.state.reserve(0))
    assert waited == [('CPU', 'of step 1')] and not buffer.command_buffers


def test_a_cuda_card_is_asked_and_not_waited_for(monkeypatch):
    from tinygrad.runtime import ops_cuda
    from tinygrad.runtime.autogen import cuda
    asked, answers = [], [cuda.CUDA_ERROR_NOT_READY, 0, 700]
    monkeypatch.setattr(shared_memory, 'Device', {'CUDA:1': SimpleNamespace(context='of card 1')})
    monkeypatch.setattr(cuda, 'cuCtxSetCurrent', lambda context: asked.append(context) or 0)
    monkeypatch.setattr(cuda, 'cuStreamQuery', lambda stream: answers.pop(0))
    monkeypatch.setattr(cuda, 'cuGetErrorString', lambda status, text: 1)    # it needs the driver
    monkeypatch.setattr(ops_cuda.ctypes, 'string_at', lambda text: b'illegal address')
    assert [shared_memory.has_finished('CUDA:1') for _ in range(2)] == [False, True]
    with pytest.raises(RuntimeError, match='CUDA Error 700, illegal address'):
        shared_memory.has_finished('CUDA:1')
    assert asked == ['of card 1'] * 3


def test_the_command_line_says_in_a_line_what_the_device_did(folder, buffer, monkeypatch, capsys):
    from tinyvllm.cli.main import main
    monkeypatch.setattr(SampledTokenBuffer, 'publish', lambda self, *sampled: None)
    assert main(['generate', 'a', '--model', str(folder), '--max-tokens', '3']) == 1
    assert re.fullmatch('tinyvllm: error: step 1 has ended and left no tokens.*\n', capsys.readouterr().err)


# --- servers on METAL ----------------------------------------------------------------------------------------

SIZES = dict(num_blocks=6, max_num_seqs=1, max_num_batched_tokens=16, max_model_len=32)
metal = pytest.mark.skipif(sys.platform != 'linux', reason='a Mac would crash')
SLOW = 300    # seconds: the simulator compiles
POISON = 13    # a prompt that begins with it has the GPU drop a kernel


def ask(url, prompt, **more):
    "The status, and the tokens or the error; 503 from a server that has ended."
    body = dict(prompt=prompt, max_tokens=4, temperature=0, ignore_eos=True, return_token_ids=True) | more
    try:
        response = begin(url, body).getresponse()
        reply = json.loads(response.read())
    except ConnectionError:
        return 503, 'no connection'
    return response.status, reply['choices'][0]['token_ids'] if response.status == 200 else reply['error']['message']


def serve_once(folder):
    "Load, warm up, answer, shut down: what `tinyvllm serve` does, in a thread."
    from tinyvllm.server.app import AppState, ServerArgs
    from tinyvllm.server.run import Server, get_url, listen, load_state
    state, sock = AppState(ServerArgs(port=0)), listen('127.0.0.1', 0)
    server = Server(state, lambda state: load_state(state, folder, partial(load_engine, **SIZES)), get_url(sock))
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    eventually(lambda: not state.closed_reason or server.error)
    reply = ask(server.url, [3, 1, 4])
    assert ask(server.url, [3], logit_bias={'5': 100})[1] == [5] * 4    # bound on a thread that ends with the loop
    assert all(graph.replay.graph for graph in state.engine.engine.runner.graphs.values())    # each step is one graph
    server.handle_exit(signal.SIGTERM, None)
    thread.join()
    return reply


def submit_to_a_new_thread(fn, *args):
    "What a program does that knows nothing of Metal."
    future = Future()
    threading.Thread(target=complete_future, args=(future, fn, args), daemon=True).start()
    return future


def serve_in_turn(folder, times, threads):
    "Servers, one after the other; prints the replies. METAL raises if a thread has ended that used it."
    if threads == 'end':
        DeviceThread.submit = submit_to_a_new_thread
    replies = [serve_once(folder) for _ in range(int(times))]
    Device['METAL'].synchronize()
    print(json.dumps(replies))


def on_metal(call, *args):
    "Run a function of this file on METAL, in a process of its own."
    code = f'import sys; sys.path.insert(0, {str(ROOT / "tests")!r}); import test_device_thread as t; t.{call}(*sys.argv[1:])'
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], env=os.environ | dict(DEV='METAL'), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope='module')
def shallow(folder, tmp_path_factory):
    "The tiny model with one layer: half the work for the simulator."
    from tinyvllm.models.weights import save_safetensors
    path = tmp_path_factory.mktemp('shallow')
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        (path / name).write_bytes((folder / name).read_bytes())
    save_safetensors(path, *tiny_checkpoint(seed=0, num_hidden_layers=1))
    return path


@metal
def test_servers_load_warm_up_and_serve_as_a_mac_wants_it(shallow):
    process = on_metal('serve_in_turn', shallow, 2, 'stay')
    out, err = process.communicate(timeout=SLOW)
    assert process.returncode == 0, err
    first, second = json.loads(out)
    assert first == second and first[0] == 200 and len(first[1]) == 4 and 'Error' not in err


@metal
def test_a_server_whose_threads_end_would_crash_on_a_mac(shallow):
    "The same with a thread for the load and one for the engine: the test above can fail."
    process = on_metal('serve_in_turn', shallow, 1, 'end')
    _, err = process.communicate(timeout=SLOW)
    assert process.returncode == 1 and 'MetalError: a Mac would have crashed: the autorelease pool of thread Thread-' in err


class DroppingRunner:
    "A runner whose device drops its last kernel from a poisoned prompt on."
    def __init__(self, runner):
        self.runner = runner

    def __getattr__(self, name): return getattr(self.runner, name)

    def __call__(self, batch):
        if any(seq.token_ids[0] == POISON for seq in batch.seqs):
            for graph in self.graphs.values():
                for program, *_ in graph.replay.graph.commands:
                    if program.name == 'publish':
                        program.max_total_threads = 1
        return self.runner(batch)


def serve_and_drop(folder):
    "`tinyvllm serve` with such a runner, until it ends by itself."
    from tinyvllm.server.app import ServerArgs
    from tinyvllm.server.run import run_server

    def make_engine(path):
        engine = load_engine(path, **SIZES)
        engine.core.runner = DroppingRunner(engine.core.runner)
        return engine
    sys.exit(run_server(folder, ServerArgs(port=0), make_engine))


@metal
def test_a_dropped_kernel_ends_all_requests_and_the_server(shallow):
    "Not one waits for ever, not one gets other tokens than its own, and the exit code is 1."
    with on_metal('serve_and_drop', shallow) as process, ThreadPoolExecutor(4) as pool:
        try:
            line = process.stderr.readline()
            log = pool.submit(process.stderr.read)    # a pipe that is full would hold the process up
            url = next(word for word in line.replace(',', ' ').split() if word.startswith('http://'))
            eventually(lambda: ask(url, [3, 1, 4])[0] == 200, seconds=SLOW)
            good = ask(url, [3, 1, 4])
            replies = list(pool.map(partial(ask, url), ([POISON], [3, 1, 4], [3, 1, 4])))
            assert process.wait(PATIENCE) == 1
        finally:
            process.kill()
    err = log.result()
    (status, _), *others = replies
    assert status == 500 and all(other[0] in (500, 503) or other == good for other in others)
    assert 'has ended and left no tokens: the device has dropped a kernel' in err and 'the engine has died' in err
