"Tiny models, a tokenizer of letters, and greedy decoding as the oracle, for tests of the engine."
import time
from collections.abc import Callable

import pytest

from tinyvllm.reference.generate import bucket
from tinyvllm.models.llama import InputBatch, Llama, NoCache, dense_attend, model_config
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.models.weights import tiny_checkpoint


def tiny(layers):
    config, state = tiny_checkpoint(seed=0, max_position_embeddings=1024, num_hidden_layers=layers)
    return Llama(model_config(config), state)


@pytest.fixture(scope='module')
def deep():
    return tiny(2)


@pytest.fixture(scope='module')
def model():
    "One layer: half the kernels, and these tests are about requests."
    return tiny(1)


class Alphabet:
    "A tokenizer whose token n is the n-th letter of the alphabet."
    eos_ids = ()
    def encode(self, text): return [ord(c) - 97 for c in text]
    def decode(self, ids): return ''.join(chr(97 + i % 26) for i in ids)
    def stream(self, **options): return self
    def add(self, id): return chr(97 + id % 26)
    def finish(self): return ''


def greedy(length, **more):
    return SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, **more)


def is_greedy(model, prompt, tokens):
    "By induction: each token is the argmax after those before it. All rows: few shapes."
    ids, n = prompt + tokens, len(prompt)
    if not tokens:
        return True
    size = bucket(len(ids) - 1)
    logits = model(InputBatch.of(ids[:-1], size=size, rows=list(range(size))), NoCache(), dense_attend).numpy()
    return logits[n - 1:len(ids) - 1].argmax(-1).tolist() == tokens


def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    "Wait until a condition holds that another thread brings about; fails after `seconds`."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.005)


def all_free(llm):
    pool = llm.engine.scheduler.blocks.pool
    return len(pool.free) == len(pool.blocks) - 1


def requests(rng, n, longest_prompt, longest_answer):
    prompts = [rng.integers(0, 512, rng.integers(1, longest_prompt + 1)).tolist() for _ in range(n)]
    return prompts, [int(k) for k in rng.integers(1, longest_answer + 1, n)]
