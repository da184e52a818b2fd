"""Every advisory that other servers had to publish, and every poison of the list, against this one.

Names in comments are the advisory's; what is asserted is our rule. A reply to poison is 4xx in OpenAI's shape, the
server answers `/health` afterwards, and no block is lost.
"""
import http.client
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip('fastapi')
pytest.importorskip('uvicorn')

from support.engines import eventually  # noqa: E402
import tinyvllm  # noqa: E402
from tinyvllm import LLM, BadInput  # noqa: E402
from tinyvllm.server.app import AppState, ServerArgs, make_app, router  # noqa: E402
from tinyvllm.server.info import info_router  # noqa: E402
from tinyvllm.server.middleware import OPEN_PATHS, ApiKeys  # noqa: E402
from tinyvllm.server.parameters import Limits  # noqa: E402
from tinyvllm.server.run import serve_in_background  # noqa: E402
from tinyvllm.models.chat_template import render_chat

PATIENCE = 60
CHAT, COMPLETE = '/v1/chat/completions', '/v1/completions'
HELLO = [{'role': 'user', 'content': 'hello'}]


@pytest.fixture(scope='module')
def engine(folder): return LLM(folder, num_blocks=64).engine


@pytest.fixture(scope='module')
def server(engine):
    with serve_in_background(engine, body_timeout=4) as server: yield server


def port(server): return int(server.url.rsplit(':', 1)[1])


def ask(server, path, body=None, method=None, **headers):
    "Status, headers, parsed JSON or text. `body`: bytes, or what is written as JSON."
    connection = http.client.HTTPConnection('127.0.0.1', port(server), timeout=PATIENCE)
    raw = body if isinstance(body, (bytes, type(None))) else json.dumps(body)
    headers = {'Content-Type': 'application/json'} | {k.replace('_', '-'): v for k, v in headers.items()}
    connection.request(method or ('GET' if body is None else 'POST'), path, raw, headers)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, response.headers, json.loads(text) if text[:1] in (b'{', b'[') else text


def refused(server, path, body, statuses=(400,), **headers):
    "The error of a reply, whose shape and size are checked."
    status, headers, reply = ask(server, path, body, **headers)
    assert status in statuses, (status, reply)
    assert set(reply) == {'error'} and set(reply['error']) == {'message', 'type', 'param', 'code'}
    text = json.dumps(reply)
    assert len(text) < 4000 and text.isascii()
    assert not re.search(r'0x[0-9a-f]{4}|/tmp|/root|/home|Traceback|site-packages|\.py\b', text), text
    return reply['error']


def healthy(server): return ask(server, '/health')[0] == 200


def free(engine, n=63):
    "Wait until no request is left and `n` blocks are free."
    eventually(lambda: engine.scheduler.blocks.num_free == n and not engine.scheduler.sequences)
    return True


# --- templates: CVE-2024-34359, CVE-2026-5760, CVE-2025-61620 ---

@pytest.mark.parametrize('template', [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__class__ }}", "{{ cycler.__init__.__globals__ }}",
    "{% for i in range(10**9) %}x{% endfor %}", "{{ 'A' * 200000000 }}", "{{ 'A'|center(2000000000) }}",
    "{% set ns = namespace(a='a') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}"])
def test_templates_are_sandboxed_and_bounded(template):
    start = time.process_time()
    with pytest.raises(BadInput): render_chat(template, HELLO)
    assert time.process_time() - start < 20


@pytest.mark.parametrize('field', ['chat_template', 'prompt_embeds', 'guided_json', 'use_beam_search'])
def test_a_request_brings_no_template_and_no_tensors(server, field):    # CVE-2025-61620, CVE-2025-62164
    assert refused(server, CHAT, dict(messages=HELLO, **{field: "{{ 'A'*200000000 }}"}))['param'] == field


@pytest.mark.parametrize('kwargs', [{'messages': 'x'}, {'x': "{{ ''.__class__ }}"}, {'add_generation_prompt': 10**400},
                                    {'a': {'b': [{}] * 50}}])
def test_template_arguments_are_data(server, kwargs):
    assert ask(server, CHAT, dict(messages=HELLO, max_tokens=1, chat_template_kwargs=kwargs))[0] in (200, 400)
    assert healthy(server)


def test_text_in_messages_is_never_a_template(server):
    text = "{{ 7*7 }}{% for x in y %}{{ ''.__class__ }}"
    ids = ask(server, '/tokenize', dict(messages=[{'role': 'user', 'content': text}]))[2]['tokens']
    assert text in ask(server, '/detokenize', dict(tokens=ids))[2]['prompt']


# --- numbers: CVE-2026-34756, GHSA-7h4p-rffg-7823, CVE-2026-21869 ---

WRONG_NUMBERS = ['NaN', 'Infinity', '-Infinity', '1e999', 'true', '"0.5"', '[]', '{}', '-1', '9' * 5000, '1e400']
NUMBERS = ['temperature', 'top_p', 'min_p', 'presence_penalty', 'frequency_penalty', 'repetition_penalty', 'n',
           'max_tokens', 'top_k', 'seed', 'logprobs', 'min_tokens']
NEGATIVE_IS_FINE = {'presence_penalty', 'frequency_penalty', 'seed', 'top_k'}


@pytest.mark.parametrize('name', NUMBERS)
def test_numbers_are_strict_finite_and_bounded(server, name):
    for value in WRONG_NUMBERS:
        if value == '-1' and name in NEGATIVE_IS_FINE: continue
        refused(server, COMPLETE, f'{{"prompt": "a", "max_tokens": 1, "{name}": {value}}}'.encode())


def test_a_million_answers_are_refused_at_once(server):    # CVE-2026-34756
    start = time.process_time()
    assert refused(server, COMPLETE, dict(prompt='a', n=10**6))['param'] == 'n'
    assert time.process_time() - start < 1 and healthy(server)
    refused(server, COMPLETE, dict(prompt='a', best_of=10**6))
    refused(server, COMPLETE, dict(prompt=['a'] * 65))


@pytest.mark.parametrize('id', [-1, 512, 2**31, 2**63, 2**64, -2**63, 1.5, True, '1', None])
def test_token_ids_are_of_the_vocabulary(server, id):
    refused(server, COMPLETE, dict(prompt=[1, id]))
    refused(server, COMPLETE, dict(prompt='a', stop_token_ids=[id]))
    refused(server, COMPLETE, dict(prompt='a', allowed_token_ids=[id]))
    refused(server, COMPLETE, dict(prompt='a', logit_bias={str(id): 1}) if id != '1' else dict(prompt='a', logit_bias={'x': 1}))
    refused(server, '/detokenize', dict(tokens=[id]))


@pytest.mark.parametrize('prompt', ['', [], [[]], [''], [[], [1]], [1, [2]], ['a', 1], {}, None, 7, [None], [{}]])
def test_prompts_without_tokens(server, prompt):    # vLLM 0.5.4's crash
    refused(server, COMPLETE, dict(prompt=prompt))


def test_a_blank_prompt_is_a_prompt(server):
    assert ask(server, COMPLETE, dict(prompt=[' '], max_tokens=1))[0] == 200


# --- sizes: GHSA-7rxv-5jhh-j6xx, CVE-2025-48956, the body, error amplification ---

def test_long_prompts_are_refused_quickly(server):
    start = time.process_time()
    assert refused(server, COMPLETE, dict(prompt='a' * 1_900_000))['code'] == 'context_length_exceeded'
    assert refused(server, COMPLETE, dict(prompt=[1] * 600_000))['code'] == 'context_length_exceeded'
    refused(server, CHAT, dict(messages=HELLO * 5000))
    assert time.process_time() - start < 30 and healthy(server)


def test_ten_megabytes_are_too_many(server):
    assert refused(server, COMPLETE, b'{"prompt": "' + b'a' * 10_000_000 + b'"}', (413,))


def send(server, data, wait=PATIENCE):
    "Bytes as they are; what comes back before the connection ends."
    with socket.create_connection(('127.0.0.1', port(server)), timeout=wait) as s:
        out = b''
        try:
            s.sendall(data)
            while piece := s.recv(65536): out += piece
        except (TimeoutError, ConnectionError): pass
        return out


HEAD = b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n'


@pytest.mark.parametrize('data, status', [
    (HEAD + b'Content-Length: 10000000000\r\n\r\n{', b'413'),
    (HEAD + b'Content-Length: -1\r\n\r\n', b'400'), (HEAD + b'Content-Length: x\r\n\r\n', b'400'),
    (HEAD + b'X: ' + b'a' * 200_000 + b'\r\n\r\n', b'400'),    # CVE-2025-48956
    (HEAD + b'Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}', b'400'), (b'\x16\x03\x01 hello TLS\r\n\r\n', b'400'),
    (HEAD + b'Transfer-Encoding: chunked\r\n\r\nzz\r\n', b'400'),
    (HEAD + b'Transfer-Encoding: chunked\r\n\r\n' + (b'fa000\r\n' + b'a' * 0xfa000 + b'\r\n') * 4 + b'0\r\n\r\n', b'413'),
    (HEAD + b'Content-Length: 9\r\n\r\n{"a"', b'408')], ids=lambda v: str(v)[-30:])
def test_broken_http(server, data, status):
    assert send(server, data).split(b' ')[1:2] == [status] and healthy(server)


def test_errors_do_not_amplify(server):
    refused(server, COMPLETE, dict(prompt=['a' * 10] * 60, stop=[1] * 900, logit_bias={str(-i): 'x' for i in range(1000)}))
    refused(server, COMPLETE, {f'field{i}' * 9: i for i in range(2000)})
    error = refused(server, CHAT, dict(messages=[{'role': 'nobody', 'content': {'secret': 'swordfish'}}] * 900))
    assert 'swordfish' not in json.dumps(error)


# --- text: lone surrogates, deep JSON, bodies that are none ---

BODIES = [b'', b'{', b'null', b'[]', b'"x"', b'7', b'\xff\xfe{}', b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}',
          b'{"prompt": "a", "stop": "\\udfff"}', b'{"\\ud800": 1}', b'{"prompt": "a", "user": "\\ud83d"}',
          b'{"model": "\\ud800", "prompt": "a"}', b'[' * 100_000, b'{"a":' * 100_000, b'{"prompt": ' + b'[' * 100_000,
          b'{"prompt": "a", "logit_bias": ' + b'{"1":' * 50_000, b'{"prompt": "a" "b"}', b'{"prompt": "a",}',
          b"{'prompt': 'a'}", b'{"prompt": ' + b'9' * 100_000 + b'}', b'prompt=a&n=1', b'\x00', b'{"prompt": "\x00"}']


@pytest.mark.parametrize('raw', BODIES, ids=lambda raw: str(raw[:30]))
def test_bodies_that_are_no_requests(server, raw):
    start = time.process_time()
    for path in (COMPLETE, CHAT, '/tokenize', '/generate', '/detokenize'): refused(server, path, raw)
    assert time.process_time() - start < 10 and healthy(server)


def test_a_web_page_cannot_post(server):    # a form or a `no-cors` fetch may send only these
    for kind in ('text/plain', 'application/x-www-form-urlencoded', 'multipart/form-data; boundary=x', ''):
        refused(server, COMPLETE, b'{"prompt": "a"}', (415,), Content_Type=kind)
    assert ask(server, COMPLETE, dict(prompt='a', max_tokens=1), Content_Type='application/json; charset=utf-8')[0] == 200


@pytest.mark.parametrize('name', ['../../etc/passwd', '/etc/passwd', 'http://127.0.0.1/x', 'a\x00b', 'x' * 200, '\ud83d\ude00',
                                  'C:\\model', '%2e%2e', "'; drop table", '{{7*7}}', 'model/'])
def test_what_a_client_names_is_never_loaded(server, name):
    for path, body in ((COMPLETE, dict(prompt='a')), (CHAT, dict(messages=HELLO)), ('/tokenize', dict(prompt='a'))):
        assert refused(server, path, body | dict(model=name), (404,))['code'] == 'model_not_found'
    quoted = ''.join(f'%{b:02x}' for b in name.encode('utf-8', 'surrogatepass'))
    refused(server, f'/v1/models/{quoted}', None, (404,))


# --- constraints: CVE-2025-48944, GHSA-rwxx-mrjm-wc2m, llama.cpp #22606 ---

def nested(n): return {'type': 'object', 'properties': {'a': nested(n - 1)}} if n else {'type': 'string'}


SCHEMAS = [{'type': 'nonsense'}, {'type': 'string', 'pattern': '('}, {'type': 'string', 'pattern': '*'}, nested(200),
           {'$ref': 'http://127.0.0.1:1/x.json'}, {'$ref': 'file:///etc/passwd'}, {'$ref': '#/nowhere'},
           {'type': 'string', 'minLength': 5, 'maxLength': 1}, {'enum': ['x' * 70000]},
           {'type': 'object', 'properties': {f'p{i}': {'type': 'string'} for i in range(5000)}}]
GRAMMARS = [dict(regex='('), dict(regex='a{1,2}{'), dict(grammar='start: nowhere'), dict(grammar='start: start start'),
            dict(grammar=''), dict(choice=[]), dict(regex='a', choice=['a']), dict(json='{'), {}, dict(nothing=1),
            dict(regex='(' * 20000), dict(json=nested(100))]
HOSTILE = ['(a{1,9999}){1,9999}', '(a+)+b' * 20, '(.|\n)*a(.|\n){20}', '[a-z]{1,2000}', '(x+x+)+y', 'a{1000000}']


@pytest.fixture(scope='module')
def llguidance(): return pytest.importorskip('llguidance')


@pytest.mark.parametrize('schema', SCHEMAS, ids=lambda s: json.dumps(s)[:40])
def test_bad_schemas_are_refused(llguidance, server, schema):
    format = dict(type='json_schema', json_schema=dict(name='x', schema=schema))
    refused(server, CHAT, dict(messages=HELLO, max_tokens=2, response_format=format))
    good = dict(type='json_schema', json_schema=dict(name='x', schema={'type': 'boolean'}))    # and the next one works
    assert ask(server, CHAT, dict(messages=HELLO, max_tokens=8, response_format=good))[0] == 200


@pytest.mark.parametrize('constraint', GRAMMARS, ids=str)
def test_bad_grammars_are_refused(llguidance, server, constraint):
    refused(server, COMPLETE, dict(prompt='a', max_tokens=2, structured_outputs=constraint))


@pytest.mark.parametrize('regex', HOSTILE)
def test_hostile_patterns_delay_no_other_request(llguidance, server, engine, regex):
    body = dict(prompt='a', max_tokens=3, structured_outputs=dict(regex=regex))
    with ThreadPoolExecutor(1) as pool:
        start = time.process_time()
        reply = pool.submit(ask, server, COMPLETE, body)
        assert healthy(server) and time.process_time() - start < 2
        assert reply.result()[0] in (200, 400) and time.process_time() - start < 20
    assert free(engine)


# --- keys: CVE-2025-59425, and what vLLM's key does not cover ---

def test_all_paths_but_two_are_closed(engine):
    args = ServerArgs(port=0, api_keys=('key-of-mine', 'another'))
    with serve_in_background(engine, api_keys=args.api_keys) as server:
        routes = [*router.routes, *info_router.routes, *make_app(AppState(args)).routes]
        paths = {route.path for route in routes if hasattr(route, 'path')} | {
            '/nowhere', '/docs', '/invocations', '//health', '/HEALTH'}
        assert {COMPLETE, CHAT, '/metrics', '/stats', '/openapi.json', '/generate', '/v1/models'} <= paths
        for path in paths - OPEN_PATHS:
            for method in ('GET', 'POST', 'PUT', 'DELETE', 'HEAD', 'OPTIONS', 'PATCH'):
                for header in ({}, dict(Authorization='Bearer wrong'), dict(Authorization='key-of-mine'),
                               dict(Authorization='Bearer key-of-mineX'), dict(Authorization='Basic key-of-mine')):
                    status, headers, reply = ask(server, path.replace('{name:path}', 'x'), None, method, **header)
                    assert status == 401 and headers['WWW-Authenticate'] == 'Bearer'
                    if method != 'HEAD': assert reply['error']['code'] == 'invalid_api_key'
        assert ask(server, '/v1/models', Authorization='Bearer another')[0] == 200 and healthy(server)
    with serve_in_background(engine, api_keys=args.api_keys, public_metrics=True) as server:
        assert ask(server, '/metrics')[0] == 200 and ask(server, '/v1/models')[0] == 401


def test_keys_are_compared_in_constant_time(monkeypatch):
    compared = []
    monkeypatch.setattr('tinyvllm.server.middleware.compare_digest', lambda a, b: compared.append((a, b)) or a == b)
    assert ApiKeys(['a', 'b', 'c']).is_valid('Bearer a') and len(compared) == 3    # all of them, found or not
    assert all(len(a) == len(b) == 32 for a, b in compared)                  # digests, not keys


# --- what goes out: CVE-2026-0599, CVE-2026-33626, CVE-2026-22778 ---

def test_no_url_is_fetched(server, monkeypatch):
    calls, connect = [], socket.socket.connect
    def watched(self, address):
        if address[1] != port(server): calls.append(address)
        return connect(self, address)
    monkeypatch.setattr(socket.socket, 'connect', watched)
    with socket.create_server(('127.0.0.1', 0)) as bait:
        bait.settimeout(0.2)
        url = f'http://127.0.0.1:{bait.getsockname()[1]}/x.png'
        for part in (dict(type='image_url', image_url=dict(url=url)), dict(type='input_audio', input_audio=dict(data=url)),
                     dict(type='file', file=dict(file_id=url)), dict(type='video_url', video_url=dict(url=url))):
            refused(server, CHAT, dict(messages=[dict(role='user', content=[part])]))
        assert ask(server, COMPLETE, dict(prompt=f'![]({url})', max_tokens=2))[0] == 200
        with pytest.raises(TimeoutError): bait.accept()
    assert calls == []


def test_a_host_header_changes_nothing(server):    # CVE-2026-48710
    with_host = b'GET /v1/models HTTP/1.1\r\nConnection: close\r\nHost: evil.example/\r\n\r\n'
    assert b'evil' not in send(server, with_host)


def test_the_page_runs_only_its_own_scripts(server):
    status, headers, html = ask(server, '/')
    policy = headers['Content-Security-Policy']
    assert status == 200 and headers['Content-Type'].startswith('text/html')
    assert "default-src 'none'" in policy and "'sha256-" in policy and 'unsafe-inline' not in policy.split('script-src')[1].split(';')[0]
    assert not re.search(rb'(?:src|href)\s*=\s*["\']?(?:https?:)?//', html) and b'onclick=' not in html


# --- the package itself: CVE-2026-3059, ShadowMQ ---

def test_no_pickle_no_eval_anywhere():
    found = [f'{path.name}:{n}' for path in Path(tinyvllm.__file__).parent.rglob('*.py')
             for n, line in enumerate(path.read_text().splitlines(), 1)
             if re.search(r'\b(?:pickle|marshal|shelve|dill)\b|(?<![\w.])(?:eval|exec)\(|yaml\.load\b|torch\.load', line)]
    assert found == []


def test_limits_are_the_documented_ones():
    limits, args = Limits(), ServerArgs()
    assert (limits.max_n, limits.max_prompts, limits.max_stop, limits.max_stop_chars, limits.max_logprobs) == (16, 64, 4, 128, 20)
    assert (limits.max_logit_bias, limits.max_tools, limits.max_schema_bytes, limits.max_schema_depth) == (1024, 128, 65536, 64)
    assert (args.host, args.max_queue, args.max_body, args.ping, args.shutdown_timeout) == ('127.0.0.1', 256, 2_000_000, 15, 30)


def test_nothing_is_left_behind(server, engine):
    assert free(engine) and (server.state.queue.num_open, server.state.queue.num_waiting) == (0, 0) and healthy(server)
