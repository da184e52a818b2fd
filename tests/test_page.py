"The page at `/`, in a real browser, against a scripted server: it types, streams, stops."
import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files

import pytest

from support.engines import eventually

PAGE = files('tinyvllm.server') / 'static/index.html'
try: from tinyvllm.server.info import load_page as served    # with the policy that the server sends
except ImportError: served = lambda: (PAGE.read_bytes(), {})
NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome',
         '/Applications/Google Chrome.app/Contents/MacOS/Google Chrome')
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


class Script:
    "What the fake server does, and what it was asked."
    def __init__(self):
        self.pieces, self.pause, self.error, self.key = ['Hel', 'lo ', 'there.'], 0.0, None, None
        self.loading, self.closed, self.bodies, self.cut = False, threading.Event(), [], False
        self.stats = dict(tok_s=42.5, running=3, waiting=1, kv_usage=0.25, num_blocks=256,
                          free_blocks=192)


class Handler(BaseHTTPRequestHandler):
    "Just enough of the server's endpoints."
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args): pass

    def send(self, status, body, kind='application/json', headers={}):
        self.send_response(status)
        for header in headers.items(): self.send_header(*header)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def fail(self, status, message):
        self.send(status, json.dumps({'error': {'message': message, 'type': 'x', 'param': None,
                                                'code': None}}).encode())

    def event(self, data):
        body = f'data: {data}\n\n'.encode()
        self.wfile.write(b'%x\r\n%s\r\n' % (len(body), body))
        self.wfile.flush()

    def stream(self, events):
        self.send_response(200)
        self.send_header('Content-Type', 'text/event-stream')
        self.send_header('Transfer-Encoding', 'chunked')
        self.end_headers()
        try:
            for data in events: self.event(data)
            self.wfile.write(b'0\r\n\r\n')
        except OSError: self.server.script.closed.set()
        self.close_connection = True

    def refused(self):
        script = self.server.script
        if script.loading: return self.fail(503, 'loading the model: 40 %') or True
        if script.key and self.headers['Authorization'] != f'Bearer {script.key}':
            return self.fail(401, 'no such key') or True
        return False

    def do_GET(self):
        if self.path == '/':
            body, headers = served()
            return self.send(200, body, 'text/html; charset=utf-8', headers)
        if self.refused(): return
        if self.path == '/v1/models':
            return self.send(200, json.dumps({'data': [{'id': 'smollm2'}]}).encode())
        if self.path == '/stats': return self.stream(self.statistics())
        self.fail(404, 'not found')

    def statistics(self):
        while not self.server.stopping.wait(0.05): yield json.dumps(self.server.script.stats)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        if self.refused(): return
        self.server.script.bodies.append(body)
        if self.server.script.error: return self.fail(*self.server.script.error)
        self.stream(self.answer())

    def answer(self):
        script, usage = self.server.script, {'prompt_tokens': 9, 'completion_tokens': 0}
        for piece in script.pieces:
            time.sleep(script.pause)
            usage['completion_tokens'] += 1
            yield json.dumps({'choices': [{'index': 0, 'delta': piece if isinstance(piece, dict)
                              else {'content': piece}, 'finish_reason': None}], 'usage': usage})
        if script.cut: return
        yield json.dumps({'choices': [{'index': 0, 'delta': {}, 'finish_reason': 'stop'}]})
        yield json.dumps({'choices': [], 'usage': usage})
        yield '[DONE]'


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.script, self.stopping = Script(), threading.Event()
        self.url = f'http://127.0.0.1:{self.server_address[1]}/'
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def stop(self):
        self.stopping.set()
        self.shutdown()
        self.server_close()


@pytest.fixture(scope='module')
def browser():
    "Headless Chromium; no browser, no test."
    if not CHROMIUM: pytest.skip('no Chromium on this machine')
    with pytest.importorskip('playwright.sync_api').sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture(scope='module')
def one_server():
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def server(one_server):
    "The fake server with a fresh script."
    one_server.script = Script()
    return one_server


@pytest.fixture
def script(server): return server.script


@pytest.fixture
def visit(browser, server):
    "Open the page; at the end nothing has complained, and no other host was asked for anything."
    contexts, complaints, hosts = [], [], set()

    def visit(url=server.url, **options):
        context = browser.new_context(**{'viewport': {'width': 1280, 'height': 800}} | options)
        context.set_default_timeout(60_000)
        page = context.new_page()
        page.on('request', lambda r: hosts.add(r.url.partition('://')[2].partition('/')[0]))
        page.on('pageerror', lambda e: complaints.append(str(e)))
        page.on('console', lambda m: complaints.append(m.text) if m.type == 'error'
                and not m.text.startswith('Failed to load resource') else None)
        contexts.append(context)
        page.goto(url)
        return page
    yield visit
    for context in contexts: context.close()
    assert not complaints
    assert all(host.startswith('127.0.0.1:') or not host for host in hosts)


def until(page, condition, seconds=60):
    "Wait for JavaScript to be true: from here, since the page's policy allows no `eval` there."
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def ask(page, text='Hello?'):
    page.locator('#prompt').fill(text)
    page.keyboard.press('Enter')


def answer(page, n=-1):
    "The n-th answer when it is complete."
    page.wait_for_selector('.assistant')
    until(page, '!document.querySelector(".busy")')
    return page.locator('.assistant').nth(n)


def test_types_and_streams(visit, script):
    page = visit()
    until(page, 'document.querySelector("#model").textContent === "smollm2"')
    ask(page, 'Who are you?')
    first = answer(page)
    assert first.locator('.text').inner_text() == 'Hello there.'
    assert first.locator('.note').inner_text().startswith('3 tokens')
    assert page.locator('#live').inner_text() == 'Hello there.'
    ask(page, 'And now?')
    answer(page)
    assert [m['content'] for m in script.bodies[1]['messages']] == [
        'Who are you?', 'Hello there.', 'And now?']
    assert page.locator('#prompt').input_value() == ''


def test_text_comes_while_it_is_made(visit, script):
    script.pieces, script.pause = ['one '] + ['more '] * 40, 0.05
    page = visit()
    ask(page)
    until(page, 'document.querySelector(".busy .text")?.textContent.includes("one")')
    until(page, '/\\d tok\\/s/.test(document.querySelector(".busy .note").textContent)')
    assert page.locator('#stop').is_visible() and not page.locator('#send').is_visible()


@pytest.mark.parametrize('how', ['button', 'Escape'])
def test_stops(visit, script, how):
    script.pieces, script.pause = ['word '] * 2000, 0.02
    page = visit()
    ask(page)
    until(page, 'document.querySelector(".busy .text")?.textContent.length > 10')
    page.locator('#stop').click() if how == 'button' else page.keyboard.press('Escape')
    assert 'stopped' in answer(page).locator('.note').inner_text()
    assert script.closed.wait(5), 'the server was not notified'
    script.pieces, script.pause = ['Again.'], 0
    ask(page, 'More')
    assert answer(page).locator('.text').inner_text() == 'Again.'
    assert script.bodies[1]['messages'][1]['content'].startswith('word word')


def test_the_knobs_are_sent(visit, script):
    page = visit()
    for knob, value in dict(temperature='1.5', top_p='0.5', top_k='7', max_tokens='33', seed='-4',
                            system='Be brief.').items():
        page.locator('#' + knob).fill(value)
    ask(page)
    answer(page)
    (body,) = script.bodies
    assert {k: body[k] for k in ('temperature', 'top_p', 'top_k', 'max_tokens', 'seed')} == dict(
        temperature=1.5, top_p=0.5, top_k=7, max_tokens=33, seed=-4)
    assert body['messages'][0] == {'role': 'system', 'content': 'Be brief.'}
    page.locator('#max_tokens').fill('-1')
    ask(page, 'kept')
    assert page.locator('#prompt').input_value() == 'kept' and len(script.bodies) == 1


def test_statistics(visit):
    page = visit()
    until(page, 'document.querySelector("#v-speed").textContent === "42.5"')
    assert page.locator('#v-running').inner_text() == '3'
    assert page.locator('#v-waiting').inner_text() == '1'
    assert page.locator('#v-blocks').inner_text() == '64 of 256'
    until(page, 'document.querySelector("#p-speed polyline").points.length > 3')


def test_model_text_is_never_html(visit, script):
    evil = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
    script.pieces = [evil, '\n```html\n', evil, '\n```\n', f'`{evil}` **{evil}**']
    page = visit()
    ask(page, evil)
    text = answer(page).locator('.text')
    assert text.inner_text().count('<script>') == 4 and page.title() == 'tinyvllm'
    assert page.locator('#log').locator('img, script').count() == 0
    assert text.locator('pre').inner_text() == evil
    assert page.locator('.user .text').inner_text() == evil


def test_thoughts_are_apart(visit, script):
    script.pieces = [{'reasoning_content': 'Hm.'}, {'content': 'Yes.'}]
    page = visit()
    ask(page)
    assert answer(page).locator('> .text').inner_text() == 'Yes.'
    assert page.locator('.thought .text').text_content() == 'Hm.'


@pytest.mark.parametrize('status, message', [(400, 'top_p is 7'), (429, 'too many requests wait'),
                                          (500, 'internal error')])
def test_errors_are_shown(visit, script, status, message):
    script.error = status, message
    page = visit()
    ask(page)
    assert message in page.locator('[role=alert]').text_content()
    script.error = None
    page.get_by_role('button', name='Try again').click()
    assert answer(page).locator('.text').inner_text() == 'Hello there.'
    assert page.locator('.assistant').count() == 1 and len(script.bodies[1]['messages']) == 1


def test_a_stream_that_breaks_off(visit, script):
    page = visit()
    script.cut = True
    ask(page)
    assert 'ended before' in answer(page).locator('[role=alert]').text_content()
    assert answer(page).locator('.text').inner_text() == 'Hello there.'


def test_a_server_that_goes_away(visit):
    own = Server()
    page = visit(own.url)
    until(page, 'document.querySelector("#v-running").textContent === "3"')
    own.stop()
    ask(page)
    assert 'does not answer' in page.locator('[role=alert]').text_content()
    until(page, 'document.querySelector("#banner").textContent.includes("does not answer")')


def test_loading_and_key(visit, script):
    script.loading, script.key = True, 'sesame'
    page = visit()
    until(page, 'document.querySelector("#banner").textContent.includes("40 %")')
    script.loading = False
    key = page.locator('#key')
    key.wait_for()
    until(page, 'document.activeElement.id === "key"')
    assert 'asks for an API key' in page.locator('#why').text_content()
    page.keyboard.type('wrong\n')
    until(page, 'document.querySelector("#banner").textContent.includes("not know")')
    key.fill('sesame')
    page.keyboard.press('Enter')
    until(page, 'document.querySelector("#model").textContent === "smollm2"')
    ask(page)
    assert answer(page).locator('.text').inner_text() == 'Hello there.'
    assert not key.is_visible()


PHONE = dict(viewport={'width': 320, 'height': 640}, is_mobile=True, has_touch=True)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_phone(visit, script, scheme):
    script.pieces = ['unbroken' * 40, '\n```\n', 'code ' * 40, '\n```\n']
    page = visit(color_scheme=scheme, **PHONE)
    ask(page, 'w' * 200)
    answer(page)
    wide = 'document.documentElement.scrollWidth > document.documentElement.clientWidth'
    assert not page.evaluate(wide)
    assert not page.locator('#temperature').is_visible()
    page.locator('#settings').tap()
    assert page.locator('#temperature').is_visible() and not page.evaluate(wide)
    page.keyboard.press('Escape')
    assert not page.locator('#temperature').is_visible()
    assert page.evaluate('document.activeElement.id') == 'prompt'
    small = '''[...document.querySelectorAll("button, input, textarea")].filter(e =>
        e.offsetParent && e.type !== "range" &&
        parseFloat(getComputedStyle(e).fontSize) < 16).length'''
    assert page.evaluate(small) == 0    # a phone zooms into smaller ones


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_contrast(visit, scheme):
    "WCAG AA for each ink on each paper."
    page = visit(color_scheme=scheme)
    value = 'name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()'

    def luminance(name):
        digits = page.evaluate(value, name).lstrip('#')
        if len(digits) == 3: digits = ''.join(2 * d for d in digits)
        parts = [int(digits[i:i+2], 16) / 255 for i in (0, 2, 4)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), parts))

    def contrast(*names):
        low, high = sorted(map(luminance, names))
        return (high + 0.05) / (low + 0.05)
    for ink in ('--ink', '--quiet', '--blue', '--orange', '--red'):
        assert contrast(ink, '--paper') >= 4.5, ink
    assert contrast('--ink', '--raised') >= 4.5 and contrast('--on-blue', '--blue') >= 4.5
    assert contrast('--edge', '--paper') >= 3    # borders of fields


def test_keyboard_alone(visit, script):
    script.pieces, script.pause = ['word '] * 2000, 0.02
    page = visit()
    focus = 'document.activeElement.id'
    assert page.evaluate(focus) == 'prompt'
    page.keyboard.type('one')
    page.keyboard.press('Shift+Enter')
    page.keyboard.type('two')
    assert not script.bodies
    page.keyboard.press('Tab')
    assert page.evaluate(focus) == 'send'
    page.keyboard.press('Enter')
    until(page, 'document.querySelector(".busy .text")?.textContent.length > 5')
    assert script.bodies[0]['messages'] == [{'role': 'user', 'content': 'one\ntwo'}]
    assert page.evaluate(focus) == 'prompt'    # the button is gone, the focus is not
    page.keyboard.press('Tab')
    assert page.evaluate(focus) == 'stop'
    page.keyboard.press('Enter')
    answer(page)
    order = []
    for _ in range(7):
        page.keyboard.press('Tab')
        order.append(page.evaluate(focus))
    assert order == ['send', 'temperature', 'top_p', 'top_k', 'max_tokens', 'seed', 'system']


def test_new_chat_forgets(visit, script):
    script.pieces, script.pause = ['old '] * 2000, 0.02
    page = visit()
    ask(page, 'first')
    until(page, 'document.querySelector(".busy .text")?.textContent.length > 5')
    page.locator('#new').click()
    assert page.locator('.message').count() == 0 and page.locator('#empty').is_visible()
    script.pieces, script.pause = ['new'], 0
    ask(page, 'second')
    assert answer(page).locator('.text').inner_text() == 'new'
    assert script.bodies[1]['messages'] == [{'role': 'user', 'content': 'second'}]


def test_composing_does_not_send(visit, script):
    page = visit()
    page.locator('#prompt').fill('にほん')
    page.evaluate('''document.querySelector("#prompt").dispatchEvent(new KeyboardEvent("keydown",
        {key: "Enter", isComposing: true, bubbles: true, cancelable: true}))''')
    page.wait_for_timeout(100)
    assert page.locator('#prompt').input_value() == 'にほん' and not script.bodies


@pytest.fixture
def endless(folder, tmp_path):
    "The tiny model with the tokenizer's vocabulary, and no end."
    from tinyvllm.models.weights import save_safetensors, tiny_checkpoint
    save_safetensors(tmp_path, *tiny_checkpoint(seed=0, vocab_size=257, eos_token_id=None))
    shutil.copy(folder / 'tokenizer.json', tmp_path)
    config = json.loads((folder / 'tokenizer_config.json').read_text())
    config.pop('eos_token')
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    return tmp_path


def test_with_the_real_server(visit, endless):
    pytest.importorskip('fastapi')
    from tinyvllm import LLM
    from tinyvllm.server.run import serve_in_background
    llm = LLM(endless, num_blocks=64)
    with serve_in_background(llm.engine, names=('tiny',)) as server:
        page = visit(server.url)
        until(page, 'document.querySelector("#model").textContent === "tiny"')
        until(page, 'document.querySelector("#v-running").textContent === "0"')
        page.locator('#max_tokens').fill('12')
        ask(page, 'abc')
        assert answer(page).locator('.note').inner_text().startswith('12 tokens')
        page.locator('#max_tokens').fill('450')
        ask(page, 'def')
        until(page, 'document.querySelectorAll(".assistant .text")[1]?.textContent.length > 4')
        page.keyboard.press('Escape')
        answer(page)
        until(page, 'document.querySelector("#v-running").textContent === "0"')
        eventually(lambda: llm.engine.scheduler.blocks.num_free == 63)    # all but the null block
        page.locator('#top_k').fill('9999999999999')
        ask(page, 'ghi')
        page.locator('[role=alert]').wait_for()


def test_no_other_host_and_no_html_sinks():
    "What the page may not contain, whoever edits it next."
    text = PAGE.read_text(encoding='utf-8')
    assert 'innerHTML' not in text and 'insertAdjacentHTML' not in text and 'eval(' not in text
    assert ' onclick=' not in text
    links = [w for w in text.replace('"', ' ').replace("'", ' ').split() if '://' in w]
    assert set(links) <= {'http://www.w3.org/2000/svg'}, links
