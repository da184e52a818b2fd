"The numbers of an engine: they equal the sums over what the requests report, whatever happens to these."
import asyncio
import random
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tinyvllm.server import metrics as module
from tinyvllm.core.blocks import BlockManager
from tinyvllm.engine.llm import LLMEngine
from tinyvllm.engine.async_llm import AsyncLLM
from tinyvllm.engine.core import EngineCore
from tinyvllm.errors import BadInput
from tinyvllm.models.llama import model_config
from tinyvllm.server.metrics import (COUNTERS, GAUGES, HISTOGRAMS, LABELS, PARTS, PREFIX, SECONDS, Histogram, Metrics, fragmentation,
                              attach_metrics, per_second, bucket_bounds)
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.server.prometheus import render_prometheus
from tinyvllm.sampling.sampler import Sampled
from tinyvllm.core.scheduler import Scheduler
from tinyvllm.models.weights import tiny_checkpoint

CONFIG = model_config(tiny_checkpoint(seed=0)[0])


def runner(batch):
    "Says a number that depends on the place; a prompt that begins with 13 fails at its second token."
    def speak(seq):
        if seq.token_ids[0] == 13 and seq.sampled: return FloatingPointError('ill')
        return [Sampled((7 * seq.num_computed + i) % 31, -1.0, None) for i in range(batch.steps)]
    return [speak(seq) if batch.samples[i] else [] for i, seq in enumerate(batch.seqs)]


def make(blocks=40, seqs=8, budget=16, run=runner, **more):
    scheduler = Scheduler(BlockManager(blocks, 4), seqs, budget, **more)
    return LLMEngine(EngineCore(scheduler, run), CONFIG)


def total(h) -> int:
    return sum(h.counts)


PLANS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 12), st.integers(1, 3), st.booleans()), min_size=1, max_size=8)


# --- counters equal the sums -----------------------------------------------------------------------------

def random_run(engine, plan, rng):
    "Requests at random moments, some of them ill, some aborted; returns their outputs."
    outputs, todo, computed = [], list(plan), 0
    while todo or engine.has_unfinished_requests():
        if todo and rng.random() < 0.5:
            length, tokens, n, ill = todo.pop()
            params = SamplingParams(max_tokens=tokens, n=n, temperature=0, ignore_eos=True)
            outputs.append(engine.add_request(len(outputs), [13 if ill else 5] * length, params))
        if engine.requests and rng.random() < 0.05:
            engine.abort(rng.choice(list(engine.requests)))
        engine.step()
        assert computed < 5000
        computed += 1
    return outputs


@pytest.mark.parametrize('more', [{}, dict(output_delay=1), dict(output_delay=1, num_scheduler_steps=3)])
@settings(max_examples=40, deadline=None)
@given(plan=PLANS, blocks=st.integers(14, 40), seed=st.integers(0, 999))
def test_counters_are_the_sums(more, plan, blocks, seed):
    engine, batches = make(blocks, **more), []
    engine = attach_metrics(engine, metrics := Metrics())
    schedule = engine.scheduler.schedule

    def noting():
        batches.append(schedule())
        return batches[-1]
    engine.scheduler.schedule = noting
    outputs = random_run(engine, plan, random.Random(seed))
    metrics.read_gauges()
    count, h = metrics.store.counters, metrics.store.histograms
    began = [o for o in outputs if o.outputs[0].token_ids]
    said = [sum(len(a.token_ids) for a in o.outputs) for o in outputs]
    assert count['requests', ''] == len(outputs)
    assert count['generation_tokens', ''] == sum(said) == h['request_generation_tokens'].sum
    assert count['prompt_tokens', ''] == count['prefix_cache_queries', ''] == sum(len(o.prompt_token_ids) for o in began)
    assert count['num_preemptions', ''] == engine.scheduler.preemptions
    computed = sum(b.num_tokens + len(b.seqs) * (b.steps - 1) for b in batches)
    assert sum(count['step_tokens', k] for k in ('prefill', 'decode')) == computed == h['iteration_tokens_total'].sum
    assert count['step_tokens', 'prefill'] == sum(n for b in batches for n in b.num_new if n > 1)
    for reason in LABELS['request_success'][1]:
        assert count['request_success', reason] == sum(o.outputs[0].finish_reason == reason for o in outputs)
    assert total(h['e2e_request_latency_seconds']) == total(h['request_prompt_tokens']) == len(outputs)
    assert total(h['time_to_first_token_seconds']) == total(h['request_queue_time_seconds']) == len(began)
    assert h['request_prompt_tokens'].sum == sum(len(o.prompt_token_ids) for o in outputs)
    steps = total(h['prefill_step_seconds']) + total(h['decode_step_seconds'])
    assert steps == total(h['iteration_tokens_total']) == sum(bool(b.seqs) for b in batches)
    seconds = h['prefill_step_seconds'].sum + h['decode_step_seconds'].sum
    assert sum(count['step_seconds', p] for p in PARTS) >= seconds > 0 or not steps
    assert all(value >= 0 for value in count.values())


@pytest.mark.parametrize('more', [{}, dict(output_delay=1, num_scheduler_steps=3)])
@settings(max_examples=25, deadline=None)
@given(plan=PLANS, seed=st.integers(0, 99))
def test_times_add_up(more, plan, seed):
    "Queue and prefill make the first token; first token and decoding make all of the answer."
    engine, last, gaps = make(**more), {}, []

    class Noting(Metrics):
        def record_tokens(self, request, index, tokens):
            super().record_tokens(request, index, tokens)
            now = request.output.metrics.stamps[-1]
            if not index and request in last: gaps.append(now - last[request])
            if not index: last[request] = now
    engine = attach_metrics(engine, metrics := Noting())
    outputs = [o for o in random_run(engine, plan, random.Random(seed)) if o.outputs[0].token_ids]
    h = {name.removesuffix('_seconds'): h.sum for name, h in metrics.store.histograms.items()}
    laps = [o.metrics.stamps for o in outputs]
    assert h['time_to_first_token'] == pytest.approx(sum(s[1] - s[0] for s in laps))
    assert h['request_queue_time'] + h['request_prefill_time'] == pytest.approx(h['time_to_first_token'])
    assert h['request_decode_time'] == pytest.approx(sum(s[-1] - s[1] for s in laps))
    assert h['inter_token_latency'] == pytest.approx(sum(gaps))    # tokens that come at once are one gap
    assert h['e2e_request_latency'] >= sum(s[-1] - s[0] for s in laps)
    means = [(s[-1] - s[1]) / (len(s) - 2) for s in laps if len(s) > 2]
    assert h['request_time_per_output_token'] == pytest.approx(sum(means))


def test_the_same_answers_with_and_without():
    plan = [(9, 7, 2, False), (3, 12, 1, False), (20, 5, 1, True), (1, 0, 1, False)]
    plain = random_run(make(15), plan, random.Random(1))
    counted = random_run(attach_metrics(make(15), Metrics()), plan, random.Random(1))
    assert [[a.token_ids for a in o.outputs] for o in plain] == [[a.token_ids for a in o.outputs] for o in counted]


def test_the_parts_of_a_step(monkeypatch):
    "By a clock that only moves when a part works. The device is waited for in two of the three calls."
    now = SimpleNamespace(s=100.0, waited=0.0)

    def work(seconds, waiting=0.0):
        now.s += seconds + waiting
        now.waited += waiting
    engine = make()
    plan = engine.scheduler
    schedule, update = plan.schedule, plan.update_from_output

    class Slow:
        waited = property(lambda self: now.waited)

        def __call__(self, batch):
            work(2, waiting=10)
            return runner(batch)
    engine.core.runner = Slow()
    plan.schedule = lambda: (work(1), schedule())[1]
    plan.update_from_output = lambda *a: (work(3, waiting=20), update(*a))[1]
    monkeypatch.setattr(module.time, 'perf_counter', lambda: now.s)
    engine = attach_metrics(engine, metrics := Metrics())
    engine.add_request('a', [1] * 20, SamplingParams(max_tokens=3, ignore_eos=True))
    while engine.has_unfinished_requests(): engine.step()
    steps = metrics.snapshot()['steps']
    assert steps == 4 and metrics.snapshot()['step_us'] == dict(schedule=1e6, launch=2e6, wait=30e6, update=3e6)
    h = metrics.store.histograms
    assert h['prefill_step_seconds'].sum == 2 * 36 and h['decode_step_seconds'].sum == 2 * 36


def test_preemptions_before_it_counted_are_not_its_own():
    engine = make(blocks=9)
    random_run(engine, [(9, 12, 1, False)] * 4, random.Random(3))
    assert engine.scheduler.preemptions
    engine = attach_metrics(engine, metrics := Metrics())
    assert metrics.snapshot()['preemptions'] == 0


def test_hits_are_at_most_queries():
    engine = make()
    engine = attach_metrics(engine, metrics := Metrics())
    for i, cached in enumerate((0, 8, 4)):
        out = engine.add_request(i, [5] * 9, SamplingParams(max_tokens=2, ignore_eos=True))
        out.num_cached_tokens = cached
    while engine.has_unfinished_requests(): engine.step()
    count = metrics.store.counters
    assert count['prefix_cache_hits', ''] == count['prompt_tokens_cached', ''] == 12
    assert count['prefix_cache_queries', ''] == 27


# --- readers on an event loop ----------------------------------------------------------------------------

def test_streams_are_counted():
    "Through `AsyncLLM`: what the readers got is what was counted, and one who leaves has aborted."
    def runner_that_waits(batch):
        "The longest request cannot end before its reader has left."
        if any(len(seq.output_token_ids) >= 30 for seq in batch.seqs):
            has_left.wait(60)
        return runner(batch)

    async def read(engine, i):
        tokens = 60 if i == 3 else 6
        stream = await engine.submit([5] * (i + 1), SamplingParams(max_tokens=tokens, ignore_eos=True))
        async for out in stream:
            if i == 3:
                stream.close()
                has_left.set()
                break
        return out

    async def everybody():
        engine = AsyncLLM(attach_metrics(make(run=runner_that_waits), metrics))
        try:
            outs = await asyncio.gather(*(read(engine, i) for i in range(8)))
            while engine.engine.core.scheduler.running: await asyncio.sleep(0.01)
        finally: engine.shutdown()
        return outs
    metrics, has_left = Metrics(), threading.Event()
    outs = asyncio.run(asyncio.wait_for(everybody(), 120))
    count = metrics.store.counters
    assert count['requests', ''] == 8 and count['request_success', 'length'] == 7
    assert count['request_success', 'abort'] == 1
    assert count['generation_tokens', ''] == sum(len(o.outputs[0].token_ids) for o in outs)


def test_reading_while_it_works():
    "Pages and snapshots from another thread, while tables come and go."
    engine = attach_metrics(make(), metrics := Metrics())
    stop, faults = threading.Event(), []

    def look():
        while not stop.is_set():
            try: render_prometheus(metrics); metrics.snapshot()
            except Exception as error: faults.append(error); return
    reader = threading.Thread(target=look)
    reader.start()
    try:
        for seed in range(10): random_run(engine, [(20, 8, 2, False)] * 8, random.Random(seed))
    finally:
        stop.set()
        reader.join()
    assert not faults


# --- histograms, speeds, fragmentation -------------------------------------------------------------------

@given(st.lists(st.floats(0, 2000), max_size=200))
def test_a_histogram_sums_up(values):
    h = Histogram(SECONDS)
    for v in values: h.observe(v)
    assert h.buckets() == [(str(b), sum(v <= b for v in values)) for b in SECONDS] + [('+Inf', len(values))]
    assert h.sum == pytest.approx(sum(values))


@given(st.lists(st.floats(2e-4, 999), min_size=1, max_size=200), st.floats(0.01, 1))
def test_a_quantile_is_in_the_right_bucket(values, share):
    h = Histogram(SECONDS)
    for v in values: h.observe(v)
    exact = float(np.quantile(values, share, method='inverted_cdf'))
    bound = min(b for b in SECONDS if b >= exact)
    below = max((b for b in SECONDS if b < exact), default=0)
    assert below * (1 - 1e-9) <= h.quantile(share) <= bound * (1 + 1e-9)


def test_the_ends_of_a_histogram():
    h = Histogram(bucket_bounds(0, 1))
    assert h.quantile(0.5) is None and h.bounds == [1, 2, 5, 10]
    h.observe(1e9)
    assert h.quantile(0.5) == 10


def test_speeds_forget():
    samples = [(t / 4, 10 * t, t) for t in range(40)]    # 40 and 4 a second, until 9.75
    assert per_second(samples, (10, 400, 40)) == [40, 4]
    assert per_second(samples, (60, 400, 40)) == [0, 0] == per_second([], (1, 5, 5))
    assert per_second([(9.99, 0, 0)], (10, 5, 0)) == [20, 0]    # a moment is no speed


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(['add', 'more', 'fork', 'free']), st.integers(0, 9), st.integers(1, 9)), max_size=40))
def test_fragmentation_counts_slots(moves):
    blocks, names = BlockManager(30, 4), iter(range(100))
    for move, which, n in moves:
        owners = sorted(blocks.tables)
        owner = owners[which % len(owners)] if owners else None
        if move == 'add' and blocks.num_free >= 3: blocks.allocate(next(names), n)
        elif owner is None: continue
        elif move == 'more' and blocks.can_allocate(owner, n): blocks.append(owner, n)
        elif move == 'fork':
            length = blocks.tables[owner].length    # the child's last token may lie before the parent's, in the same block
            blocks.fork(owner, next(names), length - n % ((length - 1) % 4 + 1))
        elif move == 'free': blocks.free(owner)
        filled = {(i, slot) for t in blocks.tables.values() for at, i in enumerate(t.ids)
                  for slot in range(min(4, t.length - 4 * at))}
        owned = {i for t in blocks.tables.values() for i in t.ids}
        assert fragmentation(blocks) == pytest.approx(1 - len(filled) / (4 * len(owned)) if owned else 0)


# --- what is shown ---------------------------------------------------------------------------------------

def parsed(metrics) -> dict:
    "Samples of the page by name, label values and all."
    parser = pytest.importorskip('prometheus_client.parser')
    page, kind = render_prometheus(metrics)
    assert kind.startswith('text/plain')
    return {(s.name, *sorted(s.labels.items())): s.value for f in parser.text_string_to_metric_families(page.decode())
            for s in f.samples}


def test_the_page_says_what_was_counted():
    engine = attach_metrics(make(), metrics := Metrics('m'))
    random_run(engine, [(9, 5, 1, False), (3, 4, 2, True)], random.Random(0))
    page, count, label = parsed(metrics), metrics.store.counters, ('model_name', 'm')
    for (name, value), n in count.items():
        labels = [label] + ([(LABELS[name][0], value)] if value else [])
        assert page[PREFIX + name + '_total', *sorted(labels)] == n
    for name, h in metrics.store.histograms.items():
        assert page[PREFIX + name + '_count', label] == total(h) == page[PREFIX + name + '_bucket', ('le', '+Inf'), label]
        assert page[PREFIX + name + '_sum', label] == h.sum
    for name, value in metrics.read_gauges().items():
        if 'memory' not in name: assert page[PREFIX + name, label] == value
    assert page[PREFIX + 'cache_config_info', ('block_size', '4'), label, ('num_blocks', '40')] == 1


def test_names_are_those_of_vllm():
    "So that its dashboards find them."
    theirs = '''num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries prefix_cache_hits prompt_tokens
        prompt_tokens_cached generation_tokens num_preemptions request_success admission_rejections time_to_first_token_seconds
        inter_token_latency_seconds request_time_per_output_token_seconds e2e_request_latency_seconds
        request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds request_prompt_tokens
        request_generation_tokens iteration_tokens_total'''.split()
    assert {*theirs} <= {*COUNTERS, *HISTOGRAMS, *GAUGES} and {*LABELS} <= {*COUNTERS}


def test_labels_are_bounded():
    "No client decides what series there are: not by ids, not by what it is refused for."
    engine = attach_metrics(make(), metrics := Metrics())
    before = {key for key in parsed(metrics) if key[0].startswith(PREFIX)}
    for i in range(50):
        metrics.record_rejection(f'because of {i}')
        engine.add_request(f'secret-{i}', [i + 1], SamplingParams(max_tokens=1))
    while engine.has_unfinished_requests(): engine.step()
    after = {key for key in parsed(metrics) if key[0].startswith(PREFIX)}
    assert after == before and b'secret' not in render_prometheus(metrics)[0] and b'because' not in render_prometheus(metrics)[0]
    assert metrics.store.counters['admission_rejections', 'other'] == 50


def test_who_runs_and_who_waits():
    engine = attach_metrics(make(seqs=2), metrics := Metrics())
    for i in range(5): engine.add_request(i, [1], SamplingParams(max_tokens=9, ignore_eos=True))
    engine.step()
    snap = metrics.snapshot()
    assert (snap['running'], snap['waiting'], snap['free_blocks'], snap['kv_usage']) == (2, 3, 37, pytest.approx(2 / 39))
    engine.abort(4)
    assert metrics.snapshot()['waiting'] == 2


def test_nothing_of_a_request_is_kept():
    engine = attach_metrics(make(), metrics := Metrics())
    random_run(engine, [(3, 2, 2, False)] * 40, random.Random(0))
    import gc
    gc.collect()
    assert len(metrics.started) == 0 and len(metrics.recent) <= 40


def test_a_snapshot_is_json():
    import json
    engine = attach_metrics(make(), metrics := Metrics())
    for _ in range(2):
        snap = json.loads(json.dumps(metrics.snapshot(), allow_nan=False))
        assert snap['free_blocks'] == snap['num_blocks'] == 39 and snap['running'] == snap['waiting'] == 0
        random_run(engine, [(3, 2, 1, False)], random.Random(0))
    assert snap['generation_tokens'] == 2 and snap['ended']['length'] == 1 and snap['ttft_s']['p50'] > 0


def test_without_the_extra(monkeypatch):
    "Counting goes on; the page says what to install."
    metrics = Metrics()
    engine = attach_metrics(make(), metrics)
    monkeypatch.setitem(sys.modules, 'prometheus_client', None)
    random_run(engine, [(3, 2, 1, False)], random.Random(0))
    assert metrics.snapshot()['requests'] == 1
    with pytest.raises(BadInput, match=r"pip install 'tinyvllm\[serve\]'"): render_prometheus(metrics)
