"Text, stop strings and log-probabilities of outputs, against the plain loop and a plain forward pass."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from support.engines import model, Alphabet, greedy, all_free  # noqa: F401
from tinyvllm.engine.llm import LLM
from tinyvllm.engine.outputs import EngineCoreOutput, make_request
from tinyvllm.errors import BadInput
from tinyvllm.reference.generate import Generation, bucket
from tinyvllm.reference.kvcache import KVCache
from tinyvllm.models.llama import InputBatch, NoCache, dense_attend
from tinyvllm.kv_cache.paged import PagedKVCache, paged_attend
from tinyvllm.runner.eager import EagerRunner
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.sampling.sampler import Sampled, Sampler


def test_logprobs_and_their_sum(model):
    out = LLM(model, Alphabet(), num_blocks=16).generate('abc', SamplingParams(max_tokens=4, seed=1, logprobs=2), use_tqdm=False)[0]
    answer = out.outputs[0]
    assert out.prompt == 'abc' and out.prompt_token_ids == [0, 1, 2] and len(answer.logprobs) == 4
    assert answer.cumulative_logprob == pytest.approx(
        sum(top[i].logprob for i, top in zip(answer.token_ids, answer.logprobs)))
    for top, token in zip(answer.logprobs, answer.token_ids):
        likeliest = list(top.values())[:2]
        assert token in top and 2 <= len(top) <= 3 and likeliest[0].logprob >= likeliest[1].logprob
        assert all(p.decoded_token == Alphabet().decode([i]) for i, p in top.items())
    prompt = InputBatch.of([0, 1, 2], size=4)
    want = model(prompt, NoCache(), dense_attend).log_softmax(-1).numpy()[0]
    assert max(abs(want[i] - p.logprob) for i, p in answer.logprobs[0].items()) < 1e-4


@settings(max_examples=4, deadline=None)
@given(st.lists(st.text('abcdefghij', min_size=1, max_size=2), max_size=2), st.integers(0, 2**31))
def test_text_and_stops_are_those_of_the_plain_loop(model, stop, seed):
    params = SamplingParams(max_tokens=8, seed=seed, stop=tuple(stop), stop_token_ids=(7, 107, 207))
    out = LLM(model, Alphabet(), num_blocks=16).generate('abc', params, use_tqdm=False)[0]
    run = Generation(model, Alphabet(), [0, 1, 2], 8, stop, params.stop_token_ids, sample=Sampler(params, [0, 1, 2]),
                     cache=KVCache(model, 16))
    text, answer = ''.join(run), out.outputs[0]
    assert (answer.text, answer.token_ids, answer.finish_reason) == (text, run.token_ids, run.finish_reason)
    if answer.finish_reason == 'stop':
        assert answer.stop_reason in stop or answer.stop_reason == answer.token_ids[-1]


def test_a_stop_string_may_stay_and_may_have_to_wait(model):
    llm = LLM(model, Alphabet(), num_blocks=64)
    (plain,) = llm.generate('abc', greedy(12), use_tqdm=False)
    text = plain.outputs[0].text
    stop, first = text[4:6], text.index(text[4:6])
    (without,), (kept,) = (llm.generate('abc', greedy(12, stop=stop, include_stop_str_in_output=keep), use_tqdm=False)
                           for keep in (False, True))
    assert without.outputs[0].text == text[:first] and kept.outputs[0].text == text[:first + 2]
    assert without.outputs[0].stop_reason == kept.outputs[0].stop_reason == stop
    (late,) = llm.generate('abc', greedy(12, stop=text[0], min_tokens=3), use_tqdm=False)
    assert late.outputs[0].text[:3] == text[:3] and len(late.outputs[0].token_ids) > 3


def prompt_logprobs(model, prompt):
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
        for i, row in enumerate(prompt_logprobs(model, prompt), 1):
            got = {t: p.logprob for t, p in out.prompt_logprobs[i].items()}
            assert {prompt[i]} <= set(got) and len(got) in (p.prompt_logprobs, p.prompt_logprobs + 1)
            assert all(abs(got[t] - row[t]) < 1e-3 for t in got)
            assert sorted(row[t] for t in got)[-1] == pytest.approx(row.max(), abs=1e-3) or not p.prompt_logprobs
    plain = llm.generate(prompts, [greedy(p.max_tokens) for p in params], use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in plain]
    assert outputs[2].outputs[0].token_ids == [] and outputs[2].outputs[0].finish_reason == 'length'
    assert all_free(llm)


def test_constraints_need_an_engine_that_binds_them(model):
    "Without `bind_constraints` a request for them is refused; with it the processors are copied for each answer."
    class Processors(list):
        def copy(self): return Processors(self)
    bound = Processors([1])
    params = SamplingParams(n=2, allowed_token_ids=[1, 2])
    with pytest.raises(BadInput, match='bind_constraints'):
        make_request('r', [1], params, None, model.config)
    request = make_request('r', [1], params, None, model.config, bind_constraints=lambda *_: bound)
    found = [seq.logits_processors for seq in request.sequences]
    assert found == [bound, bound] and found[0] is not bound and found[0] is not found[1]


def test_an_output_is_the_same_whenever_it_is_read(model):
    def read(every):
        request = make_request('r', 'abc', SamplingParams(max_tokens=9, stop='hi', logprobs=0), Alphabet(), model.config)
        seq = request.sequences[0]
        for n, letter in enumerate('defghijkl', 1):
            if not request.output.finished:
                seq.append_tokens([Sampled(ord(letter) - 97, -1.0, {1: -1.0})])
                if n % every == 0 or seq.finish_reason:
                    request.update(EngineCoreOutput.from_sequence(seq))
        return vars(request.output.outputs[0])
    assert read(1) == read(2) == read(9) and read(1)['text'] == 'defg' and len(read(1)['token_ids']) == 6
