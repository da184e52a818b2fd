"The engine against each request alone, whatever the pool, the budget and the neighbours; and what hurts only itself."
import asyncio
import json
import random
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tinyvllm.core.blocks import BlockManager
from tinyvllm.engine.llm import LLM
from tinyvllm.engine.defaults import make_engine
from tinyvllm.engine.warmup import warm_up
from tinyvllm.engine.async_llm import AsyncLLM
from tinyvllm.errors import BadInput
from tinyvllm.reference.generate import Generation, bucket, generate
from tinyvllm.reference.kvcache import KVCache
from tinyvllm.models.llama import InputBatch, Llama, NoCache, dense_attend, load_model, model_config
from tinyvllm.kv_cache.paged import PagedKVCache, paged_attend
from tinyvllm.runner.eager import EagerRunner
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.sampling.sampler import Sampler
from tinyvllm.core.scheduler import Scheduler
from tinyvllm.models.tokenizer_files import load_tokenizer
from tinyvllm.models.weights import tiny_checkpoint
from tinyvllm.models.hub import resolve

GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'smollm2.json').read_text())['items']


def tiny(layers):
    config, state = tiny_checkpoint(seed=0, max_position_embeddings=1024, num_hidden_layers=layers)
    return Llama(model_config(config), state)


@pytest.fixture(scope='module')
def deep():
    return tiny(2)


@pytest.fixture(scope='module')
def model():
    "One layer: half the kernels, and these tests are about requests."
    return tiny(1)


class Letters:
    "A tokenizer whose token n is the n-th letter of the alphabet."
    eos_ids = ()
    def encode(self, text): return [ord(c) - 97 for c in text]
    def decode(self, ids): return ''.join(chr(97 + i % 26) for i in ids)
    def stream(self, **options): return self
    def add(self, id): return chr(97 + id % 26)
    def finish(self): return ''


def greedy(length, **more):
    return SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, **more)


def is_greedy(model, prompt, tokens):
    "By induction: each token is the argmax after those before it. All rows: few shapes."
    ids, n = prompt + tokens, len(prompt)
    if not tokens:
        return True
    size = bucket(len(ids) - 1)
    logits = model(InputBatch.of(ids[:-1], size=size, rows=list(range(size))), NoCache(), dense_attend).numpy()
    return logits[n - 1:len(ids) - 1].argmax(-1).tolist() == tokens


def all_free(llm):
    pool = llm.engine.scheduler.blocks.pool
    return len(pool.free) == len(pool.blocks) - 1


def requests(rng, n, longest_prompt, longest_answer):
    prompts = [rng.integers(0, 512, rng.integers(1, longest_prompt + 1)).tolist() for _ in range(n)]
    return prompts, [int(k) for k in rng.integers(1, longest_answer + 1, n)]


def test_64_mixed_requests_in_a_small_pool_say_what_each_says_alone(deep):
    prompts, lengths = requests(np.random.default_rng(0), 64, 400, 200)
    llm = LLM(deep, num_blocks=300, max_num_batched_tokens=256)
    outputs = llm.generate(prompts, [greedy(n) for n in lengths], use_tqdm=False)
    assert llm.engine.scheduler.preemptions > 5 and all_free(llm)
    assert [out.prompt_token_ids for out in outputs] == prompts
    assert [len(out.outputs[0].token_ids) for out in outputs] == lengths
    assert all(is_greedy(deep, out.prompt_token_ids, out.outputs[0].token_ids) for out in outputs)


@pytest.mark.parametrize('budget', [1, 7, 64])
@settings(max_examples=3, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_chunks_samples_and_aborts_change_no_token(model, budget, seed):
    "Four samples of each prompt, a pool for about six sequences, requests that vanish at any moment."
    rng = random.Random(seed)
    llm = LLM(model, num_blocks=24, block_size=4, max_num_batched_tokens=budget, max_num_seqs=8)
    prompts, lengths = requests(np.random.default_rng(seed), 5, 14, 6)
    outputs = [llm.add_request(p, greedy(n, n=rng.choice([1, 4]))) for p, n in zip(prompts, lengths)]
    gone = set()
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
        alive = sorted(llm.engine.requests)
        if alive and rng.random() < 0.03:
            gone.add(alive[0])
            llm.engine.abort(alive[0])
    assert all_free(llm)
    for out, n in zip(outputs, lengths):
        for answer in out.outputs:
            assert is_greedy(model, out.prompt_token_ids, answer.token_ids)
            assert len(answer.token_ids) == n or (out.request_id in gone and answer.finish_reason == 'abort')


@pytest.mark.slow
@pytest.mark.parametrize('budget', [1, 7, 64])
def test_chunks_samples_and_aborts_at_full_size(deep, budget):
    rng = random.Random(budget)
    prompts, lengths = requests(np.random.default_rng(budget), 64, 400, 200)
    llm = LLM(deep, num_blocks=300, max_num_batched_tokens=budget)
    outputs = [llm.add_request(p, greedy(n, n=4 if i % 8 == 0 else 1))
               for i, (p, n) in enumerate(zip(prompts, lengths))]
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
        if llm.engine.requests and rng.random() < 0.002:
            llm.engine.abort(rng.choice(list(llm.engine.requests)))
    assert all_free(llm)
    for out, n in zip(outputs, lengths):
        for answer in out.outputs:
            assert is_greedy(deep, out.prompt_token_ids, answer.token_ids)
            assert len(answer.token_ids) == n or answer.finish_reason == 'abort'


def test_16_requests_on_smollm2_in_a_small_pool_say_the_goldens():
    smollm, tokenizer = load_model(resolve('smollm2'), dtype='float32'), load_tokenizer(resolve('smollm2'))
    llm = LLM(smollm, tokenizer, num_blocks=16, max_num_batched_tokens=64)
    prompts = [g['prompt'] for g in GOLDEN] + [g['prompt_ids'] + g['greedy_ids'][:i] for i, g in enumerate(GOLDEN[:6])]
    lengths = [6 + 2 * (i % 4) for i in range(16)]
    outputs = llm.generate(prompts, [greedy(n) for n in lengths], use_tqdm=False)
    assert llm.engine.scheduler.preemptions and all_free(llm)
    want = [g['greedy_ids'] for g in GOLDEN] + [g['greedy_ids'][i:] for i, g in enumerate(GOLDEN[:6])]
    assert [out.outputs[0].token_ids for out in outputs] == [ids[:n] for ids, n in zip(want, lengths)]
    assert outputs[0].outputs[0].text == tokenizer.decode(want[0][:6], skip_special_tokens=True)


def test_the_contiguous_cache_is_a_pool_of_one_block(model):
    "The same engine, scheduler and runner with the cache of chapter 01c: one request after the other."
    prompts, lengths = requests(np.random.default_rng(1), 3, 8, 5)
    paged = LLM(model, num_blocks=16)
    contiguous = LLM(model, cache=KVCache(model, 16), attend=dense_attend, scheduler=Scheduler(BlockManager(2, 16)))
    params = [greedy(n, n=2) for n in lengths]
    a, b = (llm.generate(prompts, params, use_tqdm=False) for llm in (paged, contiguous))
    assert [[o.token_ids for o in out.outputs] for out in a] == [[o.token_ids for o in out.outputs] for out in b]
    assert all_free(paged) and all_free(contiguous)


def test_a_seed_gives_the_same_tokens_in_any_company(model):
    llm = LLM(model, num_blocks=64)
    params = [SamplingParams(temperature=0.9, seed=i, n=1 + i % 3, max_tokens=5, top_p=0.9) for i in range(4)]
    together = llm.generate([[3, 1, 4]] * 4, params, use_tqdm=False)
    for i in (3, 1):
        alone = llm.generate([3, 1, 4], params[i], use_tqdm=False)[0]
        assert [o.token_ids for o in alone.outputs] == [o.token_ids for o in together[i].outputs]
    assert len({tuple(o.token_ids) for out in together for o in out.outputs}) > 3
    first = Sampler(params[2])
    want = list(int(t) for t in generate(model, [3, 1, 4], 5, sample=first, cache=KVCache(model, 16)))
    assert together[2].outputs[0].token_ids == want


def test_logprobs_and_their_sum(model):
    out = LLM(model, Letters(), num_blocks=16).generate('abc', SamplingParams(max_tokens=4, seed=1, logprobs=2), use_tqdm=False)[0]
    answer = out.outputs[0]
    assert out.prompt == 'abc' and out.prompt_token_ids == [0, 1, 2] and len(answer.logprobs) == 4
    assert answer.cumulative_logprob == pytest.approx(
        sum(top[i].logprob for i, top in zip(answer.token_ids, answer.logprobs)))
    for top, token in zip(answer.logprobs, answer.token_ids):
        likeliest = list(top.values())[:2]
        assert token in top and 2 <= len(top) <= 3 and likeliest[0].logprob >= likeliest[1].logprob
        assert all(p.decoded_token == Letters().decode([i]) for i, p in top.items())
    prompt = InputBatch.of([0, 1, 2], size=4)
    want = model(prompt, NoCache(), dense_attend).log_softmax(-1).numpy()[0]
    assert max(abs(want[i] - p.logprob) for i, p in answer.logprobs[0].items()) < 1e-4


@settings(max_examples=4, deadline=None)
@given(st.lists(st.text('abcdefghij', min_size=1, max_size=2), max_size=2), st.integers(0, 2**31))
def test_text_and_stops_are_those_of_the_plain_loop(model, stop, seed):
    params = SamplingParams(max_tokens=8, seed=seed, stop=tuple(stop), stop_token_ids=(7, 107, 207))
    out = LLM(model, Letters(), num_blocks=16).generate('abc', params, use_tqdm=False)[0]
    run = Generation(model, Letters(), [0, 1, 2], 8, stop, params.stop_token_ids, sample=Sampler(params, [0, 1, 2]),
                     cache=KVCache(model, 16))
    text, answer = ''.join(run), out.outputs[0]
    assert (answer.text, answer.token_ids, answer.finish_reason) == (text, run.token_ids, run.finish_reason)
    if answer.finish_reason == 'stop':
        assert answer.stop_reason in stop or answer.stop_reason == answer.token_ids[-1]


def test_a_stream_grows_to_the_answer_and_leaving_it_frees_the_blocks(model):
    llm = LLM(model, Letters(), num_blocks=16)
    texts = [out.outputs[0].text for out in llm.stream('abc', greedy(5))]
    assert [len(t) for t in texts] == [1, 2, 3, 4, 5] and all(b.startswith(a) for a, b in zip(texts, texts[1:]))
    for _ in llm.stream('abc', greedy(50)):
        break
    llm.generate('abc', greedy(1), use_tqdm=False)
    assert all_free(llm) and not llm.engine.core.has_work


def test_an_error_while_sampling_ends_one_request(model):
    cache = PagedKVCache(model, 32)
    llm = LLM(model, cache=cache, runner=EagerRunner(model, cache, paged_attend))
    prompts = [[1, 2, 3], [4, 5], [6]]
    want = [out.outputs[0].token_ids for out in llm.generate(prompts, greedy(5), use_tqdm=False)]
    outputs = [llm.add_request(p, greedy(5)) for p in prompts]
    sequence, calls = llm.engine.requests[outputs[1].request_id].sequences[0], []
    plain = sequence.sampler

    def breaks(logits):
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError('a logits processor divided by zero')
        return plain(logits)
    sequence.sampler = breaks
    list(llm.run_engine(outputs))
    assert [out.outputs[0].token_ids for out in outputs] == [want[0], want[1][:2], want[2]]
    assert [out.outputs[0].finish_reason for out in outputs] == ['length', 'error', 'length']
    assert isinstance(outputs[1].error, ZeroDivisionError) and not outputs[0].error and all_free(llm)


def test_logits_that_are_nan_end_one_request(model):
    class Poisoned(EagerRunner):
        "The scores of the sequence whose prompt starts with 9 are not numbers."
        def __call__(self, batch):
            for seq in batch.seqs:
                if seq.token_ids[0] == 9 and not hasattr(seq, 'plain'):
                    seq.plain = seq.sampler
                    seq.sampler = lambda logits, seq=seq: seq.plain(logits * np.nan)
            return super().__call__(batch)
    cache = PagedKVCache(model, 16)
    llm = LLM(model, cache=cache, runner=Poisoned(model, cache, paged_attend))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        good, bad = llm.generate([[1, 2], [9, 9]], greedy(3), use_tqdm=False)
    assert is_greedy(model, [1, 2], good.outputs[0].token_ids) and isinstance(bad.error, FloatingPointError)
    assert 'prompts[1]' in str(seen[0].message) and 'NaN' in str(seen[0].message)


def test_a_bad_prompt_ends_alone_and_a_bad_call_before_anything_runs(model):
    llm = LLM(model, num_blocks=16)
    prompts = [[1, 2], [], [512], 'text', [1.5], [True], 7, [1] * 1024, [3, 4] * 200, [5]]
    names = {1: 'empty', 2: '512', 3: 'tokenizer', 4: '1.5', 5: 'True', 6: 'int', 7: '1024 tokens', 8: 'pool holds 240'}
    with pytest.warns(UserWarning, match=r'8 of 10 prompts failed.*prompts\[1\]: the prompt is empty'):
        outputs = llm.generate(prompts, greedy(2), use_tqdm=False)
    for i, out in enumerate(outputs):
        assert bool(out.error) == (i in names) and out.finished
        assert not out.error or (isinstance(out.error, BadInput) and names[i] in str(out.error))
        assert out.error or is_greedy(model, prompts[i], out.outputs[0].token_ids)
    for bad, names in (([], 'list of prompts is empty'), (None, 'NoneType'), ('', 'empty'), ([[]], 'empty'), ([-1], '-1')):
        with pytest.raises(BadInput, match=names):
            llm.generate(bad, greedy(2), use_tqdm=False)
    with pytest.raises(BadInput, match='2 prompts came with 3'):
        llm.generate([[1], [2]], [greedy(2)] * 3, use_tqdm=False)
    with pytest.raises(BadInput, match='dict'):
        llm.generate([1], {'max_tokens': 3}, use_tqdm=False)
    with pytest.raises(BadInput, match='chat template'):
        llm.chat([{'role': 'user', 'content': 'x'}])
    with pytest.raises(BadInput, match='messages are a list'):
        LLM(model, Letters(), num_blocks=16).chat({'role': 'user', 'content': 'x'})
    assert all_free(llm)


def test_chat_writes_conversations_out_by_the_template(model):
    class Chatty(Letters):
        def apply_chat_template(self, messages, **more): return ''.join(m['content'] for m in messages) + more.get('end', '')
    llm = LLM(model, Chatty(), num_blocks=16)
    turns = [{'role': 'user', 'content': 'ab'}, {'role': 'assistant', 'content': 'c'}]
    one = llm.chat(turns, greedy(3), use_tqdm=False, end='d')
    two = llm.chat([turns, turns[:1]], [greedy(3), greedy(2)], False)
    assert [out.prompt for out in one + two] == ['abcd', 'abc', 'ab']
    assert [len(out.outputs[0].token_ids) for out in one + two] == [3, 3, 2]
    assert is_greedy(model, [0, 1, 2, 3], one[0].outputs[0].token_ids)


def test_max_tokens_is_clipped_to_the_context(model):
    out = LLM(model, max_model_len=8, num_blocks=4).generate([1, 2, 3], greedy(100), use_tqdm=False)[0]
    assert len(out.outputs[0].token_ids) == 5 and out.outputs[0].finish_reason == 'length'
    assert LLM(model, num_blocks=4).generate([1], greedy(0), use_tqdm=False)[0].outputs[0].finish_reason == 'length'


@pytest.mark.parametrize('sizes, names', [
    (dict(num_blocks=0), 'num_blocks is 0'), (dict(num_blocks=1), 'num_blocks is 1'), (dict(block_size=0), 'block_size'),
    (dict(max_num_seqs=0), 'max_num_seqs'), (dict(max_num_batched_tokens=0), 'max_num_batched_tokens'),
    (dict(max_model_len=4096), "context is 1024"), (dict(gpu_memory_utilization=1.5), 'gpu_memory_utilization'),
    (dict(gpu_memory_utilization=0), 'gpu_memory_utilization'), (dict(num_blocks=10**9), 'GB free')])
def test_sizes_that_cannot_be(model, sizes, names):
    with pytest.raises(BadInput, match=names):
        LLM(model, **sizes)


def test_a_cache_without_blocks_wants_a_scheduler(model):
    with pytest.raises(BadInput, match='KVCache'):
        LLM(model, cache=KVCache(model, 16), attend=dense_attend)


def test_ids_of_requests(model):
    engine = make_engine(model, num_blocks=16)
    engine.add_request('a', [1, 2], greedy(2))
    with pytest.raises(BadInput, match="'a' is in use"):
        engine.add_request('a', [1, 2], greedy(2))
    with pytest.raises(BadInput, match="'b'"):
        engine.abort('b')
    engine.step()
    engine.abort('a')
    (out,) = engine.step()
    assert out.finished and out.outputs[0].finish_reason == 'abort' and not engine.has_unfinished_requests()
    with pytest.raises(BadInput, match="'a'"):
        engine.abort('a')
    engine.add_request('a', [1, 2], greedy(1))
    assert engine.step() == []    # on its way
    assert engine.step()[0].outputs[0].finish_reason == 'length'


def test_a_step_that_fails_hurts_no_later_request(model):
    llm = LLM(model, num_blocks=16)
    runner = llm.engine.runner

    def breaks(batch):
        raise RuntimeError('the device is gone')
    llm.engine.core.runner = breaks
    with pytest.raises(RuntimeError, match='device'):
        llm.generate([1, 2], greedy(3), use_tqdm=False)
    llm.engine.core.runner = runner
    out = llm.generate([1, 2], greedy(3), use_tqdm=False)[0]
    assert is_greedy(model, [1, 2], out.outputs[0].token_ids) and all_free(llm)


def test_smaller_priority_goes_first(model):
    engine, done = make_engine(model, num_blocks=16, max_num_seqs=1), []
    for id, priority in (('late', 5), ('soon', 0), ('later', 5)):
        engine.add_request(id, [1, 2], greedy(2), priority)
    while engine.has_unfinished_requests():
        done += [out.request_id for out in engine.step() if out.finished]
    assert done == ['soon', 'late', 'later']


async def read(engine, prompt, params, **more):
    "All token ids of a stream, and how many times it spoke."
    times = 0
    async for out in engine.generate(prompt, params, **more):
        times += 1
        await asyncio.sleep(0)
    return out.outputs[0].token_ids, times


def test_async_streams_are_the_batch(model):
    llm = LLM(model, num_blocks=32)
    prompts = [[1, 2, 3], [4, 5], [6]]
    want = [out.outputs[0].token_ids for out in llm.generate(prompts, greedy(6), use_tqdm=False)]

    async def main():
        engine = AsyncLLM(llm.engine)
        try:
            streams = (read(engine, p, greedy(6)) for p in prompts)
            return await asyncio.gather(*streams)
        finally:
            engine.shutdown()
    assert [tokens for tokens, _ in asyncio.run(main())] == want and all_free(llm)


def test_a_slow_reader_stalls_nobody_and_misses_nothing(model):
    llm = LLM(model, num_blocks=32)

    async def main():
        engine, fast_has_ended = AsyncLLM(llm.engine), asyncio.Event()

        async def read_slowly():
            times = 0
            async for out in engine.generate([1, 2, 3], greedy(12)):
                times += 1
                await fast_has_ended.wait()
            return out.outputs[0].token_ids, times
        slow = asyncio.create_task(read_slowly())
        fast, _ = await read(engine, [4, 5], greedy(12))
        fast_has_ended.set()
        answer, times = await slow
        engine.shutdown()
        return fast, answer, times
    fast, answer, times = asyncio.run(asyncio.wait_for(main(), 120))
    assert is_greedy(model, [4, 5], fast) and is_greedy(model, [1, 2, 3], answer) and len(answer) == len(fast) == 12
    assert times <= 6    # what came while it waited, it read at once


def test_leaving_a_stream_aborts_its_request_and_no_other(model):
    llm = LLM(model, num_blocks=64)

    async def main():
        engine = AsyncLLM(llm.engine)

        async def leaves():
            async for out in engine.generate([9, 9], greedy(800), request_id='x'):
                if len(out.outputs[0].token_ids) >= 2:
                    return
        stays = asyncio.create_task(read(engine, [1, 2, 3], greedy(10)))
        await leaves()
        tokens, _ = await stays
        cancelled = asyncio.create_task(read(engine, [7], greedy(800)))
        await asyncio.sleep(0.5)
        cancelled.cancel()
        again, _ = await read(engine, [9, 9], greedy(2), request_id='x')
        engine.shutdown()
        return tokens, again
    tokens, again = asyncio.run(main())
    assert is_greedy(model, [1, 2, 3], tokens) and is_greedy(model, [9, 9], again)
    assert all_free(llm) and not llm.engine.core.has_work


async def begun(llm):
    "Wait until a request has reached the engine."
    while not llm.engine.scheduler.sequences:
        await asyncio.sleep(0.001)


def test_async_errors_reach_their_caller_only(model):
    llm = LLM(model, num_blocks=64)

    async def fails(coroutine, kind, names):
        with pytest.raises(kind, match=names):
            await coroutine

    async def main():
        engine = AsyncLLM(llm.engine)
        good = asyncio.create_task(read(engine, [1, 2, 3], greedy(800), request_id='mine'))
        await begun(llm)
        await fails(read(engine, [1], greedy(2), request_id='mine'), BadInput, "'mine' is in use")
        await fails(read(engine, [], greedy(2)), BadInput, 'empty')
        await fails(read(engine, [1] * 1023 + [2], greedy(2)), BadInput, '1024 tokens')
        await fails(engine.abort('nobody'), BadInput, "'nobody'")
        tokens, _ = await good
        runner, llm.engine.core.runner = llm.engine.runner, lambda batch: 1 / 0
        await fails(read(engine, [1], greedy(2)), ZeroDivisionError, 'division')
        llm.engine.core.runner = runner
        after, _ = await read(engine, [1], greedy(2))
        hanging = asyncio.create_task(read(engine, [5], greedy(900)))
        await begun(llm)
        engine.shutdown()
        await fails(hanging, RuntimeError, 'shut down')
        await fails(read(engine, [1], greedy(2)), RuntimeError, 'shut down')
        return tokens, after
    tokens, after = asyncio.run(main())
    assert is_greedy(model, [1, 2, 3], tokens) and len(tokens) == 800 and is_greedy(model, [1], after)
    assert all_free(llm) and threading.active_count() < 10


def test_abort_ends_the_stream(model):
    llm = LLM(model, num_blocks=64)

    async def main():
        engine = AsyncLLM(llm.engine)
        stream = asyncio.create_task(read(engine, [1, 2, 3], greedy(900), request_id=1))
        await begun(llm)
        await engine.abort(1)
        tokens, _ = await stream
        engine.shutdown()
        return tokens
    tokens = asyncio.run(main())
    assert len(tokens) < 900 and is_greedy(model, [1, 2, 3], tokens) and all_free(llm)


# --- warm-up

@pytest.mark.parametrize('sizes', [dict(num_blocks=40, max_num_seqs=4, max_num_batched_tokens=32),
                                   dict(num_blocks=40, max_num_seqs=4, max_num_batched_tokens=32, num_scheduler_steps=4),
                                   dict(num_blocks=3, max_num_seqs=64, max_num_batched_tokens=512)])
def test_after_a_warm_up_nothing_is_captured(model, sizes, capsys):
    engine = LLM(model, **sizes).engine
    known = warm_up(engine)
    assert known == len(engine.runner.graphs) > 0 and 'warm-up' in capsys.readouterr().err
    graphs, params = dict(engine.runner.graphs), SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for n in range(min(3, sizes['num_blocks'] - 1)):
        engine.add_request(n, [5], params)
    while engine.has_unfinished_requests():
        engine.step()
    engine.add_request('long', list(range(20)), params)
    while engine.has_unfinished_requests():
        engine.step()
    assert engine.runner.graphs == graphs    # the same objects
    assert engine.scheduler.blocks.num_free == sizes['num_blocks'] - 1
    assert engine.requests == {} and not engine.scheduler.sequences


def test_a_warm_up_without_graphs_is_silent(model, capsys):
    cache = PagedKVCache(model, 20)
    runner = EagerRunner(model, cache, paged_attend)
    engine = make_engine(model, cache=cache, runner=runner, max_num_seqs=2, max_num_batched_tokens=16)
    assert warm_up(engine, use_tqdm=False) == 0 and capsys.readouterr().err == ''


# --- scoring a prompt

def prompt_scores(model, prompt):
    "Log-probabilities of every token of a prompt after the first: one plain forward pass."
    size = bucket(len(prompt) - 1)
    logits = model(InputBatch.of(prompt[:-1], size=size, rows=list(range(size))), NoCache(), dense_attend).numpy()
    logits = logits[:len(prompt) - 1].astype(np.float64)
    return logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) \
        - logits.max(-1, keepdims=True)


@pytest.mark.parametrize('sizes', [{}, dict(max_num_seqs=3), dict(max_num_batched_tokens=4, num_blocks=8, block_size=8)])
@pytest.mark.parametrize('portable', [False, True])
def test_prompt_logprobs_are_the_forwards(model, sizes, portable):
    parts = dict(cache=PagedKVCache(model, 64), attend=paged_attend) if portable else {}
    if portable:
        parts['runner'] = EagerRunner(model, *parts.values())
        sizes = {k: v for k, v in sizes.items() if k.startswith('max')}
    llm, rng = LLM(model, **parts, **sizes), np.random.default_rng(1)
    prompts = [rng.integers(0, 512, n).tolist() for n in (17, 1, 2, 9)]
    params = [greedy(3, prompt_logprobs=2, n=2), greedy(2, prompt_logprobs=0), greedy(0, prompt_logprobs=5), greedy(4)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, p, out in zip(prompts, params, outputs):
        if p.prompt_logprobs is None:
            assert out.prompt_logprobs is None
            continue
        assert out.prompt_logprobs[0] is None and len(out.prompt_logprobs) == len(prompt)
        if len(prompt) == 1: continue
        for i, row in enumerate(prompt_scores(model, prompt), 1):
            got = {t: p.logprob for t, p in out.prompt_logprobs[i].items()}
            assert {prompt[i]} <= set(got) and len(got) in (p.prompt_logprobs, p.prompt_logprobs + 1)
            assert all(abs(got[t] - row[t]) < 1e-3 for t in got)
            assert sorted(row[t] for t in got)[-1] == pytest.approx(row.max(), abs=1e-3) or not p.prompt_logprobs
    plain = llm.generate(prompts, [greedy(p.max_tokens) for p in params], use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in plain]
    assert outputs[2].outputs[0].token_ids == [] and outputs[2].outputs[0].finish_reason == 'length'
    assert all_free(llm)


# --- stop strings, kept or not, and how long they wait

def test_a_stop_string_may_stay_and_may_have_to_wait(model):
    llm = LLM(model, Letters(), num_blocks=64)
    (plain,) = llm.generate('abc', greedy(12), use_tqdm=False)
    text = plain.outputs[0].text
    stop, first = text[4:6], text.index(text[4:6])
    (without,), (kept,) = (llm.generate('abc', greedy(12, stop=stop, include_stop_str_in_output=keep), use_tqdm=False)
                           for keep in (False, True))
    assert without.outputs[0].text == text[:first] and kept.outputs[0].text == text[:first + 2]
    assert without.outputs[0].stop_reason == kept.outputs[0].stop_reason == stop
    (late,) = llm.generate('abc', greedy(12, stop=text[0], min_tokens=3), use_tqdm=False)
    assert late.outputs[0].text[:3] == text[:3] and len(late.outputs[0].token_ids) > 3


def test_a_reader_that_leaves_is_counted_once(model):
    from tinyvllm.engine.outputs import StatLogger

    class Counts(StatLogger):
        def __init__(self): self.events = []
        def record_arrival(self, request): self.events.append('arrived')
        def record_finish(self, request): self.events.append([o.finish_reason for o in request.output.outputs])

    llm = LLM(model, num_blocks=64)
    llm.engine.stats = counts = Counts()

    async def main():
        engine = AsyncLLM(llm.engine)
        stream = await engine.submit([1, 2, 3], greedy(900))
        await anext(stream)
        stream.close(); stream.close()
        tokens, _ = await read(engine, [1, 2, 3], greedy(3))
        with pytest.raises(BadInput):
            await engine.submit([1] * 2000, greedy(900))
        assert engine.is_alive
        engine.shutdown(); engine.shutdown()
        assert not engine.is_alive
    asyncio.run(main())
    assert counts.events == ['arrived', ['abort'], 'arrived', ['length']] and all_free(llm)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_on_the_thread_reaches_its_readers(model):
    llm = LLM(model, num_blocks=64)

    async def main():
        engine = AsyncLLM(llm.engine)

        def dies(batch): raise SystemExit
        llm.engine.core.runner = dies
        with pytest.raises(SystemExit):
            await read(engine, [1, 2, 3], greedy(3))
        assert not engine.is_alive
    asyncio.run(main())
