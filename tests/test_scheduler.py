"""The scheduler against a random walk, and against running every request alone.

No device: a fake model whose next token is a function of all tokens before it. Beside it stands a
shadow of the pool: what each slot holds after the copies and writes of every step. A sequence that
reads anything but its own tokens there fails the test, whatever its tokens say.
"""
import ast
import random
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (RuleBasedStateMachine, initialize, invariant, precondition, rule,
                                 run_state_machine_as_test)

import tinyvllm.core.blocks
import tinyvllm.core.scheduler
import tinyvllm.core.sequence
from support.fake_model import EOS, VOCAB, alone, next_token, prompt
from tinyvllm.core.blocks import BlockManager
from tinyvllm.errors import BadInput
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.sampling.sampler import Sampled
from tinyvllm.core.scheduler import Scheduler
from tinyvllm.core.sequence import Sequence, SequenceStatus

def pasts(ids):
    "For each token a number that depends on it and all before it, as its keys and values do."
    return list(accumulate(ids, lambda past, token: crc32(bytes([token]), past), initial=0))[1:]


def most_work(seq):
    "Tokens that a request computes at most, if none is computed twice."
    scored = seq.params.prompt_logprobs is not None and seq.num_prompt > 1
    return seq.num_prompt + max(seq.params.max_tokens, scored) - 1


def bound(scheduler, seq):
    """Steps after which a request has ended, if no other arrives that ranks before it: one for
    each token of those that rank up to it, and of those that run although one of these waits."""
    before = [s for s in scheduler.sequences.values() if s.rank <= seq.rank]
    first_waiting = min((s.rank for s in before if s.status is SequenceStatus.WAITING), default=(9,))
    overtaken = [s for s in scheduler.running if s.rank > first_waiting]
    return sum(map(most_work, before)) + sum(map(most_work, overtaken))


class Shadow:
    "A runner: the fake model, and what each slot of the pool holds."
    def __init__(self, block_size):
        self.block_size, self.slots = block_size, {}

    def __call__(self, batch):
        self.copy(batch.copies)
        self.write(batch)
        for seq, n, table in zip(batch.seqs, batch.num_new, batch.block_tables):
            self.read(seq, seq.num_computed + n, table)
        return [[Sampled(token, 0.0, None) for token in self.tokens(batch, i)] for i in range(len(batch.seqs))]

    def tokens(self, batch, i):
        "The sampled token of an entry; where the prompt is scored, the tokens after its new ones."
        seq, n, start = batch.seqs[i], batch.num_new[i], batch.starts[i]
        if batch.scores_prompt[i]: return seq.token_ids[start + 1:start + 1 + n]
        return [next_token(seq.token_ids)] if batch.samples[i] else []

    def slot(self, table, position):    # as `PagedBatch.of` has it
        return table[position // self.block_size] * self.block_size + position % self.block_size

    def copy(self, pairs):    # all are read before any is written, as in `PagedKVCache.copy`
        content = [(target * self.block_size + i, self.slots.get(source * self.block_size + i))
                   for source, target in pairs for i in range(self.block_size)]
        self.slots.update(content)

    def write(self, batch):
        written = set()
        for seq, n, table in zip(batch.seqs, batch.num_new, batch.block_tables):
            past = pasts(seq.token_ids)
            for position in range(seq.num_computed, seq.num_computed + n):
                slot = self.slot(table, position)
                assert slot >= self.block_size, 'a write into block 0'
                assert slot not in written, f'two writes into slot {slot}'
                written.add(slot)
                self.slots[slot] = past[position]

    def read(self, seq, length, table):
        found = [self.slots.get(self.slot(table, position)) for position in range(length)]
        assert found == pasts(seq.token_ids[:length]), f'{seq.id} reads what is not its own'


# --- invariants --------------------------------------------------------------------------------------

def check_batch(scheduler, batch):
    assert sum(batch.num_new) == batch.num_tokens <= scheduler.max_num_batched_tokens
    assert len(batch.seqs) == len(batch.num_new) == len(batch.block_tables) == len(set(batch.seqs))
    assert all(n >= 1 for n in batch.num_new)
    sources, targets = {s for s, _ in batch.copies}, [t for _, t in batch.copies]
    assert len(set(targets)) == len(targets) and not sources & set(targets)
    if scheduler.sequences: assert batch.seqs, 'an empty step'
    rows = [n if scores else 1 for n, scores in zip(batch.num_new, batch.scores_prompt)]
    assert sum(rows) <= scheduler.max_num_seqs
    for seq, n, start, samples in zip(batch.seqs, batch.num_new, batch.starts, batch.samples):
        assert start == seq.num_computed and samples is (start + n == seq.num_tokens)


def check_state(scheduler):
    "What holds between two steps."
    blocks, running = scheduler.blocks, scheduler.running
    assert [s.rank for s in running] == sorted(s.rank for s in running)
    assert len(running) <= scheduler.max_num_seqs
    assert all(s.status is SequenceStatus.RUNNING for s in running)
    assert set(blocks.tables) == {s.id for s in running}    # no other owns blocks
    assert all(blocks.tables[s.id].length == s.num_computed for s in running)
    unfinished = scheduler.sequences.values()
    assert all(s.num_computed < s.num_tokens and not s.finish_reason for s in unfinished)
    queue = [s for _, s in scheduler.waiting.heap if s.status is not SequenceStatus.FINISHED]
    assert sorted(s.rank for s in queue) == sorted(s.rank for s in unfinished if s not in running)
    assert all(s.status is SequenceStatus.WAITING and s.num_computed == 0 for s in queue)
    check_blocks(blocks)


def check_blocks(blocks):
    refs = [0] * len(blocks.pool.blocks)
    for table in blocks.tables.values():
        assert len(table.ids) == -(-table.length // blocks.block_size)
        for i in table.ids: refs[i] += 1
    assert refs == [b.ref_count for b in blocks.pool.blocks] and refs[0] == 0
    assert blocks.num_free == sum(r == 0 for r in refs[1:])
    for table in blocks.tables.values():    # what is shared is full: it is not written again
        assert all(refs[i] == 1 for i in table.ids[table.length // blocks.block_size:])


# --- the walk ----------------------------------------------------------------------------------------

COUNTS = dict.fromkeys(('rules', 'steps', 'preemptions', 'copies', 'finished', 'refused', 'aborted',
                        'failed', 'late_aborts', 'overtaken', 'scored'), 0)    # what the walk met
some = st.integers(0, 10**6)


class Walk(RuleBasedStateMachine):
    @initialize(blocks=st.integers(5, 20), block_size=st.sampled_from([1, 4, 16]),
                budget=st.sampled_from([1, 2, 3, 5, 8, 16, 64]), seqs=st.integers(1, 8),
                priorities=st.sampled_from([1, 3]))
    def begin(self, blocks, block_size, budget, seqs, priorities):
        self.scheduler = Scheduler(BlockManager(blocks, block_size), seqs, budget)
        self.shadow, self.priorities = Shadow(block_size), priorities
        self.capacity = (blocks - 1) * block_size
        self.all, self.steps, self.deadline, self.reported = {}, 0, {}, []

    def new(self, seed, parent=None):
        "A request; its parameters follow from a number, since hypothesis draws numbers fastest."
        rng = random.Random(seed)
        most = rng.choice([2, 8, self.capacity // 2 + 1, self.capacity + rng.choice([0, 0, 1])])
        if rng.random() < 0.8: most = min(most, 60)    # else long answers are all that is tested
        n = 1 + int(most * rng.random()**rng.choice([1, 4]))
        params = SamplingParams(
            max_tokens=rng.choice([0, 1, 2, rng.randrange(most + 1), *[max(0, most - n + 1)] * 4]),
            ignore_eos=rng.random() < 0.8, prompt_logprobs=None if parent or rng.random() < 0.8 else 1, stop_token_ids=rng.sample(range(VOCAB), rng.choice([0, 0, 1])))
        ids, priority = prompt(n, rng.randrange(3)), rng.randrange(self.priorities)
        if parent: ids, priority = parent.token_ids[:parent.num_prompt], parent.rank[0]
        return Sequence(len(self.all), ids, params, (EOS,), priority, parent)

    def enter(self, seq):
        COUNTS['rules'] += 0 if seq.parent else 1
        self.all[seq.id] = seq
        if most_work(seq) > self.capacity:
            COUNTS['refused'] += 1
            with pytest.raises(BadInput, match='may need'): self.scheduler.add(seq)
            seq.finish_reason = 'refused'
            return
        self.scheduler.add(seq)
        for other in self.scheduler.sequences.values():    # the clock of all that rank after it
            if other.rank >= seq.rank:
                self.deadline[other.id] = self.steps + bound(self.scheduler, other)

    @rule(seed=some)
    def add(self, seed): self.enter(self.new(seed))

    @rule(seed=some, n=st.integers(2, 6))
    def add_many(self, seed, n):
        for i in range(n): self.add(seed + i)
        COUNTS['rules'] -= n - 1    # one rule

    @rule(seed=some, n=st.integers(2, 4))
    def add_group(self, seed, n):
        self.enter(parent := self.new(seed))
        for i in range(1, n): self.enter(self.new(seed + i, parent))

    @precondition(lambda self: self.scheduler.sequences)
    @rule(number=some)
    def abort(self, number):
        ids = list(self.scheduler.sequences)
        COUNTS['rules'] += 1; COUNTS['aborted'] += 1
        self.scheduler.abort(ids[number % len(ids)])

    @rule()
    def step(self):
        COUNTS['rules'] += 1
        self.finish_step(*self.begin_step())

    @rule(times=st.integers(2, 12))
    def steps_in_a_row(self, times):
        for _ in range(times): self.step()
        COUNTS['rules'] -= times - 1    # one rule

    @precondition(lambda self: self.scheduler.sequences)
    @rule(number=some, before=st.booleans())
    def step_with_abort(self, number, before):
        "A request is aborted while the device works."
        COUNTS['rules'] += 1; COUNTS['late_aborts'] += 1
        ids = list(self.scheduler.sequences)
        batch = self.schedule()
        if before: self.scheduler.abort(ids[number % len(ids)])
        tokens = self.shadow(batch)
        if not before: self.scheduler.abort(ids[number % len(ids)])
        self.finish_step(batch, tokens)

    @precondition(lambda self: self.scheduler.sequences)
    @rule(number=some)
    def step_with_error(self, number):
        COUNTS['rules'] += 1; COUNTS['failed'] += 1
        batch, tokens = self.begin_step()
        victim, tokens[number % len(tokens)] = batch.seqs[number % len(tokens)], ValueError('broken')
        self.finish_step(batch, tokens)
        assert victim.finish_reason == 'error' and str(victim.error) == 'broken'

    def schedule(self):
        ran, before = list(self.scheduler.running), self.scheduler.preemptions
        batch = self.scheduler.schedule()
        check_batch(self.scheduler, batch)
        preempted = self.scheduler.preemptions - before
        assert not preempted or set(batch.seqs) <= set(ran), 'out and in again in one step'
        COUNTS['scored'] += sum(batch.scores_prompt)
        COUNTS['preemptions'] += preempted
        COUNTS['copies'] += len(batch.copies)
        waiting = [s.rank for s in self.scheduler.sequences.values() if s.status is SequenceStatus.WAITING]
        if waiting and self.scheduler.running:
            COUNTS['overtaken'] += min(waiting) < self.scheduler.running[-1].rank
        return batch

    def begin_step(self):
        batch = self.schedule()
        return batch, self.shadow(batch)

    def finish_step(self, batch, tokens):
        sampled = {s.id for s, t, yes in zip(batch.seqs, tokens, batch.samples)
                   if yes and t and s.status is SequenceStatus.RUNNING}
        changed = self.scheduler.update_from_output(batch, tokens)
        ended = [s for s in changed if s.status is SequenceStatus.FINISHED]
        self.reported += [s.id for s in ended]
        assert {s.id for s in changed} == sampled | {s.id for s in ended}
        assert len(changed) == len({s.id for s in changed})
        self.steps += 1; COUNTS['steps'] += 1
        for seq in ended: self.check_answer(seq)
        if batch.seqs:
            for id in self.scheduler.sequences: assert self.steps < self.deadline[id], 'starvation'

    def check_answer(self, seq):
        "A request that ended has the answer that it gets alone; one that was cut short, the beginning of it."
        COUNTS['finished'] += 1
        ids, reason = alone(seq.token_ids[:seq.num_prompt], seq.params)
        if seq.finish_reason in ('abort', 'error'):
            assert seq.token_ids == ids[:seq.num_tokens]
        else:
            assert (seq.token_ids, seq.finish_reason) == (ids, reason)
            by_eos = ids[-1] == EOS and not seq.params.ignore_eos
            assert seq.stop_reason == (ids[-1] if reason == 'stop' and not by_eos else None)
            places = range(1, seq.num_prompt) if seq.params.prompt_logprobs else ()
            assert {i: t.token_id for i, t in seq.prompt_logprobs.items()} == {i: seq.token_ids[i] for i in places}
        assert [int(t) for t in seq.sampled] == seq.token_ids[seq.num_prompt:]

    @invariant()
    def between_steps(self):
        if hasattr(self, 'scheduler'): check_state(self.scheduler)

    def teardown(self):
        if not hasattr(self, 'scheduler'): return
        left = {i: self.steps + bound(self.scheduler, s) for i, s in self.scheduler.sequences.items()}
        last = max(left.values(), default=self.steps)
        self.deadline.update({i: min(self.deadline[i], d) for i, d in left.items()})
        while self.scheduler.sequences:
            assert self.steps < last
            self.finish_step(*self.begin_step())
            check_state(self.scheduler)
        self.finish_step(*self.begin_step())    # reports what ended since
        admitted = [s for s in self.all.values() if s.finish_reason != 'refused']
        assert all(s.status is SequenceStatus.FINISHED for s in admitted)
        assert sorted(self.reported) == sorted(s.id for s in admitted)    # each once
        assert self.scheduler.blocks.num_free == len(self.scheduler.blocks.pool.blocks) - 1


def test_random_walk():
    "At least 10,000 random steps, and every situation that matters among them."
    run_state_machine_as_test(Walk, settings=settings(
        max_examples=260, stateful_step_count=50, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck)))
    assert COUNTS['rules'] >= 10_000 and COUNTS['steps'] >= 10_000, COUNTS
    assert min(COUNTS.values()) >= 100, COUNTS


# --- one situation each ------------------------------------------------------------------------------

class Rig(Scheduler):
    "A scheduler with its runner."
    def __init__(self, *seqs, blocks=50, block_size=4, **limits):
        super().__init__(BlockManager(blocks, block_size), **limits)
        self.runner, self.copied = Shadow(block_size), 0
        for seq in seqs: self.add(seq)

    def step(self):
        "One step; returns {id: tokens computed}."
        batch = self.schedule()
        check_batch(self, batch)
        self.copied += len(batch.copies)
        self.update_from_output(batch, self.runner(batch))
        check_state(self)
        return {s.id: n for s, n in zip(batch.seqs, batch.num_new)}

    def run(self):
        "All steps to the end."
        trace = []
        while self.sequences: trace.append(self.step())
        return trace


def request(id, n=3, max_tokens=4, parent=None, priority=0, **params):
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params)
    return Sequence(id, parent.token_ids[:n] if parent else prompt(n), params, (EOS,), priority, parent)


def right(*seqs):
    return all((s.token_ids, s.finish_reason) == alone(s.token_ids[:s.num_prompt], s.params)
               for s in seqs)


@pytest.mark.parametrize('budget, steps', [(1, 14), (3, 8), (4, 7), (10, 5), (64, 5)])
def test_prompt_is_clipped_to_the_budget(budget, steps):
    scheduler = Rig(seq := request('a', 10, 5), max_num_batched_tokens=budget)
    trace = scheduler.run()
    assert len(trace) == steps and right(seq)
    assert [t['a'] for t in trace] == [budget] * (10 // budget) + [10 % budget] * (10 % budget > 0) + [1] * 4


def test_running_sequences_come_first():
    scheduler = Rig(request('a', 2), max_num_batched_tokens=4)
    assert scheduler.step() == {'a': 2}
    scheduler.add(request('b', 9))
    assert [scheduler.step() for _ in range(3)] == [{'a': 1, 'b': 3}] * 3
    assert scheduler.step() == {'b': 1}


def test_at_most_max_num_seqs_run():
    trace = Rig(*(request(i) for i in range(5)), max_num_seqs=2).run()
    assert max(map(len, trace)) == 2 and trace[0] == {0: 3, 1: 3}


def test_smaller_priority_goes_first_then_arrival():
    scheduler = Rig(*(request(id, priority=p) for id, p in (('a', 1), ('b', 0), ('c', 1), ('d', 0))),
                       max_num_seqs=1)
    order = [id for t in scheduler.run() for id in t]
    assert list(dict.fromkeys(order)) == ['b', 'd', 'a', 'c'] and len(order) == 16


def test_running_sequences_are_not_displaced_by_priority():
    scheduler = Rig(a := request('a', priority=5), max_num_seqs=1)
    scheduler.step()
    scheduler.add(request('b', priority=0))
    assert [list(t) for t in scheduler.run()] == [['a']] * 3 + [['b']] * 4 and right(a)


def test_a_preempted_sequence_is_first_in_the_queue():
    scheduler = Rig(*(seqs := [request(i, 4, 9) for i in range(3)]), blocks=7)    # 24 slots
    while not scheduler.preemptions: scheduler.step()
    victim = seqs[2]
    assert scheduler.running == seqs[:2]
    assert (victim.status, victim.num_computed) == (SequenceStatus.WAITING, 0) and victim.num_tokens > 4
    scheduler.add(late := request('late', 1, 1))    # would fit at once
    assert scheduler.waiting.first() is victim
    trace = scheduler.run()
    again = next(t for t in trace if 2 in t)
    assert again[2] > 4 and 'late' not in trace[0]    # prompt and answer are computed again
    assert right(*seqs, late)


def test_no_admission_in_a_step_that_preempts():
    scheduler = Rig(*(request(i, 4, 9) for i in range(2)), request('c', 1, 1), blocks=5, max_num_seqs=2)
    while not scheduler.preemptions: last = scheduler.step()
    assert list(last) == [0]


def test_preemption_spares_the_first_even_in_the_smallest_pool():
    scheduler = Rig(*(seqs := [request(i, 8, 9) for i in range(4)]), blocks=5)    # one fits
    trace = scheduler.run()
    assert right(*seqs) and sum(t.get(0, 0) for t in trace) == most_work(seqs[0])


@pytest.mark.parametrize('steps', [0, 1, 2])
def test_abort(steps):
    scheduler = Rig(*(seqs := [request(i) for i in range(4)]), max_num_seqs=2)
    for _ in range(steps): scheduler.step()
    used = scheduler.blocks.num_free
    scheduler.abort(0); scheduler.abort(3)    # the first runs after a step, the last waits
    assert scheduler.blocks.num_free - used == (steps > 0) and 3 not in scheduler.sequences
    assert [s.finish_reason for s in seqs] == ['abort', None, None, 'abort']
    batch = scheduler.schedule()
    assert scheduler.update_from_output(batch, scheduler.runner(batch)) == [*batch.seqs, seqs[0], seqs[3]]
    scheduler.run()
    assert right(*seqs[1:3]) and len(seqs[0].sampled) == steps


def test_abort_of_the_unknown_and_of_the_finished():
    scheduler = Rig(request('a', 1, 1))
    scheduler.run()
    for id in ('a', 'b', None):
        with pytest.raises(BadInput, match='no request'): scheduler.abort(id)


def test_abort_while_the_device_works():
    scheduler = Rig(*(seqs := [request(i) for i in range(3)]))
    batch = scheduler.schedule()
    scheduler.abort(1)
    changed = scheduler.update_from_output(batch, scheduler.runner(batch))
    assert changed == [seqs[0], seqs[2], seqs[1]] and seqs[1].sampled == []
    scheduler.add(again := request(1))    # the id is free, the old tokens are gone
    scheduler.run()
    assert right(seqs[0], seqs[2], again)


def test_an_error_ends_one_request():
    scheduler = Rig(*(seqs := [request(i) for i in range(3)]))
    batch = scheduler.schedule()
    error = FloatingPointError('no token can be drawn')
    changed = scheduler.update_from_output(batch, [error if i == 1 else t for i, t in enumerate(scheduler.runner(batch))])
    assert changed == [seqs[0], seqs[2], seqs[1]]
    assert seqs[1].error is error and seqs[1].finish_reason == 'error'
    assert set(scheduler.blocks.tables) == {0, 2}
    scheduler.run()
    assert right(seqs[0], seqs[2]) and seqs[0].error is None


@pytest.mark.parametrize('n', [1, 2, 4, 5, 6, 9])
def test_samples_share_their_prompt(n):
    parent = request('p', n, 5)
    children = [request(i, n, 5, parent) for i in range(3)]
    scheduler = Rig(parent, *children)
    trace = scheduler.run()
    computed = sum(sum(t.values()) for t in trace)
    assert computed == n + 4 + 3 * 5 and right(parent, *children)    # the prompt only once
    assert scheduler.copied == (3 if (n - 1) % 4 else 0)    # only a tail that is not full
    assert list(trace[0]) == (['p'] if n > 1 else ['p', 0, 1, 2])    # children wait for the prompt
    assert list(trace[1]) == ['p', 0, 1, 2]


def test_children_wait_for_a_chunked_prompt():
    parent = request('p', 10, 6)
    scheduler = Rig(parent, child := request('c', 10, 6, parent), max_num_batched_tokens=4)
    assert [scheduler.step() for _ in range(4)] == [{'p': 4}, {'p': 4}, {'p': 2}, {'p': 1, 'c': 1}]
    scheduler.run()
    assert right(parent, child)


@pytest.mark.parametrize('fate', ['finished', 'aborted', 'failed'])
def test_children_without_a_parent_compute_for_themselves(fate):
    parent = request('p', 6, 1 if fate == 'finished' else 6)
    scheduler = Rig(parent, child := request('c', 6, 6, parent), max_num_batched_tokens=3)
    scheduler.step()
    if fate == 'finished': scheduler.step()
    if fate == 'aborted': scheduler.abort('p')
    if fate == 'failed': scheduler.update_from_output(scheduler.schedule(), [RuntimeError()])
    trace = scheduler.run()
    assert sum(t.get('c', 0) for t in trace) == most_work(child) and right(child)
    assert parent.status is SequenceStatus.FINISHED


def test_children_ahead_of_their_parent_compute_for_themselves():
    parent = request('p', 6, 6, priority=1)
    trace = Rig(parent, child := request('c', 6, 6, parent), max_num_seqs=1).run()
    assert [list(t) for t in trace] == [['c']] * 6 + [['p']] * 6 and right(parent, child)


def test_children_wait_for_a_preempted_parent():
    parent = request('p', 6, 6)
    scheduler = Rig(parent, child := request('c', 6, 6, parent), max_num_batched_tokens=3)
    scheduler.step()
    scheduler.preempt()
    assert [scheduler.step() for _ in range(3)] == [{'p': 3}, {'p': 3}, {'p': 1, 'c': 1}]
    scheduler.run()
    assert right(parent, child)


def test_a_preempted_child_shares_again():
    parent = request('p', 9, 8)
    scheduler = Rig(parent, child := request('c', 9, 8, parent))
    for _ in range(4): scheduler.step()
    scheduler.preempt()
    assert child.num_computed == 0 and len(child.sampled) == 3
    assert scheduler.step()['c'] == 4    # its own tokens, not the prompt
    scheduler.run()
    assert right(parent, child)


def test_admission():
    scheduler = Rig(blocks=5)    # 16 slots
    for n, new in ((17, 1), (16, 2), (1, 17), (5, 13)):
        with pytest.raises(BadInput, match=f'may need {n + new - 1} tokens, the pool holds 16'):
            scheduler.add(request('a', n, new))
    for id, (n, new) in enumerate([(16, 1), (15, 2), (1, 16)]): scheduler.add(request(id, n, new))
    with pytest.raises(BadInput, match='request id 1 is in use'): scheduler.add(request(1))
    seqs = list(scheduler.sequences.values())
    scheduler.run()
    assert right(*seqs)
    scheduler.add(request(1))    # the id is free again
    assert len(scheduler.sequences) == 1


def test_no_tokens_wanted():
    scheduler = Rig(seq := request('a', 3, 0), request('b', 3, 1))
    assert seq.finish_reason == 'length' and 'a' not in scheduler.sequences
    batch = scheduler.schedule()
    assert [s.id for s in batch.seqs] == ['b']
    assert {s.id for s in scheduler.update_from_output(batch, scheduler.runner(batch))} == {'a', 'b'}


def test_nothing_to_do():
    batch = (scheduler := Rig()).schedule()
    assert batch.seqs == [] == scheduler.update_from_output(batch, []) and batch.num_tokens == 0


@pytest.mark.parametrize('limit', ['max_num_seqs', 'max_num_batched_tokens'])
def test_limits_of_nothing(limit):
    for value in (0, -1):
        with pytest.raises(BadInput, match=f'{limit} is {value}; use 1 or more'): Rig(**{limit: value})
    Rig(**{limit: 1})


# --- no request starves ----------------------------------------------------------------------------------

@pytest.mark.parametrize('budget', [1, 3, 64])
@pytest.mark.parametrize('seqs', [1, 4])
def test_a_stream_of_new_requests_starves_none(budget, seqs):
    "Three arrive in every step, short ones that would always fit."
    first = [request(i, 6, 9) for i in range(4)]
    scheduler = Rig(*first, blocks=6, max_num_batched_tokens=budget, max_num_seqs=seqs)
    limit, steps = sum(map(most_work, first)), 0
    assert limit == bound(scheduler, first[-1])
    while first[-1].status is not SequenceStatus.FINISHED:
        for i in range(3): scheduler.add(request((steps, i), 1, 2))
        scheduler.step()
        steps += 1
        assert steps <= limit
    assert right(*first)
    if budget == 1 or seqs == 1 and budget == 64: assert steps == (limit if budget == 1 else 4 * 9)


def test_lower_priorities_do_not_delay():
    scheduler = Rig(seq := request('a', 6, 9, priority=1), blocks=6)
    for steps in range(9):
        assert seq.status is not SequenceStatus.FINISHED
        for i in range(3): scheduler.add(request((steps, i), 6, 9, priority=2))
        scheduler.step()
    assert right(seq) and scheduler.preemptions


def test_higher_priorities_delay_for_as_long_as_they_come():
    scheduler = Rig(seq := request('a', 6, 9, priority=1), blocks=6, max_num_seqs=2)
    scheduler.step()
    for i in range(60):
        scheduler.add(request(i, 6, 9, priority=0))
        scheduler.step()
    assert seq.status is SequenceStatus.WAITING and scheduler.preemptions    # that is what they are for
    limit, steps = bound(scheduler, seq), 0
    while seq.status is not SequenceStatus.FINISHED: steps, _ = steps + 1, scheduler.step()
    assert steps <= limit and right(seq)


# --- the module --------------------------------------------------------------------------------------

def test_no_device():
    "The scheduler decides; it neither imports nor loads what computes."
    for module in (tinyvllm.core.scheduler, tinyvllm.core.sequence, tinyvllm.core.blocks):
        nodes = list(ast.walk(ast.parse(Path(module.__file__).read_text(encoding='utf-8'))))
        names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
        assert not any(name.split('.')[0] in ('tinygrad', 'numpy') for name in names)
    code = 'import sys, tinyvllm.core.scheduler; sys.exit("tinygrad" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def statements(module):
    "Statements of a module, docstrings aside."
    tree = ast.parse(Path(module.__file__).read_text(encoding='utf-8'))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    return sum(not isinstance(getattr(node, 'value', None), ast.Constant) or not isinstance(node, ast.Expr) for node in found)


def test_it_stays_small():
    sizes = {m.__name__: statements(m) for m in (tinyvllm.core.scheduler, tinyvllm.core.sequence, tinyvllm.core.blocks)}
    assert 100 < sum(sizes.values()) <= 340, sizes
