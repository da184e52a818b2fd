"SmolLM2 against Hugging Face transformers: `golden/smollm2.json` says what it must answer."
import json
from pathlib import Path

import numpy as np
import pytest

from tinyvllm.reference.generate import Generation, bucket, generate, same_greedy
from tinyvllm.reference.kvcache import KVCache
from tinyvllm.models.llama import InputBatch, NoCache, dense_attend, load_model, weight_bytes
from tinyvllm.models.tokenizer_files import load_tokenizer
from tinyvllm.models.hub import resolve

GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'smollm2.json').read_text())['items']
NAMES = [g['name'] for g in GOLDEN]


@pytest.fixture(scope='module')
def smollm():
    return load_model(resolve('smollm2'), dtype='float32')


@pytest.fixture(scope='module')
def tokenizer():
    return load_tokenizer(resolve('smollm2'))


@pytest.mark.parametrize('golden', GOLDEN, ids=NAMES)
def test_prompt_ids(tokenizer, golden):
    assert tokenizer.encode(golden['prompt']) == golden['prompt_ids']


@pytest.mark.parametrize('golden', GOLDEN, ids=NAMES)
def test_64_greedy_tokens_and_top5_in_one_pass(smollm, golden):
    "By induction: if each golden token is the argmax after those before it, the greedy loop says them all."
    ids, n = golden['prompt_ids'] + golden['greedy_ids'], len(golden['prompt_ids'])
    batch = InputBatch.of(ids[:-1], size=bucket(len(ids) - 1), rows=list(range(n - 1, len(ids) - 1)))
    logp = smollm(batch, NoCache(), dense_attend).log_softmax(-1).numpy()
    assert logp.argmax(-1).tolist() == golden['greedy_ids']
    for row, top in zip(logp, golden['top5_first8']):
        assert np.argsort(-row)[:5].tolist() == [i for i, _ in top]
        assert max(abs(row[i] - want) for i, want in top) < 1e-3
    margin = np.sort(logp, -1)
    assert np.abs(margin[:, -1] - margin[:, -2] - golden['top1_top2_margin']).max() < 2e-3


@pytest.mark.parametrize('golden', GOLDEN[4:5], ids=NAMES[4:5])
def test_cached_loop_says_the_same(smollm, tokenizer, golden):
    run = Generation(smollm, tokenizer, golden['prompt_ids'], 12, cache=KVCache(smollm, 64))
    text = ''.join(run)
    assert run.token_ids == golden['greedy_ids'][:12] and run.finish_reason == 'length'
    assert text == tokenizer.decode(golden['greedy_ids'][:12], skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize('golden', GOLDEN, ids=NAMES)
def test_cached_loop_says_the_same_for_every_prompt(smollm, golden):
    cache = KVCache(smollm, len(golden['prompt_ids']) + 64)
    assert list(generate(smollm, golden['prompt_ids'], 64, cache=cache)) == golden['greedy_ids']


def test_weights_are_held_once(smollm):
    frequencies = 32 * 4   # RoPE's, the only array that is not in the file
    assert weight_bytes(smollm) == 134_515_008 * 4 + frequencies
    assert same_greedy(smollm, GOLDEN[0]['prompt_ids'], GOLDEN[0]['greedy_ids'][:3])
