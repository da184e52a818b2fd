"""What `tinyvllm doctor` does: it runs every kernel on random cases, on the device at hand, against float64 numpy.

Meanwhile each new buffer of the device is full of NaN and lies between two guard regions. A kernel that leaves a value
out, or reads behind an end, returns NaN; one that writes outside of its buffers changes a guard region.
"""
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version

import numpy as np
from tinygrad import Device, Tensor, TinyJit
from tinygrad.helpers import Context
from tqdm import tqdm

from tinyvllm import __version__
from tinyvllm.cli.checks import CHECKS, TOLERANCE, Check, checks_for
from tinyvllm.cli.coverage import find_unchecked, record_engines
from tinyvllm.device import compiler_name
from tinyvllm.kernels.cases import REAL, SIMULATED, Case, relative_error
from tinyvllm.kernels.recording import RecordedKernels, recording
from tinyvllm.kernels.sparse import SparseArray, read_part
from tinyvllm.measure import _output, commit, machine_name, timed
from tinyvllm.metalsim import capturing, launching, lint

__all__ = ['CHECKS', 'TOLERANCE', 'Check', 'GuardDamage', 'GuardedAllocator', 'Row', 'checks_for', 'diagnose',
           'format_table', 'guard_allocator', 'heading', 'is_simulated', 'run_case', 'run_check', 'run_coverage',
           'run_lint']


def is_simulated(device: str) -> bool:
    "Is this METAL without a Mac? Its times mean nothing."
    return device.startswith('METAL') and sys.platform != 'darwin'


class GuardDamage(RuntimeError):
    "A kernel has written outside of its buffers."


class GuardedAllocator:
    """Inside the block, each new buffer of a device is full of NaN and lies between two guard regions.

    It replaces `alloc` and `free` of the device's allocator. `free` stays replaced: buffers may outlive the block.
    """
    WIDTH = 4096   # bytes before and behind; a multiple of every alignment
    GUARD = np.random.default_rng(0).integers(0xFFC1, 0xFFFF, WIDTH // 2, np.uint16).tobytes()   # NaNs, all sorts
    EMPTY = b'\xff'   # NaN in every float type, -1 in every integer
    LARGE = 2**30     # bytes: from here on a buffer is neither filled nor guarded

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
        "Allocate a larger buffer and return its middle; special memory, and what is too large to fill, is not changed."
        if options is not None or size >= self.LARGE:
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
    note: str = ''                   # what else is to be known, as why nothing ran

    def as_json(self) -> dict:
        "Return the fields of the JSON output: all but `trouble`."
        return {key: value for key, value in asdict(self).items() if key != 'trouble'}


def run_case(launch: Callable, case: Case, device: str) -> float:
    "Launch once between guard regions; return the relative error. Raises what the kernel raises, or `GuardDamage`."
    with guard_allocator(device) as guards, Context(NO_MEMORY_PLANNER=1):
        tensors = {name: x.to_tensor(device) if isinstance(x, SparseArray) else Tensor(x, device=device).realize()
                   for name, x in case.inputs.items()}
        with launching(**case.simulation) if is_simulated(device) else nullcontext():
            outs = case.call(launch, tensors)
            outs = outs if isinstance(outs, tuple) else (outs,)
            Tensor.realize(*outs)
            Device[device].synchronize()
        pairs = [read_output(out, want, case.skip) for out, want in zip(outs, case.want, strict=True)]
        if damage := guards.find_damage():
            raise GuardDamage(damage)
    return max(relative_error(*pair) for pair in pairs)


def read_output(
    out: Tensor, # realized
    want: np.ndarray | SparseArray, # what it must be
    skip: int, # rows that may hold anything
) -> tuple[np.ndarray, np.ndarray]: # what is there, what must be there
    "Read an output; of a sparse one the parts that are known."
    if not isinstance(want, SparseArray): return out.numpy()[skip:], want
    if out.shape != want.shape: return np.zeros(out.shape[:1]), np.zeros(0)
    if out.nbytes() < GuardedAllocator.LARGE:
        whole = out.numpy().reshape(-1)
        got = [whole[start:start + part.size] for start, part in want.parts.items()]
    else:    # it is no part of a guarded buffer
        got = [read_part(out, start, part.size) for start, part in want.parts.items()]
    return np.concatenate(got), np.concatenate([part.reshape(-1) for part in want.parts.values()])


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
        for i in range(min(cases, check.most or cases)):
            shape = i % max(check.operation.shapes, cases // 12)   # few: each one is compiled
            case = check.operation.make_case(np.random.default_rng([seed, i]), shape, dtype, limits)
            errors.append(run_case(launch, case, device))
            row.cases, row.max_rel_err = i + 1, max(errors) if np.isfinite(max(errors)) else None
            if not errors[-1] <= row.tolerance:
                hint = '' if np.isfinite(errors[-1]) else ' (NaN, or a wrong shape)'
                raise ArithmeticError(f'error {errors[-1]:.2g}{hint}')
            tick()
        row.ok, case = True, None   # what fails from here on is not about a case
        if check.most is None and not is_simulated(device):
            row.us, row.gbps = measure_launch(check, launch, dtype)
    except MemoryError as error:
        row.ok, row.note = not row.cases, f'not checked, the memory is too small: {error}'
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


def diagnose(
    device: str, # tinygrad's name
    cases: int = 20, # of each kernel and dtype
    kernel: str | None = None, # only this one
    seed: int = 0, # of the cases
) -> Iterator[Row]:
    "Check kernel after kernel and yield their rows. Raises `BadInput` if no kernel matches."
    work = [(check, dtype) for check in checks_for(device, kernel) for dtype in check.dtypes]
    with (tqdm(total=len(work) * cases, unit='case', disable=None) as bar, recording() as checked,
          capturing() as sources):
        for i, (check, dtype) in enumerate(work):
            bar.set_description(check.name)
            yield run_check(check, dtype, device, cases, seed, bar.update)
            bar.update((i + 1) * cases - bar.n)   # the cases that a failed kernel did not run
        if kernel is None:
            bar.set_description('engines')
            yield run_coverage(device, checked, cases)
        if is_simulated(device):    # on a Mac its own compiler has judged
            bar.set_description('lint')
            yield run_lint(device, sources)


def run_coverage(
    device: str, # tinygrad's name
    checked: RecordedKernels, # what the checks have launched
    cases: int, # of each check
) -> Row:
    "Run small engines of all kinds; each kernel that they launch must be among those that were checked."
    row = Row('engines', device, 0, None, 0, False)
    checked = RecordedKernels(checked)    # the engines' kernels are recorded, too
    try:
        captured = record_engines(device)
        missing = find_unchecked(captured, checked, by_text=cases >= max(check.operation.shapes for check in CHECKS))
        row.cases, row.ok, row.note = len(captured), not missing, 'launched: ' + ', '.join(sorted(captured.names))
        row.trouble = f'no check launches {", ".join(missing)}' if missing else ''
    except Exception as error:   # whatever an engine, a compiler or a driver raises
        row.trouble = str(error).strip() or type(error).__name__
    return row


def run_lint(
    device: str, # tinygrad's name
    sources: dict[str, list[str]], # Metal -> names of its kernels
) -> Row:
    "Look for what Apple's compiler would refuse, in every source that was compiled or run; tinygrad's own, too."
    found = [f'{", ".join(names)}: {complaint}' for source, names in list(sources.items())
             for complaint in lint(source)]
    return Row('lint', device, len(sources), None, 0, not found, trouble='\n'.join(found[:20]))


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
        f'\n{r.kernel}: {r.trouble or r.note}' for r in rows if r.trouble or r.note])
