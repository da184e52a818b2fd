"""How near do the CPU's kernels come to the memory bandwidth of one core, and tinygrad's own beside them?

    python benchmarks/cpu_kernels.py            # prints rows and adds them to benchmarks/results/cpu_kernels.jsonl
    python benchmarks/cpu_kernels.py matvec     # some of: matvec, matmul, kv_write, decode, prefill, engine

Ours and tinygrad's run in turn, the best of each counts, and a plain read of memory by one thread is timed
between them. Weights and pools are several, 512 MB together, so that no cache holds them. A run during which other
processes took more than a tenth of a core does not count, as long as there are three others.
"""
import os
import sys
import time
from importlib.metadata import version

os.environ['DEV'] = 'CPU'
import tinyvllm  # noqa: F401  picks the compiler before tinygrad looks
import numpy as np
import psutil
from common import RESULTS, write_row
from tinygrad import Tensor, TinyJit, dtypes
from tinyvllm.kernels.cpu import attend, cpu_attend, kv_write, matmul, matvec
from tinyvllm.device import compiler_name
from tinyvllm.engine.defaults import make_engine
from tinyvllm.models.llama import load_model
from tinyvllm.measure import machine_name, synchronize, timed
from tinyvllm.kernels.metal import Kernel
from tinyvllm.kv_cache.paged import PagedBatch, paged_attend, store_rows
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.models.hub import resolve

OUT = RESULTS / 'cpu_kernels.jsonl'
TYPES = {'float32': dtypes.float, 'float16': dtypes.half}
MATRICES = [(2048, 2048), (5632, 2048), (32000, 2048), (49152, 576)]
HEADS = [(9, 3, 64), (32, 8, 64), (32, 8, 128), (32, 4, 64)]      # query heads, KV heads, size
STEPS = [(1, 16384), (8, 4096), (32, 1024)]                      # sequences, context
CHUNKS = [(512, 0, 9, 3, 64), (512, 2048, 9, 3, 64), (512, 0, 32, 8, 128)]      # tokens, context before them, heads
TOTAL = 2**29                                                    # bytes that one round reads
CHAIN = Kernel(c='''kernel void chain(device float* y, device const float* x) {
  float a = x[0];
  for (int i = 0; i < 10000000; i++) a = __builtin_fmaf(a, x[1], x[2]);
  y[0] = a;
}''')


def clock() -> float:
    "Billions of cycles per second, where a multiply-add takes four."
    x = Tensor([1.0, 0.5, 0.5]).realize()
    return 4e7 / 1e9 / min(timed(lambda: CHAIN(Tensor.empty(1), x), 5).runs)


def busy() -> float:
    "Seconds that all processors together have worked."
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, 'iowait', 0) - getattr(times, 'guest', 0)


def run(contestant) -> tuple[float, bool]:
    "Return seconds of one run, and whether no other process worked meanwhile."
    start, others = time.perf_counter(), busy() - time.process_time()
    contestant()
    seconds = time.perf_counter() - start
    return seconds, busy() - time.process_time() - others < 0.1 * seconds + 0.02


def best(contestants: dict, wanted: int = 5, patience: float = 40) -> tuple[dict, bool]:
    "Seconds of the fastest run of each contestant, taken in turn, and whether three or more of each were undisturbed."
    runs, clean = {name: [] for name in contestants}, {name: [] for name in contestants}
    for way in contestants.values():
        way(), way()                      # compiled, then captured
    start = time.perf_counter()
    while min(map(len, clean.values())) < wanted and time.perf_counter() - start < patience:
        for name, way in contestants.items():
            seconds, quiet = run(way)
            runs[name].append(seconds)
            clean[name] += [seconds] * quiet
    enough = {name: len(clean[name]) >= 3 for name in contestants}
    return {name: min(clean[name] if enough[name] else runs[name]) for name in contestants}, all(enough.values())


def jitted(fn, copies):
    "Seconds per copy come from all copies in one captured graph: nothing waits between them."
    step = TinyJit(lambda: [x.realize() for copy in copies for x in fn(*copy)])
    return len(copies), lambda: (step(), synchronize('CPU'))


def random(*shape, dtype):
    return Tensor.randn(*shape, dtype=dtype).realize()


def copies(nbytes: int, make) -> list:
    return [make() for _ in range(max(1, round(TOTAL / nbytes)))]


def case_matvec(dtype):
    for N, K in MATRICES:
        x, nbytes = random(K, dtype=dtype), N * K * dtype.itemsize
        many = copies(nbytes, lambda: (random(N, K, dtype=dtype),))
        yield f'{N}x{K}', nbytes, 2 * N * K, {
            'ours': jitted(lambda w: [matvec(w, x)], many), 'tinygrad': jitted(lambda w: [w @ x], many)}


def case_matmul(dtype):
    for T in (2, 4, 8, 16):
        N, K = 5632, 2048
        x, nbytes = random(T, K, dtype=dtype), N * K * dtype.itemsize
        many = copies(nbytes, lambda: (random(N, K, dtype=dtype),))
        yield f'{T}x{N}x{K}', nbytes, 2 * T * N * K, {
            'ours': jitted(lambda w: [matmul(w, x)], many), 'tinygrad': jitted(lambda w: [x @ w.T], many)}


def case_kv_write(dtype):
    for T in (32, 512):
        new = [random(T, 8, 128, dtype=dtype) for _ in 'kv']
        slots = Tensor(np.random.default_rng(0).permutation(16384)[:T].astype(np.int32)).realize()
        many = [[random(16384, 8, 128, dtype=dtype) for _ in 'kv'] for _ in range(4)]
        yield f'{T} tokens, 8 heads of 128', 4 * new[0].nbytes(), 0, {
            'ours': jitted(lambda k, v: kv_write(k, v, *new, slots)[:1], many),
            'tinygrad': jitted(lambda k, v: [store_rows(k, new[0], slots), store_rows(v, new[1], slots)], many)}


def paged(counts, dtype, H, K, D, size=16):
    "Queries and a batch whose blocks are shuffled; `counts` holds (new tokens, context before them)."
    rng, blocks = np.random.default_rng(0), [-(-(n + past) // size) for n, past in counts]
    total, S = sum(blocks), len(counts)
    order = np.split(rng.permutation(total).astype(np.int32), np.cumsum(blocks)[:-1])
    tables = np.zeros((S, max(blocks)))
    for row, ids in zip(tables, order):
        row[:len(ids)] = ids
    owners = np.repeat(np.arange(S), [n for n, _ in counts])
    positions = np.concatenate([np.arange(past, past + n) for n, past in counts])
    tables, owners, positions = (Tensor(a.astype(np.int32)).realize() for a in (tables, owners, positions))
    batch = PagedBatch(None, positions, None, tables=tables, owners=owners)
    batch.token_tables.realize()
    return random(len(owners), H, D, dtype=dtype), (total, size, K, D), batch


def attention(counts, dtype, H, K, D):
    q, shape, batch = paged(counts, dtype, H, K, D)
    nbytes = 2 * sum(n + past for n, past in counts) * K * D * dtype.itemsize
    ops = 4 * H * D * sum(n * past + n * (n + 1) // 2 for n, past in counts)
    many = copies(nbytes, lambda: (random(*shape, dtype=dtype), random(*shape, dtype=dtype)))[:32]
    few = many[:1 if len(q) > 64 else 2]          # enough of what takes 20 times as long
    return nbytes, ops, {
        'ours': jitted(lambda k, v: [attend(q, k, v, batch.tables, batch.owners, batch.positions)], many),
        'tinygrad': jitted(lambda k, v: [paged_attend(q, k, v, batch)], few)}


def case_decode(dtype):
    for H, K, D in HEADS:
        for n, past in STEPS:
            yield f'{n} x {past}, {H}/{K} heads of {D}', *attention([(1, past - 1)] * n, dtype, H, K, D)


def case_prefill(dtype):
    for n, past, H, K, D in CHUNKS:
        yield f'{n} after {past}, {H}/{K} heads of {D}', *attention([(n, past)], dtype, H, K, D)


def engine_rows(tokens: int = 1000, steps: int = 9):
    "SmolLM2 in float32: seconds to the first token of a prompt, and per token after it."
    prompt = np.random.default_rng(0).integers(1000, 40000, tokens).tolist()
    model = load_model(resolve('smollm2'), dtype='float32')
    params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
    for rung, attend_ in (('ours', cpu_attend), ('tinygrad', paged_attend)):
        engine = make_engine(model, attend=attend_, num_blocks=2 * tokens // 16)
        for name in ('compile', 'measure'):
            output = engine.add_request(name, prompt, params)
            while engine.has_unfinished_requests():
                engine.step()
        stamps = output.metrics.stamps
        yield rung, f'first token of {tokens}', stamps[1] - stamps[0], output.outputs[0].token_ids
        yield rung, f'token after {tokens}', float(np.median(np.diff(stamps[1:]))), output.outputs[0].token_ids


def end_to_end(about: dict) -> None:
    outputs = []
    for rung, shape, seconds, ids in engine_rows():
        outputs.append(ids)
        row = dict(kernel='SmolLM2', rung=rung, shape=shape, dtype='float32', us=round(seconds * 1e6),
                   greedy_equal=ids == outputs[0], **about)
        print(rung, shape, f'{seconds:.3f} s', row['greedy_equal'], flush=True)
        write_row(OUT, row)


CASES = dict(matvec=case_matvec, matmul=case_matmul, kv_write=case_kv_write, decode=case_decode, prefill=case_prefill)


def main(names) -> None:
    about = dict(machine=machine_name('CPU'), compiler=compiler_name(), tinygrad=version('tinygrad'))
    memory = np.zeros(TOTAL // 4, np.float32) + 1
    ghz = round(clock(), 2)
    for name in names or [*CASES, 'engine']:
        if name == 'engine':
            end_to_end(about)
            continue
        for kind, dtype in TYPES.items():
            for shape, nbytes, ops, contestants in CASES[name](dtype):
                seconds, quiet = best({rung: way for rung, (_, way) in contestants.items()} | {'read': memory.max})
                read = memory.nbytes / seconds.pop('read') / 1e9
                for rung, s in seconds.items():
                    s /= contestants[rung][0]
                    row = dict(kernel=name, rung=rung, shape=shape, dtype=kind, us=round(s * 1e6, 1),
                               gbps=round(nbytes / s / 1e9, 2), share=round(nbytes / s / 1e9 / read, 3),
                               gflops=round(ops / s / 1e9, 1), read_gbps=round(read, 2), ghz=ghz, quiet=quiet, **about)
                    print(*(row[key] for key in ('kernel', 'rung', 'shape', 'dtype', 'us', 'gbps', 'share', 'gflops',
                                                 'read_gbps', 'quiet')), flush=True)
                    write_row(OUT, row)


if __name__ == '__main__':
    main(sys.argv[1:])
