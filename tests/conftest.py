"What all tests share: `--slow`, and an environment that is the same for every worker."
import json
import os

import pytest

os.environ.setdefault('PYTHONHASHSEED', '0')
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import tinyvllm  # noqa: E402,F401  picks device and compiler before any test imports tinygrad
from hypothesis import HealthCheck, settings  # noqa: E402

# A busy machine is not a failure: no test measures hypothesis' seconds unless it says so itself.
settings.register_profile('any machine', deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('any machine')


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run the tests marked slow too')


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes minutes; skipped unless --slow')


def pytest_collection_modifyitems(config, items):
    if not config.getoption('--slow'):
        for item in items:
            if item.get_closest_marker('slow'):
                item.add_marker(pytest.mark.skip(reason='slow: run with --slow'))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A tiny model in Hugging Face layout, with a tokenizer that has a chat template."
    from tinyvllm.models.weights import save_safetensors, tiny_checkpoint
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    folder = tmp_path_factory.mktemp('tiny')
    save_safetensors(folder, *tiny_checkpoint(seed=0))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.add_special_tokens(['<eos>'])
    tok.save(str(folder / 'tokenizer.json'))
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    (folder / 'tokenizer_config.json').write_text(json.dumps(
        {'eos_token': '<eos>', 'chat_template': template}))
    return folder
