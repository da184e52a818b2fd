"The model against Hugging Face transformers, and against itself."
from dataclasses import replace
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tinygrad import Tensor
from tinyvllm.errors import BadInput
from tinyvllm.models.llama import (InputBatch, Llama, NoCache, apply_rope, check_weights, dense_attend,
                            load_model, model_config, rope_frequencies, rope_table)
from tinyvllm.models.weights import open_checkpoint, save_safetensors, tensor_shapes, tiny_checkpoint

TINY = dict(vocab_size=160, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
            num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256)
LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 32, 'rope_theta': 10000.0}
FAMILIES = {
    'llama': ('LlamaConfig', {}),
    'llama, tied': ('LlamaConfig', {'tie_word_embeddings': True}),
    'llama, biased': ('LlamaConfig', {'attention_bias': True, 'mlp_bias': True}),
    'llama-3 scaling': ('LlamaConfig', {'rope_parameters': LLAMA3}),
    'linear scaling': ('LlamaConfig', {'rope_parameters': {'rope_type': 'linear', 'factor': 4.0,
                                                           'rope_theta': 10000.0}}),
    'mistral': ('MistralConfig', {'head_dim': 16, 'sliding_window': None}),
    'qwen2': ('Qwen2Config', {}),
    'qwen3': ('Qwen3Config', {'head_dim': 16}),
}


@pytest.fixture(scope='module', params=FAMILIES, ids=lambda f: f.replace(', ', '-').replace(' ', '-'))
def family(request, tmp_path_factory):
    "A tiny model that transformers made, saved and ran: folder, ids, logits."
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    name, overrides = FAMILIES[request.param]
    config = getattr(transformers, name)(**TINY, **overrides)
    torch.manual_seed(7)
    hf = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():   # biases and norms start as zeros and ones, which would hide mistakes
        for p in hf.parameters(): p.add_(torch.randn_like(p) * 0.05)
    folder = tmp_path_factory.mktemp('hf')
    hf.save_pretrained(folder)
    ids = torch.randint(0, TINY['vocab_size'], (1, 50))
    with torch.no_grad(): logits = hf(ids).logits[0].numpy()
    return folder, ids[0].tolist(), logits


def test_logits_equal_transformers(family):
    folder, ids, want = family
    model = load_model(folder, dtype='float32')
    got = model(InputBatch.of(ids, rows=list(range(len(ids)))), NoCache(), dense_attend).numpy()
    assert np.abs(got - want).max() < 1e-4
    assert (got.argmax(-1) == want.argmax(-1)).all()


def tiny(seed=0, **overrides):
    config, state = tiny_checkpoint(seed, **overrides)
    return Llama(model_config(config), state)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 511), min_size=2, max_size=16), st.data())
def test_no_token_sees_the_future(ids, data):
    model, cut = tiny(), data.draw(st.integers(1, len(ids) - 1))
    rows = list(range(cut))
    whole = model(InputBatch.of(ids, size=16, rows=rows), NoCache(), dense_attend).numpy()
    part = model(InputBatch.of(ids[:cut], size=16, rows=rows), NoCache(), dense_attend).numpy()
    assert np.abs(whole - part).max() < 1e-5


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)]), st.integers(1, 9), st.integers(0, 5), st.integers(0, 99))
def test_dense_attention_equals_float64(heads, new, before, seed):
    (H, K), D, rng = heads, 8, np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((n, h, D)).astype(np.float32)
               for n, h in ((new, H), (before + new, K), (before + new, K)))
    got = dense_attend(Tensor(q), Tensor(k), Tensor(v), InputBatch.of([0] * new, start=before)).numpy()
    for t in range(new):
        for h in range(H):
            keys, values = (x[:before + t + 1, h * K // H].astype(np.float64) for x in (k, v))
            scores = keys @ q[t, h].astype(np.float64) / D**0.5
            p = np.exp(scores - scores.max())
            assert np.abs(got[t, h] - (p / p.sum()) @ values).max() < 1e-5


def test_rope_is_a_rotation_and_relative():
    config = model_config(tiny_checkpoint()[0])
    freqs = Tensor(rope_frequencies(config))
    x = np.random.default_rng(0).standard_normal((2, 1, config.head_dim)).astype(np.float32)
    def turned(*positions): return apply_rope(Tensor(x), rope_table(freqs, Tensor(positions))).numpy()
    assert np.allclose(np.linalg.norm(turned(3, 900), axis=-1), np.linalg.norm(x, axis=-1), atol=1e-5)
    a, b = turned(12, 5), turned(512, 505)
    assert abs((a[0] * a[1]).sum() - (b[0] * b[1]).sum()) < 1e-3
    assert np.allclose(turned(0, 0), x)


@pytest.mark.parametrize('scaling', [{'rope_type': 'yarn', 'factor': 2.0}, {'rope_type': 'linear'},
                                     {'rope_type': 'llama3', 'factor': 8.0}, {'rope_type': 'linear', 'factor': -1}])
def test_bad_rope_scaling_is_refused(scaling):
    config = replace(model_config(tiny_checkpoint()[0]), rope_scaling=scaling)
    with pytest.raises(BadInput, match='scaling|factor'): rope_frequencies(config)


@pytest.mark.parametrize('change, names', [
    ({'model_type': 'gpt2'}, 'gpt2'), ({'model_type': None}, 'None'), ({'hidden_size': None}, 'hidden_size'),
    ({'vocab_size': 'many'}, 'vocab_size'), ({'num_hidden_layers': -1}, 'num_hidden_layers'),
    ({'num_key_value_heads': 3}, '3'), ({'hidden_act': 'gelu'}, 'gelu'), ({'head_dim': 15}, 'head_dim'),
    ({'num_attention_heads': True}, 'num_attention_heads'), ({'rms_norm_eps': 'x'}, 'rms_norm_eps'),
    ({'num_key_value_heads': 0.5}, 'num_key_value_heads'), ({'max_position_embeddings': 0}, 'max_position'),
    ({'rope_scaling': 'linear'}, 'rope'), ({'rope_theta': float('nan')}, 'rope_theta'),
    ({'sliding_window': 'x'}, 'sliding_window')])
def test_bad_config_names_the_key(change, names):
    config, _ = tiny_checkpoint()
    config.pop('rope_parameters', None)
    with pytest.raises(BadInput, match=names): model_config({**config, **change})


def test_every_needed_key_is_named_when_missing():
    config, _ = tiny_checkpoint()
    for key in ('model_type', 'vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers',
                'num_attention_heads'):
        with pytest.raises(BadInput, match=key if key != 'model_type' else 'architecture'):
            model_config({k: v for k, v in config.items() if k != key})
    with pytest.raises(BadInput, match='llama.block_count'):
        model_config({'general.architecture': 'llama', 'llama.attention.head_count': 4,
                      'llama.embedding_length': 64, 'llama.feed_forward_length': 8, 'llama.vocab_size': 9})


def test_weights_that_do_not_fit_are_refused(tmp_path):
    config, state = tiny_checkpoint()
    name = 'model.layers.1.mlp.up_proj.weight'
    save_safetensors(tmp_path / 'missing', config, {k: v for k, v in state.items() if k != name})
    with pytest.raises(BadInput, match=f'{name} is missing'): load_model(tmp_path / 'missing')
    save_safetensors(tmp_path / 'shape', config, {**state, name: Tensor.ones(3, 3)})
    with pytest.raises(BadInput, match=f'{name} has shape'): load_model(tmp_path / 'shape')
    save_safetensors(tmp_path / 'good', config, state)
    with pytest.raises(BadInput, match='float8'): load_model(tmp_path / 'good', dtype='float8')
    check_weights(model_config(config), open_checkpoint(tmp_path / 'good'))
    assert load_model(tmp_path / 'good').config.hidden_size == config['hidden_size']


def test_an_absurd_layer_count_is_refused_at_once(tmp_path):
    config, state = tiny_checkpoint()
    save_safetensors(tmp_path / 'm', {**config, 'num_hidden_layers': 2**30}, state)
    with pytest.raises(BadInput, match='1073741824 layers'): load_model(tmp_path / 'm')


def test_sliding_window_bounds_the_context():
    config, _ = tiny_checkpoint(model_type='mistral')
    assert model_config({**config, 'sliding_window': 32}).max_position_embeddings == 32
    assert model_config({**config, 'sliding_window': 32, 'use_sliding_window': False}) \
        .max_position_embeddings == config['max_position_embeddings']


def test_tensor_shapes_are_what_tiny_checkpoint_makes():
    for overrides in ({}, {'tie_word_embeddings': True}, {'model_type': 'qwen2'}, {'model_type': 'qwen3'}):
        config, state = tiny_checkpoint(**overrides)
        assert tensor_shapes(vars(model_config(config))) == {k: tuple(v.shape) for k, v in state.items()}
