"""From Metal to a shared object, by any clang from 14 on or by the `ziglang` wheel, kept in the cache folder.

In check mode clang's thread sanitizer puts a call before every read and write. The flag is given to
the compiler proper (`-Xclang`), so neither clang nor zig adds a runtime of its own: ours answers.
"""
import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from tinyvllm.device import first_line, short_hash, stamp, writable_dir, zig_wrapper
from tinyvllm.errors import BadInput
from tinyvllm.metalsim.translate import translation

HERE = Path(__file__).parent
OLDEST, NEWEST = 14, 30  # versions of clang that are looked for

# Arithmetic as Metal's: literals are float, char is signed, nothing is contracted, half stays half.
LANGUAGE = ['-x', 'c++', '-std=c++14', '-nostdinc++', '-Xclang', '-cl-single-precision-constant', '-fsigned-char',
            '-ffp-contract=off', '-fno-exceptions', '-fno-rtti', '-fno-stack-protector', '-fno-sanitize=undefined']
MESSAGES = ['-Wno-everything', '-Werror=return-type', '-ferror-limit=10', '-fno-caret-diagnostics']
SHARED = ['-shared', '-fPIC', '-nostdlib']
PLAIN = ['-O2']
# Scalars are left as they stand in the source, and what is not initialised holds a pattern. An index is compared
# with the array's size, and an access through a pointer with what is left of the array, where clang can tell.
CHECKED = ['-O1', '-gline-tables-only', '-Xclang',
           '-fsanitize=thread,array-bounds,local-bounds,integer-divide-by-zero',
           '-Xclang', '-fsanitize-trap=local-bounds', '-fno-vectorize', '-fno-slp-vectorize',
           '-ftrivial-auto-var-init=pattern',
           '-fwrapv']  # an index that overflows is wrong here, and not widened in silence
WRAP = '-Wl,--wrap=memcpy,--wrap=memmove,--wrap=memset'  # clang 14 does not rename what it instruments


class MetalError(RuntimeError):
    "An error of a kernel that runs, with the line and the thread."


class MetalCompileError(RuntimeError):
    "The source does not compile; the message is the compiler's, with the line numbers of the source."


@dataclass(frozen=True)
class Compiler:
    "A clang, by its own name or in the ziglang wheel."
    command: str
    major: int # version of clang

    @property
    def is_zig(self) -> bool:
        "Is it the compiler of the ziglang wheel?"
        return Path(self.command).name.startswith('zig-cc-')

    @property
    def flags(self) -> list[str]:
        "Flags for Metal: the language, half and the processor's instructions."
        half = ['-Xclang', '-ffloat16-excess-precision=none'] if self.major >= 16 else [
            '-Xclang', '-fnative-half-type', '-Xclang', '-fallow-half-arguments-and-returns']
        processor = ['-mavx2', '-mf16c', '-mfma'] if platform.machine() == 'x86_64' else []
        return [*LANGUAGE, *half, *processor, *MESSAGES, f"-I{HERE / 'include'}"]

    def run(self,
        flags: list[str], # all of them
        text: str, # what is compiled
    ) -> subprocess.CompletedProcess: # with stdout and stderr as text
        "Compile `text`, given on standard input."
        return subprocess.run([self.command, *flags, '-'], input=text, capture_output=True, text=True)


@cache
def compiler() -> Compiler:
    "Find `$METALSIM_CC`, `$CC`, the oldest clang or the ziglang wheel; raises `BadInput` without any."
    if sys.platform != 'linux':
        raise BadInput('the Metal simulator runs on Linux only; on a Mac use the device METAL itself')
    names = [os.environ.get('METALSIM_CC'), os.environ.get('CC'), 'clang',
             *(f'clang-{n}' for n in range(OLDEST, NEWEST)), zig_wrapper()]
    for command in filter(None, names):
        version = clang_version(command)
        if version >= OLDEST:
            return Compiler(command, version)
    raise BadInput(f'the Metal simulator needs a compiler: install clang ({OLDEST} or newer), or `pip install ziglang`')


def clang_version(command: str) -> int:
    "Return the major version of a clang; 0 if it does not run, or is another program."
    found = re.search(r'clang version (\d+)', first_line(command)) if shutil.which(command) else None
    return int(found.group(1)) if found else 0


def library(
    source: str, # Metal
    check: bool = True, # with a call to the runtime before every read and write
    flat: bool = False, # with entry points without fibers
    name: str = 'kernel.metal', # of the source, for messages
    constants: Mapping[str, object] = MappingProxyType({}), # values of function constants, by name
) -> Path: # of a shared object
    "Compile a source, or find it in the cache; raises `MetalCompileError`."
    flags = [*compiler().flags, *SHARED, *(CHECKED if check else PLAIN)]
    if check and not compiler().is_zig:
        flags.append(WRAP)
    try:
        return cached('kernel', flags, translation(source, name, flat, constants))
    except MetalCompileError as error:
        raise MetalCompileError('\n'.join(complaints(str(error), name))) from None


def complaints(
    text: str, # what a compiler has printed
    name: str, # of the source
) -> list[str]: # all of the text if it has none
    "Collect errors by their place in the source, also those in a header that it uses."
    found, elsewhere = [], None
    for place, kind, what in re.findall(r'^(.+?:\d+:\d+): (error|note|fatal error): (.*)$', text, re.M):
        if kind != 'note':
            elsewhere = what
        if elsewhere and place.startswith(f'{name}:'):
            found.append(f'{place}: error: {elsewhere}')
            elsewhere = None
    return found or [text]


def cached(
    kind: str, # first part of the file's name
    flags: list[str], # the compiler's
    text: str, # C++
) -> Path: # in the cache folder
    "Compile a text to a shared object in the cache, under a name made of all that it depends on."
    cc = compiler()
    folder = writable_dir() / 'metalsim'
    path = folder / f"{kind}-{short_hash(repr((flags, text, headers(), stamp(cc.command))))}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as build:
            done = cc.run([*flags, '-o', f'{build}/kernel.so'], text)
            if done.returncode:
                raise MetalCompileError(done.stderr.strip() or f'{cc.command} failed')
            os.replace(f'{build}/kernel.so', path)
    return path


@cache
def headers() -> str:
    "Return the text of our headers for Metal's standard library."
    return ''.join(path.read_text() for path in sorted((HERE / 'include').iterdir()))


@cache
def runtime() -> ctypes.CDLL:
    "Compile and load rt.cpp once, so that kernels find its functions."
    flags = ['-x', 'c++', '-std=c++17', '-O2', '-fno-exceptions', '-fno-rtti', '-fno-sanitize=undefined', *SHARED]
    path = cached('runtime', flags, (HERE / 'rt.cpp').read_text())
    loaded = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    loaded.msl_error.restype = ctypes.c_char_p
    loaded.msl_error_pc.restype = ctypes.c_uint64
    return loaded
