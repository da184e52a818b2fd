"""What `tinyvllm doctor` does: every kernel on random cases, on the device at hand, against float64 numpy.

Meanwhile each buffer of the device is born full of NaN and lies between two fences. A kernel that
leaves a place out, reads behind an end, or trusts a masked slot answers NaN; one that writes where
it should not breaks a fence. Block 0 and all slots without a token hold NaN as well.
"""
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from math import gcd, prod

import numpy as np
from tinygrad import Device, Tensor, TinyJit
from tinygrad.helpers import Context
from tqdm import tqdm

from tinyvllm import __version__
from tinyvllm.device import compiler_name
from tinyvllm.errors import BadInput
from tinyvllm.measure import _output, commit, machine_name, timed

__all__ = ['CHECKS', 'REAL', 'SIMULATED', 'TOLERANCE', 'Attention', 'Case', 'Check', 'Chunks', 'Effort', 'Fences',
           'KVWrite', 'Matmul', 'Matvec', 'Prompts', 'Row', 'attention', 'checks_for', 'diagnose', 'fences', 'heading',
           'relative_error', 'repeated', 'run_case', 'run_check', 'simulated', 'table']

TOLERANCE = {'float16': 2e-3, 'float32': 1e-5}  # of max |got - want| / max |want|
HEAD_DIMS, GROUPS, BLOCK_SIZES = (64, 80, 96, 128), (1, 3, 4, 8), (8, 16, 32)
GPUS = 'METAL', 'CUDA'


@dataclass(frozen=True)
class Effort:
    "How large a case is: a GPU takes large ones, a simulator small ones."
    context: int  # most tokens of a sequence
    tokens: int   # of a decode step
    chunk: int    # tokens of a prompt's step
    width: int    # rows and columns of a matrix, at most


REAL, SIMULATED = Effort(320, 12, 100, 1536), Effort(40, 3, 12, 160)


def simulated(device: str) -> bool:
    "Is this METAL without a Mac? Its times say nothing."
    return device.startswith('METAL') and sys.platform != 'darwin'


@dataclass(frozen=True)
class Case:
    "Arguments of a kernel, and what it must answer."
    inputs: dict[str, np.ndarray]   # in the launcher's order
    want: tuple[np.ndarray, ...]    # float64, one for each output
    skip: int = 0                   # rows of each output that may hold anything

    def __str__(self) -> str:
        return ', '.join(f'{name} {"x".join(map(str, x.shape))}' for name, x in self.inputs.items())


def relative_error(
    got: np.ndarray, # what a kernel wrote
    want: np.ndarray, # float64; NaN where NaN must be left alone
) -> float:
    "The largest error as a share of the largest value; infinite for a NaN too many or too few."
    got, kept = got.astype(np.float64), ~np.isnan(want)
    if got.shape != want.shape or (np.isnan(got) == kept).any() or np.isinf(got).any():
        return float('inf')
    return float(np.abs(got - want)[kept].max(initial=0) / np.abs(want[kept]).max(initial=1e-30))


def mixed(n: int) -> tuple[int, int, int, int]:
    """Head dim, group, KV heads and block size of the n-th of 48 shapes.

    The first four have every value, the first sixteen every head dim with every group and block size.
    """
    return HEAD_DIMS[n % 4], GROUPS[(n + n // 4) % 4], (2, 1, 3, 2, 1)[n % 5], BLOCK_SIZES[n % 3]


def normal(rng: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    "Random numbers, rounded to the dtype before anybody computes with them."
    return rng.standard_normal(shape).astype(dtype)


def repeated(
    shape: tuple[int, ...], # of the tensor
    dtype: str, # 'float16' or 'float32'
    scale: float = 1.0, # the numbers' standard deviation
) -> Tensor: # a realized buffer on the default device
    "A large random tensor, quickly: some numbers, up to a million, again and again."
    n = prod(shape)
    block = normal(np.random.default_rng(0), dtype, gcd(n, 2**20)) * np.dtype(dtype).type(scale)
    return Tensor(block).realize().expand(n // len(block), -1).contiguous().reshape(shape).realize()


class Matvec:
    "`y = w @ x`."
    tokens = ()   # a vector has none

    @classmethod
    def case(cls, rng: np.random.Generator, n: int, dtype: str, effort: Effort) -> Case:
        "Rows: one, few, odd, many. Columns: heads and hidden sizes."
        rows = min((1, 8, 67, 576, 129)[n % 5], effort.width)
        columns = min((64, 576, 96, 1536, 128, 320)[n % 6], effort.width)
        tokens = tuple(1 + n % most for most in cls.tokens)
        w, x = normal(rng, dtype, rows, columns), normal(rng, dtype, *tokens, columns)
        return Case(dict(w=w, x=x), (x.astype(np.float64) @ w.astype(np.float64).T,))

    @classmethod
    def load(cls, launch: Callable, dtype: str) -> tuple[Callable, int, int]:
        "A chain of products, their number, and the bytes of one: together more than a cache holds."
        size, count = 2048, 16
        ws, x = [repeated((size, size), dtype, size**-0.5) for _ in range(count)], repeated((*cls.tokens, size), dtype)

        def chain() -> Tensor:
            y = x
            for w in ws * 4: y = launch(w, y)
            return y.realize()
        return chain, 4 * count, ws[0].nbytes() + 2 * x.nbytes()


class Matmul(Matvec):
    "`y = x @ w.T`, for up to nine tokens: a product that still waits for memory."
    tokens = 9,


class KVWrite:
    "Keys and values into their slots; everything else stays, and block 0 is anybody's."

    @staticmethod
    def case(rng: np.random.Generator, n: int, dtype: str, effort: Effort) -> Case:
        "Some tokens are padding: they go to slot 0, all of them."
        D, _, K, S = mixed(n)
        tokens, slots = 1 + 5 * effort.tokens * (n % 3), (3 + 5 * effort.tokens * 2 // S) * S
        pools = [normal(rng, dtype, slots, K, D) for _ in 'kv']
        for pool in pools: pool[:S] = pool[rng.integers(0, slots, 3)] = np.nan
        k, v = (normal(rng, dtype, tokens, K, D) for _ in 'kv')
        places = rng.permutation(np.arange(S, slots))[:tokens].astype(np.int32)
        padding = rng.random(tokens) < 0.2
        places[padding], k[padding], v[padding] = 0, 1, 1   # alike, as in the engine
        want = [pool.astype(np.float64) for pool in pools]
        for pool, new in zip(want, (k, v)): pool[places] = new
        inputs = dict(k_pool=pools[0], v_pool=pools[1], k=k, v=v, slots=places)
        return Case(inputs, tuple(pool[S:] for pool in want), skip=S)

    @staticmethod
    def load(launch: Callable, dtype: str) -> tuple[Callable, int, int]:
        "2,048 tokens a launch, all over a pool."
        K, D, tokens, count = 8, 64, 2048, 16
        pools = [repeated((tokens * count, K, D), dtype) for _ in 'kv']
        new = [repeated((tokens, K, D), dtype) for _ in 'kv']
        order = np.random.default_rng(0).permutation(tokens * count).astype(np.int32)
        places = [Tensor(part).realize() for part in order.reshape(count, tokens)]

        def chain() -> Tensor:
            k, v = pools
            for slots in places * 2: k, v = launch(k, v, *new, slots)
            return k.realize(v)
        return chain, 2 * count, 4 * new[0].nbytes() + 4 * tokens


def attention(q, k, v, tables, owners, positions, starts=None) -> np.ndarray:
    "Paged attention in float64, sequence by sequence; the answer for tokens after the last start is 0."
    out, S, (K, D) = np.zeros(q.shape), k.shape[1], k.shape[2:]
    real = np.arange(len(q)) < (len(q) if starts is None else starts[-1])
    for owner in np.unique(owners[real]):
        mine = np.flatnonzero(real & (owners == owner))
        past = np.arange(positions[mine].max() + 1)
        at = tables[owner, past // S], past % S
        keys, values = (x[at].astype(np.float64).swapaxes(0, 1) for x in (k, v))             # (K, L, D)
        heads = q[mine].astype(np.float64).reshape(len(mine), K, -1, D).transpose(1, 2, 0, 3)  # (K, G, n, D)
        scores = heads @ keys[:, None].swapaxes(2, 3) * D**-0.5                              # (K, G, n, L)
        scores[..., past > positions[mine, None]] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        mean = p / p.sum(-1, keepdims=True) @ values[:, None]
        out[mine] = mean.transpose(2, 0, 1, 3).reshape(len(mine), -1, D)
    return out


def lengths(rng: np.random.Generator, count: int, S: int, most: int) -> np.ndarray:
    "Contexts: one token, a full block, full blocks, as long as can be, anything."
    choices = 1, S, S * rng.integers(1, most // S + 1), most, rng.integers(1, most + 1)
    return np.array([choices[i] for i in rng.permutation(5)[:count]])


def pools(rng: np.random.Generator, contexts, S: int, K: int, D: int, width: int, dtype: str):
    "Keys, values and tables of some sequences, their blocks shuffled; all other slots hold NaN."
    used = [-(-n // S) for n in contexts]
    blocks = list(1 + rng.permutation(sum(used) + 3))   # 0 is for padding, three belong to nobody
    tables = np.zeros((len(contexts) + 1, width), np.int32)   # a last row of padding
    k, v = np.full((2, len(blocks) + 1, S, K, D), np.nan, dtype)
    for table, n, count in zip(tables, contexts, used):
        table[:count] = [blocks.pop() for _ in range(count)]
        place = np.arange(n)
        k[table[place // S], place % S] = normal(rng, dtype, n, K, D)
        v[table[place // S], place % S] = normal(rng, dtype, n, K, D)
    return k, v, tables


class Attention:
    "Paged attention of single tokens: `launch(q, k, v, tables, owners, positions)`."
    prompts = False   # many tokens of a sequence, one after the other
    starts = False    # the kernel is told where each sequence begins, and writes 0 for padding

    @classmethod
    def case(cls, rng: np.random.Generator, n: int, dtype: str, effort: Effort) -> Case:
        "Up to three sequences of ragged lengths; most cases end in tokens of padding."
        D, group, K, S = mixed(n)
        width = -(-effort.context // S)
        contexts = lengths(rng, 1 + n % 3, S, width * S)
        k, v, tables = pools(rng, contexts, S, K, D, width, dtype)
        owners, positions, starts = cls.tokens(rng, contexts, effort.chunk if cls.prompts else effort.tokens)
        q = normal(rng, dtype, len(owners), K * group, D) * np.dtype(dtype).type(rng.integers(1, 3))
        inputs = dict(q=q, k=k, v=v, tables=tables, owners=owners, positions=positions)
        if cls.starts: inputs['starts'] = starts
        return Case(inputs, (attention(**inputs),))

    @staticmethod
    def tokens(rng: np.random.Generator, contexts: np.ndarray, room: int):
        "Owners and positions of `room` tokens: first the last ones of each sequence, then any."
        owners = np.append(np.arange(len(contexts)), rng.integers(0, len(contexts), room))[:room]
        positions = contexts[owners] - 1
        positions[len(contexts):] = rng.integers(0, contexts[owners[len(contexts):]])
        if room > len(contexts): owners[-1] = positions[-1] = 0   # as padding has it
        return owners.astype(np.int32), positions.astype(np.int32), None

    @classmethod
    def load(cls, launch: Callable, dtype: str) -> tuple[Callable, int, int]:
        "Eight sequences of 1,024 tokens, or a prompt of 512: 32 heads, 8 of them with keys of their own."
        H, K, D, S, count = 32, 8, 64, 16, 8
        seqs, context, T = (1, 512, 512) if cls.prompts else (8, 1024, 8)
        k, v = (repeated((count * seqs * context // S, S, K, D), dtype) for _ in 'kv')
        order = np.random.default_rng(0).permutation(k.shape[0]).astype(np.int32)
        tables = [Tensor(x).realize() for x in order.reshape(count, seqs, context // S)]
        owners, positions = (np.zeros(T), np.arange(T)) if cls.prompts else (np.arange(T), np.full(T, context - 1))
        extra = [owners, positions] + ([np.array([0, T])] if cls.starts else [])
        extra, first = [Tensor(x.astype(np.int32)).realize() for x in extra], repeated((T, H, D), dtype)
        order = tables[:4] if cls.prompts else tables * 4

        def chain() -> Tensor:
            q = first
            for table in order: q = launch(q, k, v, table, *extra)
            return q.realize()
        return chain, len(order), 2 * first.nbytes() + (k.nbytes() + v.nbytes()) // count


class Prompts(Attention):
    "Prompts, or parts of them, against the cache, for kernels that take any mix of tokens."
    prompts = True

    @staticmethod
    def tokens(rng: np.random.Generator, contexts: np.ndarray, room: int):
        "The last tokens of each context, as many as have room, and padding behind them."
        (owners, positions), starts = np.zeros((2, room), np.int32), [0]
        for i, n in enumerate(contexts):
            most = min(n, room - starts[-1] - (len(contexts) - 1 - i))   # one is left for each of the others
            new = int(most if rng.random() < 0.3 else rng.integers(1, most + 1))
            here = slice(starts[-1], starts[-1] + new)
            owners[here], positions[here] = i, np.arange(n - new, n)
            starts.append(here.stop)
        return owners, positions, np.array(starts + starts[-1:], np.int32)   # the table's last row has none


class Chunks(Prompts):
    "The same for kernels that are told more: `launch(q, k, v, tables, owners, positions, starts)`."
    starts = True


@dataclass(frozen=True)
class Check:
    "A kernel: where it runs, and what its answers are held against."
    kernel: str                 # module and launcher, such as 'softmax.decode'
    operation: type             # gives cases, and a load to be timed
    devices: tuple[str, ...]    # where it has a source
    rung: str = ''              # the module's name of one of the launcher's kernels; '': its own choice
    part: int | None = None     # of a context that is cut; None: the launcher's choice
    dtypes: tuple[str, ...] = tuple(TOLERANCE)

    @property
    def name(self) -> str:
        "As the table has it: the launcher, and in brackets which of its variants."
        variant = self.rung.split('_')[-1].lower() or (f'part={self.part}' if self.part else '')
        variant = variant or ('prompts' if self.operation is Prompts else '')
        return f'{self.kernel}[{variant}]' if variant else self.kernel

    def launcher(self) -> Callable:
        "The function, imported when it is needed."
        module, function = self.kernel.split('.')
        module = import_module(f'tinyvllm.kernels.{module}')
        options = dict(rung=getattr(module, self.rung)) if self.rung else {}
        return partial(getattr(module, function), **options | (dict(part=self.part) if self.part else {}))


CHECKS = (
    *(Check('simd.matvec', Matvec, GPUS, f'MATVEC_{rung}') for rung in ('NAIVE', 'COALESCED', 'VECTOR', 'ROWS')),
    Check('simd.kv_write', KVWrite, GPUS),
    Check('simd.decode_simple', Attention, GPUS),
    Check('softmax.decode', Attention, GPUS),
    Check('softmax.decode_split', Attention, GPUS),
    Check('softmax.decode_split', Attention, GPUS, part=32),
    Check('flash.flash', Chunks, GPUS, 'FLASH_TILED'),
    Check('flash.flash', Chunks, GPUS, 'FLASH_MATRIX', dtypes=('float16',)),
    Check('cpu.matvec', Matvec, ('CPU',)),
    Check('cpu.matmul', Matmul, ('CPU',)),
    Check('cpu.kv_write', KVWrite, ('CPU',)),
    Check('cpu.attend', Attention, ('CPU',)),
    Check('cpu.attend', Prompts, ('CPU',)),
)


class Fences:
    """Inside the block, each new buffer of a device is full of NaN and lies between two fences.

    It stands in front of the allocator. What was allocated inside may be freed later, so the way
    back stays as long as the process.
    """
    WIDTH = 4096   # bytes before and behind; a multiple of every alignment
    FENCE = np.random.default_rng(0).integers(0xFFC1, 0xFFFF, WIDTH // 2, np.uint16).tobytes()   # NaNs, all sorts
    EMPTY = b'\xff'   # NaN in every float type, -1 in every integer

    def __init__(self, device: str):
        Tensor.zeros(1, device=device).contiguous().realize()   # what the device keeps for itself is there now
        self.allocator = Device[device].allocator
        self.alloc, self.free = self.allocator.alloc, self.allocator.free
        self.fenced: dict[int, tuple] = {}   # id of a part -> the part, its size, all of it

    def __enter__(self) -> 'Fences':
        self.allocator.alloc, self.allocator.free = self.fenced_alloc, self.fenced_free
        return self

    def __exit__(self, *_) -> None:
        self.allocator.alloc = self.alloc

    def fenced_alloc(self, size: int, options=None):
        "A part of a larger buffer; special memory, as for copies, is left alone."
        if options is not None:
            return self.alloc(size, options)
        whole = self.alloc(size + 2 * self.WIDTH, options)
        self.allocator._copyin(whole, memoryview(bytearray(self.FENCE + self.EMPTY * size + self.FENCE)))
        part = self.allocator._offset(whole, size, self.WIDTH)
        self.fenced[id(part)] = part, size, whole
        return part

    def fenced_free(self, part, size: int, options=None) -> None:
        "Give the larger buffer back."
        if id(part) not in self.fenced:
            return self.free(part, size, options)
        whole = self.fenced.pop(id(part))[2]
        self.free(whole, size + 2 * self.WIDTH, options)

    def broken(self) -> str:
        "What was written outside of the buffers that still live; empty if nothing was."
        damage, seen = [], np.empty(self.WIDTH, np.uint8)
        for _, size, whole in list(self.fenced.values()):
            for where, offset in (('before', 0), ('behind', self.WIDTH + size)):
                fence = self.allocator._offset(whole, self.WIDTH, offset)
                self.allocator._copyout(memoryview(seen), fence)
                if changed := np.count_nonzero(seen != np.frombuffer(self.FENCE, np.uint8)):
                    damage.append(f'wrote {changed} bytes {where} a buffer of {size}')
                    self.allocator._copyin(fence, memoryview(bytearray(self.FENCE)))   # the next one is not to blame
        return ', '.join(damage)


fences = cache(Fences)   # one in front of each device


@dataclass
class Row:
    "What is known about one kernel on one device."
    kernel: str                      # its name and dtype
    device: str
    cases: int                       # that ran
    max_rel_err: float | None        # of all cases; None if none ran, or one answered NaN
    tolerance: float
    ok: bool
    us: float | None = None          # of a launch; None if it was not timed
    gbps: float | None = None        # of bytes that must be moved
    trouble: str = ''                # what went wrong

    def as_json(self) -> dict:
        return {key: value for key, value in asdict(self).items() if key != 'trouble'}


def run_case(launch: Callable, case: Case, device: str) -> float:
    "Launch once, inside fences; the relative error. Raises what the kernel raises, and for a broken fence."
    with fences(device) as fence, Context(NO_MEMORY_PLANNER=1):
        tensors = [Tensor(x, device=device).realize() for x in case.inputs.values()]
        outs = launch(*tensors)
        outs = outs if isinstance(outs, tuple) else (outs,)
        Tensor.realize(*outs)
        got = [out.numpy()[case.skip:] for out in outs]
        if damage := fence.broken():
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
    "All cases of one kernel; it stops at the first that fails, and says which."
    effort = SIMULATED if simulated(device) else REAL
    row, case = Row(f'{check.name} {dtype}', device, 0, None, TOLERANCE[dtype], False), None
    try:
        launch, errors = check.launcher(), []
        for i in range(cases):
            shape = i % max(4, cases // 12)   # few: each one is compiled
            case = check.operation.case(np.random.default_rng([seed, i]), shape, dtype, effort)
            errors.append(run_case(launch, case, device))
            row.cases, row.max_rel_err = i + 1, max(errors) if np.isfinite(max(errors)) else None
            if not errors[-1] <= row.tolerance:
                hint = '' if np.isfinite(errors[-1]) else ' (NaN, or a wrong shape)'
                raise ArithmeticError(f'error {errors[-1]:.2g}{hint}')
            tick()
        row.ok = True
        case = None   # what fails from here on is not about it
        if not simulated(device): row.us, row.gbps = timing(check, launch, dtype)
    except Exception as error:   # whatever a compiler, a driver or a kernel comes up with
        row.ok, row.trouble = False, str(error).strip() or type(error).__name__
        if case: row.trouble = f'case {i}, {case}: {row.trouble}'
    return row


def timing(check: Check, launch: Callable, dtype: str) -> tuple[float, float]:
    "Microseconds of a launch and GB/s, median of 3 runs of a chain of launches that TinyJit recorded."
    chain, launches, nbytes = check.operation.load(launch, dtype)
    replay, replays = TinyJit(chain), 2   # the second is asked for while the first one runs
    seconds = timed(lambda: [replay() for _ in range(replays)], repeat=3, warmup=2).median / replays / launches
    return round(seconds * 1e6, 2), round(nbytes / seconds / 1e9, 2)


def checks_for(
    device: str, # tinygrad's name
    kernel: str | None = None, # only this: a module, a function, 'module.function', or a name of the table
) -> list[Check]:
    "What can be checked. Raises `BadInput` where that is nothing."
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
    "Check kernel after kernel. Raises `BadInput` before the first if there is none."
    work = [(check, dtype) for check in checks_for(device, kernel) for dtype in check.dtypes]
    with tqdm(total=len(work) * cases, unit='case', disable=None) as bar:
        for i, (check, dtype) in enumerate(work):
            bar.set_description(check.name)
            yield run_check(check, dtype, device, cases, seed, bar.update)
            bar.update((i + 1) * cases - bar.n)   # what a failed one left out


def heading(device: str, seed: int = 0) -> str:
    "One line that says what ran where."
    tools = f'{device} on {machine_name(device)}, {driver(device)}'
    return (f'tinyvllm {__version__} ({commit()}), tinygrad {version("tinygrad")}, '
            f'Python {platform.python_version()}, {tools}, seed {seed}')


def driver(device: str) -> str:
    "What turns source into results there."
    if device.startswith('CUDA'):
        return 'driver ' + _output('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader').split('\n')[0]
    if device.startswith('METAL') and not simulated(device):
        return f'macOS {platform.mac_ver()[0]}'
    return ('simulated, ' if simulated(device) else '') + compiler_name()


def table(rows: list[Row]) -> str:
    "Markdown, and below it what went wrong."
    head = ['kernel', 'device', 'cases', 'max relative error', 'tolerance', 'ok', 'µs', 'GB/s']

    def show(x, form): return '' if x is None else format(x, form)
    lines = [head, ['---'] * 2 + ['---:'] * 3 + ['---'] + ['---:'] * 2]
    lines += [[r.kernel, r.device, str(r.cases), show(r.max_rel_err, '.1e'), f'{r.tolerance:.0e}',
               'yes' if r.ok else '**NO**', show(r.us, '.1f'), show(r.gbps, '.1f')] for r in rows]
    return '\n'.join([f'| {" | ".join(line)} |' for line in lines] + [
        f'\n{r.kernel}: {r.trouble}' for r in rows if r.trouble])
