"Requests together against each request alone, whatever the pool, the budget and the neighbours; and faults that stay with their request."
import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from support.engines import deep, model, Alphabet, greedy, is_greedy, all_free, requests  # noqa: F401
from tinyvllm.core.blocks import BlockManager
from tinyvllm.engine.llm import LLM
from tinyvllm.engine.defaults import make_engine
from tinyvllm.errors import BadInput
from tinyvllm.reference.generate import generate
from tinyvllm.reference.kvcache import KVCache
from tinyvllm.models.llama import dense_attend, load_model
from tinyvllm.kv_cache.paged import PagedKVCache, paged_attend
from tinyvllm.runner.eager import EagerRunner
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.sampling.sampler import Sampler
from tinyvllm.core.scheduler import Scheduler
from tinyvllm.models.tokenizer_files import load_tokenizer
from tinyvllm.models.hub import resolve


GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'smollm2.json').read_text())['items']


def test_64_mixed_requests_in_a_small_pool_are_answered_as_alone(deep):
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


def test_16_requests_on_smollm2_in_a_small_pool_give_the_goldens():
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


def test_a_stream_grows_to_the_answer_and_leaving_it_frees_the_blocks(model):
    llm = LLM(model, Alphabet(), num_blocks=16)
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
        LLM(model, Alphabet(), num_blocks=16).chat({'role': 'user', 'content': 'x'})
    assert all_free(llm)


def test_chat_writes_conversations_out_by_the_template(model):
    class Chatty(Alphabet):
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
