"""What `tinyvllm doctor` does: it runs every kernel on random cases, on the device at hand, against float64 numpy.

Meanwhile each new buffer of the device is full of NaN and lies between two guard regions. A kernel that leaves a value
out, or reads behind an end, returns NaN; one that writes outside of its buffers changes a guard region.
"""
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version

import numpy as np
from tinygrad import Device, Tensor, TinyJit
from tinygrad.helpers import Context
from tqdm import tqdm

from tinyvllm import __version__
from tinyvllm.device import compiler_name
from tinyvllm.errors import BadInput
from tinyvllm.kernels import cases as operations
from tinyvllm.kernels.cases import REAL, SIMULATED, Case, relative_error
from tinyvllm.measure import _output, commit, machine_name, timed

__all__ = ['CHECKS', 'TOLERANCE', 'Check', 'GuardedAllocator', 'Row', 'checks_for', 'diagnose', 'format_table',
           'guard_allocator', 'heading', 'is_simulated', 'run_case', 'run_check']

TOLERANCE = {'float16': 2e-3, 'float32': 1e-5}  # of max |got - want| / max |want|
GPUS = 'METAL', 'CUDA'


def is_simulated(device: str) -> bool:
    "Is this METAL without a Mac? Its times mean nothing."
    return device.startswith('METAL') and sys.platform != 'darwin'


@dataclass(frozen=True)
class Check:
    "A kernel: on which devices it runs, and which operation gives its cases."
    kernel: str                 # module and launcher, such as 'softmax.decode'
    operation: object           # of `tinyvllm.kernels.cases`: `make_case` and `make_load`
    devices: tuple[str, ...]    # for which it has a source
    rung: str = ''              # one of the launcher's kernels, such as 'flash.FLASH_TILED'; '': its own choice
    part: int | None = None     # positions of a part, for split contexts; None: the launcher's choice
    dtypes: tuple[str, ...] = tuple(TOLERANCE)

    @property
    def name(self) -> str:
        "The launcher, and in brackets which of its variants, as in `simd.matvec[rows]`."
        variant = self.rung.split('_')[-1].lower() or (f'part={self.part}' if self.part else '')
        variant = variant or ('prefill' if self.operation is operations.PREFILL else '')
        return f'{self.kernel}[{variant}]' if variant else self.kernel

    def launcher(self) -> Callable:
        "Import the launcher and bind its variant."
        def find(path):
            module, name = path.split('.')
            return getattr(import_module(f'tinyvllm.kernels.{module}'), name)
        options = dict(rung=find(self.rung)) if self.rung else {}
        return partial(find(self.kernel), **options | (dict(part=self.part) if self.part else {}))


CHECKS = (
    *(Check('simd.matvec', operations.MATVEC, GPUS, f'simd.MATVEC_{rung}')
      for rung in ('NAIVE', 'COALESCED', 'VECTOR', 'ROWS')),
    Check('simd.kv_write', operations.KV_WRITE, GPUS),
    Check('simd.decode_simple', operations.DECODE, GPUS),
    Check('softmax.decode', operations.DECODE, GPUS),
    Check('softmax.decode_split', operations.DECODE, GPUS),
    Check('softmax.decode_split', operations.DECODE, GPUS, part=32),
    Check('flash.flash', operations.PREFILL_STARTS, GPUS, 'flash.FLASH_TILED'),
    Check('flash.flash', operations.PREFILL_STARTS, ('METAL',), 'flash.FLASH_MATRIX', dtypes=('float16',)),
    Check('flash.flash', operations.PREFILL_STARTS, ('CUDA',), 'flash_cuda.FLASH_CUDA', dtypes=('float16',)),
    Check('cpu.matvec', operations.MATVEC, ('CPU',)),
    Check('cpu.matmul', operations.MATMUL, ('CPU',)),
    Check('cpu.kv_write', operations.KV_WRITE, ('CPU',)),
    Check('cpu.attend', operations.DECODE, ('CPU',)),
    Check('cpu.attend', operations.PREFILL, ('CPU',)),
)


class GuardedAllocator:
    """Inside the block, each new buffer of a device is full of NaN and lies between two guard regions.

    It replaces `alloc` and `free` of the device's allocator. `free` stays replaced: buffers may outlive the block.
    """
    WIDTH = 4096   # bytes before and behind; a multiple of every alignment
    GUARD = np.random.default_rng(0).integers(0xFFC1, 0xFFFF, WIDTH // 2, np.uint16).tobytes()   # NaNs, all sorts
    EMPTY = b'\xff'   # NaN in every float type, -1 in every integer

    def __init__(self, device: str):
        Tensor.zeros(1, device=device).contiguous().realize()   # what the device keeps for itself is there now
        self.allocator = Device[device].allocator
        self.alloc, self.free = self.allocator.alloc, self.allocator.free
        self.guarded: dict[int, tuple] = {}   # id of a part -> the part, its size, the whole buffer

    def __enter__(self) -> 'GuardedAllocator':
        self.allocator.alloc, self.allocator.free = self.guarded_alloc, self.guarded_free
        return self

    def __exit__(self, *_) -> None:
        self.allocator.alloc = self.alloc

    def guarded_alloc(self, size: int, options=None):
        "Allocate a larger buffer and return its middle; special memory, as for copies, is passed through."
        if options is not None:
            return self.alloc(size, options)
        whole = self.alloc(size + 2 * self.WIDTH, options)
        self.allocator._copyin(whole, memoryview(bytearray(self.GUARD + self.EMPTY * size + self.GUARD)))
        part = self.allocator._offset(whole, size, self.WIDTH)
        self.guarded[id(part)] = part, size, whole
        return part

    def guarded_free(self, part, size: int, options=None) -> None:
        "Free the larger buffer to which the part belongs."
        if id(part) not in self.guarded:
            return self.free(part, size, options)
        whole = self.guarded.pop(id(part))[2]
        self.free(whole, size + 2 * self.WIDTH, options)

    def find_damage(self) -> str:
        "Describe the changed guard regions of the live buffers, and restore them; empty if all are whole."
        damage, seen = [], np.empty(self.WIDTH, np.uint8)
        for _, size, whole in list(self.guarded.values()):
            for where, offset in (('before', 0), ('behind', self.WIDTH + size)):
                guard = self.allocator._offset(whole, self.WIDTH, offset)
                self.allocator._copyout(memoryview(seen), guard)
                if changed := np.count_nonzero(seen != np.frombuffer(self.GUARD, np.uint8)):
                    damage.append(f'wrote {changed} bytes {where} a buffer of {size}')
                    self.allocator._copyin(guard, memoryview(bytearray(self.GUARD)))
        return ', '.join(damage)


guard_allocator = cache(GuardedAllocator)   # one for each device


@dataclass
class Row:
    "The result of checking one kernel on one device."
    kernel: str                      # its name and dtype
    device: str
    cases: int                       # that ran
    max_rel_err: float | None        # of all cases; None if none ran, or a result was NaN
    tolerance: float
    ok: bool
    us: float | None = None          # of a launch; None if it was not timed
    gbps: float | None = None        # of bytes that must be moved
    trouble: str = ''                # why it is not ok

    def as_json(self) -> dict:
        "Return the fields of the JSON output: all but `trouble`."
        return {key: value for key, value in asdict(self).items() if key != 'trouble'}


def run_case(launch: Callable, case: Case, device: str) -> float:
    "Launch once between guard regions; return the relative error. Raises what the kernel raises, or `MemoryError`."
    with guard_allocator(device) as guards, Context(NO_MEMORY_PLANNER=1):
        tensors = [Tensor(x, device=device).realize() for x in case.inputs.values()]
        outs = launch(*tensors)
        outs = outs if isinstance(outs, tuple) else (outs,)
        Tensor.realize(*outs)
        got = [out.numpy()[case.skip:] for out in outs]
        if damage := guards.find_damage():
            raise MemoryError(damage)
    return max(relative_error(*pair) for pair in zip(got, case.want, strict=True))


def run_check(
    check: Check, # which kernel
    dtype: str, # 'float16' or 'float32'
    device: str, # tinygrad's name
    cases: int, # how many
    seed: int = 0, # the same cases for the same number
    tick: Callable[[], object] = lambda: None, # called after each case
) -> Row:
    "Run all cases of one kernel, up to the first that fails, and time it; the row says what went wrong."
    limits = SIMULATED if is_simulated(device) else REAL
    row, case = Row(f'{check.name} {dtype}', device, 0, None, TOLERANCE[dtype], False), None
    try:
        launch, errors = check.launcher(), []
        for i in range(cases):
            shape = i % max(4, cases // 12)   # few: each one is compiled
            case = check.operation.make_case(np.random.default_rng([seed, i]), shape, dtype, limits)
            errors.append(run_case(launch, case, device))
            row.cases, row.max_rel_err = i + 1, max(errors) if np.isfinite(max(errors)) else None
            if not errors[-1] <= row.tolerance:
                hint = '' if np.isfinite(errors[-1]) else ' (NaN, or a wrong shape)'
                raise ArithmeticError(f'error {errors[-1]:.2g}{hint}')
            tick()
        row.ok, case = True, None   # what fails from here on is not about a case
        if not is_simulated(device):
            row.us, row.gbps = measure_launch(check, launch, dtype)
    except Exception as error:   # whatever a compiler, a driver or a kernel raises
        row.ok, row.trouble = False, str(error).strip() or type(error).__name__
        if case:
            row.trouble = f'case {i}, {case}: {row.trouble}'
    return row


def measure_launch(check: Check, launch: Callable, dtype: str) -> tuple[float, float]:
    "Return microseconds of a launch and GB/s: the median of 3 runs of a chain of launches captured by TinyJit."
    chain, launches, nbytes = check.operation.make_load(launch, dtype)
    replay, replays = TinyJit(chain), 2   # the second is submitted while the first one runs
    seconds = timed(lambda: [replay() for _ in range(replays)], repeat=3, warmup=2).median / replays / launches
    return round(seconds * 1e6, 2), round(nbytes / seconds / 1e9, 2)


def checks_for(
    device: str, # tinygrad's name
    kernel: str | None = None, # only this: a module, a function, 'module.function', or a name of the table
) -> list[Check]:
    "Return the checks for a device. Raises `BadInput` where there are none."
    kind = device.split(':')[0]
    here = [check for check in CHECKS if kind in check.devices]
    if not here:
        known = sorted({d for check in CHECKS for d in check.devices})
        raise BadInput(f'no kernel of tinyvllm runs on {device}, so there is nothing to check; '
                       f'{", ".join(known)} have some')
    found = [check for check in here if kernel in (None, check.name, check.kernel, *check.kernel.split('.'))]
    if not found:
        raise BadInput(f'no kernel {kernel!r} on {device}; there are {", ".join(check.name for check in here)}')
    return found


def diagnose(
    device: str, # tinygrad's name
    cases: int = 20, # of each kernel and dtype
    kernel: str | None = None, # only this one
    seed: int = 0, # of the cases
) -> Iterator[Row]:
    "Check kernel after kernel and yield their rows. Raises `BadInput` if no kernel matches."
    work = [(check, dtype) for check in checks_for(device, kernel) for dtype in check.dtypes]
    with tqdm(total=len(work) * cases, unit='case', disable=None) as bar:
        for i, (check, dtype) in enumerate(work):
            bar.set_description(check.name)
            yield run_check(check, dtype, device, cases, seed, bar.update)
            bar.update((i + 1) * cases - bar.n)   # the cases that a failed kernel did not run


def heading(device: str, seed: int = 0) -> str:
    "Return one line with versions, machine, device and seed."
    tools = f'{device} on {machine_name(device)}, {driver(device)}'
    return (f'tinyvllm {__version__} ({commit()}), tinygrad {version("tinygrad")}, '
            f'Python {platform.python_version()}, {tools}, seed {seed}')


def driver(device: str) -> str:
    "Return the driver, system or compiler that runs kernels on a device."
    if device.startswith('CUDA'):
        return 'driver ' + _output('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader').split('\n')[0]
    if device.startswith('METAL') and not is_simulated(device):
        return f'macOS {platform.mac_ver()[0]}'
    return ('simulated, ' if is_simulated(device) else '') + compiler_name()


def format_table(rows: list[Row]) -> str:
    "Format rows as a Markdown table, and below it what went wrong."
    head = ['kernel', 'device', 'cases', 'max relative error', 'tolerance', 'ok', 'µs', 'GB/s']

    def show(x, form):
        return '' if x is None else format(x, form)

    lines = [head, ['---'] * 2 + ['---:'] * 3 + ['---'] + ['---:'] * 2]
    lines += [[r.kernel, r.device, str(r.cases), show(r.max_rel_err, '.1e'), f'{r.tolerance:.0e}',
               'yes' if r.ok else '**NO**', show(r.us, '.1f'), show(r.gbps, '.1f')] for r in rows]
    return '\n'.join([f'| {" | ".join(line)} |' for line in lines] + [
        f'\n{r.kernel}: {r.trouble}' for r in rows if r.trouble])
