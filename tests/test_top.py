"`tinyvllm top` before servers that are well, slow, rude and absent."
import json
import threading
from argparse import Namespace
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tinyvllm.cli import top as module
from tinyvllm.cli.main import main, parser
from tinyvllm.errors import BadInput
from tinyvllm.cli.top import NUMBERS, line, picture, top

SNAPSHOT = dict(tok_s=123.4, prompt_tok_s=0.0, running=8, waiting=2, kv_usage=0.25, num_blocks=2047, free_blocks=1535,
                fragmentation=0.043, preemptions=3, requests=1234, ended=dict(stop=1200, length=30, abort=0, error=1),
                rejected=dict(queue_full=5, other=0), prompt_tokens=9, generation_tokens=9, ttft_s=dict(p50=0.31, p99=1.7),
                gap_s=dict(p50=0.0071, p99=0.0123), steps=9, memory_bytes=1.5e9, uptime_s=7260,
                step_us=dict(schedule=12, launch=95, wait=6100, update=77.4))


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv('TINYVLLM_API_KEY', raising=False)


class Answers(BaseHTTPRequestHandler):
    "Plays a list of (status, headers, body), one for each request; notes what it was asked."
    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get('Authorization')))
        status, headers, body = self.server.script[min(len(self.server.asked), len(self.server.script)) - 1]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serve_in_background(*script):
    server = ThreadingHTTPServer(('127.0.0.1', 0), Answers)
    server.script, server.asked = script, []
    server.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def events(*snapshots) -> tuple:
    body = b': ping\n\n'.join(b'data: ' + json.dumps(s).encode() + b'\n\n' for s in snapshots)
    return 200, {'Content-Type': 'text/event-stream'}, body


def look(url, count=None, as_json=False, key=None) -> int:
    return top(Namespace(url=url, api_key_file=key, count=count, json=as_json))


def test_lines_where_there_is_no_terminal(capsys):
    with serve_in_background(events(SNAPSHOT, SNAPSHOT | dict(tok_s=0))) as server:
        assert look(server.url + '/') == 0
    assert capsys.readouterr().out.splitlines() == [
        '   123.4 tok/s  prompts      0.0 tok/s  running    8  waiting    2  blocks  25.0%',
        '     0.0 tok/s  prompts      0.0 tok/s  running    8  waiting    2  blocks  25.0%']
    assert server.asked == [('/stats', None)]


def test_json_and_count(capsys):
    with serve_in_background(events(*[SNAPSHOT] * 5)) as server:
        assert look(server.url, count=2, as_json=True) == 0
    assert [json.loads(s) for s in capsys.readouterr().out.splitlines()] == [SNAPSHOT] * 2


def test_the_picture(capsys, monkeypatch):
    monkeypatch.setattr('sys.stdout.isatty', lambda: True, raising=False)
    with serve_in_background(events(SNAPSHOT)) as server:
        look(server.url)
    out = capsys.readouterr().out
    assert out.startswith('\x1b[H\x1b[2J') and out.removeprefix('\x1b[H\x1b[2J') == picture(SNAPSHOT) + '\n'
    assert picture(SNAPSHOT) == '''\
speed     123.4 tok/s answered, 0.0 tok/s of prompts read
requests  8 running, 2 waiting, 1,234 ever
          1,200 stop, 30 length, 1 error
          turned away: 5 queue_full
blocks    [##########..............................] 25.0% of 2,047
          4.3% of their slots empty, 3 preemptions
waits     first token 310 ms (99 %: 1.7 s), next token 7.1 ms (99 %: 12 ms)
step      schedule 12 µs, launch 95 µs, wait 6,100 µs, update 77 µs
memory    1.50 GB, up 121 min'''


def test_before_the_first_request():
    young = SNAPSHOT | dict(ttft_s=dict(p50=None, p99=None), gap_s=None, ended={}, rejected=None, step_us='x', kv_usage=1.5)
    assert 'first token -, next token -' in picture(young) and 'step      -' in picture(young)
    assert picture({name: 0 for name in NUMBERS}) and line(young)


@pytest.mark.parametrize('where', ['file', 'environment'])
def test_the_key(where, tmp_path, monkeypatch):
    (file := tmp_path / 'key').write_text('secret\nmore\n')
    if where == 'environment':
        monkeypatch.setenv('TINYVLLM_API_KEY', 'secret')
    with serve_in_background(events(SNAPSHOT)) as server:
        look(server.url, key=file if where == 'file' else None)
    assert server.asked == [('/stats', 'Bearer secret')]


def test_no_other_host_gets_the_key(tmp_path):
    (file := tmp_path / 'key').write_text('secret')
    with serve_in_background(events(SNAPSHOT)) as other, serve_in_background((302, {'Location': other.url + '/stats'}, b'')) as server:
        with pytest.raises(BadInput, match='answers 302'):
            look(server.url, key=file)
    assert other.asked == []


@pytest.mark.parametrize('content, words', [(None, 'cannot read the key'), (b'\n', 'is no key'), (b'\xff', 'not UTF-8'),
                                            ('schlüssel'.encode(), 'is no key'), (b'a\x1bb', 'is no key')])
def test_bad_keys(content, words, tmp_path):
    if content is not None:
        (tmp_path / 'key').write_bytes(content)
    with pytest.raises(BadInput, match=words):
        look(module.URL, key=tmp_path / 'key')


def test_it_waits_for_a_server_that_loads(capsys, monkeypatch):
    monkeypatch.setattr(module.time, 'sleep', lambda _: None)
    error = json.dumps({'error': {'message': 'loading \x1b[31mthe model'}}).encode()
    with serve_in_background((503, {}, error), (503, {}, b'nonsense'), events(SNAPSHOT)) as server:
        assert look(server.url) == 0
    said = capsys.readouterr()
    assert said.err == 'loading  [31mthe model\nthe server is not ready\n' and '123.4 tok/s' in said.out


@pytest.mark.parametrize('answer, words', [
    ((401, {}, b''), '--api-key-file'), ((404, {}, b''), 'answers 404'), ((500, {}, b''), 'answers 500'),
    ((200, {}, b'data: {}\n\n'), 'does not answer'), ((200, {}, b'data: [1]\n\n'), 'does not answer'),
    ((200, {}, b'data: nonsense\n\n'), 'does not answer'), ((200, {}, b'data: \xff\n\n'), 'does not answer'),
    ((200, {'Content-Length': '999'}, b'data: {'), 'does not answer|stopped sending'),
    (events(SNAPSHOT | dict(tok_s='\x1b[31m')), 'does not answer'), (events(SNAPSHOT | dict(kv_usage=float('nan'))), 'does not answer'),
])
def test_rude_servers(answer, words):
    with serve_in_background(answer) as server, pytest.raises(BadInput, match=words) as error:
        look(server.url)
    assert '\n' not in str(error.value) and '\x1b' not in str(error.value)


@pytest.mark.parametrize('url', ['file:///etc/passwd', 'localhost', '', 'http://', 'ftp://a', 'http://a:b/', 'http://127.0.0.1:1'])
def test_no_server(url):
    with pytest.raises(BadInput) as error:
        look(url)
    assert '\n' not in str(error.value)


def test_a_silent_server(monkeypatch):
    monkeypatch.setattr(module, 'TIMEOUT', 0.2)
    import socket
    with socket.create_server(('127.0.0.1', 0)) as deaf, pytest.raises(BadInput, match='timed out'):
        look(f'http://127.0.0.1:{deaf.getsockname()[1]}')


def test_ctrl_c(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(module, 'connect', interrupted)
    assert look(module.URL) == 0


def test_the_command(capsys):
    args = parser().parse_args(['top'])
    assert args.url == module.URL and args.count is None
    assert main(['top', 'http://127.0.0.1:1', '--count', '1']) == 2
    assert 'no server at' in capsys.readouterr().err
    assert main(['top', '--count', '0']) == 2
    assert 'use 1 or more' in capsys.readouterr().err


def test_a_real_server(folder, tmp_path, capsys):
    "Counted by `metrics`, told by `server`, shown here."
    pytest.importorskip('fastapi')
    import urllib.request

    from test_batchfile import runner
    from tinyvllm.core.blocks import BlockManager
    from tinyvllm.engine.llm import LLMEngine
    from tinyvllm.engine.core import EngineCore
    from tinyvllm.models.llama import model_config
    from tinyvllm.core.scheduler import Scheduler
    from tinyvllm.server.run import serve_in_background
    from tinyvllm.models.tokenizer_files import load_tokenizer
    from tinyvllm.models.weights import tiny_checkpoint
    engine = LLMEngine(EngineCore(Scheduler(BlockManager(40), 8, 64), runner), model_config(tiny_checkpoint(seed=0)[0]),
                       load_tokenizer(folder))
    (file := tmp_path / 'key').write_text('k')
    with serve_in_background(engine, api_keys=('k',)) as server:
        def ask(path, body=None):
            headers = {'Authorization': 'Bearer k', 'Content-Type': 'application/json'}
            with urllib.request.urlopen(urllib.request.Request(server.url + path, body, headers), timeout=30) as reply:
                return reply.read()
        usage = [json.loads(ask('/v1/completions', json.dumps({'prompt': 'abc' * n, 'max_tokens': n}).encode()))['usage']
                 for n in (1, 2, 3)]
        assert look(server.url, count=1, as_json=True, key=file) == 0
        stats, page = json.loads(capsys.readouterr().out), ask('/metrics').decode()
        with pytest.raises(BadInput, match='needs a key'):
            look(server.url)
    assert stats['requests'] == 3 and stats['num_blocks'] == stats['free_blocks'] == 39
    for ours, theirs in (('prompt_tokens', 'prompt_tokens'), ('generation_tokens', 'completion_tokens')):
        total = sum(u[theirs] for u in usage)
        assert stats[ours] == total
        assert any(s.startswith(f'tinyvllm:{ours}_total{{') and float(s.split()[-1]) == total for s in page.splitlines())
