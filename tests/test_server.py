"The server as its clients meet it: a port of this machine, bytes in, bytes out."
import asyncio
import http.client
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip('fastapi')
pytest.importorskip('uvicorn')

from support.engines import eventually  # noqa: E402
from tinyvllm import LLM  # noqa: E402
from tinyvllm.cli.main import main  # noqa: E402
from tinyvllm.server.app import AppState, ServerArgs  # noqa: E402
from tinyvllm.server.run import Server, get_url, listen, serve_in_background  # noqa: E402

PATIENCE = 60    # seconds for anything: these tests are about what happens, not how fast
GREEDY = dict(temperature=0, ignore_eos=True)


class Gate:
    "A runner that can be held, and that fails for prompts which begin with a poisoned token."
    poison = 13

    def __init__(self, runner):
        self.runner, self.open = runner, threading.Event()
        self.open.set()

    def __getattr__(self, name): return getattr(self.runner, name)

    def __call__(self, batch):
        assert self.open.wait(PATIENCE)
        tokens = self.runner(batch)
        return [ZeroDivisionError('secret 0xdeadbeef /tmp/secret') if seq.token_ids[0] == self.poison else new
                for seq, new in zip(batch.seqs, tokens)]


@contextmanager
def held(gate):
    "No step ends while the block runs."
    gate.open.clear()
    try: yield
    finally: gate.open.set()


@pytest.fixture(scope='module')
def engine(folder):
    engine = LLM(folder, num_blocks=64, num_scheduler_steps=1).engine
    engine.core.runner = Gate(engine.core.runner)
    return engine


@pytest.fixture(scope='module')
def gate(engine): return engine.core.runner


@pytest.fixture(scope='module')
def server(engine):
    with serve_in_background(engine, ping=0.2) as server: yield server


def connect(server):
    host, port = server.url.removeprefix('http://').split(':')
    return http.client.HTTPConnection(host, int(port), timeout=PATIENCE)


def ask(server, path, body=None, method=None, **headers):
    "Status, headers, parsed JSON."
    connection = connect(server)
    headers = {k.replace('_', '-'): v for k, v in headers.items()}
    if body is not None: headers.setdefault('Content-Type', 'application/json')
    raw = body if isinstance(body, (bytes, type(None))) else json.dumps(body)
    connection.request(method or ('GET' if body is None else 'POST'), path, raw, headers)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, response.headers, json.loads(text) if text[:1] in (b'{', b'[') else text


def begin(server, path, body):
    "A connection whose request has been sent, nothing read."
    connection = connect(server)
    connection.request('POST', path, json.dumps(body), {'Content-Type': 'application/json'})
    return connection


def begin_get(server, path):
    connection = connect(server)
    connection.request('GET', path)
    return connection.getresponse()


def chunks(response):
    "The events of a stream; the last is `[DONE]`."
    lines = [line[6:].strip() for line in response if line.startswith(b'data: ')]
    assert lines[-1] == b'[DONE]'
    return [json.loads(line) for line in lines[:-1]]


def stream(server, path, body): return chunks(begin(server, path, body | dict(stream=True)).getresponse())


def idle(server, engine):
    "No request waits or runs, and all blocks are free."
    scheduler, queue = engine.scheduler, server.state.queue
    return not scheduler.sequences and scheduler.blocks.num_free == 63 and (queue.num_open, queue.num_waiting) == (0, 0)


def error(reply, status):
    "The error of a reply in OpenAI's shape."
    assert reply[0] == status and set(reply[2]) == {'error'}
    assert set(reply[2]['error']) == {'message', 'type', 'param', 'code'}
    return reply[2]['error']


REQUESTS = [dict(prompt='abc', max_tokens=24, temperature=0), dict(prompt=['ab', 'xyz'], max_tokens=12, n=2, seed=7),
            dict(prompt=[[5, 6], [7]], max_tokens=8, temperature=0, logprobs=2),
            dict(prompt='q', max_tokens=30, seed=3, stop=['a', 'the', '\x01']), dict(prompt='abc', max_tokens=0)]


@pytest.mark.parametrize('body', REQUESTS, ids=str)
def test_a_stream_joins_to_the_plain_reply(server, body):
    plain = ask(server, '/v1/completions', body)[2]
    parts = stream(server, '/v1/completions', body | dict(stream_options={'include_usage': True}))
    texts, ends = {}, {}
    for choice in (c for part in parts for c in part['choices']):
        texts[choice['index']] = texts.get(choice['index'], '') + choice['text']
        ends[choice['index']] = choice['finish_reason'] or ends.get(choice['index'])
    assert texts == {c['index']: c['text'] for c in plain['choices']}
    assert ends == {c['index']: c['finish_reason'] for c in plain['choices']}
    assert parts[-1]['usage'] == plain['usage'] and parts[-1]['choices'] == []


def test_the_answer_is_the_engines(server, engine):
    ids = [11, 42, 7]
    reply = ask(server, '/v1/completions', dict(prompt=ids, max_tokens=9, return_token_ids=True, **GREEDY))[2]
    reference = LLM.__new__(LLM)
    reference.engine = engine
    chat = ask(server, '/v1/chat/completions', dict(messages=[{'role': 'user', 'content': 'hi'}], max_tokens=5))[2]
    assert len(reply['choices'][0]['token_ids']) == 9 == reply['usage']['completion_tokens']
    assert reply['usage']['prompt_tokens'] == 3 and chat['usage']['completion_tokens'] <= 5
    assert chat['choices'][0]['message']['role'] == 'assistant' and chat['object'] == 'chat.completion'


def test_characters_are_never_split_and_stops_are_found_across_chunks(server):
    pytest.importorskip('llguidance')
    text = 'na\u00efve \U0001f469\u200d\U0001f680 text'    # a token is a byte: an astronaut is eleven of them
    body = dict(prompt='a', max_tokens=60, structured_outputs=dict(choice=[text]))
    for stop, received in ((None, text), ('ve \U0001f469', text[:3]), ('\U0001f680', text[:8]), ('\u00ef', 'na'), ('nowhere', text)):
        asked = body | (dict(stop=[stop]) if stop else {})
        parts = [c['text'] for part in stream(server, '/v1/completions', asked) for c in part['choices']]
        assert ''.join(parts) == received == ask(server, '/v1/completions', asked)[2]['choices'][0]['text']
        assert not any('\ufffd' in part for part in parts)


def test_the_metrics_are_the_sum_of_the_usage(engine):
    with serve_in_background(engine) as server:
        bodies = [dict(prompt=[[n] * n, [n]], max_tokens=n, n=2, **GREEDY) for n in range(1, 7)]
        usages = [ask(server, '/v1/completions', body)[2]['usage'] for body in bodies]
        refused = [ask(server, '/v1/completions', dict(prompt=''))[0] for _ in range(3)]
        line = begin_get(server, '/stats').readline()
        reported = json.loads(line.removeprefix(b'data: '))
        assert reported['generation_tokens'] == sum(u['completion_tokens'] for u in usages)
        assert reported['prompt_tokens'] == sum(u['prompt_tokens'] for u in usages)
        assert refused == [400] * 3 and reported['rejected']['invalid'] == 3
        text = ask(server, '/metrics')[2].decode()
        assert f"tinyvllm:generation_tokens_total{{model_name=\"model\"}} {reported['generation_tokens']:.1f}" in text
        assert 'cmpl' not in text


def test_many_at_once_get_the_same_answers_as_alone(server):
    bodies = [dict(prompt=[n, n + 1], max_tokens=6, **GREEDY) for n in range(20, 32)]
    alone = [ask(server, '/v1/completions', body)[2]['choices'] for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = pool.map(lambda body: ask(server, '/v1/completions', body)[2]['choices'], bodies)
    assert list(together) == alone


def test_the_small_routes(server):
    assert ask(server, '/health')[2] == {'status': 'ok'} and 'version' in ask(server, '/version')[2]
    listed = ask(server, '/v1/models')[2]['data']
    assert [m['id'] for m in listed] == ['model'] and listed[0]['max_model_len'] == 256
    assert ask(server, '/v1/models/model')[2]['id'] == 'model'
    assert error(ask(server, '/v1/models/other/one'), 404)['code'] == 'model_not_found'
    ids = ask(server, '/tokenize', dict(prompt='héllo'))[2]
    assert ids['count'] == len(ids['tokens'])
    assert ask(server, '/detokenize', dict(tokens=ids['tokens']))[2]['prompt'] == 'héllo'
    assert ask(server, '/tokenizer_info')[2]['vocab_size'] == 512
    assert len(ask(server, '/generate', dict(prompt='abc', max_tokens=3, n=2))[2]['text']) == 2
    assert error(ask(server, '/nowhere'), 404)['type'] == 'not_found_error'
    reply = ask(server, '/v1/completions')
    assert error(reply, 405) and reply[1]['Allow'] == 'POST'


def test_every_reply_has_an_id_and_safe_headers(server):
    for reply in (ask(server, '/health', X_Request_Id='mine-1.2'), ask(server, '/nowhere', X_Request_Id='mine-1.2')):
        assert reply[1]['X-Request-Id'] == 'mine-1.2' and reply[1]['X-Content-Type-Options'] == 'nosniff'
        assert reply[1]['Access-Control-Allow-Origin'] is None and reply[1]['Server'] is None
    for bad in ('a b', 'x' * 65, '../x', ''):
        assert ask(server, '/health', X_Request_Id=bad)[1]['X-Request-Id'] != bad
    body = dict(prompt='a', max_tokens=1)
    assert ask(server, '/v1/completions', body, X_Request_Id='abc')[2]['id'] == 'cmpl-abc'


# --- clients that leave ---

def test_a_client_that_hangs_up_frees_its_blocks(server, engine, gate):
    long = dict(prompt='abc', max_tokens=200, **GREEDY)
    for body in (long, long | dict(stream=True), long | dict(n=3, prompt=['a', 'b'])):
        with held(gate):
            connection = begin(server, '/v1/completions', body)
            eventually(lambda: engine.scheduler.sequences)
            connection.close()
            eventually(lambda: not server.state.queue.num_open)
        eventually(lambda: idle(server, engine))


def test_a_stream_that_hangs_up_in_the_middle(server, engine, gate):
    connection = begin(server, '/v1/completions', dict(prompt=[70], max_tokens=250, stream=True, **GREEDY))
    response = connection.getresponse()
    assert response.readline().startswith(b'data: ')
    with held(gate):
        response.close()
        connection.close()
        eventually(lambda: not server.state.queue.num_open)
    eventually(lambda: idle(server, engine))


def test_connect_and_drop(server, engine):
    body = json.dumps(dict(prompt='abc', max_tokens=50, stream=True)).encode()
    head = b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n'
    whole = head % len(body) + body
    host, port = server.url.removeprefix('http://').split(':')
    for i in range(60):
        with socket.create_connection((host, int(port))) as s: s.sendall(whole[:len(whole) * (i % 7) // 6])
    eventually(lambda: idle(server, engine))
    assert ask(server, '/health')[0] == 200


def test_a_slow_reader_delays_no_other_and_loses_nothing(server, engine):
    body = dict(prompt=[[70]] * 8, n=4, max_tokens=40, stream=True, logprobs=5, **GREEDY)
    host, port = server.url.removeprefix('http://').split(':')
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)    # the system buffers little for it
    slow.connect((host, int(port)))
    raw = json.dumps(body).encode()
    slow.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n'
                 b'Content-Length: %d\r\n\r\n' % len(raw) + raw)
    eventually(lambda: server.state.queue.num_open)
    assert ask(server, '/v1/completions', dict(prompt='abc', max_tokens=30, **GREEDY))[0] == 200
    eventually(lambda: not engine.scheduler.sequences)    # nothing was read, all has been computed
    slow.settimeout(PATIENCE)
    data = b''
    while piece := slow.recv(65536): data += piece
    slow.close()
    received = {}
    for line in data.split(b'\n'):
        if b'data: {' not in line: continue
        for choice in json.loads(line[line.index(b'{'):])['choices']:
            received.setdefault(choice['index'], []).extend(choice['logprobs']['tokens'] if choice['logprobs'] else [])
    assert len(received) == 32 and all(len(tokens) == 40 for tokens in received.values())
    eventually(lambda: idle(server, engine))


# --- clients that must wait ---

def test_overload_refuses_exactly_the_surplus(engine, gate):
    with serve_in_background(engine, max_queue=4) as server:
        body = dict(prompt=[9, 9], max_tokens=4, return_token_ids=True, **GREEDY)
        with held(gate), ThreadPoolExecutor(40) as pool:
            asked = [pool.submit(ask, server, '/v1/completions', body) for _ in range(40)]
            eventually(lambda: sum(a.done() for a in asked) == 36)
            start = time.process_time()
            assert ask(server, '/health')[0] == 200 and time.process_time() - start < 5
            gate.open.set()
            replies = [a.result() for a in asked]
        refused = [r for r in replies if r[0] == 429]
        served = [r[2]['choices'][0]['token_ids'] for r in replies if r[0] == 200]
        assert len(refused) == 36 and len(served) == 4 and all(len(s) == 4 and s == served[0] for s in served)
        for reply in refused:
            assert int(reply[1]['Retry-After']) >= 1 and error(reply, 429)['type'] == 'rate_limit_error'
        assert error(ask(server, '/v1/completions', body | dict(prompt=['a'] * 5)), 429)
        assert ask(server, '/v1/completions', body | dict(prompt=['a'] * 4))[0] == 200
        assert idle(server, engine)


def test_a_pool_that_is_too_small_preempts_and_loses_nothing(folder):
    bodies = [dict(prompt=[n] * 5, max_tokens=20, return_token_ids=True, **GREEDY) for n in range(30, 38)]
    answers = []
    for blocks in (200, 4):
        engine = LLM(folder, num_blocks=blocks, max_model_len=None if blocks > 4 else 48, block_size=16).engine
        with serve_in_background(engine) as server, ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda body: ask(server, '/v1/completions', body)[2], bodies))
            answers.append([r['choices'][0]['token_ids'] for r in replies])
            wrong = ask(server, '/v1/completions', dict(prompt=[1] * 300, max_tokens=5))
            assert error(wrong, 400)['code'] == 'context_length_exceeded'
        assert engine.scheduler.blocks.num_free == blocks - 1
    assert answers[0] == answers[1] and engine.scheduler.preemptions > 0


def test_deadlines_end_requests_and_free_their_blocks(engine, gate):
    body = dict(prompt='abc', max_tokens=100, **GREEDY)
    with serve_in_background(engine, queue_timeout=0.1) as server, held(gate):
        reply = ask(server, '/v1/completions', body)
        assert error(reply, 503)['type'] == 'unavailable_error' and int(reply[1]['Retry-After']) >= 1
        assert error(ask(server, '/v1/completions', body | dict(stream=True)), 503)    # not begun: a plain error
        gate.open.set()
        eventually(lambda: idle(server, engine))
    with serve_in_background(engine, request_timeout=0.1) as server, held(gate):
        assert stream(server, '/v1/completions', body)[-1]['error']['type'] == 'timeout_error'
        assert error(ask(server, '/v1/completions', body), 408)['type'] == 'timeout_error'
        gate.open.set()
        eventually(lambda: idle(server, engine))


def test_a_silent_stream_sends_comments(server, engine, gate):
    with held(gate):
        response = begin(server, '/v1/completions', dict(prompt='abc', max_tokens=2, stream=True)).getresponse()
        assert response.readline() == b': ping\n' and response.readline() == b'\n'
    assert chunks(response)
    eventually(lambda: idle(server, engine))


def test_a_bad_day_in_short(folder):
    "The benchmark's streams, droppers, crawlers and bursts, for seconds; its exact checks."
    from importlib.util import module_from_spec, spec_from_file_location
    path = Path(__file__).parents[1] / 'benchmarks/serve_load.py'
    if not path.exists(): pytest.skip('no benchmarks beside the tests')
    sys.path.insert(0, str(path.parent))
    spec = spec_from_file_location('serve_load', path)
    module = sys.modules['serve_load'] = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(path.parent))
    engine = LLM(folder, num_blocks=40, max_num_seqs=16).engine
    with serve_in_background(engine, max_queue=12) as server:
        port = int(server.url.rsplit(':', 1)[1])
        day = module.Day(port, seconds=3, streams=16, droppers=4, slow=2, queue=12, burst_every=1, longest=24)
        row = asyncio.run(module.live(day))
        eventually(lambda: not server.state.queue.num_open)
    exact = 'answers_exact', 'blocks_free', 'nobody_left', 'refused'
    assert all(row['checks'][name] for name in exact), row
    assert row['finished'] > 10 and row['dropped'] > 4 and row['slow_bytes'] > 0


# --- what goes wrong ---

def test_a_poisoned_request_fails_alone(server, engine, caplog):
    good, bad = dict(prompt=[5, 6], max_tokens=12, **GREEDY), dict(prompt=[Gate.poison], max_tokens=12)
    alone = ask(server, '/v1/completions', good)[2]['choices']
    with ThreadPoolExecutor(6) as pool, caplog.at_level(logging.INFO):
        replies = list(pool.map(lambda body: ask(server, '/v1/completions', body), [good, bad] * 3))
        parts = stream(server, '/v1/completions', bad)
    for reply in replies[1::2]:
        assert error(reply, 500)['type'] == 'server_error'
        assert not any(word in reply[2]['error']['message'] for word in ('0x', '/tmp', 'Zero', 'secret'))
    assert all(reply[2]['choices'] == alone for reply in replies[0::2])
    assert parts[-1]['error']['type'] == 'server_error'
    assert 'ZeroDivisionError' in caplog.text and 'secret' not in caplog.text
    eventually(lambda: idle(server, engine))


def test_a_dead_engine_ends_the_server(folder):
    engine = LLM(folder, num_blocks=16).engine
    with pytest.raises(RuntimeError, match='died'), serve_in_background(engine) as server:
        server.state.engine.engine.core.step = lambda: [None]    # what no step returns
        assert error(ask(server, '/v1/completions', dict(prompt='abc', max_tokens=5)), 500)
        eventually(lambda: server.should_exit)


def test_neither_prompts_nor_keys_are_logged(engine, caplog):
    with caplog.at_level(logging.DEBUG), serve_in_background(engine, api_keys=('key-of-mine',)) as server:
        for body in (dict(prompt='my secret', max_tokens=1), dict(prompt='my secret', n=99), dict(my_secret='my secret')):
            ask(server, '/v1/completions?q=my+secret', body, Authorization='Bearer key-of-mine')
        ask(server, '/v1/my%0Asecret%1b', Authorization='Bearer my-secret-try')
    assert '/v1/completions' in caplog.text
    assert not any(word in caplog.text for word in ('my secret', 'my+secret', 'key-of-mine', 'secret-try', 'my\nsecret'))


# --- from loading to the end ---

def test_a_server_that_loads_answers_503(engine):
    loaded = threading.Event()
    def load(state):
        assert loaded.wait(PATIENCE)
        state.start(engine)
    state, sock = AppState(ServerArgs(port=0)), listen('127.0.0.1', 0)
    server = Server(state, load, get_url(sock))
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    for path, body in (('/health', None), ('/v1/models', None), ('/v1/completions', dict(prompt='a'))):
        reply = ask(server, path, body)
        assert error(reply, 503)['message'] == 'the model is loading' and reply[1]['Retry-After']
    loaded.set()
    eventually(lambda: not state.closed_reason)
    assert ask(server, '/health')[0] == 200
    server.handle_exit(signal.SIGTERM, None)
    thread.join(PATIENCE)
    assert not thread.is_alive() and server.error is None


def test_draining_finishes_what_is_on_its_way(engine, gate):
    with serve_in_background(engine) as server:
        with held(gate):
            connection = begin(server, '/v1/completions', dict(prompt=[70], max_tokens=9, stream=True, **GREEDY))
            eventually(lambda: engine.scheduler.sequences)
            server.handle_exit(signal.SIGTERM, None)
            assert error(ask(server, '/v1/completions', dict(prompt='a')), 503)
            assert error(ask(server, '/health'), 503)
        parts = chunks(connection.getresponse())
        assert parts[-1]['choices'][0]['finish_reason'] == 'length'


def test_a_second_signal_ends_streams_with_an_error(engine, gate):
    with serve_in_background(engine) as server:
        gate.open.clear()
        connection = begin(server, '/v1/completions', dict(prompt=[70], max_tokens=9, stream=True, **GREEDY))
        eventually(lambda: engine.scheduler.sequences)
        server.handle_exit(signal.SIGTERM, None)
        server.handle_exit(signal.SIGTERM, None)
        eventually(lambda: server.should_exit)
        gate.open.set()
        assert chunks(connection.getresponse())[-1]['error']['type'] == 'unavailable_error'


def test_origins_are_closed_until_named(engine):
    origin = 'https://page.example'
    with serve_in_background(engine, allowed_origins=(origin,), api_keys=('k',)) as server:
        asked = dict(Origin=origin, Access_Control_Request_Method='POST')
        assert ask(server, '/v1/models', method='OPTIONS', **asked)[1]['Access-Control-Allow-Origin'] == origin
        asked['Origin'] = 'https://other.example'
        assert ask(server, '/v1/models', method='OPTIONS', **asked)[1]['Access-Control-Allow-Origin'] is None


# --- the command ---

def test_serve_as_a_process(folder, tmp_path):
    (tmp_path / 'keys').write_text('# mine\nabc  # the first\n\n')
    command = [sys.executable, '-m', 'tinyvllm', 'serve', '--model', str(folder), '--port', '0', '--num-blocks', '32',
               '--api-key-file', str(tmp_path / 'keys'), '--no-warmup', '--served-model-name', 'tiny', 'tiny:2']
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        server = type('', (), {'url': next(w for w in line.replace(',', ' ').split() if w.startswith('http://'))})
        eventually(lambda: ask(server, '/health')[0] == 200)
        assert ask(server, '/v1/models')[0] == 401
        reply = ask(server, '/v1/models', Authorization='Bearer abc')
        assert [m['id'] for m in reply[2]['data']] == ['tiny', 'tiny:2']
        received = ask(server, '/v1/completions', dict(prompt='a', max_tokens=1, model='tiny:2'), Authorization='Bearer abc')
        assert re.fullmatch(r'[0-9.]+-[0-9a-f]{8}', received[2]['system_fingerprint'])
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0 and 'Traceback' not in process.stderr.read()
    finally:
        process.kill()
        process.stderr.close()


def run(capsys, *args):
    try: code = main(['serve', *map(str, args)])
    except SystemExit as stop: code = stop.code
    return code, capsys.readouterr().err


def test_bad_input_is_one_line_and_exit_2(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / 'empty').write_text('\n# nothing\n')
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        cases = [(('--port', port), 'in use'), (('--port', 70000), 'port'), (('--port', 'x'), 'port'),
                 (('--host', 'no.such.host.invalid'), 'no.such.host'), (('--dance',), '--dance'),
                 (('--api-key-file', tmp_path / 'none'), 'none'), (('--api-key-file', tmp_path / 'empty'), 'no key'),
                 (('--api-key', 'a b'), 'key'), (('--max-queue', 0), 'max_queue'), (('--queue-timeout', -1), 'queue_timeout'),
                 (('--max-num-seqs', 0), 'max_num_seqs'), (('--shutdown-timeout', 'nan'), 'shutdown_timeout'),
                 (('--port', 0, '--model', tmp_path / 'nowhere'), 'nowhere'),
                 (('--port', 0, '--model', folder, '--max-model-len', 10**6), 'max_model_len'),
                 (('--port', 0, '--model', folder, '--num-blocks', 10**12), 'blocks')]
        for args, words in cases:
            code, err = run(capsys, *args)
            lines = [line for line in err.splitlines() if 'loading' not in line]
            assert code == 2 and len(lines) == 1 and words in lines[0] and 'Traceback' not in err, (args, err)
    monkeypatch.setitem(sys.modules, 'fastapi', None)
    for name in [n for n in sys.modules if n.startswith('tinyvllm.server.')]: monkeypatch.delitem(sys.modules, name)
    code, err = run(capsys)
    assert code == 2 and "pip install 'tinyvllm[serve]'" in err and err.count('\n') == 1
