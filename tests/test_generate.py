"The loop, its stops and its door; the cached loop against the plain one."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tinyvllm.errors import BadInput
from tinyvllm.reference.generate import Generation, StopText, bucket, check_prompt, generate, greedy, same_greedy
from tinyvllm.reference.kvcache import KVCache, keep_prefix
from tinyvllm.models.llama import InputBatch, Llama, NoCache, dense_attend, kv_bytes, model_config, weight_bytes
from tinyvllm.measure import counting
from tinyvllm.models.weights import tiny_checkpoint


@pytest.fixture(scope='module')
def model():
    config, state = tiny_checkpoint(seed=0)
    return Llama(model_config(config), state)


class ToyTokenizer:
    "A tokenizer whose token n is the n-th letter of the alphabet."
    eos_ids = (0,)
    def stream(self, **options): return self
    def add(self, id): return chr(97 + id % 26)
    def finish(self): return ''


class Script:
    "A `sample` that says what it was told to."
    def __init__(self, text): self.ids = iter([ord(c) - 97 for c in text])
    def __call__(self, logits): return next(self.ids)


class SmallChunks(KVCache):
    chunk = 4


def test_greedy_takes_the_lowest_id_of_equals():
    assert greedy(np.array([0., 3., 3., 1.])) == 1


@given(st.integers(1, 100_000))
def test_bucket_is_large_enough_and_not_twice_as_large(n):
    assert n <= bucket(n) <= max(2 * n - 1, n + 255) and bucket(bucket(n)) == bucket(n)


def test_loop_equals_the_definition(model):
    ids, want = [11, 42, 7], []
    for _ in range(5):
        logits = model(InputBatch.of(ids + want), NoCache(), dense_attend).numpy()
        want.append(int(logits[0].argmax()))
    assert list(generate(model, ids, 5)) == want
    assert list(generate(model, ids, 5, cache=KVCache(model, 8))) == want
    assert same_greedy(model, ids, want) and not same_greedy(model, ids, want[:-1] + [want[-1] ^ 1])


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 511), min_size=1, max_size=14), st.integers(1, 5), st.sampled_from([KVCache, SmallChunks]))
def test_cached_tokens_are_the_greedy_tokens(model, ids, n, cache):
    tokens = list(generate(model, ids, n, cache=cache(model, len(ids) + n)))
    assert len(tokens) == n and same_greedy(model, ids, tokens)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 511), min_size=1, max_size=8), st.integers(0, 8), st.lists(st.integers(0, 511), min_size=1, max_size=4))
def test_a_reused_cache_changes_no_token(model, old, keep, new):
    cache = KVCache(model, 24)
    list(generate(model, old, 2, cache=cache))
    ids = old[:keep] + new
    held = list(cache.tokens)
    same = keep_prefix(cache, ids)
    assert cache.tokens == held[:same] == ids[:same] and same < len(ids)
    assert same == len(ids) - 1 or same == len(held) or held[same] != ids[same]
    assert same_greedy(model, ids, list(generate(model, ids, 3, cache=cache)))


def test_cache_makes_work_flat_and_compiles_once_per_bucket(model):
    stream, work, compiled = generate(model, [1, 2, 3], 13, cache=KVCache(model, 16)), [], []
    for _ in range(13):
        with counting() as c:
            next(stream)
        work.append(c.flops), compiled.append(c.compiled)
    assert max(work[6:]) == min(work[6:]) < work[0]          # all within the 16-slot bucket
    assert set(compiled[7:]) == {0}
    plain = generate(model, list(range(12)), 1)
    with counting() as c:
        next(plain)
    assert c.flops > 8 * work[-1]


def test_cache_bytes(model):
    cache = KVCache(model, 30)
    slots = cache.k[0].shape[0]
    assert slots == 30 + 32 and cache.nbytes == slots * kv_bytes(model)
    assert weight_bytes(model) <= sum(t.nbytes() for t in tiny_checkpoint(seed=0)[1].values())


def test_cache_too_small_is_refused_before_the_first_token(model):
    with pytest.raises(BadInput, match='room for 10 tokens.*needs 11'):
        next(generate(model, [1, 2, 3], 8, cache=KVCache(model, 10)))


@pytest.mark.parametrize('ids, n, names', [([], 4, 'empty'), ([1], -1, 'max_tokens is -1'), ([512], 4, '512'),
                                           ([-1], 4, '-1'), ([1] * 10_000, 4, '10000 tokens')])
def test_bad_requests_are_named(model, ids, n, names):
    with pytest.raises(BadInput, match=names):
        check_prompt(ids, model.config, n)


def test_max_tokens_is_clipped_to_the_context(model):
    context = model.config.max_position_embeddings
    assert check_prompt([1] * (context - 3), model.config, 100) == 3
    assert check_prompt([1], model.config, 0) == 0


def run(model, text, **options):
    g = Generation(model, ToyTokenizer(), [1], len(text), sample=Script(text), cache=KVCache(model, 64), **options)
    pieces = list(g)
    assert ''.join(pieces) == g.text and all(pieces)
    return g


def test_length_stop_token_and_stop_string(model):
    g = run(model, 'hello')
    assert (g.text, g.finish_reason, len(g.token_ids)) == ('hello', 'length', 5)
    g = run(model, 'helxlo', stop_ids=[ord('x') - 97])
    assert (g.text, g.finish_reason, len(g.token_ids)) == ('hel', 'stop', 4)
    g = run(model, 'hello', stop=['lo', 'zz'])
    assert (g.text, g.finish_reason, len(g.token_ids)) == ('hel', 'stop', 5)
    g = run(model, 'abcab', stop=['abd'])
    assert (g.text, g.finish_reason) == ('abcab', 'length')
    g = Generation(model, ToyTokenizer(), [1], 0)
    assert list(g) == [] and g.finish_reason == 'length' and g.watch.ttft_s is None


def one_shot(text, stop):
    "The text before the stop string that is complete first."
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[:min(starts)], True
    return text, False


@settings(max_examples=400)
@given(st.text('abc', max_size=24), st.lists(st.text('abc', min_size=1, max_size=4), max_size=3), st.data())
def test_stop_text_equals_one_shot_on_any_split(text, stop, data):
    door, out, rest = StopText(stop), '', text
    while rest and not door.hit:
        n = data.draw(st.integers(1, len(rest)))
        out += door.add(rest[:n])
        rest = rest[n:]
        assert not any(s in out for s in stop)
    if not door.hit:
        out += door.finish()
    want, hit = one_shot(text, stop)
    assert (out, bool(door.hit)) == (want, hit) and (not hit or door.hit in stop)
