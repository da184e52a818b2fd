"The device and compiler that `import tinyvllm` settles on, each in a fresh process with its own environment."
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tinyvllm import device
from tinyvllm.device import MetalGPU

ROOT = Path(__file__).resolve().parents[1]
needs_zig = pytest.mark.skipif(not importlib.util.find_spec('ziglang'), reason='no ziglang wheel')
linux = pytest.mark.skipif(sys.platform != 'linux', reason='compilers are compared on Linux')
SHOW = "import os, tinyvllm; print(os.environ.get('DEV'), os.environ.get('CC'), os.environ.get('CACHEDB'))"


def python(code, path='/usr/bin:/bin', **env):
    "Run `code` in a fresh process that sees only these environment variables."
    env = {'PATH': path, 'PYTHONPATH': str(ROOT), 'HOME': os.environ.get('HOME', '/'), **env}
    run = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture
def no_clang(tmp_path):
    "A PATH that holds a shell and its few tools, and no compiler."
    folder = tmp_path / 'bin'
    folder.mkdir()
    (folder / 'sh').symlink_to('/bin/sh')
    return str(folder)


@pytest.fixture
def here(tmp_path, monkeypatch):
    "Choices made in this process: an empty cache folder, nothing chosen before."
    monkeypatch.setenv('TINYVLLM_CACHE', str(tmp_path / 'cache'))
    device.writable_dir.cache_clear()
    yield tmp_path / 'cache'
    device.writable_dir.cache_clear()


def test_what_is_set_is_left_alone(tmp_path):
    clang = compiler(tmp_path, 'cc', 'Some clang version 99')
    out = python(SHOW, DEV='PYTHON', CC=clang, CACHEDB='/x/y.db', TINYVLLM_CACHE=str(tmp_path))
    assert out == f'PYTHON {clang} /x/y.db'


@needs_zig
def test_gcc_in_the_environment_is_no_obstacle(tmp_path):
    gcc = compiler(tmp_path, 'gcc', 'gcc (Debian) 12.2.0')
    assert gcc not in python(SHOW, CC=gcc, TINYVLLM_CACHE=str(tmp_path))


def compiler(folder, name, version):
    "A program that only knows its version."
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "{version}"\n')
    path.chmod(0o755)
    return str(path)


@needs_zig
@pytest.mark.parametrize('before, cache', [
    ('import tinygrad', 'cache/kernels-'), ('from tinygrad import Tensor', 'cache/kernels-'),
    ('import os, tinygrad; os.environ["CC"] = "gcc"', 'cache/kernels-'),
    ('from tinygrad import Tensor\ntry: Tensor([1]).exp2().tolist()\nexcept Exception: print("no compiler")', '')],
    ids=['package', 'tensor', 'gcc', 'failed'])
def test_a_late_import_gives_tinygrad_device_and_compiler(before, cache, tmp_path, no_clang):
    "And the file of compiled kernels, unless tinygrad has opened its own."
    code = (f'{before}\nimport warnings; warnings.simplefilter("error"); import tinyvllm\n'
            'from tinygrad import Device, Tensor, helpers\nDevice.DEFAULT, (Tensor([1, 2]) + 1).tolist()\n'
            'print(Device.DEFAULT, (Tensor([1, 2]) + 1).tolist(), helpers.CACHEDB)')
    last = python(code, path=no_clang, HOME=str(tmp_path), TINYVLLM_CACHE=str(tmp_path / 'cache')).splitlines()[-1]
    assert last.startswith(f'{device.best_device()} [2, 3] ') and cache in last


def test_a_late_import_leaves_what_is_in_use(tmp_path):
    "The device and the compiler of a process that has run a kernel, and what was set by hand."
    clang = compiler(tmp_path, 'clang-of-ours', 'Some clang version 99')
    code = (f'import os; os.environ.update(DEV="PYTHON", CC="{clang}", CACHEDB="{tmp_path}/k.db"); from tinygrad import Tensor\n'
            'print((Tensor([1, 2]) + 1).tolist()); before = dict(os.environ); import tinyvllm\n'
            'from tinygrad import Device, helpers; print(before == dict(os.environ), Device.DEFAULT, helpers.CACHEDB)')
    assert python(code).splitlines() == ['[2, 3]', f'True PYTHON {tmp_path}/k.db']


def test_a_late_import_says_which_device_tinygrad_chose(tmp_path):
    code = ('from tinygrad import Device; vars(Device)["_select_device"] = "NV"; import os; os.environ["DEV"] = "NV"\n'
            'import warnings\nwith warnings.catch_warnings(record=True) as found: import tinyvllm\n'
            'print(*[w.message for w in found], Device.DEFAULT, sep="\\n")')
    message, chosen = python('import sys; ' + code, TINYVLLM_CACHE=str(tmp_path)).splitlines()
    assert message == (f'tinygrad chose NV before tinyvllm was imported: import tinyvllm first for '
                       f'{device.best_device()}, or set DEV=NV to keep it')
    assert chosen == 'NV'


def test_a_missing_compiler_is_named_in_one_line(tmp_path, no_clang):
    site = tmp_path / 'hides'  # a finder in front that does not know the ziglang wheel
    site.mkdir()
    (site / 'sitecustomize.py').write_text(
        "import importlib.util as u\nfind = u.find_spec\nu.find_spec = lambda n, *a: None if n == 'ziglang' else find(n, *a)")
    run = subprocess.run([sys.executable, '-c', 'import tinyvllm'], capture_output=True, text=True, env={
        'PATH': no_clang, 'PYTHONPATH': f'{site}:{ROOT}', 'DEV': 'CPU', 'TINYVLLM_CACHE': str(tmp_path)})
    assert run.returncode == 0
    assert 'no C compiler for the CPU: install clang, or `pip install ziglang`' in run.stderr.splitlines()[0]


def test_import_is_light(tmp_path):
    code = "import sys, tinyvllm; print([m for m in ('tinygrad', 'numpy', 'ziglang') if m in sys.modules])"
    assert python(code, TINYVLLM_CACHE=str(tmp_path)) == '[]'


MACS = {  # what Metal says on real machines (llama.cpp#8617, #3129), the version of macOS, why METAL is not for it
    'M1': (MetalGPU('Apple M1', True), '14.5', None),
    'M4 Max': (MetalGPU('Apple M4 Max', True), '26.0', None),
    'an Intel Mac': (MetalGPU('AMD Radeon Pro 5600M', False), '14.5', 'AMD Radeon Pro 5600M is older than Apple7 (M1)'),
    'a virtual machine': (MetalGPU('Apple Paravirtual device', False), '14.5', 'Apple Paravirtual device is a virtual GPU'),
    'a virtual machine of a later macOS': (MetalGPU('Apple Paravirtual device', True), '26.1', 'is a virtual GPU'),
    'no GPU': (None, '14.5', 'no GPU'),
    'an old macOS': (MetalGPU('Apple M1', True), '12.7.6', 'macOS 12.7.6 is older than 13'),
    'an old Python': (MetalGPU('Apple M1', True), '10.16', 'this Python was built for macOS 10')}


@pytest.mark.parametrize('mac', MACS)
def test_metal_is_chosen_where_the_kernels_run(mac, monkeypatch):
    gpu, macos, reason = MACS[mac]
    monkeypatch.setattr(sys, 'platform', 'darwin')
    monkeypatch.setattr(device.platform, 'mac_ver', lambda: (macos, ('', '', ''), ''))
    monkeypatch.setattr(device, 'probe_metal', lambda: gpu)
    why = device.why_no_metal(gpu, macos)
    assert device.best_device() == ('CPU' if reason else 'METAL')
    assert why is None if reason is None else reason in why and why.endswith('the device is CPU') and why.count('.') <= 3
    monkeypatch.setattr(device, 'best_compiler', lambda: '/c/clang')
    monkeypatch.setenv('CACHEDB', 'kernels.db')
    for asked in ('', 'METAL'):
        monkeypatch.setenv('DEV', asked)
        monkeypatch.setattr(device, 'update_tinygrad', lambda: None)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            device.setup()
        assert os.environ['DEV'] == (asked or device.best_device())    # what was asked for is left alone
        assert [str(w.message) for w in told] == ([why] if why and not asked else [])


OBJC = """
static const char* name = "Apple M1";
static int same(const char* a, const char* b) {
  while (*a && *a == *b) a++, b++;
  return *a == *b;
}
const char* sel_registerName(const char* name) { return name; }
void* MTLCreateSystemDefaultDevice(void) { return (void*)0x700000000123; }
long objc_msgSend(void* self, const char* selector, long argument) {
  if (same(selector, "name") && self == (void*)0x700000000123) return (long)&name;
  if (same(selector, "UTF8String") && self == &name) return (long)name;
  return same(selector, "supportsFamily:") && self == (void*)0x700000000123 && argument == 1007;
}"""


@linux
@needs_zig
def test_metal_is_asked_as_objective_c_wants_it(here, tmp_path, monkeypatch):
    "A library with the few functions of Apple's that are called; addresses have more than 32 bits."
    library = tmp_path / 'objc.so'
    subprocess.run([device.zig_wrapper(), *device.PROBE_FLAGS, '-', '-o', library], input=OBJC.encode(), check=True)
    loaded, versions = device.ctypes.CDLL(str(library)), iter(['14.5', '12.7', '14.5'])
    monkeypatch.setattr(device.platform, 'mac_ver', lambda: (next(versions), ('', '', ''), ''))
    monkeypatch.setattr(device.ctypes, 'CDLL', lambda path: loaded)
    found = []
    for _ in range(2):
        device.probe_metal.cache_clear()
        found.append(device.probe_metal())
    monkeypatch.undo()
    monkeypatch.setattr(device.platform, 'mac_ver', lambda: ('14.5', ('', '', ''), ''))
    device.probe_metal.cache_clear()
    found.append(device.probe_metal())    # no such libraries here
    device.probe_metal.cache_clear()
    assert found == [MetalGPU('Apple M1', True), None, None]


@pytest.mark.parametrize('family, old', [('Apple5', True), ('Apple6', True), ('Apple7', False), ('Apple9', False),
                                         ('Apple10', False), ('Mac2', True), ('Common3', True), ('', True)])
def test_families_that_run_the_kernels(family, old):
    assert device.is_old_gpu(family) == old


def test_device_of_this_machine(monkeypatch):
    monkeypatch.setattr(sys, 'platform', 'linux')
    assert device.best_device() in ('CPU', 'CUDA')


@pytest.mark.parametrize('init, count, expected', [(0, 2, 'CUDA'), (0, 0, 'CPU'), (100, 2, 'CPU'), (None, 0, 'CPU')])
def test_cuda_needs_a_driver_that_sees_a_gpu(monkeypatch, init, count, expected):
    class Driver:
        def __init__(self, name):
            if init is None:
                raise OSError('no such library')

        def cuInit(self, flags):
            return init

        def cuDeviceGetCount(self, pointer):
            pointer._obj.value = count
            return 0
    monkeypatch.setattr(sys, 'platform', 'linux')
    monkeypatch.setattr(device.ctypes, 'CDLL', Driver)
    assert device.best_device() == expected


@needs_zig
def test_wrapper_drops_only_the_target(here):
    script = Path(device.zig_wrapper())
    text = script.read_text()
    last = text.index('exec ')
    script.write_text(text[:last] + 'printf "%s\\n" "$@"\n')
    asked = ['-c', '-x', 'c', '--target=x86_64-none-unknown-elf', '-march=native', 'a b', '$HOME', '', '-', '-o', '-']
    got = subprocess.run([script, *asked], capture_output=True, text=True, check=True).stdout.split('\n')[:-1]
    assert got == [a for a in asked if not a.startswith('--target')]
    assert str(here / 'zig') in text and '-g0' in text[last:]


@needs_zig
def test_wrapper_compiles_to_an_object_file(here):
    flags = '-c -x c -O2 -fPIC -ffreestanding -fno-math-errno -nostdlib -fno-ident --target=x86_64-none-unknown-elf'
    run = subprocess.run([device.zig_wrapper(), *flags.split(), '-', '-o', '-'], input=b'int f(int a) { return a+1; }',
                         capture_output=True, check=True)
    assert run.stdout.startswith(b'\x7fELF') and b'.eh_frame' not in run.stdout


@needs_zig
def test_wrapper_in_a_folder_with_spaces(tmp_path, monkeypatch):
    monkeypatch.setenv('TINYVLLM_CACHE', str(tmp_path / "it's a cache"))
    device.writable_dir.cache_clear()
    run = subprocess.run([device.zig_wrapper(), '-c', '-x', 'c', '-', '-o', '-'], input=b'int x;', capture_output=True)
    device.writable_dir.cache_clear()
    assert run.returncode == 0 and run.stdout.startswith(b'\x7fELF'), run.stderr


@needs_zig
def test_kernels_run_without_clang(tmp_path, no_clang):
    code = """
import tinyvllm
from tinyvllm.device import compiler_name
from tinygrad import Tensor
print((Tensor.arange(12).reshape(3, 4).half() @ Tensor.ones(4).half()).tolist(), compiler_name())
"""
    out = python(code, path=no_clang, DEV='CPU', TINYVLLM_CACHE=str(tmp_path / 'cache'))
    assert out.startswith('[6.0, 22.0, 38.0] zig ') and out.endswith('(ziglang wheel)')
    assert list((tmp_path / 'cache').glob('kernels-*.db'))


@needs_zig
def test_unwritable_cache_is_no_obstacle(tmp_path, no_clang):
    (tmp_path / 'cache').write_text('a file where the folder should be')  # root may write to read-only folders
    code = "import os, tinyvllm; from tinygrad import Tensor; print(Tensor([2.]).exp2().item(), os.environ['CC'])"
    value, chosen = python(code, path=no_clang, DEV='CPU', TINYVLLM_CACHE=str(tmp_path / 'cache')).split(' ', 1)
    assert value == '4.0' and not chosen.startswith(str(tmp_path))
    assert not Path(chosen).exists()  # the temporary folder went with the process


@linux
@pytest.mark.parametrize('clang, zig, winner', [(2.0, 1.0, 'zig'), (1.0, 2.0, 'clang'), (1.0, 0.95, 'clang'),
                                                (float('inf'), 1.0, 'zig'), (float('inf'), float('inf'), 'clang')])
def test_the_faster_compiler_wins_and_is_remembered(here, monkeypatch, clang, zig, winner):
    asked = []

    def probe(compiler):
        asked.append(compiler)
        return {'/c/clang': clang, '/c/zig': zig}[compiler]
    monkeypatch.setattr(device.shutil, 'which', lambda name: '/c/clang' if name == 'clang' else None)
    monkeypatch.setattr(device, 'zig_wrapper', lambda: '/c/zig')
    monkeypatch.setattr(device, 'probe_seconds', probe)
    assert device.best_compiler() == f'/c/{winner}'
    assert device.best_compiler() == f'/c/{winner}' and asked == ['/c/clang', '/c/zig']
    (here / 'compilers.json').write_text('{"half a fi')
    assert device.best_compiler() == f'/c/{winner}' and len(asked) == 4
    assert len(json.loads((here / 'compilers.json').read_text())) == 1


@pytest.mark.parametrize('clang, zig', [('/c/clang', None), (None, '/c/zig'), (None, None)])
def test_one_compiler_is_taken_as_it_is(monkeypatch, clang, zig):
    monkeypatch.setattr(device.shutil, 'which', lambda name: clang)
    monkeypatch.setattr(device, 'zig_wrapper', lambda: zig)
    monkeypatch.setattr(device, 'probe_seconds', lambda compiler: pytest.fail('nothing to compare'))
    assert device.best_compiler() == (clang or zig)


@needs_zig
@linux
def test_probe_times_real_kernels(here):
    assert 1e-7 < device.probe_seconds(device.zig_wrapper()) < 1


def test_probe_of_a_broken_compiler_loses(tmp_path):
    assert device.probe_seconds(str(tmp_path / 'missing')) == float('inf')
    assert device.probe_seconds('/bin/false' if Path('/bin/false').exists() else '/usr/bin/false') == float('inf')


def test_names_for_people(monkeypatch, tmp_path):
    monkeypatch.setenv('CC', '/nowhere/cc')
    assert device.compiler_name().startswith('none')
    monkeypatch.setenv('CC', compiler(tmp_path, 'cc', 'Debian clang version 14.0.6'))
    assert device.compiler_name() == 'Debian clang version 14.0.6'


def test_cache_folder(monkeypatch):
    monkeypatch.setenv('TINYVLLM_CACHE', '~/here')
    assert device.cache_dir() == Path.home() / 'here'
    monkeypatch.delenv('TINYVLLM_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', '/x')
    monkeypatch.setattr(sys, 'platform', 'linux')
    assert device.cache_dir() == Path('/x/tinyvllm')
    monkeypatch.setattr(sys, 'platform', 'darwin')
    assert device.cache_dir() == Path.home() / 'Library/Caches/tinyvllm'


def test_kernels_compile_in_any_thread():
    script = """if True:
        import threading
        from tinyvllm.device import allow_threads
        from tinygrad import Tensor
        assert (Tensor([1, 2]) + 1).tolist() == [2, 3]
        allow_threads(); allow_threads()
        said = []
        for n in (3, 4):
            thread = threading.Thread(target=lambda: said.append((Tensor([n, 5, 6]) * n).tolist()))
            thread.start(); thread.join()
        said.append((Tensor([1, 2, 3, 4]) - 9).sum().item())
        print(said)"""
    run = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=120,
                         env=os.environ | dict(DEV='CPU'))    # on METAL such threads may not end
    assert run.stdout.strip() == '[[9, 15, 18], [16, 20, 24], -26]', run.stderr
