"Block tables against a dict of lists, on a random walk; the counts and links that must hold after each step."
import ast
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (RuleBasedStateMachine, initialize, invariant, precondition, rule,
                                 run_state_machine_as_test)

import tinyvllm.core.blocks
from tinyvllm.core.blocks import Block, BlockManager, BlockPool, BlockTable, FreeList
from tinyvllm.errors import BadInput

ANY = st.integers(0, 2**16)      # picks an owner or a length, modulo how many there are
TOKENS = st.integers(0, 7) | st.integers(0, 40)
LENGTHS = np.minimum(np.random.default_rng(0).lognormal(5.5, 0.9, 64).astype(int) + 1, 2048)


def ceil(n, size): return -(-n // size)


def free_ids(free_list):
    "Ids of the free blocks, first to last; the links must agree in both directions."
    ids, block = [], free_list.head
    for _ in range(len(free_list) + 1):
        assert block.next.prev is block and block.prev.next is block
        block = block.next
        ids.append(block.id)
    assert block is free_list.head, 'the ring is longer or shorter than its size'
    return ids[:-1]


class Walk(RuleBasedStateMachine):
    "A manager, the memory of its blocks, and for each owner the tokens it should find there."
    steps = copies = 0    # in all walks

    @initialize(num_blocks=st.integers(2, 50), block_size=st.sampled_from([1, 2, 3, 4, 7, 16]))
    def start(self, num_blocks, block_size):
        self.total, self.size = num_blocks, block_size
        self.manager = BlockManager(num_blocks, block_size)
        self.memory = [[None] * block_size for _ in range(num_blocks)]
        self.tokens, self.born, self.written = {}, 0, 0

    # --- what the walk needs to know, without asking the module ---

    def state(self):
        "All there is to know about the manager."
        return (free_ids(self.manager.pool.free), [b.ref_count for b in self.manager.pool.blocks],
                {o: (list(t.ids), t.length) for o, t in self.manager.tables.items()})

    def pick(self, number): return list(self.tokens)[number % len(self.tokens)]

    def counts(self): return Counter(i for t in self.manager.tables.values() for i in t.ids)

    def shares_tail(self, owner):
        "Is the block of the owner's next token in another table too?"
        have = len(self.tokens[owner])
        return have % self.size > 0 and self.counts()[self.manager.tables[owner].ids[-1]] > 1

    def needs(self, owner, n):
        have = len(self.tokens.get(owner, ()))
        copy = n > 0 and owner in self.tokens and self.shares_tail(owner)
        return ceil(have + n, self.size) - ceil(have, self.size) + copy

    def refused(self, error, call, *args):
        "The call fails, and nothing has changed."
        before = self.state()
        with pytest.raises(error): call(*args)
        assert self.state() == before

    def write(self, owner, start, n):
        "New tokens through the table; every block written to is in one table."
        table, counts = self.manager.tables[owner].ids, self.counts()
        for t in range(start, start + n):
            block = table[t // self.size]
            assert counts[block] == 1 == self.manager.pool.blocks[block].ref_count, 'wrote to a shared block'
            self.written += 1
            self.memory[block][t % self.size] = self.written
            self.tokens[owner].append(self.written)

    # --- the steps ---

    @rule(n=TOKENS)
    def allocate(self, n):
        Walk.steps += 1
        owner, need, free = self.born, self.needs(self.born, n), free_ids(self.manager.pool.free)
        assert self.manager.can_allocate(owner, n) is (need <= len(free))
        if need > len(free): return self.refused(IndexError, self.manager.allocate, owner, n)
        self.manager.allocate(owner, n)
        assert self.manager.tables[owner].ids == free[:need]    # first come, first taken
        self.born += 1
        self.tokens[owner] = []
        self.write(owner, 0, n)

    @precondition(lambda self: self.tokens)
    @rule(number=ANY, n=TOKENS)
    def append(self, number, n):
        Walk.steps += 1
        owner = self.pick(number)
        have, need, shared = len(self.tokens[owner]), self.needs(owner, n), self.shares_tail(owner)
        free, refs, tables = self.state()
        assert self.manager.can_allocate(owner, n) is (need <= len(free))
        if need > len(free): return self.refused(IndexError, self.manager.append, owner, n)
        copies, old, new = self.manager.append(owner, n), tables[owner][0], self.manager.tables[owner].ids
        assert len(copies) == (shared and n > 0)    # a copy if the tail is shared, else none
        Walk.copies += len(copies)
        for source, target in copies:
            assert refs[source] > 1 and target in free and old[-1] == source and new[len(old) - 1] == target
            self.memory[target] = list(self.memory[source])
        kept = len(old) - len(copies)
        assert new[:kept] == old[:kept] and new[kept:] == free[:need]
        self.write(owner, have, n)
        if n and (have + n) % self.size: assert self.manager.pool.blocks[new[-1]].ref_count == 1

    @precondition(lambda self: self.tokens)
    @rule(number=ANY, cut=ANY)
    def fork(self, number, cut):
        Walk.steps += 1
        parent, child = self.pick(number), self.born
        have, free = len(self.tokens[parent]), free_ids(self.manager.pool.free)
        length = have - cut % (have + 1)
        self.manager.fork(parent, child, length)
        self.born += 1
        self.tokens[child] = self.tokens[parent][:length]
        assert self.manager.tables[child].ids == self.manager.tables[parent].ids[:ceil(length, self.size)]
        assert self.manager.tables[child].ids is not self.manager.tables[parent].ids
        assert free_ids(self.manager.pool.free) == free    # costs nothing

    @precondition(lambda self: self.tokens)
    @rule(number=ANY, n=st.integers(1, 7))
    def fork_and_append(self, number, n):
        "A second answer to one prompt: both go on from the same block."
        parent = number % len(self.tokens)
        self.fork(parent, 0)
        self.append(parent, n)
        self.append(-1, n)

    @precondition(lambda self: self.tokens)
    @rule(number=ANY)
    def free(self, number):
        Walk.steps += 1
        self.release(self.pick(number))

    def release(self, owner):
        free, refs, tables = self.state()
        self.manager.free(owner)
        del self.tokens[owner]
        freed = [i for i in reversed(tables[owner][0]) if refs[i] == 1]
        assert free_ids(self.manager.pool.free) == free + freed    # the tail goes first

    @precondition(lambda self: self.tokens)
    @rule(number=ANY)
    def mistake(self, number):
        Walk.steps += 1
        owner, m = self.pick(number), self.manager
        beyond = (m.num_free + 1) * self.size
        assert not m.can_allocate(owner, beyond)
        self.refused(IndexError, m.append, owner, beyond)
        self.refused(IndexError, m.fork, owner, 'new', len(self.tokens[owner]) + 1)
        for call, *args in ((m.append, 'unknown', 1), (m.free, 'unknown'), (m.fork, 'unknown', 'new', 0),
                            (m.allocate, owner, 0), (m.fork, owner, owner, 0)):
            self.refused(KeyError, call, *args)

    # --- what holds after each of them ---

    @invariant()
    def every_block_is_free_or_in_a_table(self):
        free, refs, tables = self.state()
        counts = self.counts()
        assert len(set(free)) == len(free) == self.manager.num_free
        assert refs == [counts[i] for i in range(self.total)]
        assert {*free} ^ {*counts} == {*range(1, self.total)} and not {*free} & {*counts}
        assert len(free) + len(counts) + 1 == self.total
        assert all(len(set(ids)) == len(ids) for ids, _ in tables.values())

    @invariant()
    def every_owner_reads_its_own_tokens(self):
        assert self.manager.tables.keys() == self.tokens.keys()
        for owner, table in self.manager.tables.items():
            assert table.length == len(self.tokens[owner]) and len(table.ids) == ceil(table.length, self.size)
            assert self.tokens[owner] == [self.memory[table.ids[t // self.size]][t % self.size]
                                          for t in range(table.length)]
        assert self.memory[0] == [None] * self.size

    def teardown(self):
        if not hasattr(self, 'manager'): return
        for owner in list(self.tokens): self.release(owner)
        assert sorted(free_ids(self.manager.pool.free)) == list(range(1, self.total))
        assert not any(b.ref_count for b in self.manager.pool.blocks) and not self.manager.tables


def test_walk():
    Walk.steps = Walk.copies = 0
    run_state_machine_as_test(Walk, settings=settings(
        max_examples=250, stateful_step_count=60, deadline=None, database=None,
        suppress_health_check=list(HealthCheck)))
    assert Walk.steps >= 10_000 and Walk.copies >= 100


# --- one thing at a time ----------------------------------------------------------------------------

def test_free_list_is_first_in_first_out():
    blocks = [Block(i) for i in range(4)]
    free = FreeList(blocks)
    first = free.popleft()
    free.append(first)
    assert free_ids(free) == [1, 2, 3, 0]
    assert [free.popleft().id for _ in range(4)] == [1, 2, 3, 0] and not len(free)
    with pytest.raises(IndexError): free.popleft()
    free.append(first)
    assert free_ids(free) == [0]


def test_block_0_is_never_allocated():
    pool = BlockPool(8)
    assert sorted(pool.allocate() for _ in range(7)) == list(range(1, 8))
    with pytest.raises(IndexError): pool.allocate()


def test_a_shared_block_is_free_when_its_last_table_is():
    pool = BlockPool(3)
    block = pool.allocate()
    pool.share([block, block])
    for left in (2, 1): pool.release([block]); assert pool.blocks[block].ref_count == left and len(pool.free) == 1
    pool.release([block])
    assert free_ids(pool.free) == [2, 1]


def test_tail_is_freed_first():
    manager = BlockManager(9, block_size=4)
    manager.allocate('a', 16)
    manager.fork('a', 'b', 8)
    manager.free('a')
    assert free_ids(manager.pool.free) == [5, 6, 7, 8, 4, 3]    # b still holds 1 and 2
    manager.free('b')
    assert free_ids(manager.pool.free) == [5, 6, 7, 8, 4, 3, 2, 1]


def test_the_last_table_writes_in_place():
    prompt = BlockTable(BlockPool(9), 4)
    prompt.append(6)
    samples = [prompt, prompt.fork(6), prompt.fork(6)]
    assert [s.append(1) for s in samples] == [[(2, 3)], [(2, 4)], []]
    assert [s.ids for s in samples] == [[1, 3], [1, 4], [1, 2]]


@pytest.mark.parametrize('length, copied', [(4, False), (5, True), (8, False)])
def test_only_a_partial_block_is_copied(length, copied):
    manager = BlockManager(9, 4)
    manager.allocate('a', 8)
    manager.fork('a', 'b', length)
    assert bool(manager.append('b', 1)) is copied
    assert manager.append('a', 1) == []


def test_the_table_that_a_batch_holds_grows_with_it():
    manager = BlockManager(9, 4)
    manager.allocate('a', 4)
    ids = manager.tables['a'].ids
    manager.append('a', 8)
    assert ids is manager.tables['a'].ids and ids == [1, 2, 3]


def test_an_append_of_nothing_copies_nothing():
    manager = BlockManager(4, 4)
    manager.allocate('a', 6)
    manager.fork('a', 'b', 6)
    assert manager.append('b', 0) == [] and manager.can_allocate('b', 0) and manager.num_free == 1


@pytest.mark.parametrize('blocks, size, name', [(1, 16, 'num_blocks is 1'), (0, 16, 'num_blocks is 0'),
                                                (-3, 16, 'num_blocks is -3'), (8, 0, 'block_size is 0'),
                                                (8, -1, 'block_size is -1')])
def test_bad_sizes_are_named(blocks, size, name):
    with pytest.raises(BadInput, match=name): BlockManager(blocks, size)


def test_errors_say_what_is_missing():
    manager = BlockManager(3, 4)
    manager.allocate('a', 4)
    for message, call in (("'b'", lambda: manager.free('b')), ("'a' has a table", lambda: manager.allocate('a')),
                          ('2 more blocks wanted, 1 free', lambda: manager.append('a', 5)),
                          ('only 4 tokens, not 5', lambda: manager.fork('a', 'b', 5))):
        with pytest.raises((KeyError, IndexError), match=message): call()


# --- costs ------------------------------------------------------------------------------------------

def lines_run(call):
    "Lines of `tinyvllm.core.blocks` that a call executes."
    count, before = 0, sys.gettrace()

    def trace(frame, event, arg):
        nonlocal count
        if frame.f_code.co_filename != tinyvllm.core.blocks.__file__: return None
        count += event == 'line'
        return trace

    sys.settrace(trace)
    try: call()
    finally: sys.settrace(before)
    return count


class Touched(Block):
    "A block that counts how often its links are read or set."
    touches = 0

    def __getattribute__(self, name):
        Touched.touches += name in ('prev', 'next')
        return super().__getattribute__(name)

    def __setattr__(self, name, value):
        Touched.touches += name in ('prev', 'next')
        super().__setattr__(name, value)


def test_free_list_touches_neighbours_only():
    def cost(size):
        free = FreeList(Touched(i) for i in range(size))
        Touched.touches = 0
        free.append(free.popleft())
        return Touched.touches
    assert 0 < cost(10) == cost(10_000) < 20


def test_a_token_costs_the_same_in_a_long_sequence_and_a_large_pool():
    def cost(length, num_blocks):
        manager = BlockManager(num_blocks)
        manager.allocate('a', length)
        return [lines_run(lambda: (manager.can_allocate('a', 1), manager.append('a', 1))) for _ in range(17)]
    assert cost(16, 8) == cost(16_000, 20_000) and max(cost(16, 8)) < 40


def test_waste_on_long_tailed_lengths():
    manager = BlockManager(1 + sum(ceil(int(n), 16) for n in LENGTHS))
    for owner, n in enumerate(LENGTHS):
        manager.allocate(owner, int(n) // 2)
        for _ in range(int(n) - int(n) // 2): assert manager.append(owner, 1) == []
    slots = 16 * sum(len(t.ids) for t in manager.tables.values())
    assert manager.num_free == 0 and sum(t.length for t in manager.tables.values()) == LENGTHS.sum()
    assert 1 - LENGTHS.sum() / slots < 0.04 and 1 - LENGTHS.sum() / (2048 * len(LENGTHS)) > 0.8


def test_module_knows_no_tensors():
    tree = ast.parse(Path(tinyvllm.core.blocks.__file__).read_text(encoding='utf-8'))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {'.' * n.level + (n.module or '') for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    ours = {n for n in names if n.split('.')[0] not in sys.stdlib_module_names}
    assert ours <= {'tinyvllm.errors', '..errors'}
