"Models of AWQ and GPTQ, packed here by the published rules, one weight at a time: the same codes, scales and zeros."
import json

import numpy as np
import pytest
from tinygrad import Tensor

from tinyvllm.errors import BadInput
from tinyvllm.models.weights import save_safetensors, tiny_checkpoint
from tinyvllm.quant.load import load_packed, open_packed


def relative(got, want):
    return np.sqrt(((got - want) ** 2).mean() / (want ** 2).mean())


def pack_awq(codes):    # (A, N) -> (A, N/8): nibble i of a word holds column ORDER[i]
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def pack_plain(codes):  # (A, N) -> (A, N/8): nibble i of a word holds column i
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for i in range(8):
        words |= codes[:, i::8].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def quantized_model(folder, method, group=32, order=None, version='gptq', zeros=None, drop='', **settings):
    config, state = tiny_checkpoint(seed=0)
    rng, want, files = np.random.default_rng(3), {}, {}
    for name, t in state.items():
        if 'proj' not in name:
            files[name] = want[name] = t
            continue
        N, K = t.shape
        G = K if group < 0 else group
        q, z = rng.integers(0, 16, (K, N)), rng.integers(1, 16, (K // G, N)) if zeros is None else np.full((K // G, N), zeros)
        s = rng.uniform(0.005, 0.02, (K // G, N)).astype(np.float16)
        want[name] = ((q - z.repeat(G, 0)) * s.repeat(G, 0).astype(np.float32)).T
        stem = name[:-7]
        if method == 'awq':
            files |= {f'{stem}.qweight': pack_awq(q), f'{stem}.qzeros': pack_awq(z)}
        else:
            stored = z - (version == 'gptq')
            files |= {f'{stem}.qweight': pack_plain(q.T).T.copy(), f'{stem}.qzeros': pack_plain(stored)}
            files[f'{stem}.g_idx'] = np.arange(K, dtype=np.int32) // G if order is None else order(K, G)
        files[f'{stem}.scales'] = s
    files = {n: t if isinstance(t, Tensor) else Tensor(t) for n, t in files.items() if not drop or drop not in n}
    settings = {'quant_method': method, 'bits': 4, 'group_size': group, **settings}
    if method == 'gptq':
        settings['checkpoint_format'] = version
    save_safetensors(folder, {**config, 'quantization_config': settings}, files)
    return want


@pytest.mark.parametrize('method,extra', [
    ('awq', {}), ('awq', {'group': 64}), ('awq', {'group': -1}), ('awq', {'version': 'GEMM'}), ('gptq', {}), ('gptq', {'group': -1}),
    ('gptq', {'version': 'gptq_v2'}), ('gptq', {'zeros': 8, 'sym': True})])
def test_codes_stay_as_they_were(tmp_path, method, extra):
    if method == 'awq' and 'version' in extra:
        extra = {}
    want = quantized_model(tmp_path / 'm', method, **extra)
    config, state = load_packed(tmp_path / 'm')
    assert set(state) == set(want)
    for name, w in want.items():
        got = state[name] if isinstance(state[name], Tensor) else state[name].dequantize()
        assert (got.numpy() == (w.numpy() if isinstance(w, Tensor) else w)).all(), name
    packed = state['model.layers.0.mlp.down_proj.weight']
    assert packed.format.scales == 'zero' and packed.nbytes() < packed.shape[0] * packed.shape[1] * 0.62


def test_a_file_of_any_name(tmp_path):
    quantized_model(tmp_path / 'm', 'gptq')
    before = open_packed(tmp_path / 'm')
    file = (tmp_path / 'm' / 'model.safetensors').rename(tmp_path / 'm' / 'gptq_model-4bit-32g.safetensors')
    for path in (tmp_path / 'm', file):
        found = open_packed(path)
        assert found.path == file and found.config == before.config and found.names == before.names


def test_gptq_writers_that_forgot_to_subtract(tmp_path):
    want = quantized_model(tmp_path / 'm', 'gptq', version='gptq_v2', zeros=8, sym=True)
    config = json.loads((tmp_path / 'm' / 'config.json').read_text())
    config['quantization_config']['checkpoint_format'] = 'gptq'     # says so, and holds 8 where 7 belongs
    (tmp_path / 'm' / 'config.json').write_text(json.dumps(config))
    name = 'model.layers.0.mlp.up_proj.weight'
    assert (load_packed(tmp_path / 'm')[1][name].dequantize().numpy() == want[name]).all()


def test_a_packed_model_is_rounded_again(tmp_path):
    want = quantized_model(tmp_path / 'm', 'awq')
    name = 'model.layers.0.mlp.up_proj.weight'
    packed = load_packed(tmp_path / 'm', 'int8-g32')[1][name]
    assert packed.format.name == 'int8-g32' and relative(packed.dequantize().numpy(), want[name]) < 0.01


@pytest.mark.parametrize('method,extra,message', [
    ('gptq', {'order': lambda K, G: (np.arange(K, dtype=np.int32) // G)[::-1].copy()}, r'permuted \(desc_act\).*desc_act=false'),
    ('gptq', {'bits': 8}, "unknown quantisation 'gptq' of 8 bits"), ('awq', {'bits': 3}, "unknown quantisation 'awq' of 3 bits"),
    ('awq', {'drop': 'mlp.up_proj.scales'}, 'up_proj.scales is missing'), ('awq', {'drop': 'mlp.up_proj.qweight'}, 'missing'),
    ('gptq', {'group_size': 24}, 'no multiple of 32'), ('gptq', {'group_size': 64}, 'does not fit'),
    ('awq', {'version_': 'gemv'}, "version 'gemv' is unknown"), ('hqq', {}, "unknown quantisation 'hqq'")])
def test_what_is_unknown_is_refused(tmp_path, method, extra, message):
    if 'version_' in extra:
        extra = {}
        quantized_model(tmp_path / 'm', method)
        config = json.loads((tmp_path / 'm' / 'config.json').read_text())
        config['quantization_config']['version'] = 'gemv'
        (tmp_path / 'm' / 'config.json').write_text(json.dumps(config))
    else:
        quantized_model(tmp_path / 'm', method, **extra)
    with pytest.raises(BadInput, match=message):
        load_packed(tmp_path / 'm')
