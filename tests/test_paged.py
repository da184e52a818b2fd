"Slots, block tables and attention through them, against numpy."
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tinygrad import Tensor

from tinyvllm.core.blocks import BlockManager
from tinyvllm.models.llama import Llama, dense_attend, model_config
from tinyvllm.measure import counting
from tinyvllm.kv_cache.paged import PagedBatch, PagedKVCache, paged_attend, store_rows
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.core.scheduler import Scheduler
from tinyvllm.core.sequence import Batch, Sequence
from tinyvllm.models.weights import tiny_checkpoint


@pytest.fixture(scope='module')
def model():
    config, state = tiny_checkpoint(seed=0)
    return Llama(model_config(config), state)


def tensor(x):
    return Tensor(np.asarray(x)).realize()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_store_rows_is_a_scatter_and_touches_what_it_writes(seed):
    rng = np.random.default_rng(seed)
    start, new = rng.standard_normal((200, 2, 4), np.float32), rng.standard_normal((8, 2, 4), np.float32)
    slots, pool = rng.permutation(200)[:8].astype(np.int32), tensor(start)
    arguments = tensor(new), tensor(slots)
    with counting() as c:
        after = store_rows(pool, *arguments).realize()
    start[slots] = new
    assert np.array_equal(after.numpy(), start) and np.array_equal(pool.numpy(), start)
    assert c.kernels == 1 and c.nbytes <= 2 * new.nbytes + slots.nbytes


@st.composite
def mixed(draw):
    "Sequences with a past and new tokens, in shuffled blocks; sizes fall into few buckets."
    seed = draw(st.integers(0, 2**32 - 1))
    rng, size = np.random.default_rng(seed), draw(st.sampled_from([4, 16]))
    heads, kv_heads = draw(st.sampled_from([(4, 2), (3, 1), (8, 8)]))
    entries, free = [], list(rng.permutation(np.arange(1, 33)))
    for i in range(draw(st.integers(1, 4))):
        new, past = int(rng.integers(1, 5)), int(rng.integers(0, 3 * size - 4))
        seq = Sequence(i, rng.integers(0, 512, past + new).tolist())
        seq.num_computed = past
        entries.append((seq, new, [int(free.pop()) for _ in range(-(-(past + new) // size))]))
    return Batch.of(entries, size), heads, kv_heads, rng


@settings(max_examples=60, deadline=None)
@given(mixed())
def test_batches_are_laid_out_as_a_loop_would(case):
    batch, *_ = case
    inputs, t, size = PagedBatch.of(batch), 0, batch.block_size
    tokens, positions, slots, owners, rows = (getattr(inputs, n).tolist() for n in
                                              ('tokens', 'positions', 'slots', 'owners', 'rows'))
    for s, (seq, n, table) in enumerate(zip(batch.seqs, batch.num_new, batch.block_tables)):
        assert inputs.tables[s].tolist() == table + [0] * (inputs.tables.shape[1] - len(table))
        for p in range(seq.num_computed, seq.num_computed + n):
            assert (tokens[t], positions[t], owners[t]) == (seq.token_ids[p], p, s)
            assert slots[t] == table[p // size] * size + p % size
            t += 1
        assert rows[s] == t - 1
    assert all(slot < size for slot in slots[t:]) and len(set(slots[:t])) == t


@settings(max_examples=60, deadline=None)
@given(mixed())
def test_attention_through_tables_is_attention(case):
    batch, heads, kv_heads, rng = case
    inputs, size = PagedBatch.of(batch), batch.block_size
    q = rng.standard_normal((len(inputs.tokens), heads, 8)).astype(np.float32)
    k, v = (rng.standard_normal((33, size, kv_heads, 8)).astype(np.float32) for _ in 'kv')
    out = paged_attend(tensor(q), tensor(k), tensor(v), inputs).numpy()
    t = 0
    for seq, n, table in zip(batch.seqs, batch.num_new, batch.block_tables):
        keys, values = (x[table].reshape(-1, kv_heads, 8).astype(np.float64) for x in (k, v))
        for p in range(seq.num_computed, seq.num_computed + n):
            for h in range(heads):
                g = h // (heads // kv_heads)
                scores = keys[:p + 1, g] @ q[t, h] / math.sqrt(8)
                weights = np.exp(scores - scores.max())
                want = weights @ values[:p + 1, g] / weights.sum()
                assert np.abs(out[t, h] - want).max() <= 1e-5 * max(1, np.abs(want).max())
            t += 1


def test_copied_blocks_are_copies_and_others_stay(model):
    cache, rng = PagedKVCache(model, 8, 4), np.random.default_rng(0)
    start = rng.standard_normal(cache.k[0].shape, np.float32)
    for pool in cache.k + cache.v:
        pool.assign(tensor(start)).realize()
    cache.copy([(1, 5), (1, 6), (2, 7)])
    want = start.reshape(8, 4, *start.shape[1:]).copy()
    want[5], want[6], want[7] = want[1], want[1], want[2]
    for pool in cache.k + cache.v:
        assert np.array_equal(pool.numpy()[4:], want.reshape(start.shape)[4:])    # block 0 is anybody's


def test_half_precision_agrees_with_the_dense_attention():
    config, state = tiny_checkpoint(seed=0)
    half = Llama(model_config(config), {n: t.half().realize() for n, t in state.items()})
    scheduler = Scheduler(BlockManager(8))
    scheduler.add(Sequence(0, [5, 6, 7, 8], SamplingParams(max_tokens=1)))
    from tinyvllm.models.llama import InputBatch, NoCache
    got = half(PagedBatch.of(scheduler.schedule()), PagedKVCache(half, 8), paged_attend).numpy()[0]
    want = half(InputBatch.of([5, 6, 7, 8]), NoCache(), dense_attend).numpy()[0]
    assert np.abs(got - want).max() < 2e-3 * np.abs(want).max() + 2e-3
