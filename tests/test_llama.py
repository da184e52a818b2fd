"The model against Hugging Face transformers, and against itself."
import json
from dataclasses import replace
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from support.families import FAMILIES, IDS, weight
from tinygrad import Tensor
from tinyvllm.errors import BadInput
from tinyvllm.models.llama import (InputBatch, Llama, NoCache, apply_rope, check_weights, dense_attend,
                            load_model, model_config, rope_frequencies, rope_table)
from tinyvllm.models.weights import open_checkpoint, save_safetensors, tensor_shapes, tiny_checkpoint

GOLDEN = Path(__file__).parent / 'golden'
MODELS = json.loads((GOLDEN / 'families.json').read_text())


def logits_of(folder):
    "The model's logits of IDS, in float32."
    model = load_model(folder, dtype='float32')
    return model(InputBatch.of(IDS, rows=list(range(len(IDS)))), NoCache(), dense_attend).numpy()


@pytest.mark.parametrize('name', FAMILIES)
def test_logits_equal_transformers(name, tmp_path):
    "As golden/make_families.py wrote them down."
    state = {tensor: Tensor(weight(tensor, shape)) for tensor, shape in MODELS[name]['shapes'].items()}
    save_safetensors(tmp_path / name, MODELS[name]['config'], state)
    got, want = logits_of(tmp_path / name), np.load(GOLDEN / 'families.npz')[name]
    assert np.abs(got - want).max() < 1e-4
    assert (got.argmax(-1) == want.argmax(-1)).all()


@pytest.mark.parametrize('name', FAMILIES)
def test_logits_equal_transformers_run_here(name, tmp_path):
    "With the files that transformers itself saves; and what was written down is still its answer."
    pytest.importorskip('torch')
    pytest.importorskip('transformers')
    config, shapes, want = run_path(str(GOLDEN / 'make_families.py'))['run_family'](name, tmp_path)
    got = logits_of(tmp_path)
    assert np.abs(got - want).max() < 1e-4
    assert (got.argmax(-1) == want.argmax(-1)).all()
    assert {**config, 'transformers_version': ''} == {**MODELS[name]['config'], 'transformers_version': ''}
    assert shapes == MODELS[name]['shapes'] and np.abs(np.load(GOLDEN / 'families.npz')[name] - want).max() < 1e-5


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
