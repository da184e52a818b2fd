"""What the host writes for a decision, and what the device makes of it.

`prepare` is checked against a model of it in plain loops: random batches with prompts in chunks, sequences
that speak, tokens in flight, padding, and several replays of a page. The C text runs all of them, the Metal
text some in the simulator (or on a Mac).
"""
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tinygrad import Tensor, dtypes

from tinyvllm.runner import inputs as module
from tinyvllm.core.blocks import BlockManager
from tinyvllm.engine.defaults import make_engine
from tinyvllm.models.fused import fused
from tinyvllm.runner.inputs import DESKS, Inputs, Page, chances, host_visible, laid_out, page_shapes, piece
from tinyvllm.models.llama import Llama, model_config
from tinyvllm.kernels.metal import Kernel
from tinyvllm.runner.jit import Mail
from tinyvllm.kernels.sampler import pack_sampling_params
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.sampling.sampler import Sampled, draw_uniform
from tinyvllm.core.sequence import Batch, Sequence
from tinyvllm.models.weights import tiny_checkpoint

cases = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
few = settings(cases, max_examples=5)
seeds = st.integers(0, 2**32 - 1)
BLOCK, LAST = 4, 8    # tokens of a block; rows of the mail
SIZES = (8, 8, 16, 0, 4), (16, 4, 16, 0, 1), (32, 4, 16, 0, 1), (1, 1, 64, 0, 16)    # few: each is compiled once


def on(device, x):
    return Tensor(np.array(x), device=device).realize()


# --- a decision, and what must come of it -------------------------------------------------------------

def sequence(rng, i, n, flying, width):
    "One that computes `n` tokens now. `flying`: its last token is not known here."
    more = int(rng.integers(0, 3)) if n > 1 else 0    # of the prompt, for later steps
    computed = int(rng.integers(0, width * BLOCK - n - more - 20))
    params = SamplingParams(temperature=float(rng.choice([0, 0.7, 1])), top_p=0.9, top_k=5, min_p=0.1,
                            seed=int(rng.integers(-2**63, 2**63)), max_tokens=10**4)
    prompt = rng.integers(1, 10**6, computed + n + more - flying).tolist()
    seq = Sequence(i, prompt, params)
    seq.num_computed, seq.in_flight = computed, int(flying)
    seq.sampled = [Sampled(0, 0.0, None)] * int(rng.integers(0, 200))
    return seq


def decision(rng, tokens, rows, width, steps):
    "A batch that fits, and for those in flight the row in which they spoke."
    entries, places = [], {}
    size, speak = int(rng.integers(1, rows + 1)), tokens == rows
    spare, free = tokens - size, rng.permutation(10**5).tolist()
    for i in range(size):
        n = 1 + (0 if speak else int(rng.integers(0, spare + 1)))
        spare -= n - 1
        seq = sequence(rng, i, n, rng.random() < 0.5, width)
        blocks = -(-(seq.num_computed + n + steps - 1) // BLOCK)
        entries.append((seq, n, [1 + free.pop() for _ in range(blocks)]))
        if seq.in_flight:
            places[i] = int(rng.integers(LAST))
    chosen = int(rng.integers(1, steps + 1)) if speak else 1
    return Batch.of(entries, BLOCK, steps=chosen), places


def expected(batch, places, last, later, tokens, rows):
    "In loops, one token after the other."
    made = {name: [0] * tokens for name in ('tokens', 'positions', 'slots', 'owners')}
    at, ends, odds = 0, [], np.zeros((rows, 8), np.float32)
    for row, (seq, n, table) in enumerate(zip(batch.seqs, batch.num_new, batch.block_tables)):
        for i in range(n):
            place = seq.num_computed + later + i
            if later:
                token = last[row]
            elif place < len(seq.token_ids):
                token = seq.token_ids[place]
            else:
                token = last[places[seq.id]]
            made['tokens'][at], made['positions'][at], made['owners'][at] = token, place, row
            made['slots'][at] = table[place // BLOCK] * BLOCK + place % BLOCK
            at += 1
        ends.append(at - 1)
        odds[row] = pack_sampling_params(seq.params)
        if not seq.params.greedy:
            u = draw_uniform(seq.params.seed, len(seq.sampled) + seq.in_flight + later)
            odds[row, 4] = min(u, 1 - 2**-24)
    return made | dict(rows=ends + [at - 1] * (rows - len(ends)), wishes=odds)


class Desk:
    "Inputs of one size, the mail, and a captured `prepare`."
    def __init__(self, device, sizes):
        self.sizes, self.mail = sizes, Mail(LAST, device)
        self.inputs = Inputs(device, *sizes)

    def prepared(self):
        "What the next replay reads, by the clock of the device."
        x = self.inputs.prepare(self.mail, BLOCK)
        return {name: x[name].numpy() for name in self.inputs.made}

    def check(self, batch, places, rng):
        "All replays of a decision; between two of them every row speaks."
        tokens, rows, _, _, steps = self.sizes
        page = self.inputs.next_page()
        page.fill(batch, places)
        for later in range(batch.steps):
            ticket = self.mail.announce(self.inputs.used * steps + later)
            last = rng.integers(1, 10**6, LAST).astype(np.int32)
            self.mail.last.assign(on(self.mail.device, last)).realize()
            self.mail.clock.assign(on(self.mail.device, np.int32([ticket]))).realize()
            got, want = self.prepared(), expected(batch, places, last.tolist(), later, tokens, rows)
            odds = got['wishes'].reshape(rows, 8)
            odds[odds[:, 0] == 0, 4] = 0    # greedy rows ask for no chance; an old one may lie there
            for name, x in want.items():
                assert np.array_equal(got[name].reshape(np.shape(x)), x), (name, later)


DESK = {}


def desk(device, sizes):
    if (device, sizes) not in DESK:
        DESK[device, sizes] = Desk(device, sizes)
    return DESK[device, sizes]


@cases
@given(seeds, st.sampled_from(SIZES))
def test_prepare_makes_what_the_host_used_to_write(seed, sizes):
    "Pages are used again and again: whatever they held before must not show."
    rng = np.random.default_rng(seed)
    for _ in range(3):
        desk('CPU', sizes).check(*decision(rng, *sizes[:3], sizes[4]), rng)


@few
@given(seeds, st.sampled_from(SIZES[:2]))
def test_the_metal_text_says_the_same(seed, sizes):
    rng = np.random.default_rng(seed)
    desk('METAL', sizes).check(*decision(rng, *sizes[:3], sizes[4]), rng)


def test_more_tokens_than_threads():
    "Each thread takes several; the rows are found by halving."
    rng, sizes = np.random.default_rng(0), (1024, 64, 512, 0, 1)
    for device in ('CPU', 'METAL'):
        Desk(device, sizes).check(*decision(rng, *sizes[:3], 1), rng)


# --- mutants of the text --------------------------------------------------------------------------------

MUTANTS = [
    ('page[STARTS + i] == i && page[STARTS + i + 1] == i + 1', '1'),
    ('<= i) row += jump', '< i) row += jump'),
    ('if (!later)', 'if (later)'),
    ('later ? row : page[SOURCE', 'page[SOURCE'),
    ('page[FIRST + row] + later', 'page[FIRST + row]'),
    ('fed = real && from >= 0 && i + 1 == page[STARTS + row + 1]', 'fed = real && from >= 0'),
    ('at = real ? place', 'at = 1 ? place'),
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
            fresh = Desk('CPU', sizes)
            for _ in range(4 * DESKS):
                fresh.check(*decision(rng, *sizes[:3], sizes[4]), rng)
    with pytest.raises(AssertionError):
        run()


# --- chances --------------------------------------------------------------------------------------------

@cases
@given(st.integers(-2**63, 2**63 - 1), st.integers(0, 2**20))
def test_chances_are_those_of_sampling(seed, place):
    got = chances(seed, place // 64)
    assert got.shape == (64,) and got.dtype == np.float32 and got.max() < 1
    assert got[place % 64] == np.float32(min(draw_uniform(seed, place), 1 - 2**-24))


def test_a_chance_never_rounds_to_one(monkeypatch):
    class Ones:
        def __init__(self, **_): pass
        def random_raw(self, n): return np.full(n, 2**64 - 1, np.uint64)
    monkeypatch.setattr(module, 'Philox', Ones)
    assert (chances.__wrapped__(0, 0) == np.float32(1 - 2**-24)).all()


# --- a page remembers ---------------------------------------------------------------------------------

def page_of(rows=4, width=8, steps=2):
    shapes = page_shapes(rows, rows, width, 16, steps)
    begins, size = laid_out(shapes)
    return Page(np.zeros(size, np.int32), begins, shapes)


def batch_of(*tables, params=None):
    entries = []
    for i, table in enumerate(tables):
        seq = Sequence(i, [1, 2], params[i] if params else SamplingParams(temperature=0))
        seq.num_computed = 1
        entries.append((seq, 1, table))
    return Batch.of(entries, BLOCK)


def test_only_new_blocks_are_written():
    page, table = page_of(), [5, 6]
    page.fill(batch_of(table), {})
    assert page.parts['tables'][0].tolist() == [5, 6] + [0] * 6
    page.parts['tables'][0, 0] = 99    # to see what is written
    table.append(7)
    page.fill(batch_of(table), {})
    assert page.parts['tables'][0].tolist() == [99, 6, 7] + [0] * 5
    page.parts['tables'][0, 2] = 98
    page.fill(batch_of(table), {})
    assert page.parts['tables'][0, 2] == 98


@pytest.mark.parametrize('grown', [[], [9]])
def test_a_copied_last_block_is_written(grown):
    "A fork's first token copies the shared tail; the table may grow in the same step."
    page, table = page_of(), [5, 6]
    page.fill(batch_of(table), {})
    table.pop()
    table += [8, *grown]
    page.fill(batch_of(table), {})
    assert page.parts['tables'][0, :len(table)].tolist() == table


def test_tables_of_the_block_manager():
    "Growing, forked, copied, freed and taken again: at any time a page that is filled has what counts."
    rng, blocks, pages = np.random.default_rng(0), BlockManager(60, BLOCK), [page_of(8, 32), page_of(8, 32)]
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
        page = pages[rng.integers(2)]
        page.fill(batch_of(*tables), {})
        for row, table in enumerate(tables):
            assert page.parts['tables'][row, :len(table)].tolist() == table
    assert copied > 5 and names > 20


def test_another_sequence_takes_the_row():
    page = page_of()
    hot, cold = SamplingParams(temperature=0.7, seed=1), SamplingParams(temperature=0)
    page.fill(batch_of([1, 2, 3], [4], params=[hot, cold]), {})
    assert page.parts['wishes'][0, 0] == np.float32(0.7) and page.parts['wishes'][1, 0] == 0
    page.fill(batch_of([1, 2, 3][:], params=[cold]), {})
    assert page.parts['wishes'][0].tolist() == np.float32(pack_sampling_params(cold)).tolist()
    page.fill(batch_of([7, 8], params=[hot]), {})
    assert page.parts['tables'][0, :2].tolist() == [7, 8] and page.parts['wishes'][0, 0] == np.float32(0.7)


def test_rows_beyond_the_batch_are_greedy():
    "And when they are taken again, their wishes are written again."
    page, hot = page_of(), SamplingParams(temperature=0.7, seed=1)
    many, one = (batch_of(*[[1]] * n, params=[hot] * n) for n in (3, 1))
    for batch, n in ((many, 3), (one, 1), (many, 3)):
        page.fill(batch, {})
        assert (page.parts['wishes'][:n, 0] == np.float32(0.7)).all() and not page.parts['wishes'][n:].any()
        assert (page.parts['starts'][n:] == n).all()


def test_seen_tokens_of_penalised_rows():
    page = page_of()
    for lists in ([[(5, 1), (7, 0)], [], [(5, 2)]], [[(3, 3)]]):
        page.fill_pairs(lists, 'seen', 'counts', 'begins')
        begins = page.parts['begins'].tolist()
        assert [list(zip(page.parts['seen'][a:b].tolist(), page.parts['counts'][a:b].tolist()))
                for a, b in zip(begins, begins[1:])] == lists + [[]] * (4 - len(lists))


# --- memory ------------------------------------------------------------------------------------------

def test_parts_lie_apart_at_multiples_of_16_bytes():
    shapes = page_shapes(5, 3, 7, 9, 2)
    begins, end = laid_out(shapes)
    assert list(begins) == list(shapes) and all(begin % 4 == 0 for begin in [*begins.values(), end])
    taken = [i for name, shape in shapes.items() for i in range(begins[name], begins[name] + int(np.prod(shape)))]
    assert len(taken) == len(set(taken)) and max(taken) < end
    assert not {'seen', 'counts', 'begins'} & page_shapes(5, 3, 7, 0, 2).keys()


def test_a_piece_is_the_same_memory():
    whole, host = host_visible(16, 'CPU')
    part, odds = piece(whole, 4, (2, 3)), piece(whole, 8, (1,), dtypes.float)
    host[:] = np.arange(16)
    assert part.tolist() == [[4, 5, 6], [7, 8, 9]]
    host[8:9].view(np.float32)[0] = 0.25
    assert odds.tolist() == [0.25]


def test_both_sides_see_what_the_other_writes():
    both, host = host_visible(4, 'CPU')
    host[:] = [1, 2, 3, 4]
    both.assign(both * 10).realize()
    assert host.tolist() == [10, 20, 30, 40]


# --- how often ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('steps', [1, 8])
def test_a_decision_fills_one_page_and_a_replay_prepares_once(steps, monkeypatch):
    "Thirty-two tokens: the host writes 32 / `steps` pages; the device prepares each replay by its own clock."
    config, state = tiny_checkpoint(seed=3, num_hidden_layers=1)
    model = fused(Llama(model_config(config), state))
    engine = make_engine(model, num_blocks=20, max_num_seqs=2, num_scheduler_steps=steps)
    filled, launches, prepare, fill = [], [], Inputs.prepare, Page.fill
    monkeypatch.setattr(Page, 'fill', lambda self, *a: filled.append(self) or fill(self, *a))
    monkeypatch.setattr(Inputs, 'prepare', lambda self, *a: launches.append(self) or prepare(self, *a))
    params = SamplingParams(temperature=0, max_tokens=33, ignore_eos=True)
    for turn in range(2):
        filled.clear()
        launches.clear()
        before = int(engine.runner.mail.clock.item())
        out = engine.add_request(turn, [1, 2, 3], params)
        while engine.has_unfinished_requests():
            engine.step()
        assert len(out.outputs[0].token_ids) == 33
        assert len(filled) == 1 + 32 // steps    # the prompt, then tokens
        assert int(engine.runner.mail.clock.item()) == before + 33    # one replay for each token
        assert engine.runner.mail.ticket + 1 == before + 33
    assert not launches    # the second turn had its graphs: Python asked for no kernel
    assert {page for page in filled} <= {p for g in engine.runner.graphs.values() for p in g.step.inputs.pages}
    assert all(len(g.step.inputs.pages) == DESKS for g in engine.runner.graphs.values())
