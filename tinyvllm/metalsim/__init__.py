"""A Metal device for machines without a Mac: kernels run on the CPU, and are checked while they run.

The source of a kernel is compiled as C++ with headers of ours that play Metal's standard library.
Every thread of a threadgroup is a fiber; the lanes of a simdgroup meet at collectives, the threads
of a threadgroup at barriers. In check mode each read and write of the kernel is looked at: bounds,
alignment, races, uninitialised threadgroup memory, ends of arrays; and each integer division. A
complaint names the line and the thread.

    add = Library(source)['add']                                # Metal text -> kernel
    add([a, b, out, len(a)], grid=(4,), threads=(256,))         # numpy arrays, written in place
    add.verify([a, b, out, len(a)], (4,), (256,), outs=[2])     # five thread orders, three fills
    lint(source)                                                # what Metal's own compiler refuses
    count_operations(source).arrays                             # which arrays of a thread stay in memory
    with counting() as counts:                                  # who ran, reads, writes and bytes
        add([a, b, out, len(a)], grid=(4,), threads=(256,))
    with launching('add', order=1, origin=(3, 0, 0)):           # backwards, only the last threadgroup
        add([a, b, out, len(a)], grid=(4,), threads=(256,))
    with capturing() as sources:                                # what tinygrad compiles and runs
        Tensor.ones(4, device='METAL').realize()

`install()` goes further: with it tinygrad's own Metal renderer, scheduler, TinyJit and graph run
here unchanged. `import tinyvllm` calls it wherever there is no Metal, so that `DEV=METAL`,
`--device METAL` and `Tensor(x, device='METAL')` work. It is never chosen by itself.

The device keeps a Mac's rules, as far as they can be read off tinygrad's runtime: a thread that has used
it ends only with the process, a kernel with more threads than its pipeline takes is dropped from a graph
without an error, a command buffer that an M1 would compute for more than five seconds fails, and what a
GPU's family lacks is refused when a pipeline is built. See `command_buffers` and `pipelines`.

It needs clang 14 or newer, or the `ziglang` wheel, which tinyvllm installs on Linux. It cannot tell
how fast a kernel is, nor whether it fits into a GPU's registers.

Environment variables, for the device METAL:

    METALSIM_CHECK=0       run without checks, faster; 1 is the default
    METALSIM_FLUSH=0       keep denormals of single precision; 1, zero as on a GPU, is the default
    METALSIM_LINT=0        compile without lint; 1 is the default: each source is linted, once
    METALSIM_ARCH=Apple7   the GPU's family: Apple7 is M1, Apple8 is M2, Apple9 (the default) M3 and M4
    METALSIM_MAX_THREADS=64    threads that fit, by a kernel's registers, if it declares no number; default 1024
    METALSIM_DEFER=1       run kernels when they are waited for, as late as a GPU may; 0 is the default
    METALSIM_REFUSE=a,b    kernels whose pipelines are refused, by name
    METALSIM_CC=clang-14   the compiler; default: $CC, the first clang there is, ziglang
"""
import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

_HOMES = {'Library': 'kernel', 'Kernel': 'kernel', 'MetalError': 'compiler', 'MetalCompileError': 'compiler',
          'lint': 'linter', 'verify': 'checks', 'counting': 'counts', 'launching': 'kernel',
          'capturing': 'capture', 'count_operations': 'operations'}
__all__ = [*_HOMES, 'install']

RUNTIME = 'tinygrad.runtime.ops_metal'  # the module that tinygrad imports when METAL is first used


def __getattr__(name: str):
    "Load a public name from its module when it is first used: `import tinyvllm` stays light."
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_HOMES[name]}'), name)


class StandIn:
    "An import hook that knows one name: tinygrad's Metal runtime is found here."

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        "Our file for `RUNTIME`, nothing for any other name."
        if name == RUNTIME:
            return importlib.util.spec_from_file_location(name, Path(__file__).with_name('ops_metal.py'))


def install() -> None:
    """Answer for METAL from now on, unless this is a Mac, where the real one does.

    A hook, and not a module put in place, so that nothing is imported before METAL is asked for.
    The default device is chosen by then: tinygrad, left alone, would try METAL before all others.
    """
    if sys.platform != 'darwin' and StandIn not in sys.meta_path:
        sys.meta_path.insert(0, StandIn)
