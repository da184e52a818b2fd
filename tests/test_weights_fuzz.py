"Damaged files: whatever bytes arrive, the readers answer or complain in one line, in little memory and time."
import json
import struct
import tracemalloc
from datetime import timedelta

import gguf
import numpy as np
import pytest
import safetensors.numpy
from gguf.quants import quantize
from hypothesis import HealthCheck, given, settings, strategies as st

from tinyvllm.errors import BadInput
from tinyvllm.models.weights import open_checkpoint
from tinyvllm.models.headers import read_gguf, read_safetensors

FUZZ = settings(max_examples=400, deadline=timedelta(seconds=5), derandomize=True, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
SIZES = [0, 1, 2, 3, 4, 7, 8, 9, 31, 32, 33, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]


def safetensors_file():
    w = np.arange(16, dtype=np.float32)
    return safetensors.numpy.save({'b': w.reshape(4, 4), 'a': w.astype(np.float16), 'ids': np.arange(3)},
                                  {'format': 'pt'})


def gguf_file(folder):
    writer = gguf.GGUFWriter(folder/'seed.gguf', 'llama')
    writer.add_head_count(2)
    writer.add_bool('flag', True)
    writer.add_array('tokenizer.ggml.tokens', ['<s>', 'a', 'Ġb', '€'])
    writer.add_array('tokenizer.ggml.scores', [0.0, -1.0, -2.0, -3.0])
    writer.add_array('nested', [[1, 2], [3]])
    w = np.arange(256, dtype=np.float32).reshape(8, 32)
    writer.add_tensor('output_norm.weight', w[0])
    writer.add_tensor('blk.0.attn_q.weight', w)
    kind = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor('token_embd.weight', quantize(w, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (folder/'seed.gguf').read_bytes()


@st.composite
def damage(draw, raw):
    "One to four edits: flipped bytes, length fields, cuts, holes, doubled stretches."
    data = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(['flip', 'byte', 'u32', 'u64', 'cut', 'drop', 'double']))
        if kind == 'flip' and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 'byte' and data:
            data[at] = draw(st.integers(0, 255))
        elif kind in ('u32', 'u64'):
            width = 4 if kind == 'u32' else 8
            data[at:at+width] = (draw(st.sampled_from(SIZES)) % 2**(8*width)).to_bytes(width, 'little')
        elif kind == 'cut':
            del data[at:]
        elif kind == 'drop':
            del data[at:at + draw(st.integers(1, 64))]
        elif kind == 'double':
            data[at:at] = data[at:at + draw(st.integers(1, 64))]
    return bytes(data)


def survives(path, raw, read):
    "True if the file was read; complaints must be `BadInput`, one line, with the name of the file."
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        read(path)
        return True
    except BadInput as error:
        assert str(path) in str(error) and '\n' not in str(error) and len(str(error)) < 500
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20 + 40 * len(raw), f'{peak} bytes for a file of {len(raw)}'


def load_also(path):
    "Read, then load: what passes the header's checks must load too."
    (path.parent/'config.json').write_text('{}')
    for name, tensor in open_checkpoint(path).load(device='CPU').items():
        assert tensor.shape, name


SAFETENSORS = safetensors_file()


@FUZZ
@given(raw=damage(SAFETENSORS))
def test_damaged_safetensors(tmp_path, raw):
    if survives(tmp_path/'x.safetensors', raw, read_safetensors):
        load_also(tmp_path/'x.safetensors')


@pytest.fixture(scope='module')
def gguf_bytes(tmp_path_factory):
    return gguf_file(tmp_path_factory.mktemp('seed'))


@FUZZ
@given(data=st.data())
def test_damaged_gguf(tmp_path, gguf_bytes, data):
    if survives(tmp_path/'x.gguf', data.draw(damage(gguf_bytes)), read_gguf):
        try:
            load_also(tmp_path/'x.gguf')
        except BadInput as error:  # whole, but not a llama: rows that do not fill its heads
            assert str(tmp_path/'x.gguf') in str(error)


@FUZZ
@given(raw=st.binary(max_size=200), magic=st.sampled_from([b'', b'GGUF\3\0\0\0', struct.pack('<Q', 150)]))
def test_random_bytes(tmp_path, raw, magic):
    survives(tmp_path/'x.gguf', magic + raw, read_gguf)
    survives(tmp_path/'x.safetensors', magic + raw, read_safetensors)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(['F32', 'BF16', 'x']),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
                        st.sampled_from(['dtype', 'shape', 'data_offsets', 'a', '__metadata__', 'weight_map']), inner),
                    max_leaves=12)


@FUZZ
@given(header=JSON, entry=JSON)
def test_well_formed_json_of_any_shape(tmp_path, header, entry):
    for value in (header, {'w': entry}, {'w': {'dtype': 'F32', 'shape': header, 'data_offsets': entry}}):
        text = json.dumps(value).encode()
        survives(tmp_path/'x.safetensors', struct.pack('<Q', len(text)) + text + bytes(8), read_safetensors)
    (tmp_path/'config.json').write_text('{}')
    (tmp_path/'x.safetensors').unlink()
    survives(tmp_path/'model.safetensors.index.json', json.dumps(header).encode(), lambda path: open_checkpoint(tmp_path))


@pytest.mark.parametrize('kind', ['safetensors', 'gguf'])
def test_every_truncation(tmp_path, gguf_bytes, kind):
    "No prefix of a file is a file."
    raw, read = (SAFETENSORS, read_safetensors) if kind == 'safetensors' else (gguf_bytes, read_gguf)
    data = max(e.start + e.nbytes for e in _entries(read, tmp_path/f'whole.{kind}', raw))
    assert data <= len(raw)
    for n in range(data):
        assert not survives(tmp_path/f'x.{kind}', raw[:n], read), n


def _entries(read, path, raw):
    path.write_bytes(raw)
    found = read(path)
    return (found[1] if isinstance(found, tuple) else found).values()


def test_a_large_sparse_file_costs_nothing(tmp_path):
    "Counts and lengths that a 1 TB file could hold, were it not empty."
    for head, read in ((b'GGUF' + struct.pack('<IQQ', 3, 2**30, 2**30), read_gguf),
                       (b'GGUF' + struct.pack('<IQQQ', 3, 1, 1, 2**39), read_gguf),
                       (b'GGUF' + struct.pack('<IQQQcIIQ', 3, 0, 1, 1, b'k', 9, 4, 2**37), read_gguf),
                       (b'GGUF' + struct.pack('<IQQQcIIQ', 3, 0, 1, 1, b'k', 9, 8, 2**36), read_gguf),
                       (struct.pack('<Q', 2**39), read_safetensors)):
        path = tmp_path/'x.bin'
        with path.open('wb') as file:
            file.write(head)
            file.truncate(2**40)
        tracemalloc.start()
        with pytest.raises(BadInput):
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10_000_000
        path.unlink()
