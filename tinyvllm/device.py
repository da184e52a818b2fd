"""Where tinygrad runs, and which C compiler it uses there: settled before tinygrad is imported.

The answers go into environment variables, and one that is already set is left alone: `DEV` is the
device (METAL, CUDA or CPU), `CC` the compiler of the CPU device, `CACHEDB` the file of compiled
kernels (one per CPU and compiler). tinygrad speaks clang's language, so a `CC` that names gcc is
replaced. A machine without clang compiles with the `ziglang` wheel, which carries one of its own.
"""
import atexit
import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

# A matrix-vector product as tinygrad writes it, in both precisions: decoding is made of these.
PROBE = """
#define DOT4(a, b) (float)(a[0]*b[0]) + (float)(a[1]*b[1]) + (float)(a[2]*b[2]) + (float)(a[3]*b[3])
#define MATVEC(name, T, T4) \\
typedef T T4 __attribute__((aligned(4*sizeof(T)), ext_vector_type(4))); \\
void name(T* restrict y, T* restrict w, T* restrict x) { \\
  for (int row = 0; row < 192; row += 3) { float sum[3] = {0.0f, 0.0f, 0.0f}; \\
    for (int i = 0; i < 576; i += 4) { T4 v = *(T4*)(x+i); T* p = w + row*576 + i; \\
      T4 w0 = *(T4*)p, w1 = *(T4*)(p+576), w2 = *(T4*)(p+1152); \\
      sum[0] = sum[0] + DOT4(v, w0); \\
      sum[1] = sum[1] + DOT4(v, w1); \\
      sum[2] = sum[2] + DOT4(v, w2); } \\
    for (int i = 0; i < 3; i++) y[row+i] = (T)sum[i]; } }
MATVEC(half_matvec, __fp16, half4)
MATVEC(float_matvec, float, float4)
"""
OLDEST_FAMILY, OLDEST_MACOS = 7, 13  # of Apple's GPUs that run our kernels; with Metal 3
APPLE7 = 1007  # MTLGPUFamilyApple7, the M1
INSTALL_COMPILER = 'install clang, or `pip install ziglang`'
STDERR_LOCK = threading.Lock()  # the error stream belongs to the process
PROBE_FLAGS = '-shared -x c -O2 -fPIC -ffreestanding -fno-math-errno -nostdlib'.split()
PROBE_FLAGS.append('-march=native' if platform.machine() == 'x86_64' else '-mcpu=native')


def setup() -> None:
    """Choose device, compiler and kernel cache for this process and its children.

    A tinygrad imported earlier gets the same choice, as far as it has not made its own.
    """
    if not os.environ.get('DEV'):
        os.environ['DEV'] = best_device()
        if sys.platform == 'darwin' and os.environ['DEV'] == 'CPU':
            warnings.warn(why_no_metal(probe_metal(), platform.mac_ver()[0]), stacklevel=3)
    asked = os.environ.get('CC')
    if compiler := asked if asked and is_clang(asked) else best_compiler():
        os.environ['CC'] = compiler
        kernels = f"kernels-{short_hash(cpu_facts() + stamp(compiler))}.db"
        os.environ.setdefault('CACHEDB', str(writable_dir() / kernels))
    elif os.environ['DEV'] == 'CPU':
        warnings.warn(f'no C compiler for the CPU: {INSTALL_COMPILER}', stacklevel=3)
    if 'tinygrad' in sys.modules:
        update_tinygrad()


def update_tinygrad() -> None:
    "Hand the environment's DEV, CC and CACHEDB to a tinygrad that read them before they were set."
    from tinygrad import Device, helpers
    helpers.getenv.cache_clear()  # CC is read at each compilation, through this cache
    if helpers._db_connection is None:
        helpers.CACHEDB = os.environ.get('CACHEDB', helpers.CACHEDB)
    if not helpers.DEV.device:
        helpers.DEV.value = os.environ['DEV']
    chosen, best = vars(Device).get('_select_device'), best_device()
    if chosen and chosen != best:
        warnings.warn(f'tinygrad chose {chosen} before tinyvllm was imported: import tinyvllm first '
                      f'for {best}, or set DEV={chosen} to keep it', stacklevel=4)


def best_device() -> str:
    "METAL on a Mac whose GPU runs our kernels, CUDA where the driver sees a GPU, else CPU."
    if sys.platform == 'darwin':
        return 'CPU' if why_no_metal(probe_metal(), platform.mac_ver()[0]) else 'METAL'
    try:
        cuda, count = ctypes.CDLL('libcuda.so.1'), ctypes.c_int(0)
        failed = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
        return 'CPU' if failed or count.value == 0 else 'CUDA'
    except (OSError, AttributeError):  # no driver
        return 'CPU'


class MetalGPU(NamedTuple):
    "What Metal says about a Mac's GPU."
    name: str
    is_apple7: bool  # of this family or a later one: M1, M2, ...


@cache
def probe_metal() -> MetalGPU | None:
    """Ask Metal for the default GPU, without tinygrad; None if there is none, or no Metal.

    `MTLCreateSystemDefaultDevice` finds nothing in a process that has not loaded CoreGraphics.
    """
    if is_old_macos(platform.mac_ver()[0]):
        return None
    try:
        objc = ctypes.CDLL('/usr/lib/libobjc.dylib')
        ctypes.CDLL('/System/Library/Frameworks/CoreGraphics.framework/CoreGraphics')
        create = ctypes.CDLL('/System/Library/Frameworks/Metal.framework/Metal').MTLCreateSystemDefaultDevice
        create.restype = objc.sel_registerName.restype = ctypes.c_void_p
        device = create()
    except (OSError, AttributeError):
        return None
    if not device:
        return None

    def send(receiver, selector: bytes, result, *arguments):
        types = [ctypes.c_void_p, ctypes.c_void_p, *(ctypes.c_long for _ in arguments)]
        call = ctypes.CFUNCTYPE(result, *types)(ctypes.cast(objc.objc_msgSend, ctypes.c_void_p).value)
        return call(receiver, objc.sel_registerName(selector), *arguments)
    name = send(send(device, b'name', ctypes.c_void_p), b'UTF8String', ctypes.c_char_p)
    return MetalGPU(name.decode(), send(device, b'supportsFamily:', ctypes.c_bool, APPLE7))


def why_no_metal(
    gpu: MetalGPU | None, # the default GPU; None: there is none
    macos: str, # its version, such as 14.5
) -> str | None: # one sentence; None: METAL is the right device
    "Why is METAL not for this Mac?"
    if macos.startswith('10.16'):  # what a new macOS answers to a program that was built for an old one
        return ('this Python was built for macOS 10, and tinygrad would compile for that; '
                'use a newer Python for METAL; the device is CPU')
    if is_old_macos(macos):
        return f'macOS {macos} is older than {OLDEST_MACOS}, the first with Metal 3; the device is CPU'
    if gpu is None:
        return 'this Mac shows no GPU to Metal; the device is CPU'
    if 'virtual' in gpu.name.lower():
        return f'{gpu.name} is a virtual GPU, which runs no graphs; the device is CPU'
    if not gpu.is_apple7:
        return f'{gpu.name} is older than Apple7 (M1), the first GPU that runs our kernels; the device is CPU'
    return None


def is_old_macos(
    version: str, # such as 14.5; empty on another system
) -> bool:
    "Is it a macOS without Metal 3?"
    return int(version.partition('.')[0] or 0) < OLDEST_MACOS


def is_old_gpu(
    family: str, # tinygrad's name of a Metal GPU's family: Apple9, or Mac2 on an Intel Mac
) -> bool:
    "Does it come before Apple7 (M1), the first whose simdgroups add and multiply matrices?"
    number = family.removeprefix('Apple')
    return not number.isdigit() or int(number) < OLDEST_FAMILY


def best_compiler() -> str | None:
    "The path of the faster of clang and zig, of the one there is, or None."
    clang, zig = shutil.which('clang'), zig_wrapper()
    if clang and zig and sys.platform == 'linux':
        seconds = remembered_seconds(clang, zig)
        return zig if seconds['zig'] < 0.9 * seconds['clang'] else clang  # nearer is noise
    return clang or zig


def is_clang(compiler: str) -> bool:
    "Is it clang, by its name or by its version text?"
    name = Path(shutil.which(compiler) or compiler).resolve().name
    return 'clang' in name or name.startswith('zig-cc-') or 'clang' in first_line(compiler)


def cache_dir() -> Path:
    "Where downloads are kept: `$TINYVLLM_CACHE`, else `tinyvllm` in the platform's cache folder."
    if folder := os.environ.get('TINYVLLM_CACHE'):
        return Path(folder).expanduser()
    if sys.platform == 'darwin':
        return Path.home() / 'Library/Caches/tinyvllm'
    return Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'tinyvllm'


@cache
def writable_dir() -> Path:
    "The cache folder; where it is read-only, a private one that goes with this process."
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir()):
            return cache_dir()
    except OSError:
        folder = tempfile.mkdtemp(prefix='tinyvllm-')
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)


def zig_wrapper() -> str | None:
    "Make a script that tinygrad calls as clang and that runs the ziglang wheel; None without the wheel."
    spec = importlib.util.find_spec('ziglang')
    zig = Path(spec.origin).with_name('zig') if spec and spec.origin else None
    if not zig or not zig.exists():
        return None
    cpu = 'aarch64' if platform.machine() == 'arm64' else platform.machine()
    text = f"""#!/bin/sh
# Plays clang with {stamp(zig)}
# Drops --target: zig spells it differently.
for arg; do
  shift
  case $arg in --target=*) ;; *) set -- "$@" "$arg" ;; esac
done
export ZIG_GLOBAL_CACHE_DIR={shlex.quote(str(writable_dir() / 'zig'))}
export ZIG_LOCAL_CACHE_DIR="$ZIG_GLOBAL_CACHE_DIR"
exec {shlex.quote(str(zig))} cc -target {cpu}-linux-musl -g0 \\
  -fno-unwind-tables -fno-asynchronous-unwind-tables "$@"
"""
    path = writable_dir() / f'zig-cc-{short_hash(text)}'
    if not path.exists():
        write_atomically(path, text, mode=0o755)
    return str(path)


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    "Write beside the file, then rename: others see the old file or the new one, never half of it."
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, 'w') as file:
        file.write(text)
    os.chmod(name, mode)
    os.replace(name, path)


def remembered_seconds(clang: str, zig: str) -> dict[str, float]:
    "How long the probe takes with each: measured once for a CPU and a pair of compilers."
    path = writable_dir() / 'compilers.json'
    key = short_hash(cpu_facts() + stamp(clang) + stamp(zig))
    try:
        known = json.loads(path.read_text())
        return {name: float(known[key][name]) for name in ('clang', 'zig')}
    except (OSError, ValueError, KeyError, TypeError):  # not measured yet, or the file is damaged
        seconds = {'clang': probe_seconds(clang), 'zig': probe_seconds(zig)}
        write_atomically(path, json.dumps({key: seconds}, indent=1))
        return seconds


def probe_seconds(compiler: str, repeats: int = 25) -> float:
    "Seconds for an fp16 and an fp32 product (two medians); infinite when it does not compile."
    y, w, x = (ctypes.create_string_buffer(4*n) for n in (192, 192*576, 576))
    times = {'half_matvec': [], 'float_matvec': []}
    with tempfile.TemporaryDirectory() as folder:
        library = os.path.join(folder, 'probe.so')
        try:
            subprocess.run([compiler, *PROBE_FLAGS, '-', '-o', library], input=PROBE.encode(),
                           check=True, capture_output=True, timeout=60)
            kernels = {name: getattr(ctypes.CDLL(library), name) for name in times}
        except (OSError, AttributeError, subprocess.SubprocessError):
            return float('inf')
    for name in list(times) * repeats:
        start = time.perf_counter()
        kernels[name](y, w, x)
        times[name].append(time.perf_counter() - start)
    return sum(map(statistics.median, times.values()))


def stamp(compiler: str) -> str:
    "What changes when a compiler is replaced: its real path, size and date."
    path = Path(shutil.which(compiler) or compiler).resolve()
    return f'{path} {path.stat().st_size} {path.stat().st_mtime_ns}' if path.exists() else str(path)


def short_hash(text: str) -> str:
    "Twelve hex digits that stand for `text` in a file name."
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def allow_threads() -> None:
    """Let more than one thread run kernels, one at a time.

    tinygrad looks compiled kernels up through one SQLite connection, and SQLite lets only the
    thread that opened a connection use it. From here on each thread opens its own.
    """
    from tinygrad import helpers
    open_connection, local, lock = helpers.db_connection, threading.local(), threading.Lock()

    def db_connection():
        if not hasattr(local, 'connection'):
            with lock:
                helpers._db_connection = None
                local.connection = open_connection()
        return local.connection
    helpers.db_connection = db_connection


def cpu_facts() -> str:
    "The CPU's model and instruction sets: what code for `native` depends on."
    try:
        lines = Path('/proc/cpuinfo').read_text().split('\n\n')[0].splitlines()
        facts = [line for line in lines if line.startswith(('model name', 'flags', 'Features'))]
    except OSError:
        facts = []
    return '\n'.join(facts) or f'{platform.machine()} {platform.processor()}'


def compiler_name() -> str:
    "The compiler's name for people: `zig 0.17.1 (ziglang wheel)`, or the first line of its `--version`."
    compiler = os.environ.get('CC') or 'clang'
    if Path(compiler).name.startswith('zig-cc-'):
        from importlib.metadata import version
        return f"zig {version('ziglang')} (ziglang wheel)"
    return first_line(compiler) or f'none ({INSTALL_COMPILER})'


@contextmanager
def capture_stderr() -> Iterator[list[str]]:
    "Collect what this process and its children write to the error stream inside the block, as one text."
    messages = []
    with STDERR_LOCK, tempfile.TemporaryFile('w+') as log:
        saved = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            yield messages
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            log.seek(0)
            messages.append(log.read())


def first_line(compiler: str) -> str:
    "The first line of what the compiler's `--version` prints; empty when it does not run."
    try:
        run = subprocess.run([compiler, '--version'], capture_output=True, text=True, timeout=10)
        return run.stdout.partition('\n')[0].strip()
    except (OSError, subprocess.SubprocessError):
        return ''
