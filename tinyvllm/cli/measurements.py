"""What `tinyvllm bench` measures.

The ladder: the loops of 01 and 01c on one prompt, the engine on several. Rung 04a is the engine with portable
operations, 08 the same with the kernels of the device, 07 replays them as one graph, 10c has few kernels and the
weights as they are stored: what `LLM` runs. Prompts and answers of one measurement have equal lengths and start
together, so every step after the first is decoding alone, and its speed can be held against the memory limit.

The loads: decoding at a batch and a context, prefill, and a trace of requests, with what they cost the host, the
device and the memory.
"""
from __future__ import annotations
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
import time

import numpy as np
from tinygrad import Device, Tensor, dtypes
from tinygrad.helpers import Context
from tqdm import tqdm, trange

from tinyvllm.engine.llm import LLMEngine
from tinyvllm.engine.defaults import make_engine
from tinyvllm.errors import BadInput
from tinyvllm.engine.defaults import best_attend, best_cache
from tinyvllm.models.fused import FusedLlama
from tinyvllm.engine.defaults import best_model
from tinyvllm.reference.generate import answer_logits, generate, same_greedy
from tinyvllm.reference.kvcache import KVCache
from tinyvllm.models.llama import Llama, NoCache, kv_bytes, model_config, weight_bytes
from tinyvllm.measure import LadderRow, Stopwatch, bandwidth, counting, ladder_row, measure_stream
from tinyvllm.kv_cache.paged import PagedKVCache, paged_attend
from tinyvllm.runner.eager import EagerRunner
from tinyvllm.quant.pack import Packed, PackedLlama
from tinyvllm.quant.load import load_packed, packed_state
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.models.weights import tensor_shapes
from tinyvllm.models.hub import resolve

__all__ = ['RUNGS', 'SHAPES', 'Load', 'Run', 'Trace', 'Workload', 'as_text', 'engine_stream', 'layer_kernels',
           'measure_load', 'measure_rung', 'measure_trace', 'open_model', 'open_reference', 'plot_loads',
           'plot_trace', 'random_state']

RUNGS = {'01': '01_greedy', '01c': '01c_kvcache', '04a': '04a_engine', '08': '08_flash', '07': '07_tinyjit',
         '10c': '10c_fusion'}  # rung: its notebook
GRAPHS = '07', '10c'  # whose steps are one launch each


@dataclass(frozen=True)
class Workload:
    "What one measurement computes."
    prompt_tokens: int = 32
    tokens: int = 16  # generated per request
    requests: int = 1  # at the same time

    def __str__(self) -> str:
        return f'{self.prompt_tokens}+{self.tokens}'

    @property
    def room(self) -> int:
        "Tokens of one request in all."
        return self.prompt_tokens + self.tokens

    def prompts(self, vocab_size: int) -> list[list[int]]:
        "Random token ids, the same every time and different for every request."
        return np.random.default_rng(0).integers(0, vocab_size, (self.requests, self.prompt_tokens)).tolist()


def measure_rung(
    rung: str,  # a key of `RUNGS`
    model: Llama,  # on its device; computes the right tokens
    work: Workload,  # what to compute
    repeat: int = 3,  # measured runs; one more comes first and compiles
    name: str = '',  # of the model
    fast: Llama | None = None,  # for rung 10c: the model as `LLM` has it
    tick: Callable[[], object] = lambda: None,  # called after each step and each answer's check; may raise
) -> LadderRow:  # of the median run
    "Measure a rung and check its tokens. Raises `BadInput` for a workload beyond the context."
    runs_on = fast if fast and rung == '10c' else model
    context = model.config.max_position_embeddings
    if work.room > context:
        raise BadInput(f'{work} tokens are {work.room}, and the context is {context}; ask for fewer')
    prompts = work.prompts(model.config.vocab_size)
    stream = rung_stream(rung, runs_on, work, prompts)
    bar = trange(1 + repeat, desc=f'{rung} ×{work.requests}', unit='run', leave=False, disable=None)
    runs = [measure_stream(lambda: each_step(stream(), tick)) for _ in bar][1:]
    answers = (runs[0].tokens[i::work.requests] for i in range(work.requests))  # a step has one of each
    equal = [same_greedy(model, prompt, answer) for prompt, answer in each_step(zip(prompts, answers), tick)]
    row = ladder_row(runs, weight_bytes(runs_on), kv_bytes(runs_on) * work.room, work.requests, rung=rung,
                     notebook=RUNGS[rung], model=name, dtype=stored_as(runs_on) or model.dtype, workload=str(work),
                     greedy_equal=all(equal))
    if rung in GRAPHS:    # the last step's numbers arrive when nothing runs any more
        counts = count_step(runs_on, Load(work.requests, work.prompt_tokens, min(8, work.tokens)), {})
        row.kernels_per_token = round(counts.kernels / counts.tokens)
        row.bytes_per_token = round(counts.nbytes / counts.tokens)
    return row


def rung_stream(rung: str, model: Llama, work: Workload, prompts: list[list[int]]) -> Callable[[], Iterable]:
    "How a rung starts to answer: a function without arguments that yields what `measure_stream` takes."
    if rung in ('04a', '08', *GRAPHS):
        parts = {}
        if rung not in GRAPHS:
            attend = paged_attend if rung == '04a' else best_attend(model)
            cache = (PagedKVCache if rung == '04a' else best_cache)(model, blocks_for(work))
            parts = dict(cache=cache, runner=EagerRunner(model, cache, attend))
        engine = make_engine(model, max_num_seqs=work.requests, max_model_len=work.room,
                             max_num_batched_tokens=work.requests * work.prompt_tokens, **parts)
        return lambda: engine_stream(engine, prompts, work.tokens)
    cache = {'01': NoCache, '01c': lambda: KVCache(model, work.room)}[rung]
    return lambda: generate(model, prompts[0], work.tokens, cache=cache())


def each_step(steps: Iterable, tick: Callable[[], object]) -> Iterator:
    "Pass steps on, and call `tick` after each was used."
    for step in steps:
        yield step
        tick()


def blocks_for(work: Workload, block_size: int = 16) -> int:
    "Blocks with room for all requests, and block 0."
    return work.requests * -(-work.room // block_size) + 1


def engine_stream(
    engine: LLMEngine,  # has nothing else to do
    prompts: list[list[int]],  # token ids
    max_tokens: int,  # for each of them
) -> Iterator[list[int]]:  # the tokens of each step, in the order of the prompts
    "Answer prompts together, greedily and to the full length. Raises what a request failed with."
    answers = begin(engine, prompts, max_tokens)
    while engine.has_unfinished_requests():
        before = [len(a) for a in answers]
        step(engine)
        if new := [t for a, n in zip(answers, before) for t in a[n:]]:
            yield new


SHAPES = {   # random weights in a real model's shape; keys of config.json
    'tinyllama-1.1b': dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
                           num_key_value_heads=4, head_dim=64, vocab_size=32000,
                           max_position_embeddings=4096),    # its own is 2048: no room behind a prompt of 2048
    'smollm2-135m': dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                         num_key_value_heads=3, head_dim=64, vocab_size=49152, max_position_embeddings=8192,
                         rope_theta=100000.0, tie_word_embeddings=True),
    'qwen3-0.6b': dict(model_type='qwen3', hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                       num_attention_heads=16, num_key_value_heads=8, head_dim=128, vocab_size=151936,
                       max_position_embeddings=40960, rope_theta=1e6, tie_word_embeddings=True),
    'llama-3.1-8b': dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                         num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=131072,
                         rope_theta=500000.0),
}
FAMILY = dict(model_type='llama', rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False,
              attention_bias=False)


def random_state(
    shape: str,  # a key of `SHAPES`
    dtype: str = 'auto',  # float32, float16, bfloat16; auto: float32 on the CPU, else float16
    seed: int = 0,
) -> tuple[dict, dict[str, Tensor]]:  # keys of config.json; arrays under Hugging Face's names
    "Seeded random weights, drawn on the device. They compute nonsense at a real model's speed."
    config = FAMILY | SHAPES[shape]
    if dtype == 'auto':
        dtype = 'float32' if Device.DEFAULT.startswith('CPU') else 'float16'
    Tensor.manual_seed(seed)
    state = {}
    for name, size in tqdm(tensor_shapes(config).items(), desc=f'drawing {shape}', unit=' tensors', leave=False):
        width = (3 / size[-1]) ** 0.5    # variance 1 / fan-in
        low, high = (0.5, 1.5) if 'norm' in name else (-width, width)
        draws = Tensor.uniform(*size, low=low, high=high, dtype=getattr(dtypes, dtype))
        state[name] = draws.contiguous().realize()
    return config, state


def packed_model(
    model: str,  # a key of `SHAPES`, a name, a folder or a file
    dtype: str = 'auto',  # of random weights
    quant: str | None = None,  # such as int4-g32; None: as stored
) -> tuple:  # ModelConfig, packed weights
    "What both the fast model and its check are made of. Raises `BadInput`."
    if model not in SHAPES: return load_packed(resolve(model), quant)
    config, state = random_state(model, dtype)
    return model_config(config), packed_state(state, quant)


def open_model(
    model: str,  # a key of `SHAPES`, a name, a folder or a file
    dtype: str = 'auto',  # of weights that are not quantised
    quant: str | None = None,  # such as int4-g32; None: as stored
) -> Llama:
    "A model to measure, in the form that `LLM` gives it. Raises `BadInput`."
    if model not in SHAPES: return best_model(resolve(model), dtype, quantization=quant)
    return FusedLlama(PackedLlama(*packed_model(model, dtype, quant)))


def open_reference(
    model: str,  # as for `open_model`
    dtype: str = 'auto',
    quant: str | None = None,
) -> Llama:
    "The same numbers as plain float32 arrays, for portable operations."
    config, state = packed_model(model, dtype, quant)
    for name, w in state.items():
        plain = w.dequantize(dtypes.float) if isinstance(w, Packed) else w.float()
        state[name] = plain.contiguous().realize()
    return Llama(config, state)


def stored_as(model: Llama) -> str | None:
    "The format of a model's quantised matrices, such as q4_1."
    weight = model.layers[0].down.weight if isinstance(model, FusedLlama) else None
    return weight.format.name if weight and weight.format.bits < 16 else None


def agreement(
    reference: Llama,  # dense
    prompts: list[list[int]],
    answers: list[list[int]],  # greedy ones, of another engine
) -> dict:
    "How often the reference chooses the same token, and how far below its best logit the worst choice was."
    equal, gaps = [], []
    for prompt, answer in zip(prompts, answers):
        logits = answer_logits(reference, prompt, answer)
        equal += (logits.argmax(-1) == answer).tolist()
        gaps.append(float((logits.max(-1) - logits[range(len(answer)), answer]).max()))
    return dict(greedy_equal=all(equal), greedy_share=round(sum(equal) / len(equal), 5),
                greedy_gap=round(max(gaps), 5))


@dataclass(frozen=True)
class Load:
    "What `bench decode` and `bench prefill` compute."
    batch: int = 1  # sequences at the same time
    context: int = 128  # tokens of each prompt
    tokens: int = 64  # timed steps of decoding
    budget: int | None = None  # most tokens of one step; None: all prompts in as few steps as 8192 tokens allow

    @property
    def sizes(self) -> dict:
        "Fields of `EngineArgs`: room for the steps in which the last prompts are still read."
        budget = self.budget or max(512, 2 * self.batch, min(self.batch * self.context, 8192))
        late = 0 if self.batch == 1 else -(-self.batch * self.context // max(1, budget - self.batch)) + 1
        return dict(max_num_seqs=self.batch, max_num_batched_tokens=budget,
                    max_model_len=self.context + self.tokens + late + SLACK)

    def check(self, model: Llama) -> None:
        "Raises `BadInput` for a load beyond the context."
        wanted, context = self.sizes['max_model_len'], model.config.max_position_embeddings
        if wanted > context: raise BadInput(
            f'{self.context} tokens of context and {self.tokens} to generate need room for {wanted}, and the '
            f"model's context is {context}; lower --context or --tokens")

    def prompts(self, vocab_size: int) -> list[list[int]]:
        "Random token ids, the same every time and different for every sequence."
        return Workload(self.context, requests=self.batch).prompts(vocab_size)


SLACK = 64   # tokens that an engine may be ahead of what it has reported


@dataclass
class Run:
    "What one timed stretch of steps did."
    tokens: int = 0  # computed: generated ones in decoding, the prompts' in prefill
    steps: float = 0  # passes over the weights
    seen: int = 0  # keys and values that had to be read or written, in tokens, over all steps
    seconds: float = 0
    kernels: int = 0
    nbytes: int = 0
    waited: float | None = None  # seconds of these that the host spent waiting for the device
    answers: list = field(default_factory=list)


@contextmanager
def metered(engine: LLMEngine) -> Iterator[Run]:
    "Time and count the block: from one step's tokens to another's, with the same work ahead of both."
    run, waited = Run(), getattr(engine.runner, 'waited', None)
    start = time.perf_counter()
    with counting() as counts:
        yield run
    run.seconds = time.perf_counter() - start
    run.kernels, run.nbytes = counts.kernels, counts.nbytes
    if waited is not None:
        run.waited = engine.runner.waited - waited


def begin(engine: LLMEngine, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    "Queue greedy requests; returns their answers, which grow."
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return [engine.add_request(i, ids, params).outputs[0].token_ids for i, ids in enumerate(prompts)]


def step(engine: LLMEngine) -> int:
    "One step; returns how many requests ended. Raises what one of them failed with."
    outputs = engine.step()
    for out in outputs:
        if out.error: raise out.error
    return sum(out.finished for out in outputs)


def end(engine: LLMEngine) -> None:
    "Abort what runs, so that the engine is free again."
    for id in list(engine.requests):
        engine.abort(id)
    while engine.has_unfinished_requests():
        engine.step()


def decode(engine: LLMEngine, prompts: list[list[int]], load: Load) -> Run:
    "Read the prompts, then time `load.tokens` steps in which all sequences decode."
    answers = begin(engine, prompts, load.sizes['max_model_len'] - load.context)
    while not all(answers):
        step(engine)
    before = [len(a) for a in answers]
    with metered(engine) as run:
        while any(len(a) - n < load.tokens for a, n in zip(answers, before)):
            step(engine)
    new = [len(a) - n for a, n in zip(answers, before)]
    run.tokens, run.steps, run.answers = sum(new), sum(new) / len(new), [a[:] for a in answers]
    run.seen = sum(n * (load.context + b) + n * (n - 1) // 2 for n, b in zip(new, before))
    end(engine)
    return run


def prefill(engine: LLMEngine, prompts: list[list[int]], load: Load) -> Run:
    "Time the prompts to the first token of the last one."
    answers = begin(engine, prompts, 1)
    with metered(engine) as run:
        while not all(answers):
            step(engine)
    run.tokens = run.seen = len(prompts) * load.context
    run.steps = -(-run.tokens // load.sizes['max_num_batched_tokens'])
    run.answers = [a[:] for a in answers]
    end(engine)
    return run


LOADS = {'decode': decode, 'prefill': prefill}


def count_step(model: Llama, load: Load, options: dict) -> Run:
    "Decode with every kernel counted: a graph would count as one launch."
    with Context(JIT=2):
        engine = make_engine(model, **load.sizes, **options)
        prompts = load.prompts(model.config.vocab_size)
        decode(engine, prompts, load)    # compiles, captures
        return decode(engine, prompts, load)


def layer_kernels(
    model: Llama,
    load: Load,  # of decoding
    options: dict,  # of the engine
) -> int | None:  # None: the model has one layer
    "Launches of one decode step that one more layer adds: a model of two layers against one of them."
    if len(model.layers) < 2: return None
    counts = []
    for layers in 1, 2:
        shallow = copy(model)
        shallow.layers, shallow.config = model.layers[:layers], replace(model.config, num_hidden_layers=layers)
        run = count_step(shallow, load, options)
        counts.append(run.kernels / run.steps)
    return round(counts[1] - counts[0])


def measure_load(
    kind: str,  # a key of `LOADS`
    model: Llama,
    load: Load,
    repeat: int = 3,  # measured runs; one more comes first and compiles
    check: int = 0,  # answers to check
    reference: Callable | None = None,  # makes the dense model that checks them
    count: bool = True,  # kernels too
    options: dict | None = None,  # of the engine
) -> dict:  # what `--json` prints, less its heading
    "Measure one load; the run of the median time counts. Raises `BadInput`."
    load.check(model)
    engine = make_engine(model, **load.sizes, **(options or {}))
    prompts = load.prompts(model.config.vocab_size)
    bar = trange(1 + repeat, desc=f'{kind} ×{load.batch}', unit='run', leave=False)
    runs = [LOADS[kind](engine, prompts, load) for _ in bar][1:]
    run = sorted(runs, key=lambda r: r.seconds / r.tokens)[repeat // 2]
    shallow = replace(load, context=min(load.context, 16), tokens=8, budget=None)
    row = dict(batch=load.batch, context=load.context, tokens=load.tokens,
               **speed(run, model), kernels_per_layer=layer_kernels(model, shallow, options or {}) if count else None,
               **traffic(run, model), median_of=repeat)
    if kind == 'prefill':
        row['tflop_s'] = round(flops(model, load) / run.seconds / 1e12, 4)
    if check:
        row |= agreement(reference(), prompts[:check], run.answers[:check])
    return row


def speed(run: Run, model: Llama) -> dict:
    "How fast, and how much of a step the host was busy."
    host = None if run.waited is None else round((run.seconds - run.waited) / run.steps * 1e6, 1)
    return dict(tok_s=round(run.tokens / run.seconds, 3), ms_per_step=round(run.seconds / run.steps * 1e3, 4),
                host_us_per_step=host)


def traffic(run: Run, model: Llama) -> dict:
    "Bytes that moved, beside those that had to: the weights once a step, and each live key and value."
    least = run.steps * weight_bytes(model) + run.seen * kv_bytes(model)
    limit = max(bandwidth(), least / run.seconds)    # a cache may read faster than the probe
    return dict(bytes_per_token=round(run.nbytes / run.tokens), bytes_over_minimum=round(run.nbytes / least, 4),
                bandwidth_share=round(least / run.seconds / limit, 4), bandwidth_gb_s=round(limit / 1e9, 2))


def flops(model: Llama, load: Load) -> int:
    "Operations of a prefill: the layers' matrices and causal attention. The head's few rows are left out."
    c, tokens = model.config, load.batch * load.context
    heads = c.num_attention_heads * c.head_dim
    matrices = c.hidden_size * (2 * heads + 2 * c.num_key_value_heads * c.head_dim + 3 * c.intermediate_size)
    return 2 * tokens * c.num_hidden_layers * (matrices + heads * load.context)


@dataclass(frozen=True)
class Trace:
    "Requests as nano-vllm's benchmark draws them: lengths from 100 up, uniform."
    requests: int = 256
    longest_prompt: int = 1024
    longest_answer: int = 1024
    shortest: int = 100
    rate: float | None = None  # arrivals per second, at random; None: all at the start
    seed: int = 0

    def scaled(self, scale: float) -> Trace:
        "The same shape with fewer requests and shorter texts."
        def shrink(n):
            return max(1, round(n * scale))
        return replace(self, requests=shrink(self.requests), shortest=shrink(self.shortest),
                       longest_prompt=shrink(self.longest_prompt), longest_answer=shrink(self.longest_answer))

    def draw(self, vocab_size: int) -> list[tuple[float, list[int], int]]:
        "Arrival in seconds, prompt, tokens to answer, for each request."
        rng = np.random.default_rng(self.seed)
        lengths = [rng.integers(min(self.shortest, top), top + 1, self.requests).tolist()
                   for top in (self.longest_prompt, self.longest_answer)]
        gaps = rng.exponential(1 / self.rate, self.requests) if self.rate else np.zeros(self.requests)
        return [(t, rng.integers(0, min(vocab_size, 10000), prompt).tolist(), answer)
                for t, prompt, answer in zip(np.cumsum(gaps).tolist(), *lengths)]


def serve(engine: LLMEngine, trace: list[tuple], desc: str = 'trace') -> tuple[Run, list[Stopwatch]]:
    "Answer a trace; returns what that took, and when each request's tokens came."
    outputs, start = [], time.perf_counter()
    with metered(engine) as run, tqdm(total=len(trace), desc=desc, unit='request', leave=False) as bar:
        while len(outputs) < len(trace) or engine.has_unfinished_requests():
            now = time.perf_counter() - start
            while len(outputs) < len(trace) and trace[len(outputs)][0] <= now:
                _, prompt, answer = trace[len(outputs)]
                params = SamplingParams(max_tokens=answer, temperature=0.6, seed=len(outputs), ignore_eos=True)
                outputs.append(engine.add_request(len(outputs), prompt, params))
            if not engine.has_unfinished_requests():
                time.sleep(trace[len(outputs)][0] - now)
                continue
            bar.update(step(engine))
            run.steps += 1
    run.tokens = sum(answer for *_, answer in trace)
    run.seen = sum(n * len(prompt) + n * (n - 1) // 2 for _, prompt, n in trace)
    return run, [out.metrics for out in outputs]


def percentiles(seconds: list[float]) -> dict:
    "The 50th, 90th and 99th percentile, in milliseconds."
    return {f'p{p}': round(float(np.percentile(seconds, p)) * 1e3, 2) if seconds else None for p in (50, 90, 99)}


def latencies(watches: list[Stopwatch]) -> dict:
    "Percentiles of the times to the first token, between tokens, and to the last token, in milliseconds."
    stamps = [w.stamps for w in watches]
    return dict(ttft_ms=percentiles([s[1] - s[0] for s in stamps]),
                between_ms=percentiles([float(gap) for s in stamps for gap in np.diff(s[1:])]),
                end_to_end_ms=percentiles([s[-1] - s[0] for s in stamps]))


def measure_trace(
    model: Llama,
    trace: Trace,
    batch: int = 256,  # most requests at the same time
    sequential: bool = False,  # one at a time too
    warm: bool = True,  # serve it once before, to compile
    count: bool = True,  # kernels too
    options: dict | None = None,  # of the engine
) -> dict:  # what `--json` prints, less its heading
    "Serve a trace. Raises `BadInput` for one beyond the context."
    room, context = trace.longest_prompt + trace.longest_answer, model.config.max_position_embeddings
    if room > context: raise BadInput(f"requests of up to {room} tokens, and the model's context is {context}; "
                                      'lower --context, --tokens or --scale')
    drawn = trace.draw(model.config.vocab_size)

    def run(batch):
        engine = make_engine(model, max_num_seqs=batch, max_model_len=room, **(options or {}))
        if warm:
            serve(engine, drawn, 'warm-up')
        return serve(engine, drawn, 'trace' if batch > 1 else 'sequential')
    served, watches = run(batch)
    row = dict(batch=batch, requests=trace.requests, context=trace.longest_prompt, tokens=trace.longest_answer,
               prompt_tokens=sum(len(p) for _, p, _ in drawn), generated_tokens=served.tokens, rate=trace.rate,
               seconds=round(served.seconds, 3), **speed(served, model),
               kernels_per_layer=layer_kernels(model, Load(batch, 16, 8), options or {}) if count else None,
               **traffic(served, model), **latencies(watches), median_of=1)
    if sequential:
        alone, watches = run(1)
        row |= dict(sequential_tok_s=round(alone.tokens / alone.seconds, 3),
                    over_sequential=round(alone.seconds / served.seconds, 3), sequential=latencies(watches))
    return row


UNITS = dict(tok_s='tok/s', ms_per_step='ms', host_us_per_step='us', seconds='s', bandwidth_gb_s='GB/s',
             tflop_s='TFLOP/s', sequential_tok_s='tok/s', ttft_ms='ms', between_ms='ms', end_to_end_ms='ms')


def as_text(row: dict) -> str:  # what `measure_load` or `measure_trace` returns
    "A line for each number; latencies by percentile."
    def show(value):
        if isinstance(value, dict): return ', '.join(f'{k} {show(v)}' for k, v in value.items())
        if value is None: return '-'
        return f'{value:,}' if type(value) in (int, float) else str(value)
    return '\n'.join(f'{key:18} {show(value)} {UNITS.get(key, "") if value is not None else ""}'.rstrip()
                     for key, value in row.items())


def plot_loads(
    rows: list[dict],  # of `measure_load`, one model
):
    "Tokens per second over the batch, below what the memory allows; returns the figure."
    import matplotlib.pyplot as plt
    rows = sorted(rows, key=lambda r: r['batch'])
    fig, ax = plt.subplots(figsize=(6, 3.4), dpi=100)
    batch, speeds = [r['batch'] for r in rows], [r['tok_s'] for r in rows]
    ax.plot(batch, speeds, 'o-', color='#2e86c1', label=rows[0]['kind'])
    if rows[0]['kind'] == 'decode':
        limits = [r['tok_s'] / r['bandwidth_share'] for r in rows]
        ax.plot(batch, limits, '--', color='#c0392b', label='memory limit')
    for x, y in zip(batch, speeds):
        ax.text(x, y, f'{y:,.0f}', ha='center', va='bottom', fontsize=9)
    ax.set(xscale='log', yscale='log', xlabel='sequences together', ylabel='tokens per second',
           title=f"{rows[0]['model']} {rows[0]['quant'] or rows[0]['dtype']}, {rows[0]['machine']}")
    ax.set_xticks(batch, [f'{b}' for b in batch], minor=False)
    ax.title.set_fontsize(9)
    ax.minorticks_off()
    ax.legend(frameon=False)
    ax.spines[['top', 'right']].set_visible(False)
    fig.tight_layout()
    return fig


def plot_trace(
    row: dict,  # of `measure_trace`
):
    "Latencies by percentile, and one at a time beside them where that was measured; returns the figure."
    import matplotlib.pyplot as plt
    names = dict(ttft_ms='first token', between_ms='between tokens', end_to_end_ms='last token')
    kinds = [(f"{row['batch']} at a time", row, '#2e86c1')]
    if 'sequential' in row:
        kinds.append(('one at a time', row['sequential'], '#a9cce3'))
    fig, axes = plt.subplots(1, 3, figsize=(9, 3), dpi=100)
    for ax, (key, title) in zip(axes, names.items()):
        for i, (label, values, color) in enumerate(kinds):
            marks = [(p, ms) for p, ms in values[key].items() if ms is not None]
            ax.bar([n + 0.4 * i for n in range(len(marks))], [ms for _, ms in marks], 0.38, color=color, label=label)
        ax.set_xticks([n + 0.2 * (len(kinds) - 1) for n in range(3)], ['p50', 'p90', 'p99'])
        ax.set_title(f'{title}, ms', fontsize=9)
        ax.spines[['top', 'right']].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    fig.suptitle(f"{row['model']}, {row['requests']} requests: {row['tok_s']:,.0f} tok/s, {row['machine']}",
                 fontsize=9)
    fig.tight_layout()
    return fig
