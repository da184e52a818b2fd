"""What the host writes for a decision, and what the device makes of it.

`prepare` is checked against a model of it in plain loops: random batches with prompts in chunks, sequences
that decode, tokens in flight, padding, and several replays of a staging buffer. The C text runs all of them, the Metal
text some in the simulator (or on a Mac).
"""
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tinygrad import Tensor, dtypes

from tinyvllm.runner import inputs as module
from tinyvllm.core.blocks import BlockManager
from tinyvllm.engine.defaults import make_engine
from tinyvllm.models.fused import fused
from tinyvllm.runner.inputs import (NUM_STAGING_BUFFERS, InputBuffers, StagingBuffer, StepState, draw_uniforms, lay_out,
                                    staging_parts, view_part)
from tinyvllm.runner.shared_memory import allocate_shared
from tinyvllm.models.llama import Llama, model_config
from tinyvllm.kernels.metal import Kernel
from tinyvllm.kernels.sampler import pack_sampling_params
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.sampling.sampler import Sampled, draw_uniform
from tinyvllm.core.sequence import Batch, Sequence
from tinyvllm.models.weights import tiny_checkpoint

cases = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
few = settings(cases, max_examples=5)
seeds = st.integers(0, 2**32 - 1)
BLOCK, LAST = 4, 8    # tokens of a block; rows of the last tokens
SIZES = (8, 8, 16, 0, 4), (16, 4, 16, 0, 1), (32, 4, 16, 0, 1), (1, 1, 64, 0, 16)    # few: each is compiled once


def on(device, x):
    return Tensor(np.array(x), device=device).realize()


# --- a decision, and what must come of it -------------------------------------------------------------

def sequence(rng, i, n, in_flight, width):
    "One that computes `n` tokens now. `in_flight`: its last token is not known here."
    more = int(rng.integers(0, 3)) if n > 1 else 0    # of the prompt, for later steps
    computed = int(rng.integers(0, width * BLOCK - n - more - 20))
    params = SamplingParams(temperature=float(rng.choice([0, 0.7, 1])), top_p=0.9, top_k=5, min_p=0.1,
                            seed=int(rng.integers(-2**63, 2**63)), max_tokens=10**4)
    prompt = rng.integers(1, 10**6, computed + n + more - in_flight).tolist()
    seq = Sequence(i, prompt, params)
    seq.num_computed, seq.in_flight = computed, int(in_flight)
    seq.sampled = [Sampled(0, 0.0, None)] * int(rng.integers(0, 200))
    return seq


def decision(rng, tokens, rows, width, steps):
    "A batch that fits, and the rows that sequences with a token in flight had in the step before."
    entries, previous_rows = [], {}
    size, decodes = int(rng.integers(1, rows + 1)), tokens == rows
    spare, free = tokens - size, rng.permutation(10**5).tolist()
    for i in range(size):
        n = 1 + (0 if decodes else int(rng.integers(0, spare + 1)))
        spare -= n - 1
        seq = sequence(rng, i, n, rng.random() < 0.5, width)
        blocks = -(-(seq.num_computed + n + steps - 1) // BLOCK)
        entries.append((seq, n, [1 + free.pop() for _ in range(blocks)]))
        if seq.in_flight:
            previous_rows[i] = int(rng.integers(LAST))
    chosen = int(rng.integers(1, steps + 1)) if decodes else 1
    return Batch.of(entries, BLOCK, steps=chosen), previous_rows


def expected(batch, previous_rows, last, later, tokens, rows):
    "In loops, one token after the other."
    made = {name: [0] * tokens for name in ('tokens', 'positions', 'slots', 'owners')}
    at, ends, settings = 0, [], np.zeros((rows, 8), np.float32)
    for row, (seq, n, table) in enumerate(zip(batch.seqs, batch.num_new, batch.block_tables)):
        for i in range(n):
            position = seq.num_computed + later + i
            if later:
                token = last[row]
            elif position < len(seq.token_ids):
                token = seq.token_ids[position]
            else:
                token = last[previous_rows[seq.id]]
            made['tokens'][at], made['positions'][at], made['owners'][at] = token, position, row
            made['slots'][at] = table[position // BLOCK] * BLOCK + position % BLOCK
            at += 1
        ends.append(at - 1)
        settings[row] = pack_sampling_params(seq.params)
        if not seq.params.greedy:
            u = draw_uniform(seq.params.seed, len(seq.sampled) + seq.in_flight + later)
            settings[row, 4] = min(u, 1 - 2**-24)
    return made | dict(rows=ends + [at - 1] * (rows - len(ends)), settings=settings)


class Bench:
    "Input buffers of one size, and the state of a device whose steps are counted by hand."
    def __init__(self, device, sizes):
        self.sizes, self.state = sizes, StepState(LAST, device)
        self.inputs = InputBuffers(device, *sizes)

    def prepared(self):
        "What the next replay reads, by the step counter of the device."
        x = self.inputs.prepare(self.state, BLOCK)
        return {name: x[name].numpy() for name in self.inputs.prepared}

    def check(self, batch, previous_rows, rng):
        "All replays of a decision; between two of them every row gets a token."
        tokens, rows, _, _, steps = self.sizes
        self.inputs.next_buffer().fill(batch, previous_rows)
        for later in range(batch.steps):
            step_id = self.state.reserve(self.inputs.used * steps + later)
            last = rng.integers(1, 10**6, LAST).astype(np.int32)
            self.state.last_tokens.assign(on(self.state.device, last)).realize()
            self.state.step_counter.assign(on(self.state.device, np.int32([step_id]))).realize()
            got, want = self.prepared(), expected(batch, previous_rows, last.tolist(), later, tokens, rows)
            settings = got['settings'].reshape(rows, 8)
            settings[settings[:, 0] == 0, 4] = 0    # greedy rows need no random number; an old one may lie there
            for name, x in want.items():
                assert np.array_equal(got[name].reshape(np.shape(x)), x), (name, later)


@cache
def bench(device, sizes):
    return Bench(device, sizes)


@cases
@given(seeds, st.sampled_from(SIZES))
def test_prepare_computes_what_the_host_used_to_write(seed, sizes):
    "Staging buffers are used again and again: whatever they held before must not show."
    rng = np.random.default_rng(seed)
    for _ in range(3):
        bench('CPU', sizes).check(*decision(rng, *sizes[:3], sizes[4]), rng)


@few
@given(seeds, st.sampled_from(SIZES[:2]))
def test_the_metal_text_computes_the_same(seed, sizes):
    rng = np.random.default_rng(seed)
    bench('METAL', sizes).check(*decision(rng, *sizes[:3], sizes[4]), rng)


def test_more_tokens_than_threads():
    "Each thread takes several; the rows are found by halving."
    rng, sizes = np.random.default_rng(0), (1024, 64, 512, 0, 1)
    for device in ('CPU', 'METAL'):
        Bench(device, sizes).check(*decision(rng, *sizes[:3], 1), rng)


# --- mutants of the text --------------------------------------------------------------------------------

MUTANTS = [
    ('x[STARTS + i] == i && x[STARTS + i + 1] == i + 1', '1'),
    ('<= i) row += jump', '< i) row += jump'),
    ('if (!later)', 'if (later)'),
    ('later ? row : x[PREVIOUS_ROWS', 'x[PREVIOUS_ROWS'),
    ('x[FIRST_POSITIONS + row] + later', 'x[FIRST_POSITIONS + row]'),
    ('fed = real && previous >= 0 && i + 1 == x[STARTS + row + 1]', 'fed = real && previous >= 0'),
    ('at = real ? first', 'at = 1 ? first'),
    ('owners[i] = real ? row : 0', 'owners[i] = row'),
    ('slots[i] = real ?', 'slots[i] = 1 ?'),
    ('at / BLOCK] * BLOCK', 'i / BLOCK] * BLOCK'),
    ('end > 0 ? end - 1 : 0', 'end'),
    ('i % 8 == 4 ?', 'i % 8 == 3 ?'),
    ('i / 8 * STEPS + later', 'i / 8 * STEPS'),
]


@pytest.mark.parametrize('old, new', MUTANTS)
def test_a_wrong_text_is_found(old, new, monkeypatch):
    assert old in module.PREPARE.c and old in module.PREPARE.metal
    monkeypatch.setattr(module, 'PREPARE', Kernel(module.PREPARE.metal, c=module.PREPARE.c.replace(old, new)))
    rng = np.random.default_rng(1)

    def run():
        for sizes in SIZES[:3]:
            fresh = Bench('CPU', sizes)
            for _ in range(4 * NUM_STAGING_BUFFERS):
                fresh.check(*decision(rng, *sizes[:3], sizes[4]), rng)
    with pytest.raises(AssertionError):
        run()


# --- random numbers --------------------------------------------------------------------------------------------

@cases
@given(st.integers(-2**63, 2**63 - 1), st.integers(0, 2**20))
def test_uniforms_are_those_of_sampling(seed, position):
    got = draw_uniforms(seed, position // 64)
    assert got.shape == (64,) and got.dtype == np.float32 and got.max() < 1
    assert got[position % 64] == np.float32(min(draw_uniform(seed, position), 1 - 2**-24))


def test_a_uniform_never_rounds_to_one(monkeypatch):
    class Ones:
        def __init__(self, **_): pass
        def random_raw(self, n): return np.full(n, 2**64 - 1, np.uint64)
    monkeypatch.setattr(module, 'Philox', Ones)
    assert (draw_uniforms.__wrapped__(0, 0) == np.float32(1 - 2**-24)).all()


# --- a staging buffer remembers ---------------------------------------------------------------------------------

def buffer_of(rows=4, width=8, steps=2):
    parts = staging_parts(rows, rows, width, 16, steps)
    return StagingBuffer(np.zeros(lay_out(parts)[1], np.int32), parts)


def batch_of(*tables, params=None):
    entries = []
    for i, table in enumerate(tables):
        seq = Sequence(i, [1, 2], params[i] if params else SamplingParams(temperature=0))
        seq.num_computed = 1
        entries.append((seq, 1, table))
    return Batch.of(entries, BLOCK)


def test_only_new_blocks_are_written():
    buffer, table = buffer_of(), [5, 6]
    buffer.fill(batch_of(table), {})
    assert buffer.parts['tables'][0].tolist() == [5, 6] + [0] * 6
    buffer.parts['tables'][0, 0] = 99    # to see what is written
    table.append(7)
    buffer.fill(batch_of(table), {})
    assert buffer.parts['tables'][0].tolist() == [99, 6, 7] + [0] * 5
    buffer.parts['tables'][0, 2] = 98
    buffer.fill(batch_of(table), {})
    assert buffer.parts['tables'][0, 2] == 98


@pytest.mark.parametrize('grown', [[], [9]])
def test_a_copied_last_block_is_written(grown):
    "A fork's first token copies the shared tail; the table may grow in the same step."
    buffer, table = buffer_of(), [5, 6]
    buffer.fill(batch_of(table), {})
    table.pop()
    table += [8, *grown]
    buffer.fill(batch_of(table), {})
    assert buffer.parts['tables'][0, :len(table)].tolist() == table


def test_tables_of_the_block_manager():
    "Growing, forked, copied, freed and taken again: at any time a staging buffer that is filled has what counts."
    rng, blocks, buffers = np.random.default_rng(0), BlockManager(60, BLOCK), [buffer_of(8, 32), buffer_of(8, 32)]
    names, copied = 0, 0
    for turn in range(300):
        owners = list(blocks.tables)
        if len(owners) < 6 or rng.random() < 0.05:
            if owners and rng.random() < 0.7 and (length := blocks.tables[owners[0]].length):
                blocks.fork(owners[0], names, int(rng.integers(1, length + 1)))
            else:
                blocks.allocate(names)
            names += 1
        for owner in list(blocks.tables):
            if blocks.can_allocate(owner, 1):
                copied += len(blocks.append(owner, 1))
        if rng.random() < 0.2 or blocks.num_free < 6:
            blocks.free(list(blocks.tables)[int(rng.integers(len(blocks.tables)))])
        tables = [t.ids for t in blocks.tables.values() if t.ids][:8]
        buffer = buffers[rng.integers(2)]
        buffer.fill(batch_of(*tables), {})
        for row, table in enumerate(tables):
            assert buffer.parts['tables'][row, :len(table)].tolist() == table
    assert copied > 5 and names > 20


def test_another_sequence_takes_the_row():
    buffer = buffer_of()
    hot, cold = SamplingParams(temperature=0.7, seed=1), SamplingParams(temperature=0)
    buffer.fill(batch_of([1, 2, 3], [4], params=[hot, cold]), {})
    assert buffer.parts['settings'][0, 0] == np.float32(0.7) and buffer.parts['settings'][1, 0] == 0
    buffer.fill(batch_of([1, 2, 3][:], params=[cold]), {})
    assert buffer.parts['settings'][0].tolist() == np.float32(pack_sampling_params(cold)).tolist()
    buffer.fill(batch_of([7, 8], params=[hot]), {})
    assert buffer.parts['tables'][0, :2].tolist() == [7, 8] and buffer.parts['settings'][0, 0] == np.float32(0.7)


def test_rows_beyond_the_batch_are_greedy():
    "And when they are taken again, their settings are written again."
    buffer, hot = buffer_of(), SamplingParams(temperature=0.7, seed=1)
    many, one = (batch_of(*[[1]] * n, params=[hot] * n) for n in (3, 1))
    for batch, n in ((many, 3), (one, 1), (many, 3)):
        buffer.fill(batch, {})
        assert (buffer.parts['settings'][:n, 0] == np.float32(0.7)).all() and not buffer.parts['settings'][n:].any()
        assert (buffer.parts['starts'][n:] == n).all()


def test_rows_that_score_a_prompt_have_a_forced_token():
    "The next token of the prompt; when a row decodes again, its own top-k is back."
    buffer, seq = buffer_of(), Sequence('a', [5, 6, 7], SamplingParams(temperature=0, top_k=3))
    scoring = Batch([seq] * 2, [1, 1], [0, 1], [[1]] * 2, [True] * 2, [True] * 2, [], 1, BLOCK)
    buffer.fill(scoring, {})
    assert buffer.parts['settings'][:, 3].tolist() == [-1 - 6, -1 - 7, 0, 0]
    buffer.fill(batch_of([1], params=[seq.params]), {})
    assert buffer.parts['settings'][:, 3].tolist() == [3, 0, 0, 0]


def test_seen_tokens_of_penalised_rows():
    buffer = buffer_of()
    for lists in ([[(5, 1), (7, 0)], [], [(5, 2)]], [[(3, 3)]]):
        buffer.fill_pairs(lists, 'seen', 'counts', 'begins')
        begins = buffer.parts['begins'].tolist()
        assert [list(zip(buffer.parts['seen'][a:b].tolist(), buffer.parts['counts'][a:b].tolist()))
                for a, b in zip(begins, begins[1:])] == lists + [[]] * (4 - len(lists))


# --- memory ------------------------------------------------------------------------------------------

def test_parts_lie_apart_at_multiples_of_16_bytes():
    parts = staging_parts(5, 3, 7, 9, 2)
    begins, end = lay_out(parts)
    assert list(begins) == list(parts) and all(begin % 4 == 0 for begin in [*begins.values(), end])
    taken = [i for name, (shape, _) in parts.items() for i in range(begins[name], begins[name] + int(np.prod(shape)))]
    assert len(taken) == len(set(taken)) and max(taken) < end
    assert not {'seen', 'counts', 'begins'} & staging_parts(5, 3, 7, 0, 2).keys()


def test_a_view_is_the_same_memory():
    whole, host = allocate_shared(16, 'CPU')
    part, number = view_part(whole, 4, (2, 3)), view_part(whole, 8, (1,), dtypes.float)
    host[:] = np.arange(16)
    assert part.tolist() == [[4, 5, 6], [7, 8, 9]]
    host[8:9].view(np.float32)[0] = 0.25
    assert number.tolist() == [0.25]


def test_both_sides_see_what_the_other_writes():
    both, host = allocate_shared(4, 'CPU')
    host[:] = [1, 2, 3, 4]
    both.assign(both * 10).realize()
    assert host.tolist() == [10, 20, 30, 40]


# --- how often ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('steps', [1, 8])
def test_a_decision_fills_one_staging_buffer_and_a_replay_prepares_once(steps, monkeypatch):
    "Thirty-two tokens: the host fills 32 / `steps` staging buffers; the device prepares each replay by its own counter."
    config, state = tiny_checkpoint(seed=3, num_hidden_layers=1)
    model = fused(Llama(model_config(config), state))
    engine = make_engine(model, num_blocks=20, max_num_seqs=2, num_scheduler_steps=steps)
    filled, launches, prepare, fill = [], [], InputBuffers.prepare, StagingBuffer.fill
    monkeypatch.setattr(StagingBuffer, 'fill', lambda self, *a: filled.append(self) or fill(self, *a))
    monkeypatch.setattr(InputBuffers, 'prepare', lambda self, *a: launches.append(self) or prepare(self, *a))
    params = SamplingParams(temperature=0, max_tokens=33, ignore_eos=True)
    for turn in range(2):
        filled.clear()
        launches.clear()
        before = int(engine.runner.state.step_counter.item())
        out = engine.add_request(turn, [1, 2, 3], params)
        while engine.has_unfinished_requests():
            engine.step()
        assert len(out.outputs[0].token_ids) == 33
        assert len(filled) == 1 + 32 // steps    # the prompt, then tokens
        assert int(engine.runner.state.step_counter.item()) == before + 33    # one replay for each token
        assert engine.runner.state.step_id + 1 == before + 33
    assert not launches    # the second turn had its graphs: Python asked for no kernel
    assert {buffer for buffer in filled} <= {b for g in engine.runner.graphs.values() for b in g.inputs.buffers}
    assert all(len(g.inputs.buffers) == NUM_STAGING_BUFFERS for g in engine.runner.graphs.values())
