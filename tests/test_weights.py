"Readers, loaders and the tiny model, against the safetensors and gguf libraries."
import json
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest
import safetensors.numpy
from gguf.quants import dequantize, quantize
from tinygrad import dtypes

from tinyvllm.models import weights
from tinyvllm.errors import BadInput
from tinyvllm.models.weights import (ARCHITECTURES, open_checkpoint, save_safetensors,
    tensor_shapes, tiny_checkpoint)
from tinyvllm.models.hub import resolve
from tinyvllm.models.headers import read_gguf, read_safetensors, unpermute

LINUX = sys.platform == 'linux'
QUANTS = ['Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0', 'Q4_K', 'Q5_K', 'Q6_K']
HALVES = {'Q4_0': [0], 'Q4_1': [0, 2], 'Q5_0': [0], 'Q5_1': [0, 2], 'Q8_0': [0],
          'Q4_K': [0, 2], 'Q5_K': [0, 2], 'Q6_K': [208]}  # where a block keeps its fp16 scales


def write_header(path, header, data=b''):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(text)) + text + data)
    return path


def row(dtype='F32', shape=(2,), offsets=(0, 8)):
    return {'dtype': dtype, 'shape': list(shape), 'data_offsets': list(offsets)}


def packed(kind, rows, columns, seed=0):
    "Random values in `kind`'s blocks: quantised where the library can, else random bytes with sane scales."
    rng = np.random.default_rng(seed)
    quant = gguf.GGMLQuantizationType[kind]
    try:
        return quantize(rng.standard_normal((rows, columns)).astype(np.float32), quant)
    except NotImplementedError:
        values, size = gguf.GGML_QUANT_SIZES[quant]
        blocks = rng.integers(0, 256, (rows * columns // values, size), dtype=np.uint8)
        for at in HALVES[kind]:
            scales = rng.uniform(0.01, 0.1, len(blocks)).astype(np.float16)
            blocks[:, at:at+2] = scales.view(np.uint8).reshape(-1, 2)
        return blocks.reshape(rows, -1)


def write_gguf(path, tensors, arch='llama', heads=4, kv_heads=2, **extra):
    "`tensors`: name -> array (float) or (kind, packed bytes)."
    writer = gguf.GGUFWriter(path, arch)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_array('tokenizer.ggml.tokens', ['<s>', 'a', 'Ġb', '€'])
    writer.add_array('tokenizer.ggml.token_type', [3, 1, 1, 1])
    for key, value in extra.items():
        writer.add_uint32(key.replace('__', '.'), value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[1], raw_dtype=gguf.GGMLQuantizationType[value[0]])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def bits(tensor):
    return np.frombuffer(weights.tensor_bytes(tensor), np.uint8)


@pytest.fixture
def tiny(tmp_path):
    config, state = tiny_checkpoint()
    save_safetensors(tmp_path/'tiny', config, state)
    return tmp_path/'tiny', config, state


# --- safetensors

@pytest.mark.parametrize('max_shard_bytes', [10**9, 60_000])
def test_saves_and_loads_back(tmp_path, max_shard_bytes):
    config, state = tiny_checkpoint(3)
    save_safetensors(tmp_path/'m', config, state, max_shard_bytes)
    checkpoint = open_checkpoint(tmp_path/'m')
    loaded = checkpoint.load()
    assert checkpoint.config == config and set(loaded) == set(state)
    assert checkpoint.names == {n: (t.shape, 'F32') for n, t in state.items()}
    for name in state:
        assert np.array_equal(loaded[name].numpy(), state[name].numpy()), name
    files = sorted((tmp_path/'m').glob('*.safetensors'))
    assert (len(files) > 1) == (max_shard_bytes < 10**9)
    if len(files) > 1:  # one tensor may be larger than a shard, two together may not
        for file in files:
            sizes = [e.nbytes for e in read_safetensors(file).values()]
            assert len(sizes) == 1 or sum(sizes) <= max_shard_bytes
    assert [p.name for p in tmp_path.iterdir()] == ['m']


def test_the_safetensors_library_reads_what_we_save(tiny):
    folder, _, state = tiny
    theirs = safetensors.numpy.load_file(folder/'model.safetensors')
    assert set(theirs) == set(state)
    for name in state:
        assert np.array_equal(theirs[name], state[name].numpy()), name


@pytest.mark.parametrize('code', ['F64', 'F32', 'F16', 'I64', 'I32', 'I16', 'I8', 'U8', 'U16', 'U32', 'U64', 'BOOL'])
def test_reads_what_the_safetensors_library_saves(tmp_path, code):
    kind = np.dtype({'F': 'float', 'I': 'int', 'U': 'uint', 'B': 'bool'}[code[0]] + code[1:].replace('OOL', ''))
    array = (np.arange(24) % 7).astype(kind).reshape(2, 3, 4)
    safetensors.numpy.save_file({'x': array, 'scalar': np.array(1, kind)}, tmp_path/'x.safetensors')
    (tmp_path/'config.json').write_text('{}')
    loaded = open_checkpoint(tmp_path/'x.safetensors').load()
    assert np.array_equal(loaded['x'].numpy(), array) and loaded['x'].numpy().dtype == kind
    assert loaded['scalar'].shape == () and loaded['scalar'].numpy() == 1


def test_bfloat16_round_trip_needs_no_bfloat16_compiler(tmp_path):
    rng = np.random.default_rng(0)
    upper = rng.integers(0, 2**16, (8, 12), dtype=np.uint16)
    upper[np.isnan((upper.astype(np.uint32) << 16).view(np.float32))] = 0
    safetensors.numpy.save_file({'w': upper}, tmp_path/'w.safetensors')
    raw = (tmp_path/'w.safetensors').read_bytes().replace(b'"U16"', b'"BF16"')
    size = struct.unpack('<Q', raw[:8])[0] + 1
    (tmp_path/'w.safetensors').write_bytes(struct.pack('<Q', size) + raw[8:])
    (tmp_path/'config.json').write_text('{}')
    checkpoint = open_checkpoint(tmp_path/'w.safetensors')
    exact = (upper.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(checkpoint.load(dtype='float32')['w'].numpy(), exact)
    stored = checkpoint.load()
    assert stored['w'].dtype == dtypes.bfloat16
    save_safetensors(tmp_path/'again', {}, stored)
    assert np.array_equal(bits(open_checkpoint(tmp_path/'again').load()['w']), bits(stored['w']))


def test_dtype_casts_floats_and_leaves_integers(tmp_path):
    safetensors.numpy.save_file({'w': np.full(4, 1/3, np.float32), 'ids': np.arange(4)}, tmp_path/'x.safetensors')
    (tmp_path/'config.json').write_text('{}')
    loaded = open_checkpoint(tmp_path/'x.safetensors').load(dtype='float16')
    assert loaded['w'].dtype == dtypes.float16 and loaded['ids'].dtype == dtypes.int64
    assert np.array_equal(loaded['w'].numpy(), np.full(4, 1/3, np.float16))
    with pytest.raises(BadInput, match='float8'):
        open_checkpoint(tmp_path/'x.safetensors').load(dtype='float8')


@pytest.mark.parametrize('header, data, wrong', [
    (b'not json', b'', 'not valid JSON'),
    (b'[' * 100_000, b'', 'not valid JSON'),
    (b'[]', b'', 'list where an object'),
    (b'{"a":1,"a":2}', b'', "'a' appears twice"),
    ({'a': 3}, b'', 'lacks dtype'),
    ({'a': {'dtype': 'F32', 'shape': [2]}}, b'', 'lacks dtype'),
    ({'a': row(offsets=(0, 8, 9))}, bytes(8), 'lacks dtype'),
    ({'a': row('F8_E4M3', (8,))}, bytes(8), "unknown dtype 'F8_E4M3'"),
    ({'a': row(dtype=['F32'])}, bytes(8), 'unknown dtype'),
    ({'a': row(shape=(-2,))}, bytes(8), 'shape'),
    ({'a': row(shape=(0,), offsets=(0, 0))}, b'', 'shape'),
    ({'a': row(shape=(1,) * 50, offsets=(0, 4))}, bytes(4), 'shape'),
    ({'a': row(shape=(2.0,))}, bytes(8), 'shape'),
    ({'a': row(shape=(True, 2))}, bytes(8), 'shape'),
    ({'a': row(shape=(3,))}, bytes(8), 'owns 8 bytes, its shape needs 12'),
    ({'a': row(shape=(2**62, 2**62))}, bytes(8), 'owns 8 bytes'),
    ({'a': row(offsets=(8, 0))}, bytes(8), 'owns -8 bytes'),
    ({'a': row(offsets=(-8, 0))}, bytes(8), 'whole numbers'),
    ({'a': row(), 'b': row(offsets=(4, 12))}, bytes(12), "'b' overlaps"),
    ({'a': row(), 'b': row(offsets=(16, 24))}, bytes(24), "hole before"),
    ({'a': row(offsets=(8, 16))}, bytes(8), "hole before"),
    ({'a': row()}, bytes(7), 'its header describes'),
    ({'a': row()}, bytes(9), 'its header describes'),
    ({'a': row(offsets=(10**30, 10**30 + 8))}, bytes(8), 'hole'),
], ids=lambda x: x.replace(' ', '-') if isinstance(x, str) else '')
def test_a_bad_safetensors_file_is_named_in_one_line(tmp_path, header, data, wrong):
    path = write_header(tmp_path/'bad.safetensors', header, data)
    with pytest.raises(BadInput, match=wrong) as error:
        read_safetensors(path)
    assert str(path) in str(error.value) and '\n' not in str(error.value) and len(str(error.value)) < 500


def test_a_header_longer_than_the_file_or_the_limit(tmp_path):
    path = tmp_path/'x.safetensors'
    for raw, wrong in ((b'', 'longer'), (b'\x05\0\0', 'longer'), (struct.pack('<Q', 2**63) + b'{}', 'longer')):
        path.write_bytes(raw)
        with pytest.raises(BadInput, match=wrong):
            read_safetensors(path)
    with path.open('wb') as file:  # a sparse file of 200 MB that claims a header of 150 MB
        file.write(struct.pack('<Q', 150_000_000))
        file.truncate(200_000_000)
    with pytest.raises(BadInput, match='claims 150000000'):
        read_safetensors(path)
    with pytest.raises(BadInput, match='No such file'):
        read_safetensors(tmp_path/'none.safetensors')


# --- folders

def test_a_bad_folder_is_named_in_one_line(tiny):
    folder, *_ = tiny

    def refuses(pattern, path=folder):
        with pytest.raises(BadInput, match=pattern) as error:
            open_checkpoint(path)
        assert '\n' not in str(error.value)

    config = (folder/'config.json').read_text()
    for text, wrong in ((config[:-3], 'not valid JSON'), ('[]', 'list'), ('\xff', 'not valid JSON'),
                        ('{"quantization_config": {"quant_method": "gptq"}}', "unknown quantisation 'gptq'")):
        (folder/'config.json').write_text(text, encoding='latin-1')
        refuses(wrong)
    (folder/'config.json').unlink()
    refuses('config.json: No such file')
    (folder/'config.json').write_text(config)
    (folder/'model.safetensors').rename(folder/'part.safetensors')
    assert len(open_checkpoint(folder).names) == 21  # the only weights file there
    (folder/'other.gguf').write_bytes(b'')
    refuses('other.gguf, part.safetensors')
    (folder/'other.gguf').unlink()
    (folder/'part.safetensors').unlink()
    (folder/'pytorch_model.bin').write_bytes(b'')
    refuses('pickles are not read')
    refuses('no model', folder/'config.json')
    refuses('no model', folder/'nothing')


def test_a_bad_index_is_named_in_one_line(tmp_path):
    config, state = tiny_checkpoint()
    save_safetensors(tmp_path/'m', config, state, 60_000)
    path = tmp_path/'m'/'model.safetensors.index.json'
    index = json.loads(path.read_text())

    def refuses(pattern, **changes):
        path.write_text(json.dumps({**index, **changes}))
        with pytest.raises(BadInput, match=pattern):
            open_checkpoint(tmp_path/'m')

    table = index['weight_map']
    first = next(iter(table))
    refuses('no weight_map', weight_map=None)
    refuses('no weight_map', weight_map={'a': 3})
    refuses('no file beside it', weight_map={**table, first: '../secret.safetensors'})
    refuses('no file beside it', weight_map={**table, first: '/etc/passwd'})
    refuses('No such file', weight_map={**table, first: 'model-9.safetensors'})
    refuses("'ghost'", weight_map={**table, 'ghost': table[first]})
    path.write_text(json.dumps(index))
    assert open_checkpoint(tmp_path/'m').names.keys() == state.keys()


def test_saving_over_an_older_model_leaves_no_stale_file(tmp_path):
    config, state = tiny_checkpoint()
    for max_shard_bytes, files in ((10**9, 2), (60_000, 11), (10**9, 2)):
        save_safetensors(tmp_path/'m', config, state, max_shard_bytes)
        assert len(list((tmp_path/'m').iterdir())) == files
        assert open_checkpoint(tmp_path/'m').names.keys() == state.keys()


@pytest.mark.skipif(not LINUX, reason='file size limits as Linux has them')
def test_a_full_disk_leaves_the_old_model(tiny):
    folder, *_ = tiny
    before = (folder/'model.safetensors').read_bytes()
    code = f"""
import resource
from tinyvllm.models.weights import tiny_checkpoint, save_safetensors
config, state = tiny_checkpoint(7)
for t in state.values(): t.realize()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
save_safetensors({str(folder)!r}, config, state)"""
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'cannot be written (File too large)' in out.stderr
    assert (folder/'model.safetensors').read_bytes() == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


# --- GGUF

@pytest.mark.parametrize('kind', QUANTS)
def test_blocks_equal_the_gguf_library(tmp_path, kind):
    "Four tensors of one shape: the third and fourth replay the kernel that was captured for the first."
    raws = {f'blk.{i}.ffn_up.weight': packed(kind, 6, 512, seed=i) for i in range(4)}
    path = write_gguf(tmp_path/'x.gguf', {name: (kind, raw) for name, raw in raws.items()}, arch='qwen2')
    checkpoint = open_checkpoint(path)
    assert checkpoint.names == {f'model.layers.{i}.mlp.up_proj.weight': ((6, 512), kind) for i in range(4)}
    whole, half = checkpoint.load(), checkpoint.load(dtype='float16')
    for i, raw in enumerate(raws.values()):
        name, exact = f'model.layers.{i}.mlp.up_proj.weight', dequantize(raw, gguf.GGMLQuantizationType[kind])
        assert whole[name].dtype == dtypes.float32 and half[name].dtype == dtypes.float16
        np.testing.assert_allclose(whole[name].numpy(), exact, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(half[name].numpy(), exact.astype(np.float16), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize('kind', [np.float64, np.float32, np.float16, np.int8, np.int16, np.int32, np.int64])
def test_plain_gguf_types(tmp_path, kind):
    array = (np.arange(96) % 50).astype(kind).reshape(3, 32)
    checkpoint = open_checkpoint(write_gguf(tmp_path/'x.gguf', {'output.weight': array}))
    loaded = checkpoint.load()['lm_head.weight'].numpy()
    assert loaded.dtype == kind and np.array_equal(loaded, array)


def test_gguf_bfloat16(tmp_path):
    upper = np.arange(0x3f00, 0x3f60, dtype=np.uint16).reshape(3, 32)
    path = write_gguf(tmp_path/'x.gguf', {'output.weight': ('BF16', upper.view(np.uint8))})
    loaded = open_checkpoint(path).load(dtype='float32')['lm_head.weight'].numpy()
    assert np.array_equal(loaded, (upper.astype(np.uint32) << 16).view(np.float32))


def permute(w, heads):
    "What llama.cpp's converter does to q and k (convert_hf_to_gguf.py, LlamaModel.permute)."
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


@pytest.mark.parametrize('arch, swapped', [('llama', True), ('qwen2', False), ('qwen3', False)])
@pytest.mark.parametrize('kind', ['F32', 'Q8_0', 'Q4_K'])
def test_q_and_k_rows_come_back_in_order_for_llama_only(tmp_path, arch, swapped, kind):
    rng = np.random.default_rng(1)
    tensors, exact = {}, {}
    for part, rows, heads in (('q', 64, 4), ('k', 32, 2), ('v', 32, 0)):
        w = rng.standard_normal((rows, 256)).astype(np.float32) if kind == 'F32' else packed(kind, rows, 256, rows)
        stored = permute(w, heads) if swapped and heads else w
        tensors[f'blk.0.attn_{part}.weight'] = stored if kind == 'F32' else (kind, stored)
        name = f'model.layers.0.self_attn.{part}_proj'
        exact[f'{name}.weight'] = w if kind == 'F32' else dequantize(w, gguf.GGMLQuantizationType[kind])
        bias = rng.standard_normal(rows).astype(np.float32)
        tensors[f'blk.0.attn_{part}.bias'] = permute(bias, heads) if swapped and heads else bias
        exact[f'{name}.bias'] = bias
    loaded = open_checkpoint(write_gguf(tmp_path/'x.gguf', tensors, arch)).load()
    assert loaded.keys() == exact.keys()
    for name in exact:
        np.testing.assert_allclose(loaded[name].numpy(), exact[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_unpermute_undoes_the_converter():
    w = np.random.default_rng(0).standard_normal((48, 5))
    assert np.array_equal(unpermute(permute(w, 6), 6), w)
    assert not np.array_equal(permute(w, 6), w)


@pytest.mark.parametrize('model_type', ARCHITECTURES)
def test_every_name_of_a_model_is_translated(model_type):
    "gguf's own table gives GGUF's name for each of ours."
    config, state = tiny_checkpoint(model_type=model_type)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA if model_type in ('llama', 'mistral')
                                     else gguf.MODEL_ARCH[model_type.upper()], config['num_hidden_layers'])
    for name in state:
        assert weights.hf_name(names.get_name(name, try_suffixes=('.weight', '.bias'))) == name
    assert weights.hf_name('rope_freqs.weight') == 'rope_freqs.weight'
    assert weights.hf_name('blk.x.attn_q.weight') == 'blk.x.attn_q.weight'


def test_gguf_metadata_arrives_as_python_values(tmp_path):
    writer = gguf.GGUFWriter(tmp_path/'x.gguf', 'llama')
    values = {'uint8': 200, 'int8': -3, 'uint16': 60000, 'int16': -3, 'uint32': 4 * 10**9, 'int32': -3,
              'uint64': 2**63, 'int64': -2**60, 'float32': 0.5, 'float64': 1e-5, 'bool': True, 'string': 'ßé'}
    for kind, value in values.items():
        getattr(writer, f'add_{kind}')(f'key.{kind}', value)
    writer.add_array('key.list', [1.5, 2.5])
    writer.add_array('key.nested', [[1, 2], [3]])
    writer.add_tensor('output.weight', np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, entries = read_gguf(tmp_path/'x.gguf')
    assert metadata == {'general.architecture': 'llama', 'key.list': [1.5, 2.5], 'key.nested': [[1, 2], [3]],
                        **{f'key.{kind}': value for kind, value in values.items()}}
    assert [e.shape for e in entries.values()] == [(2, 2)]


def raw_gguf(pairs=b'', tensors=b'', data=b'', counts=None, magic=b'GGUF', version=3):
    "A GGUF file by hand; `counts` are (tensors, pairs)."
    n = counts or (int(bool(tensors)), int(bool(pairs)))
    head = magic + struct.pack('<IQQ', version, *n) + pairs + tensors
    return head + bytes(-len(head) % 32) + data


def text(value):
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack('<Q', len(value)) + value


def info(name='w', shape=(32,), kind=0, offset=0):
    return text(name) + struct.pack(f'<I{len(shape)}QIQ', len(shape), *shape, kind, offset)


def number(key, value):
    return text(key) + struct.pack('<II', 4, value)


def array(kind, count, body=b'', key='k'):
    return text(key) + struct.pack('<IIQ', 9, kind, count) + body


ONE = dict(tensors=info(), data=bytes(128))


@pytest.mark.parametrize('raw, wrong', [
    (b'GGUF', 'too short'),
    (raw_gguf(magic=b'GGML', **ONE), 'does not start with GGUF'),
    (raw_gguf(version=1, **ONE), 'version 1'),
    (raw_gguf(version=0x03000000, **ONE), 'version 50331648'),
    (raw_gguf(counts=(2**63, 0)), 'claims 9223372036854775808 tensors'),
    (raw_gguf(counts=(0, 2**40)), 'metadata pairs'),
    (raw_gguf(counts=(1, 0), data=bytes(10)), '0 dimensions'),
    (raw_gguf(pairs=struct.pack('<Q', 2**62) + b'k'), 'beyond its end'),
    (raw_gguf(pairs=text(b'\xff\xfe') + struct.pack('<II', 4, 1)), 'not UTF-8'),
    (raw_gguf(pairs=text('k') + struct.pack('<II', 13, 1)), 'unknown type 13'),
    (raw_gguf(pairs=number('k', 1) + number('k', 2), counts=(0, 2)), "'k' appears twice"),
    (raw_gguf(pairs=array(4, 2**60)), 'claims 1152921504606846976 items'),
    (raw_gguf(pairs=array(8, 60)), 'claims 60 items'),
    (raw_gguf(pairs=array(4, 50, bytes(100))), 'beyond its end'),
    (raw_gguf(pairs=array(8, 2, text('a' * 36))), 'run beyond its end'),
    (raw_gguf(pairs=array(8, 1, text(b'\xff'))), 'not UTF-8'),
    (raw_gguf(pairs=array(9, 1, struct.pack('<IQ', 9, 1) * 2000)), 'unknown type 9'),
    (raw_gguf(pairs=array(7, 1, b'\1') + number('general.alignment', 7), counts=(0, 2)), 'alignment is 7'),
    (raw_gguf(pairs=number('general.alignment', 0)), 'alignment is 0'),
    (raw_gguf(tensors=info(shape=()), data=bytes(128)), '0 dimensions'),
    (raw_gguf(tensors=info(shape=(1,) * 5), data=bytes(128)), '5 dimensions'),
    (raw_gguf(tensors=info(shape=(0, 4)), data=bytes(128)), 'shape'),
    (raw_gguf(tensors=info(kind=20), data=bytes(128)), r'unknown quantisation IQ4_NL \(20\)'),
    (raw_gguf(tensors=info(kind=10), data=bytes(128)), r'unknown quantisation Q2_K \(10\)'),
    (raw_gguf(tensors=info(kind=99), data=bytes(128)), r'unknown quantisation type \(99\)'),
    (raw_gguf(tensors=info(kind=3, shape=(40,)), data=bytes(128)), 'not whole Q4_1 blocks'),
    (raw_gguf(tensors=info(shape=(2**32, 2**32, 2**32, 2**32)), data=bytes(128)), "ends before tensor 'w'"),
    (raw_gguf(tensors=info(shape=(33,)), data=bytes(128)), "ends before tensor 'w'"),
    (raw_gguf(tensors=info(offset=2**63 - 32), data=bytes(128)), "ends before tensor 'w'"),
    (raw_gguf(tensors=info(offset=4), data=bytes(256)), 'not aligned'),
    (raw_gguf(tensors=info() + info(), counts=(2, 0), data=bytes(256)), "'w' appears twice"),
    (raw_gguf(tensors=info() + info('v', offset=64), counts=(2, 0), data=bytes(256)), 'overlaps'),
], ids=lambda x: x.replace(' ', '-') if isinstance(x, str) else '')
def test_a_bad_gguf_file_is_named_in_one_line(tmp_path, raw, wrong):
    (path := tmp_path/'bad.gguf').write_bytes(raw)
    with pytest.raises(BadInput, match=wrong) as error:
        read_gguf(path)
    assert str(path) in str(error.value) and '\n' not in str(error.value) and len(str(error.value)) < 500


def test_a_gguf_file_that_cannot_be_a_whole_llama(tmp_path):
    q = {'blk.0.attn_q.weight': np.ones((12, 32), np.float32)}
    with pytest.raises(BadInput, match='12 rows for 5 heads'):
        open_checkpoint(write_gguf(tmp_path/'a.gguf', q, heads=5))
    assert open_checkpoint(write_gguf(tmp_path/'b.gguf', q, heads=3)).format == 'gguf'
    with pytest.raises(BadInput, match='one part of several'):
        open_checkpoint(write_gguf(tmp_path/'c.gguf', q, heads=3, split__count=2))
    twice = {'token_embd.weight': q['blk.0.attn_q.weight'], 'model.embed_tokens.weight': q['blk.0.attn_q.weight']}
    with pytest.raises(BadInput, match='appears twice'):
        open_checkpoint(write_gguf(tmp_path/'d.gguf', twice))


def test_gguf_version_2_and_trailing_bytes_are_fine(tmp_path):
    (path := tmp_path/'x.gguf').write_bytes(raw_gguf(version=2, **ONE) + b'more')
    assert open_checkpoint(path).load()['w'].shape == (32,)


def test_alignment_of_the_file_is_used(tmp_path):
    head = b'GGUF' + struct.pack('<IQQ', 3, 1, 1) + number('general.alignment', 256) + info()
    (path := tmp_path/'x.gguf').write_bytes(head + bytes(-len(head) % 256) + np.arange(32, dtype='<f4').tobytes())
    assert open_checkpoint(path).load()['w'].tolist() == list(range(32))


# --- loading

def test_files_are_only_read(tiny):
    folder, *_ = tiny
    path = folder/'model.safetensors'
    before, times = path.read_bytes(), path.stat().st_mtime_ns
    path.chmod(0o444)
    loaded = open_checkpoint(folder).load()
    (loaded['model.norm.weight'] + 1).realize()
    loaded['model.norm.weight'].assign(loaded['model.norm.weight'] * 0).realize()
    assert path.read_bytes() == before and path.stat().st_mtime_ns == times


def test_the_file_may_go_once_it_is_loaded(tiny):
    folder, _, state = tiny
    loaded = open_checkpoint(folder).load()
    (folder/'model.safetensors').unlink()
    assert all(np.array_equal(loaded[n].numpy(), state[n].numpy()) for n in state)


def test_a_file_that_vanishes_before_loading(tiny):
    folder, *_ = tiny
    checkpoint = open_checkpoint(folder)
    (folder/'model.safetensors').unlink()
    with pytest.raises(BadInput, match='No such file'):
        checkpoint.load()


@pytest.mark.skipif(not LINUX, reason='reads VmHWM')
def test_no_second_copy(tmp_path):
    "256 MB in 16 tensors: the peak is the model and one tensor, not two models."
    state = {f'w{i}': np.full((4096, 1024), i, np.float32) for i in range(16)}
    safetensors.numpy.save_file(state, tmp_path/'x.safetensors')
    (tmp_path/'config.json').write_text('{}')
    code = f"""
from tinyvllm.models.weights import open_checkpoint
def peak(): return int([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1]) * 1024
from tinygrad import Tensor; Tensor([1.0]).realize(); before = peak()
loaded = open_checkpoint({str(tmp_path/'x.safetensors')!r}).load()
print(peak() - before, loaded['w3'].max().item())"""
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    grown, value = out.stdout.split()
    assert float(value) == 3 and int(grown) < (256 + 2*16) * 2**20


# --- the tiny model

PINNED = [0.1106333, -0.1597381, 0.0420243]


def test_the_tiny_model_is_the_same_everywhere():
    "Pinned: other tests' goldens, and readers' outputs, depend on these numbers."
    _, state = tiny_checkpoint(0)
    assert [round(float(x), 7) for x in state['model.embed_tokens.weight'].numpy()[0, :3]] == PINNED
    _, other = tiny_checkpoint(1)
    assert not np.array_equal(state['lm_head.weight'].numpy(), other['lm_head.weight'].numpy())
    _, qwen = tiny_checkpoint(0, model_type='qwen3')  # what two families share is equal
    assert all(np.array_equal(state[n].numpy(), qwen[n].numpy()) for n in state)


def test_the_tiny_model_knows_the_families():
    def names(**overrides):
        return set(tiny_checkpoint(**overrides)[1])
    base = names()
    assert names(model_type='mistral') == base
    assert {n for n in names(model_type='qwen2') - base} == {
        f'model.layers.{i}.self_attn.{p}_proj.bias' for i in (0, 1) for p in 'qkv'}
    assert {n for n in names(model_type='qwen3') - base} == {
        f'model.layers.{i}.self_attn.{p}_norm.weight' for i in (0, 1) for p in 'qk'}
    assert names(attention_bias=True) - base == {
        f'model.layers.{i}.self_attn.{p}_proj.bias' for i in (0, 1) for p in 'qkvo'}
    assert base - names(tie_word_embeddings=True) == {'lm_head.weight'}
    config, state = tiny_checkpoint(hidden_size=96, num_hidden_layers=1, rope_scaling={'type': 'linear', 'factor': 2})
    assert config['rope_scaling']['factor'] == 2 and config['architectures'] == ['LlamaForCausalLM']
    assert {n: t.shape for n, t in state.items()} == tensor_shapes(config)
    with pytest.raises(BadInput, match='gemma.*known are llama'):
        tiny_checkpoint(model_type='gemma')


# --- the real model

@pytest.mark.slow
def test_the_real_model_equals_the_gguf_library():
    reader = gguf.GGUFReader(resolve('smollm2'))
    loaded = open_checkpoint(resolve('smollm2')).load(dtype='float32')
    assert len(loaded) == len(reader.tensors) == 272
    for tensor in reader.tensors:
        exact = dequantize(tensor.data, tensor.tensor_type)
        if 'attn_q.' in tensor.name or 'attn_k.' in tensor.name:
            exact = unpermute(exact, 9 if 'attn_q' in tensor.name else 3)
        np.testing.assert_allclose(loaded[weights.hf_name(tensor.name)].numpy(), exact, rtol=1e-6, atol=1e-6)
