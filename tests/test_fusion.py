"""RoPE with the write against float64 numpy, and the fused model against the plain one, in all its variants.

The Metal text runs on CUDA or on a Mac where that is the default device, else in the simulator; the C text on the
processor."""
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tinygrad import Device, Tensor, dtypes
from tinygrad.helpers import Context

from tinyvllm.models import fused as fusion

from tinyvllm import metalsim
from tinyvllm.engine.llm import LLM
from tinyvllm.errors import BadInput
from tinyvllm.engine.defaults import best_attend
from tinyvllm.models.fused import FusedKVCache, FusedLlama, fused, rope_write, state_of, rope_qkv
from tinyvllm.engine.defaults import best_model, best_cache
from tinyvllm.reference.generate import bucket, same_greedy
from tinyvllm.models.llama import InputBatch, Llama, NoCache, RMSNorm, dense_attend, kv_bytes, model_config, weight_bytes
from tinyvllm.measure import counting
from tinyvllm.kv_cache.paged import PagedBatch, PagedKVCache, paged_attend
from tinyvllm.quant.pack import Packed, PackedLlama, concat_rows, quantize
from tinyvllm.quant.load import packed_state
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.models.weights import save_safetensors, tiny_checkpoint
from tinyvllm.models.hub import resolve

GPU = 'CUDA' if Device.DEFAULT.startswith('CUDA') else 'METAL'
SIMULATED = GPU == 'METAL' and sys.platform != 'darwin'
TOLERANCE = {'float': 1e-5, 'half': 2e-3}
TYPES = {'float': np.float32, 'half': np.float16}
simulator = pytest.mark.skipif(not SIMULATED, reason='the mutants are caught by the simulator')
slowly = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**32 - 1)
SHAPES = [  # kind of numbers, tokens, H, K, D, normalised: they are compiled in
    ('float', 1, 9, 3, 64, False), ('float', 7, 4, 2, 16, True), ('half', 5, 3, 1, 80, True),
    ('float', 3, 1, 1, 2, False), ('half', 16, 4, 4, 96, False), ('float', 2, 8, 1, 128, True)]


# --- the kernel

def arrays(kind, T, H, K, D, normed, seed, slots=24):
    "Projections, pools, angles, slots (of padding, too) and norms."
    rng = np.random.default_rng(seed)
    qkv = rng.standard_normal((T, (H + 2 * K) * D)).astype(TYPES[kind]) * 3
    pools = rng.standard_normal((2, slots, K, D)).astype(TYPES[kind])
    angles = rng.uniform(0, 300, (T, 1, D // 2))
    where = np.append(1, 2 + rng.permutation(slots - 2))[:T].astype(np.int32)    # slot 1 is somebody's
    where[2:][rng.random(T)[2:] < 0.4] = 0
    where[2:3] = 0
    norms = rng.uniform(0.3, 2, (2, D)).astype(np.float32) if normed else None
    return qkv, pools, [f(angles).astype(np.float32) for f in (np.cos, np.sin)], where, norms


def answer(qkv, pools, table, slots, norms, eps):
    "The same in float64, head by head."
    (k_pool, v_pool), (cos, sin) = pools.astype('f8'), (a.astype('f8') for a in table)
    T, (_, K, D) = len(qkv), k_pool.shape
    x = qkv.astype('f8').reshape(T, -1, D)
    H = x.shape[1] - 2 * K

    def turn(y, weight):
        if norms is not None:
            y = y / np.sqrt((y**2).mean(-1, keepdims=True) + eps) * weight
        a, b = y[..., :D // 2], y[..., D // 2:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    queries, keys = (turn(y, w) for y, w in zip((x[:, :H], x[:, H:H + K]), norms if norms is not None else (0, 0)))
    for t, slot in enumerate(slots):
        if slot:
            k_pool[slot], v_pool[slot] = keys[t], x[t, H + K:]
    return queries, k_pool, v_pool


def check_rope(device, case, seed):
    "Poisoned queries, and pools of which nothing else may change."
    kind, T, H, K, D, normed = case
    made, eps = arrays(*case, seed), 0.01
    qkv, pools, table, slots, norms = made

    def tensor(x):
        return Tensor(np.ascontiguousarray(x), device=device).realize()

    def poisoned(*shape, dtype, device):
        return tensor(np.full(shape, np.nan, {dtypes.half: 'e', dtypes.float: 'f'}[dtype]))
    weights = tuple(RMSNorm(tensor(n), eps) for n in norms) if normed else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusion, 'Tensor', SimpleNamespace(empty=poisoned))
        out = rope_write(tensor(qkv), *map(tensor, pools), tuple(map(tensor, table)), tensor(slots), weights)
    Tensor.realize(*out)
    for got, want in zip(out, answer(*made, eps)):
        got = got.numpy()
        assert got.shape == want.shape and got.dtype == TYPES[kind]
        assert np.abs(got - want).max() <= TOLERANCE[kind] * np.abs(want).max()    # False for NaN
    untouched = np.setdiff1d(np.arange(len(pools[0])), slots[slots > 0])
    for got, before in zip(out[1:], pools):
        assert (got.numpy()[untouched] == before[untouched]).all()


@settings(max_examples=100, **slowly)
@given(st.sampled_from(SHAPES), seeds)
def test_the_processors_kernel_turns_and_writes(case, seed):
    check_rope('CPU', case, seed)


@settings(max_examples=12 if SIMULATED else 150, **slowly)
@given(st.sampled_from(['float', 'half']), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3),
       st.sampled_from([2, 16, 64, 80, 96, 128]), st.booleans(), seeds)
def test_the_metal_text_turns_and_writes(kind, T, H, K, D, normed, seed):
    check_rope(GPU, (kind, T, H, K, D, normed), seed)


@pytest.mark.parametrize('case', SHAPES[:3])
def test_the_portable_twin_agrees(case):
    qkv, pools, table, slots, norms = made = arrays(*case, seed=3)
    weights = norms is not None and tuple(RMSNorm(Tensor(n), 0.01) for n in norms) or None
    got = rope_qkv(Tensor(qkv), *pools.shape[2:], tuple(map(Tensor, table)), weights)
    want = answer(*made, 0.01)
    written = slots > 0
    for g, w in zip((got[0].numpy(), *(x.numpy()[written] for x in got[1:])),
                    (want[0], *(p[slots[written]] for p in want[1:]))):
        assert g.dtype == qkv.dtype and np.abs(g - w).max(initial=0) <= TOLERANCE[case[0]] * np.abs(want[0]).max()


def test_wrong_tensors_are_refused_by_name():
    def refused(says, **change):
        args = dict(qkv=Tensor.empty(3, 8 * 16), k_pool=Tensor.empty(24, 2, 16), v_pool=Tensor.empty(24, 2, 16),
                    table=(Tensor.empty(3, 1, 8),) * 2, slots=Tensor.empty(3, dtype=dtypes.int32)) | change
        with pytest.raises(BadInput, match=says):
            rope_write(**args)
    refused("'qkv' has shape", qkv=Tensor.empty(3, 8 * 16 + 1))
    refused("'qkv' has shape", qkv=Tensor.empty(3, 4 * 16))
    refused("'qkv' has shape", qkv=Tensor.empty(8 * 16))
    refused("'qkv' is int", qkv=Tensor.empty(3, 8 * 16, dtype=dtypes.int32))
    refused("'k_pool' has shape", k_pool=Tensor.empty(24, 32))
    refused("'k_pool' has shape", k_pool=Tensor.empty(24, 2, 15), v_pool=Tensor.empty(24, 2, 15))
    refused("'k_pool' is a view|'k_pool' is written", k_pool=Tensor.empty(24, 2, 16) + 1)
    refused("'v_pool' has shape", v_pool=Tensor.empty(23, 2, 16))
    refused("'v_pool' is half", v_pool=Tensor.empty(24, 2, 16, dtype=dtypes.half))
    refused("'cosines' has shape", table=(Tensor.empty(2, 1, 8),) * 2)
    refused("'slots' has shape", slots=Tensor.empty(4, dtype=dtypes.int32))
    refused("'slots' is", slots=Tensor.empty(3, dtype=dtypes.int64))
    refused("'k_norm' has shape", norms=(RMSNorm(Tensor.empty(16), 0), RMSNorm(Tensor.empty(8), 0)))


MUTANTS = [
    ('head >= H + 2 * KV', 'head > H + 2 * KV'),                 # one head too many
    ('if (head >= H && slot < 1) return;', ''),                  # padding writes
    ('slot < 1', 'slot < 2'),                                    # slot 1 is somebody's
    ('place.x * SIMDS + simd', 'place.x + simd * SIMDS'),
    ('(long(t) * (H + 2 * KV) + head) * D', '(long(t) * (H + KV) + head) * D'),
    ('head - H - KV) * D', 'head - H) * D'),                     # values of the next slot
    ('value[i] = P(x[i]);', 'if (i < D - 1) value[i] = P(x[i]);'),
    ('/ D + EPS', '+ EPS'),
    ('/ D + EPS', '/ D'),
    ('simd_sum(sum)', 'sum'),                                    # each lane has its own mean
    ('head < H ? q_norm : k_norm', 'q_norm'),
    ('float(weight[i + D / 2])', 'float(weight[i])'),
    ('a * c - b * s', 'a * c + b * s'),                          # the other way round
    ('b * c + a * s', 'b * c + low * s'),
    ('cosines[t * (D / 2) + i]', 'cosines[i]'),                  # the first token's angle
    ('sines[t * (D / 2) + i];\n', 'sines[t * D + i];\n'),
    ('for (int i = lane; i < D / 2; i += 32)', 'for (int i = lane; i < D / 2 && i < 32; i += 32)'),
    ('(long(t) * H + head) * D', '(long(t) * H + head % KV) * D'),
    ('(long(slot) * KV + head - H) * D', '(long(t) * KV + head - H) * D'),
    ('device const NORM* weight', 'const NORM* weight'),      # address space forgotten
]


def caught(text, check):
    "By the simulator, by lint, or by the answer."
    broken, sources = replace(fusion.ROPE_WRITE, **text), []
    source = type(broken).source
    with pytest.MonkeyPatch.context() as patch, np.errstate(all='ignore'):
        patch.setattr(fusion, 'ROPE_WRITE', broken)
        patch.setattr(type(broken), 'source', lambda *a: sources.append(source(*a)) or sources[-1])
        try:
            check()
        except (AssertionError, metalsim.MetalError, BadInput):
            return True
    return 'metal' in text and any(metalsim.lint(text) for text in sources)


def survivors(language, mutants, *checks):
    text = getattr(fusion.ROPE_WRITE, language)
    for old, _ in mutants:
        assert text.count(old) == 1, old
    return [m for m in mutants if not any(caught({language: text.replace(*m)}, check) for check in checks)]


@simulator
def test_ten_ways_to_break_the_metal_text_are_caught():
    def check():
        check_rope('METAL', ('float', 3, 3, 2, 80, True), 5)
    check()
    assert len(MUTANTS) >= 10 and not survivors('metal', MUTANTS, check)


def test_the_c_text_broken_is_caught():
    def check():
        check_rope('CPU', ('float', 3, 3, 2, 80, True), 5)
    check()
    assert not survivors('c', [
        ('if (slots[t] < 1) continue;', ''), ('slots[t] < 1', 'slots[t] < 2'), ('x, k_norm', 'x, q_norm'),
        ('sum / D + EPS', 'sum / D'), ('*sine = sines + t * (D / 2)', '*sine = sines + t'),
        ('(H + 2 * KV) * D', '(H + KV) * D'),
        ('a * cosine[i] - b * sine[i]', 'a * cosine[i] + b * sine[i]'), ('value[i] = x[i]', 'value[i] = x[0]'),
        ('key[h * D + i]', 'key[i]'), ('(long)t * H + h', '(long)t + h')], check)


@simulator
@pytest.mark.parametrize('T', ['half', 'float'])
def test_metals_compiler_would_take_the_text(T):
    constants = dict(T=T, P='half', NORM='float', SIMDS=4, H=4, KV=2, D=80, NORMED=1, EPS=1e-5, TOKENS=3)
    assert metalsim.lint(fusion.ROPE_WRITE.source('METAL', 128, constants)) == []


# --- the model

SMALL = dict(hidden_size=96, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
LLAMA3 = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
VARIANTS = {
    'llama': {}, 'tied': dict(tie_word_embeddings=True), 'o bias': dict(attention_bias=True),
    'qwen2': dict(model_type='qwen2'), 'qwen3': dict(model_type='qwen3', tie_word_embeddings=True),
    'linear rope': dict(rope_scaling=dict(rope_type='linear', factor=2.0)), 'llama3 rope': dict(rope_scaling=LLAMA3)}


def plain(seed=0, **changes):
    config, state = tiny_checkpoint(seed, **SMALL | changes)
    return Llama(model_config(config), {name: t.realize() for name, t in state.items()})


def mixed_state(model):
    "A different format for some of the matrices that would stand below each other."
    state = packed_state(state_of(model))
    for name, format in (('self_attn.k_proj', 'int8'), ('mlp.up_proj', 'int4-g32')):
        name = f'model.layers.0.{name}.weight'
        state[name] = quantize(state[name].parts[0], format)
    return state


IDS = np.random.default_rng(7).integers(0, 512, 30).tolist()


def scores(model, cache=None, attend=None, parts=(9, 7)):
    "Scores of the last token of each part of a prompt; parts are padded."
    cache, attend = cache or best_cache(model, 3), attend or best_attend(model)
    out, start, ints = [], 0, dict(dtype=dtypes.int32, device=model.embedding.device)
    size = bucket(max(parts))
    for n in parts:
        place = start + np.arange(n)
        rows = np.array(IDS)[place], place, place + 16, 0 * place    # tokens, positions, slots, owners
        tokens, positions, slots, owners = (Tensor(np.pad(row, (0, size - n)).tolist(), **ints) for row in rows)
        batch = PagedBatch(tokens, positions, Tensor([n - 1], **ints), start, slots, Tensor([[1, 2]], **ints), owners,
                           Tensor([0, n], **ints))
        with Context(SPLIT_REDUCEOP=0):
            out.append(model(batch, cache, attend).numpy()[0])
        start += n
    return np.array(out)


def oracle(model, parts=(9, 7)):
    "The same by the plain model, in one pass, without a cache."
    batch = InputBatch.of(IDS[:sum(parts)], rows=(np.cumsum(parts) - 1).tolist())
    return model(batch, NoCache(), dense_attend).numpy()


def distance(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


PROMPTS = [IDS[:9], IDS[9:19], IDS[19:30]]    # with the answers 14 to 16 tokens: one shape for the oracle


def assert_greedy(quick, plain, n=6):
    "What the engine says is what the plain model would say."
    params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
    outs = LLM(quick, num_blocks=12).generate(PROMPTS, params, use_tqdm=False)
    for prompt, out in zip(PROMPTS, outs):
        assert len(out.outputs[0].token_ids) == n and same_greedy(plain, prompt, out.outputs[0].token_ids)


@pytest.mark.parametrize('changes', VARIANTS.values(), ids=VARIANTS)
def test_a_fused_model_has_the_same_scores_and_tokens(changes):
    model = plain(**changes)
    quick = fused(model)
    assert distance(scores(quick), oracle(model)) < 1e-4
    assert isinstance(best_cache(quick, 3), FusedKVCache) and len(quick.layers[0].qkv) == 1
    assert_greedy(quick, model)
    assert weight_bytes(quick) == weight_bytes(model) and kv_bytes(quick) == kv_bytes(model)


def test_the_frequencies_of_a_gguf_file_are_kept():
    model = plain()
    factors = np.linspace(1, 8, 16, dtype=np.float32)
    scaled = Llama(model.config, state_of(model) | {'rope_freqs.weight': Tensor(factors)})
    want = oracle(scaled)
    state = packed_state(state_of(model) | {'rope_freqs.weight': Tensor(factors)})
    for quick in (fused(scaled), FusedLlama(PackedLlama(model.config, state))):
        assert distance(scores(quick), want) < 1e-4
    assert distance(oracle(model), want) > 1e-2


def test_matrices_of_several_formats_stay_apart():
    model = plain(model_type='qwen2')
    state = mixed_state(model)
    dense = {n: w.dequantize().realize() if isinstance(w, Packed) else w for n, w in state.items()}
    quick = FusedLlama(PackedLlama(model.config, state))
    assert [len(layer.qkv) for layer in quick.layers] == [3, 1]
    assert [len(layer.gate_up) for layer in quick.layers] == [2, 1]
    model = Llama(model.config, dense)
    assert distance(scores(quick), oracle(model)) < 1e-4
    assert_greedy(quick, model)


def test_biases_of_some_matrices_only_are_no_obstacle():
    model = plain(attention_bias=True)
    model.layers[0].attention.k.bias = None
    model.layers[1].mlp.gate.bias = model.layers[1].mlp.up.bias = Tensor(np.linspace(-1, 1, 160, dtype='f'))
    quick = fused(model)
    assert distance(scores(quick), oracle(model)) < 1e-4


def test_any_other_cache_serves():
    model = plain(model_type='qwen3')
    quick, want = fused(model), oracle(model)
    assert distance(oracle(quick), want) < 1e-4
    assert distance(scores(quick, PagedKVCache(quick, 3), paged_attend), want) < 1e-4


def test_what_the_kernel_refuses_is_done_portably():
    quick, want = fused(plain(model_type='qwen3')), None
    for device in (None, 'refused'):
        cache = best_cache(quick, 3)
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            if device:
                patch.setattr(fusion, 'ROPE_WRITE', fusion.Kernel(fusion.METAL_ROPE))    # no text for the CPU
            got = scores(quick, cache)
        assert any('portable' in str(w.message) for w in told) == bool(device)
        assert want is None or distance(got, want) < 1e-5
        want = got


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_the_model_runs_by_metal_text(dtype):
    config, state = tiny_checkpoint(1, num_hidden_layers=1, model_type='qwen3')
    kind = getattr(dtypes, dtype)
    rounded = {name: t.cast(kind).realize() for name, t in state.items()}
    model = Llama(model_config(config), {name: t.float().realize() for name, t in rounded.items()})
    there = Llama(model_config(config), {name: t.to(GPU).realize() for name, t in rounded.items()})
    quick = fused(there)
    assert quick.dtype == dtype
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        got = scores(quick, parts=(5, 1))
    assert distance(got, oracle(model, parts=(5, 1))) < {'float32': 1e-4, 'float16': 1e-2}[dtype]


# --- what it is for

@pytest.mark.parametrize('changes', VARIANTS.values(), ids=VARIANTS)
def test_six_kernels_a_layer(changes):
    quick = fused(plain(**changes))
    counts = {}
    for n in (2, 1):
        quick.layers = quick.layers[:n]
        counts[n] = step(quick, context=40).kernels
    assert counts[2] - counts[1] == 6 and counts[1] == 6 + 5    # embed, cos, sin, rows, head


def step(model, context, tokens=1):
    "The counts of one decode step; the pool holds as many blocks as live."
    ints, blocks = dict(dtype=dtypes.int32), -(-context // 16)
    one, at = Tensor([5] * tokens, **ints), Tensor([context - 1] * tokens, **ints)
    order = list(range(tokens))
    batch = PagedBatch(one, at, Tensor(order, **ints), context - 1, at + 16,
                       Tensor([list(range(1, blocks + 1))] * tokens, **ints), Tensor(order, **ints),
                       Tensor(order + [tokens], **ints))
    for t in vars(batch).values():
        if isinstance(t, Tensor):
            t.realize()
    cache, attend = best_cache(model, blocks + 1), best_attend(model)
    with Context(SPLIT_REDUCEOP=0), counting() as counts:
        model(batch, cache, attend).realize()
    return counts


@pytest.mark.skipif(Device.DEFAULT != 'CPU', reason="the counters of the processor's kernels")
@pytest.mark.parametrize('quantization', [None, 'int8'])
def test_bytes_stay_near_the_minimum(quantization):
    model = fused(plain(hidden_size=256, intermediate_size=512, num_attention_heads=8), quantization)
    least = weight_bytes(model) + 64 * kv_bytes(model)
    assert least < step(model, context=64).nbytes <= 1.05 * least


# --- loading

def test_a_file_becomes_a_fused_model(folder):
    model = best_model(folder)
    assert type(model) is FusedLlama and model.dtype == 'float32'
    assert [len(layer.qkv) for layer in model.layers] == [1, 1]
    assert best_model(folder, quantization='int8').layers[0].qkv[0][0].format.bits == 8
    assert best_model(folder, dtype='float16').layers[0].o.weight.format.name == 'f16'


@pytest.mark.parametrize('options, says', [
    (dict(dtype='float8'), 'float8'), (dict(quantization='int3'), 'int3'),
    (dict(quantization='int8-g48'), 'multiple of 32')])
def test_unknown_types_are_refused(folder, options, says):
    with pytest.raises(BadInput, match=says):
        best_model(folder, **options)


def test_a_packed_model_is_not_packed_again():
    quick = fused(plain())
    for again in (quick, PackedLlama(quick.config, packed_state(state_of(plain())))):
        with pytest.raises(BadInput, match='packed already'):
            fused(again, 'int8')


def test_the_dense_model_stays_as_it_is():
    model = plain(model_type='qwen3', tie_word_embeddings=True)
    before = {name: t.numpy() for name, t in state_of(model).items()}
    fused(model, 'int8')
    after = state_of(model)
    assert before.keys() == after.keys() and all((after[n].numpy() == before[n]).all() for n in before)
    assert before.keys() == tiny_checkpoint(0, **SMALL, model_type='qwen3', tie_word_embeddings=True)[1].keys()


def test_layers_that_are_taken_over_are_let_go(tmp_path):
    "Joined matrices are copies: their originals must not stay."
    from tinygrad.helpers import GlobalCounters
    save_safetensors(tmp_path, *tiny_checkpoint(0, **SMALL))
    before = GlobalCounters.mem_used
    model = best_model(tmp_path)
    assert GlobalCounters.mem_used - before < 1.1 * (weight_bytes(model) + model.embedding.nbytes())


# --- SmolLM2

GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'smollm2.json').read_text())['items']


@pytest.fixture(scope='module')
def smollm():
    return best_model(resolve('smollm2'))


@pytest.mark.parametrize('golden', GOLDEN, ids=lambda g: g['name'])
def test_smollm2_says_what_it_must(smollm, golden):
    "As `test_golden`: each golden token is the likeliest after those before it, with its log-probability."
    ids, n = golden['prompt_ids'] + golden['greedy_ids'], len(golden['prompt_ids'])
    T, blocks = len(ids) - 1, bucket(len(ids)) // 16
    place, size, ints = np.arange(T), bucket(T), dict(dtype=dtypes.int32)
    rows = np.array(ids[:-1]), place, place + 16, 0 * place
    tokens, positions, slots, owners = (Tensor(np.pad(row, (0, size - T)).tolist(), **ints) for row in rows)
    batch = PagedBatch(tokens, positions, Tensor(list(range(n - 1, T)), **ints), 0, slots,
                       Tensor([list(range(1, blocks + 1))], **ints), owners, Tensor([0, T], **ints))
    logits = smollm(batch, best_cache(smollm, blocks + 1), best_attend(smollm)).numpy().astype('f8')
    logp = logits - logits.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    assert logp.argmax(-1).tolist() == golden['greedy_ids']
    for row, top in zip(logp, golden['top5_first8']):
        assert max(abs(row[i] - want) for i, want in top) < 1e-3


def test_smollm2_reads_little_more_than_its_weights(smollm):
    least = weight_bytes(smollm) + 224 * kv_bytes(smollm)
    counts = step(smollm, context=224)
    assert counts.kernels == 30 * 6 + 5 and counts.nbytes <= 1.05 * least
    assert weight_bytes(smollm) < 97e6


@pytest.mark.slow
@pytest.mark.parametrize('golden', GOLDEN, ids=lambda g: g['name'])
def test_smollm2_through_the_engine(smollm, golden):
    llm = LLM(smollm, num_blocks=2 + (len(golden['prompt_ids']) + 64) // 16)
    out, = llm.generate([golden['prompt_ids']], SamplingParams(temperature=0, max_tokens=64, ignore_eos=True),
                        use_tqdm=False)
    assert out.outputs[0].token_ids == golden['greedy_ids']
