"The sections of `tinyvllm doctor --report`: what each of them runs, and for how long at most."
import hashlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import psutil
from tinygrad import Device, Tensor, TinyJit, dtypes
from tinygrad.dtype import DType

from tinyvllm import LLM, SamplingParams, __version__
from tinyvllm.cli.coverage import KINDS, ModelKind, record_engines
from tinyvllm.cli.doctor import Check, checks_for, driver, is_simulated, run_check
from tinyvllm.cli.measurements import (Load, Workload, count_step, decode, layer_kernels, measure_rung, open_model,
                                       stored_as)
from tinyvllm.device import probe_metal, why_no_metal
from tinyvllm.engine.defaults import make_engine
from tinyvllm.measure import _output, commit, gpu_read_bandwidth, machine_name, read_bandwidth, timed
from tinyvllm.models.hub import DEFAULT_MODEL, resolve
from tinyvllm.models.llama import Llama, load_model

__all__ = ['SECTIONS', 'TOLERANCE', 'Plan', 'Section', 'bandwidth_probes', 'counting_syncs', 'identity',
           'source_digest', 'unusual']

GOLDENS = files('tinyvllm') / 'data/smollm2_golden.json'   # greedy tokens by transformers, in float32
# Of log-probabilities: rounding in tinygrad's own operations comes to 5e-5 in float32 and to 0.03 in float16.
TOLERANCE = {'float32': 1e-3, 'float16': 0.1}
# Of the ladder: rung, requests together, measured runs. The slow ones last, and once.
RUNG_RUNS = (('10c', 1, 3), ('10c', 4, 3), ('10c', 16, 3), ('07', 1, 3), ('08', 1, 1), ('04a', 1, 1), ('01c', 1, 1),
             ('01', 1, 1))


@dataclass(frozen=True)
class Plan:
    "What a report runs: the device, the model with its goldens, and the amount of work."
    device: str                                # tinygrad's name; the default device
    model: str = DEFAULT_MODEL                 # a name, a folder or a file
    goldens: Path = GOLDENS                    # prompts with the tokens and log-probabilities of that model
    cases: int = 12                            # of each kernel and dtype
    golden_tokens: int = 64                    # of each answer
    batches: tuple[int, ...] = (1, 8)          # sequences together, for which decoding is counted
    work: Workload = Workload(32, 16)          # of a rung; the ladder's
    rungs: tuple[tuple[str, int, int], ...] = RUNG_RUNS

    @cached_property
    def commit(self) -> str:
        "The commit at the start: the code that runs is that one's, whatever happens to the folder."
        return commit()

    def fetch(self) -> None:
        "Download the model, if it is not here and something will run it. Raises `BadInput`."
        if not is_simulated(self.device):
            resolve(self.model)

    @cached_property
    def fast(self) -> Llama:
        "The model as `LLM` runs it."
        return open_model(self.model)

    @cached_property
    def portable(self) -> Llama:
        "The model in tinygrad's operations: the first rungs, and the oracle of all."
        return load_model(resolve(self.model))

    @cached_property
    def llm(self) -> LLM:
        "An engine for one request after the other."
        return LLM(self.fast, max_num_seqs=1, max_model_len=min(256, self.fast.config.max_position_embeddings))


@dataclass(frozen=True)
class Section:
    "A group of parts, and the time that they have together."
    name: str
    list_parts: Callable[[Plan], dict[str, Callable]]   # name -> function of `tick` that returns a result
    seconds: float


def identity(plan: Plan) -> dict:
    "Return what must be equal for two runs to be of one report: machine, device, versions, source."
    system = f'macOS {platform.mac_ver()[0]}' if sys.platform == 'darwin' else platform.system()
    return dict(machine=machine_name(plan.device), device=plan.device, simulated=is_simulated(plan.device),
                system=f'{system} {platform.machine()}', compiler=driver(plan.device), tinyvllm=__version__,
                commit=plan.commit, source=source_digest(), tinygrad=version('tinygrad'), numpy=version('numpy'),
                python=platform.python_version(), model=os.path.basename(str(plan.model).rstrip('/')))


@cache
def source_digest() -> str:
    "Return twelve hex digits for the package's Python files: they tell changes that no commit has."
    folder, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob('*.py')):
        digest.update(f'{path.relative_to(folder)}\n'.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def hardware_only(list_parts: Callable) -> Callable:
    "Replace a section's parts by a note where METAL is simulated: times and speeds mean nothing there."
    def list_here(plan: Plan) -> dict[str, Callable]:
        note = dict(ok=True, skipped='METAL is simulated here: this needs a Mac')
        return {'all': lambda tick: note} if is_simulated(plan.device) else list_parts(plan)
    return list_here


# --- facts -------------------------------------------------------------------------------------------------

def fact_parts(plan: Plan) -> dict[str, Callable]:
    "Parts of `facts`: the machine, and whether something else keeps it busy."
    return {'machine': lambda tick: machine_facts(plan.device)}


def machine_facts(device: str) -> dict:
    "Return processor, GPU, memory and power, and what is unusual about them. None where the system does not say."
    battery = psutil.sensors_battery() if hasattr(psutil, 'sensors_battery') else None
    gpu_cores = re.search(r'"gpu-core-count" = (\d+)', _output('ioreg', '-rc', 'AGXAccelerator', '-d1'))
    macos, is_metal = platform.mac_ver()[0] or None, device.startswith('METAL')
    gpu = probe_metal() if macos else None
    facts = dict(
        cores=os.cpu_count(), performance_cores=apple_setting('hw.perflevel0.physicalcpu'),
        efficiency_cores=apple_setting('hw.perflevel1.physicalcpu'),
        memory_gb=round(psutil.virtual_memory().total / 2**30, 1), busy_percent=psutil.cpu_percent(interval=0.5),
        on_battery=None if battery is None else not battery.power_plugged,
        macos=macos, virtual=apple_setting('kern.hv_vmm_present') == 1 if macos else None,
        gpu=gpu and gpu.name, gpu_cores=int(gpu_cores[1]) if gpu_cores else None,
        gpu_family=Device[device].arch if is_metal else None,
        gpu_graph=Device[device].graph is not None if is_metal else None)
    return facts | dict(notes=list(unusual(facts, why_no_metal(gpu, macos) if macos else None)))


def unusual(
    facts: dict, # of `machine_facts`
    no_metal: str | None, # why METAL is not for this Mac
) -> Iterator[str]:
    "Yield a sentence for each fact that the kernels or the times may suffer from."
    if no_metal:
        yield no_metal.removesuffix('; the device is CPU')
    if facts['virtual']:
        yield 'a virtual machine: its times are not those of a Mac'
    if facts['gpu_graph'] is False:
        yield 'the GPU replays no graphs: each kernel is launched by itself'
    if facts['on_battery']:
        yield 'on battery: times may be longer'
    if facts['busy_percent'] > 20:
        yield f'other programs use {facts["busy_percent"]:.0f} % of the processor: times may be longer'


def apple_setting(name: str) -> int | None:
    "Return a number of `sysctl`; None on other systems."
    text = _output('sysctl', '-n', name)
    return int(text) if text.isdigit() else None


# --- compiler ----------------------------------------------------------------------------------------------

def compiler_parts(plan: Plan) -> dict[str, Callable]:
    "Parts of `compiler`: a kernel that no cache knows."
    return {'a new kernel': lambda tick: compile_new(plan.device)}


def compile_new(device: str) -> dict:
    "Compile and run a kernel with a constant that was never used before. Raises what the compiler raises."
    constant, start = time.time_ns() % 2**30, time.perf_counter()
    got = Tensor([0, 1, 2, 3], device=device).mul(2).add(constant).tolist()
    if got != [constant + 2 * i for i in range(4)]:
        return dict(ok=False, wrong=f'a kernel computed {got}')
    return {} if is_simulated(device) else dict(compile_s=round(time.perf_counter() - start, 3))


# --- bandwidth ---------------------------------------------------------------------------------------------

def bandwidth_parts(plan: Plan) -> dict[str, Callable]:
    "Parts of `bandwidth`: each probe."
    return {what: partial(measure_bandwidth, probe) for what, probe in bandwidth_probes(plan.device).items()}


def measure_bandwidth(probe: Callable[[], float], tick: Callable) -> dict:
    "Run a probe of memory."
    return dict(gb_s=round(probe() / 1e9, 2))


def bandwidth_probes(
    device: str, # tinygrad's name; the default device
) -> dict[str, Callable[[], float]]: # what is measured -> function that returns bytes per second
    "Return probes: a plain read, and how much of it tinygrad's matrix-vector product uses."
    reads = {'read': partial(gpu_read_bandwidth, device)}
    if device.startswith('CPU'):
        reads = {'read, 1 thread': partial(read_bandwidth, threads=1), 'read, all cores': read_bandwidth}
    return reads | {f'product, {dtype}': partial(product_bandwidth, getattr(dtypes, dtype))
                    for dtype in ('float32', 'float16')}


def product_bandwidth(dtype: DType) -> float:
    "Bytes of SmolLM2's output layer per second, best of 9; several matrices in turn, so that no cache holds them."
    weights = [Tensor.ones(49152, 576, dtype=dtype).contiguous().realize() for _ in range(8)]
    x = Tensor.ones(576, dtype=dtype).contiguous().realize()
    sweep = TinyJit(lambda x: [(w @ x).realize() for w in weights])
    return sum(w.nbytes() for w in weights) / min(timed(lambda: sweep(x), repeat=9, warmup=4).runs)


# --- kernels -----------------------------------------------------------------------------------------------

def kernel_parts(plan: Plan) -> dict[str, Callable]:
    "Parts of `kernels`: each kernel with each dtype. Raises `BadInput` for a device without any."
    return {f'{check.name} {dtype}': partial(check_kernel, plan, check, dtype)
            for check in checks_for(plan.device) for dtype in check.dtypes}


def check_kernel(plan: Plan, check: Check, dtype: str, tick: Callable) -> dict:
    "Run the cases of one kernel, and time it."
    row = run_check(check, dtype, plan.device, plan.cases, tick=tick)
    result = {key: value for key, value in row.as_json().items() if key not in ('kernel', 'device')}
    return result | (dict(wrong=row.trouble) if row.trouble else {})


# --- engines -----------------------------------------------------------------------------------------------

def engine_parts(plan: Plan) -> dict[str, Callable]:
    "Parts of `engines`: a small engine for each format of weights, with requests of all kinds."
    return {str(kind): partial(run_kind, plan.device, kind) for kind in KINDS}


def run_kind(device: str, kind: ModelKind, tick: Callable) -> dict:
    "Run one small engine. Raises what its kernels raise; a kernel that was refused is an error, too."
    return dict(kernels=record_engines(device, (kind,)).names)


# --- goldens -----------------------------------------------------------------------------------------------

def golden_parts(plan: Plan) -> dict[str, Callable]:
    "Parts of `goldens`: the greedy answer to each prompt."
    items = json.loads(plan.goldens.read_text(encoding='utf-8'))['items']
    return {item['name']: partial(compare_golden, plan, item) for item in items}


def compare_golden(plan: Plan, item: dict, tick: Callable) -> dict:
    """Compare greedy tokens, and the log-probability of each golden token after those before it.

    A token may differ where the two best are nearer to each other than the tolerance.
    """
    prompt, want = item['prompt_ids'], item['greedy_ids'][:plan.golden_tokens]
    greedy = SamplingParams(temperature=0, max_tokens=len(want), ignore_eos=True)
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    answer, = plan.llm.generate([prompt], greedy, use_tqdm=False)
    tick()
    forced, = plan.llm.generate([prompt + want], scored, use_tqdm=False)
    rows = forced.prompt_logprobs[len(prompt):]
    worst = max(abs(row[token].logprob - logprob) for row, token, logprob in zip(rows, want, item['top1_logprob']))
    tolerance = TOLERANCE['float32' if plan.device.startswith('CPU') else 'float16']
    got = list(answer.outputs[0].token_ids)
    first = next((i for i, pair in enumerate(zip(got, want)) if pair[0] != pair[1]), None)
    near_tie = first is not None and item['top1_top2_margin'][first] <= 2 * tolerance
    result = dict(ok=worst <= tolerance and (first is None or near_tie), tokens=len(want), first_difference=first,
                  near_tie=near_tie, max_logprob_error=round(worst, 6), tolerance=tolerance)
    if not result['ok']:
        result['wrong'] = f'first token that differs: {first}; log-probabilities differ by up to {worst:.2g}'
    return result


# --- counts ------------------------------------------------------------------------------------------------

def count_parts(plan: Plan) -> dict[str, Callable]:
    "Parts of `counts`: decoding with some sequences together."
    return {f'decode x{batch}': partial(count_decoding, plan, batch) for batch in plan.batches}


def count_decoding(plan: Plan, batch: int, tick: Callable) -> dict:
    "Count what decoding costs a token: kernels, bytes, launches of the graph, waits for an empty queue."
    load = Load(batch, 16, 16)
    counted = count_step(plan.fast, load, {})
    tick()
    engine, prompts = make_engine(plan.fast, **load.sizes), load.prompts(plan.fast.config.vocab_size)
    decode(engine, prompts, load)    # compiles, captures
    with counting_syncs(plan.device) as syncs:
        replayed = decode(engine, prompts, load)
    return dict(batch=batch, quant=stored_as(plan.fast), dtype=plan.fast.dtype,
                kernels_per_token=round(counted.kernels / counted.tokens, 2),
                kernels_per_layer=layer_kernels(plan.fast, load, {}),
                bytes_per_token=round(counted.nbytes / counted.tokens),
                launches_per_token=round(replayed.kernels / replayed.tokens, 2),
                syncs_per_token=round(len(syncs) / replayed.tokens, 2))


@contextmanager
def counting_syncs(device: str) -> Iterator[list]:
    "Collect an entry for each time that the host waits until the device has nothing left to do."
    syncs, owner = [], Device[device]
    synchronize = owner.synchronize
    owner.synchronize = lambda *args, **options: (syncs.append(1), synchronize(*args, **options))[1]
    try:
        yield syncs
    finally:
        del owner.synchronize


# --- rungs -------------------------------------------------------------------------------------------------

def rung_parts(plan: Plan) -> dict[str, Callable]:
    "Parts of `rungs`: rows of the ladder."
    return {f'{rung} x{requests}': partial(measure_one_rung, plan, rung, requests, repeat)
            for rung, requests, repeat in plan.rungs}


def measure_one_rung(plan: Plan, rung: str, requests: int, repeat: int, tick: Callable) -> dict:
    "Measure a row of the ladder; its tokens must be those of portable operations."
    work = Workload(plan.work.prompt_tokens, plan.work.tokens, requests)
    name = os.path.basename(str(plan.model).rstrip('/'))
    row = measure_rung(rung, plan.portable, work, repeat, name, plan.fast if rung == '10c' else None, tick)
    return dict(ok=row.greedy_equal, **asdict(row) | dict(commit=plan.commit)) | (
        {} if row.greedy_equal else dict(wrong="tokens that portable operations don't choose"))


SECTIONS = (
    Section('facts', fact_parts, 5),
    Section('compiler', compiler_parts, 15),
    Section('bandwidth', hardware_only(bandwidth_parts), 30),
    Section('kernels', kernel_parts, 190),
    Section('engines', hardware_only(engine_parts), 60),
    Section('goldens', hardware_only(golden_parts), 50),
    Section('counts', hardware_only(count_parts), 30),
    Section('rungs', hardware_only(rung_parts), 210),
)   # 590 seconds together
