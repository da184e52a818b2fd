"Packed weights: the same numbers as the files, rounding that is as good as it claims, and refusals by name."
import warnings

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize as gguf_quantize
from hypothesis import given, settings, strategies as st
from tinygrad import Device, Tensor, dtypes

from tinyvllm.quant import pack as Q
from tinyvllm.quant.calibrate import log_likelihoods, observe_inputs
from tinyvllm.quant.formats import REPACK, format_of, pack_2bit, pack_4bit
from tinyvllm.quant.load import load_packed, open_packed, packed_state
from tinyvllm.errors import BadInput
from tinyvllm.models.llama import InputBatch, Llama, NoCache, dense_attend, model_config, weight_bytes
from tinyvllm.kv_cache.paged import paged_attend
from tinyvllm.models.weights import open_checkpoint, read_tensor, save_safetensors, tiny_checkpoint
from tinyvllm.models.hub import resolve
from tinyvllm.models.headers import BLOCKS, Entry

HALVES = {'Q4_0': [0], 'Q4_1': [0, 2], 'Q5_0': [0], 'Q8_0': [0], 'Q4_K': [0, 2], 'Q6_K': [208]}
OWN = ['int8', 'int8-g32', 'int4-g32', 'int4-g64', 'int4-g128', 'int4-g32-zp', 'int4-g128-zp', 'q4_1']
EXAMPLES = settings(max_examples=12, deadline=None)


@pytest.fixture
def portable(monkeypatch):
    "The oracle, not the kernels, which have tests of their own."
    monkeypatch.setattr(Q, 'dispatch', lambda operation, w, *a, **kw: Q.PORTABLE[operation](*a, **kw))


def blocks(kind, rows, columns, seed=0):
    "Random bytes in the blocks of a GGUF type, with sane scales."
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows * columns // values, size), dtype=np.uint8)
    for at in HALVES[kind]:
        raw[:, at:at + 2] = rng.normal(0, 0.1, len(raw)).astype(np.float16).view(np.uint8).reshape(-1, 2)
    return raw.reshape(rows, -1)


def entry(path, kind, raw, columns, heads=0):
    path.write_bytes(b'\0' * 32 + raw.tobytes())
    return Entry(path, (len(raw), columns), kind, 32, raw.size, heads)


def matrix(rows, columns, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * scale).astype(np.float32)


def relative(got, want):
    return np.sqrt(((got - want) ** 2).mean() / (want ** 2).mean())


# --- names

@pytest.mark.parametrize('name', ['int3', 'int4', 'int8-zp', 'int8-g32-zp', 'q4', '', None, 'INT8', 'int4-g', 'int4-g-32'])
def test_unknown_name(name):
    with pytest.raises(BadInput, match='unknown; use int8'):
        format_of(name)


@pytest.mark.parametrize('name', ['int4-g0', 'int4-g16', 'int4-g33', 'int8-g48'])
def test_group_is_a_multiple_of_32(name):
    with pytest.raises(BadInput, match='multiple of 32'):
        format_of(name)


@pytest.mark.parametrize('name,bits', [('int8', 8.0078125), ('int8-g32', 8.5), ('int4-g32', 4.5), ('int4-g128', 4.125),
                                       ('int4-g32-zp', 4.75), ('q4_1', 5), ('q4_k', 4.625), ('q6_k', 6.5625),
                                       ('f16', 16), ('f32', 32), ('bf16', 16)])
def test_bits_per_weight(name, bits):
    assert format_of(name).nbytes((64, 2048)) * 8 == bits * 64 * 2048


# --- GGUF

@pytest.mark.parametrize('kind', REPACK)
@pytest.mark.parametrize('heads', [0, 4])
def test_gguf_stays_exact(tmp_path, kind, heads):
    raw = blocks(kind, 16, 512)
    e = entry(tmp_path / 'w', kind, raw, 512, heads)
    packed = Q.read_packed(e, Device.DEFAULT)
    got = packed.dequantize().numpy()
    want = read_tensor(e, Device.DEFAULT, dtypes.float).numpy()
    assert (got == want).all() and want.std() > 0
    if not heads:
        np.testing.assert_allclose(got, dequantize(raw.reshape(-1), gguf.GGMLQuantizationType[kind]).reshape(16, 512),
                                   rtol=2e-7, atol=1e-6)
    assert packed.nbytes() == packed.format.nbytes(packed.shape) == sum(p.nbytes() for p in packed.parts)
    if kind != 'Q5_0':
        assert packed.nbytes() <= 1.03 * raw.size


def test_gguf_order_of_codes(tmp_path):
    "The layout that the kernels read: low nibbles are the first half of 32, high nibbles the second."
    raw = gguf_quantize(np.arange(32, dtype=np.float32)[None] - 16, gguf.GGMLQuantizationType.Q4_1)
    packed = Q.read_packed(_entry_in_memory(raw), Device.DEFAULT)
    codes = packed.parts[0].numpy()[0]
    got = packed.dequantize().numpy()[0]
    d, m = packed.parts[1].numpy().astype(np.float32)[0, 0]
    assert (got[:16] == (codes & 15) * d + m).all() and (got[16:] == (codes >> 4) * d + m).all()


def _entry_in_memory(raw, kind='Q4_1'):
    import tempfile
    from pathlib import Path
    return entry(Path(tempfile.mkdtemp()) / 'w', kind, raw, raw.shape[1] // BLOCKS[kind][2] * BLOCKS[kind][1])


def test_six_bits_order():
    rng = np.random.default_rng(0)
    q = rng.integers(0, 64, (3, 256), dtype=np.uint8)
    parts = tuple(Tensor(x) for x in (pack_4bit(q & 15), pack_2bit(q >> 4), np.ones((3, 1), np.float16),
                                      np.ones((3, 16), np.int8)))
    packed = Q.Packed(format_of('q6_k'), (3, 256), parts)
    assert (packed.codes().numpy() == q).all()
    assert (packed.dequantize().numpy() == q.astype(int) - 32).all()
    low, high = parts[0].numpy()[0], parts[1].numpy()[0]
    k = 32 + 21   # the second group: weight 21 stands in a high nibble, and in byte 5 at shift 4
    assert q[0, k] == (low[16 + 5] >> 4) | ((high[8 + 5] >> 4 & 3) << 4)


@pytest.mark.parametrize('kind', ['Q4_1', 'Q8_0'])
def test_gguf_damaged_scale(kind):
    raw = blocks(kind, 4, 64)
    raw[2, :2] = np.array([np.inf], np.float16).view(np.uint8)
    with pytest.raises(BadInput, match='blk.7 holds NaN or infinity'):
        Q.read_packed(_entry_in_memory(raw, kind), Device.DEFAULT, 'blk.7')


def test_smollm2_stays_packed():
    checkpoint = open_checkpoint(resolve('smollm2'))
    config, state = load_packed(checkpoint)
    assert config.tie_word_embeddings and 'lm_head.weight' not in state
    stored = sum(e.nbytes for e in checkpoint.entries.values())
    assert sum(p.nbytes() for p in state.values()) == stored
    for name in ('model.layers.0.self_attn.q_proj.weight', 'model.layers.3.self_attn.k_proj.weight',
                 'model.layers.29.mlp.down_proj.weight', 'model.embed_tokens.weight'):
        want = read_tensor(checkpoint.entries[name], Device.DEFAULT, dtypes.float)
        assert (state[name].dequantize() == want).all().item(), name


# --- rounding

@pytest.mark.parametrize('name', OWN)
def test_parts_and_codes(name):
    w = matrix(24, 256)
    packed = Q.quantize(Tensor(w), name)
    kind = packed.format
    assert packed.nbytes() == kind.nbytes(w.shape)
    scales, group = packed.parts[1].numpy().astype(np.float32), kind.group or 256
    assert packed.parts[1].dtype == dtypes.half and scales.shape == (24, 256 // group) + (2,) * (name == 'q4_1')
    scales = scales[..., 0] if name == 'q4_1' else scales
    got, d = packed.dequantize().numpy(), np.repeat(np.abs(scales), group, 1)
    inside = np.abs(got - w) <= d * 0.5001
    assert inside.mean() > {8: 0.999, 4: 0.93}[kind.bits]     # else it was cut at an end of the range
    assert relative(got, w) < {8: 0.011, 4: 0.11 if group < 128 else 0.14}[kind.bits]


@EXAMPLES
@given(st.integers(0, 2**32 - 1), st.sampled_from(OWN), st.sampled_from([1e-3, 1.0, 300.0]))
def test_codes_are_the_nearest(seed, name, scale):
    "Given its scales, no other code of the format is nearer to the weight."
    w = matrix(2, 128, seed, scale)
    packed = Q.quantize(Tensor(w), name)
    group = packed.format.group or 128
    scales, offset = packed.parts[1].numpy().astype(np.float64), 0
    if name == 'q4_1':
        scales, offset = scales[..., 0], np.repeat(scales[..., 1], group, 1)[..., None] + 8 * np.repeat(scales[..., 0], group, 1)[..., None]
    scales = np.repeat(scales, group, 1)[..., None]
    zero = np.repeat(packed.parts[2].numpy().astype(np.float64), group, 1)[..., None] if len(packed.parts) > 2 else 8
    codes = np.arange(16) - zero if packed.format.bits == 4 else np.arange(-128, 128)
    nearest = np.abs(scales * codes + offset - w[..., None]).min(-1)
    assert (np.abs(packed.dequantize().numpy() - w) <= nearest * (1 + 1e-5) + 1e-6 * scale).all()


def test_search_beats_the_plain_scale():
    w = matrix(64, 256)
    plain = np.abs(w.reshape(64, -1, 32)).max(-1, keepdims=True) / 7
    naive = np.clip(np.rint(w.reshape(64, -1, 32) / plain), -8, 7) * plain
    assert relative(Q.quantize(Tensor(w), 'int4-g32').dequantize().numpy(), w) < 0.85 * relative(naive.reshape(w.shape), w)


@pytest.mark.parametrize('name', OWN)
def test_zeros_and_tiny_weights(name):
    w = np.zeros((2, 128), np.float32)
    assert (Q.quantize(Tensor(w), name).dequantize().numpy() == 0).all()
    w[0, :64], w[1] = 1e-30, 1e-7
    got = Q.quantize(Tensor(w), name).dequantize().numpy()
    assert np.isfinite(got).all() and np.abs(got - w).max() <= 1e-7


def test_q4_1_of_a_q4_1_file_changes_nothing():
    raw = gguf_quantize(matrix(32, 512), gguf.GGMLQuantizationType.Q4_1)
    stored = Q.read_packed(_entry_in_memory(raw), Device.DEFAULT)
    again = Q.quantize(stored.dequantize().contiguous().realize(), 'q4_1')
    for a, b in zip(stored.parts, again.parts):
        assert (a.numpy() == b.numpy()).all()


@pytest.mark.parametrize('name', ['int4-g32', 'int4-g64', 'int4-g32-zp', 'q4_1'])
def test_importance_lowers_the_weighted_error(name):
    w, importance = matrix(64, 256), np.random.default_rng(1).lognormal(0, 2, 256).astype(np.float32)
    def weighted(packed):
        return ((packed.dequantize().numpy() - w) ** 2 * importance).sum()
    weighed, plain = (weighted(Q.quantize(Tensor(w), name, importance=c)) for c in (Tensor(importance).realize(), None))
    assert weighed < 0.9 * plain
    assert weighted(Q.quantize(Tensor(w), name, importance=Tensor.ones(256).contiguous().realize())) == plain


@pytest.mark.parametrize('name', ['int4-g32', 'int8-g32'])
def test_a_grid_is_kept(name):
    "Weights that stand on a grid of the format already come back as they were."
    rng, top = np.random.default_rng(0), {'int4-g32': 8, 'int8-g32': 127}[name]
    codes = rng.integers(-top + 1, top, (4, 4, 32))
    codes[..., 0] = -top
    w = (codes * np.float16(0.0371).astype(np.float32)).reshape(4, 128).astype(np.float32)
    assert (Q.quantize(Tensor(w), name).dequantize().numpy() == w).all()


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('name', ['int8', 'int4-g32', 'int4-g32-zp'])
def test_not_finite(bad, name):
    w = matrix(8, 64)
    for _ in range(3):     # also when the kernels are captured
        w[5, 33] = bad
        with pytest.raises(BadInput, match='layer 3 holds NaN or infinity'):
            Q.quantize(Tensor(w), name, 'layer 3')
        w[5, 33] = 0
        assert Q.quantize(Tensor(w), name).shape == (8, 64)


@pytest.mark.parametrize('name,columns', [('int8', 40), ('int4-g64', 96), ('int4-g128-zp', 192), ('int8-g32', 16)])
def test_group_must_divide(name, columns):
    with pytest.raises(BadInput, match=f'down: a row of {columns} weights is no multiple'):
        Q.quantize(Tensor(matrix(4, columns)), name, 'down')


def test_refuses_what_is_no_matrix_of_floats():
    for t in (Tensor([1.0, 2.0]), Tensor([[1, 2]])):
        with pytest.raises(BadInput, match='a matrix of floats'):
            Q.quantize(t, 'int8')
    with pytest.raises(BadInput, match='only read from GGUF files; use int4-g32'):
        Q.quantize(Tensor(matrix(2, 256)), 'q4_k')


# --- products

def operands(name, rows=12, columns=256, tokens=3):
    rng = np.random.default_rng(1)
    w = Q.pack_dense(Tensor(matrix(rows, columns, 2, 0.1))) if name == 'f32' else Q.quantize(Tensor(matrix(rows, columns, 2, 0.1)), name)
    return w, *(rng.standard_normal(s).astype(np.float32) for s in ((tokens, columns), columns, rows, (tokens, rows)))


@pytest.mark.parametrize('name,tokens', [*((name, 1) for name in ['f32', *OWN]), ('int4-g32', 9), ('int8', 9)])
def test_linear(portable, name, tokens):
    w, x, norm, bias, add = operands(name, tokens=tokens)
    dense = w.dequantize().numpy().astype(np.float64)
    unit = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * norm
    want = unit @ dense.T + bias + add
    got = Q.linear(Tensor(x), w, Tensor(norm), 1e-5, Tensor(bias), Tensor(add))
    assert got.dtype == dtypes.float and np.abs(got.numpy() - want).max() < 1e-5 * np.abs(want).max()
    got = Q.linear(Tensor(x), w).numpy()
    assert np.abs(got - x @ dense.T).max() < 1e-5 * np.abs(want).max()


def test_swiglu_and_embed(portable):
    w, x, norm, *_ = operands('int4-g32')
    dense = w.dequantize().numpy().astype(np.float64)
    unit = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * norm
    gate, up = np.split(unit @ dense.T, 2, -1)
    want = gate / (1 + np.exp(-gate)) * up
    assert np.abs(Q.swiglu(Tensor(x), w, Tensor(norm), 1e-5).numpy() - want).max() < 1e-5 * np.abs(want).max()
    rows = Q.embed(w, Tensor([3, 0, 3, 11], dtype=dtypes.int), dtypes.half)
    assert rows.dtype == dtypes.half and (rows.numpy() == dense[[3, 0, 3, 11]].astype(np.float16)).all()
    assert (w[Tensor([5], dtype=dtypes.int)].numpy() == dense[[5]].astype(np.float32)).all()


def test_half_stays_half(portable):
    w, x, norm, bias, add = operands('int8-g32')
    half = [Tensor(a).half() for a in (x, add)]
    got = Q.linear(half[0], w, Tensor(norm), 1e-5, add=half[1])
    assert got.dtype == dtypes.half


def test_concat_rows():
    parts = [Q.quantize(Tensor(matrix(n, 64, n)), 'int4-g32') for n in (8, 4, 2)]
    whole = Q.concat_rows(parts)
    assert whole.shape == (14, 64)
    assert (whole.dequantize().numpy() == np.concatenate([p.dequantize().numpy() for p in parts])).all()
    assert Q.concat_rows([parts[0], Q.quantize(Tensor(matrix(4, 64)), 'int8')]) is None
    assert Q.concat_rows([parts[0], Q.quantize(Tensor(matrix(4, 96)), 'int4-g32')]) is None


@pytest.mark.parametrize('wrong,name', [
    (lambda w, x: Q.linear(x[:, :32], w), 'x'), (lambda w, x: Q.linear(x, w, norm=x[0, :32]), 'norm'),
    (lambda w, x: Q.linear(x, w, bias=x[0]), 'bias'), (lambda w, x: Q.linear(x, w, add=x), 'add'),
    (lambda w, x: Q.swiglu(x[0], w), 'x'), (lambda w, x: Q.embed(w, Tensor([[1]]), dtypes.float), 'tokens')])
def test_shapes_by_name(wrong, name):
    with pytest.raises(BadInput, match=f"'{name}' has shape"):
        wrong(Q.quantize(Tensor(matrix(12, 64)), 'int8'), Tensor(matrix(3, 64)))


# --- models

@pytest.fixture(scope='module')
def tiny():
    config, state = tiny_checkpoint(seed=0, model_type='qwen2')
    return model_config(config), state


@pytest.fixture(scope='module')
def logits(tiny):
    "Of the dense model."
    ids = np.random.default_rng(0).integers(0, 512, 33).tolist()
    return ids, Llama(*tiny)(InputBatch.of(ids, rows=list(range(33))), NoCache(), dense_attend).numpy().astype(np.float64)


def likelihoods(model, ids):
    "Through the kernels that the device has, with portable attention."
    return log_likelihoods(model, ids, paged_attend, chunk=32)


def true_likelihoods(ids, logits):
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return want[np.arange(len(ids) - 1), ids[1:]], want[:-1].argmax(-1)


def test_log_likelihoods(tiny, logits):
    ids, dense = logits
    want, best = true_likelihoods(ids, dense)
    for found, likeliest in (log_likelihoods(Llama(*tiny), ids, paged_attend, chunk=16), likelihoods(Llama(*tiny), ids)):
        np.testing.assert_allclose(found, want, atol=1e-4)
        assert (likeliest == best).all()


@pytest.mark.parametrize('quant,limit', [(None, 1e-4), ('int8', 0.05), ('int4-g32', 0.5)])
def test_packed_llama(tiny, logits, quant, limit):
    config, state = tiny
    ids, dense = logits
    packed = packed_state(state, quant)
    assert all(p.dtype == dtypes.float for n, p in packed.items() if len(p.shape) == 1)
    model = Q.PackedLlama(config, packed)
    assert np.abs(likelihoods(model, ids)[0] - true_likelihoods(ids, dense)[0]).mean() < limit
    if quant == 'int4-g32':
        assert packed['lm_head.weight'].format.name == packed['model.embed_tokens.weight'].format.name == 'int8-g32'
        assert packed['model.layers.0.mlp.up_proj.weight'].format.name == 'int4-g32'
    if quant:
        assert weight_bytes(model) < 0.4 * weight_bytes(Llama(config, state))


def test_observe_inputs(tiny):
    config, state = tiny
    ids = [5, 6, 7, 300, 12]
    seen = observe_inputs(Llama(config, state), ids)
    inputs = {n for n in state if 'proj.weight' in n}
    assert set(seen) == inputs
    x = state['model.embed_tokens.weight'].numpy()[ids[:-1]].astype(np.float64)    # the last token is only predicted
    norm = state['model.layers.0.input_layernorm.weight'].numpy()
    want = ((x / np.sqrt((x ** 2).mean(-1, keepdims=True) + config.rms_norm_eps) * norm) ** 2).mean(0)
    np.testing.assert_allclose(seen['model.layers.0.self_attn.k_proj.weight'].numpy(), want, rtol=1e-4)


def test_a_sample_is_read_where_there_is_a_tokenizer(folder, tmp_path):
    config, plain = load_packed(folder, 'int4-g32', sample='')
    _, weighed = load_packed(folder, 'int4-g32', sample='a text')
    name = 'model.layers.1.mlp.down_proj.weight'
    assert (plain[name].parts[0].numpy() != weighed[name].parts[0].numpy()).any()
    save_safetensors(tmp_path / 'm', *tiny_checkpoint(seed=0))
    with pytest.warns(UserWarning, match='all columns are rounded alike'):
        _, without = load_packed(tmp_path / 'm', 'int4-g32')
    assert (plain[name].parts[0].numpy() == without[name].parts[0].numpy()).all()


def test_unknown_quantisation_before_anything_is_read(tmp_path):
    with pytest.raises(BadInput, match="'int5' is unknown"):
        packed_state({}, 'int5')


def test_nan_in_a_file_is_named(tmp_path):
    config, state = tiny_checkpoint(seed=0)
    name = 'model.layers.1.self_attn.o_proj.weight'
    broken = state[name].numpy().copy()
    broken[3, 5] = np.nan
    save_safetensors(tmp_path / 'm', config, {**state, name: Tensor(broken)})
    for quant in (None, 'int8'):
        with pytest.raises(BadInput, match=f'{name} holds NaN'):
            load_packed(tmp_path / 'm', quant)


# --- dispatch

def test_falls_back_with_one_warning(monkeypatch):
    calls = []

    def kernel(x, w, **options):
        calls.append(options)
        raise NotImplementedError('no kernel for odd shapes')
    monkeypatch.setattr(Q, '_kernel', lambda operation, device: kernel)
    Q.warn_once.cache_clear()
    w, x, *_ = operands('int8')
    with pytest.warns(UserWarning, match='slow, portable path: no kernel for odd shapes'):
        first = Q.linear(Tensor(x), w).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert (Q.linear(Tensor(x), w).numpy() == first).all()
    assert len(calls) == 2 and calls[0] == dict(norm=None, eps=0.0, bias=None, add=None)
    Q.warn_once.cache_clear()
