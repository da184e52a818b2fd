"""What the tests of constraints share: two engines that must sample the same tokens, a plugin, ways to read answers."""
import pytest
from hypothesis import HealthCheck, settings, strategies as st
from tinygrad import Tensor

from tinyvllm.core.blocks import BlockManager
from tinyvllm.core.scheduler import Scheduler
from tinyvllm.engine.defaults import best_attend, best_cache, make_engine
from tinyvllm.errors import BadInput
from tinyvllm.models.fused import fused
from tinyvllm.models.llama import Llama, model_config
from tinyvllm.models.tokenizer_files import load_tokenizer
from tinyvllm.models.weights import tiny_checkpoint
from tinyvllm.runner.eager import EagerRunner
from tinyvllm.sampling.logits_processors import PLUGINS, LogitsProcessorPlugin

cases = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope='module')
def tokenizer(folder):
    tokenizer = load_tokenizer(folder)    # 257 tokens, ends are 256 and 2
    tokenizer.check_vocab(512)
    return tokenizer


@pytest.fixture(scope='module')
def model():
    config, state = tiny_checkpoint(seed=3, num_hidden_layers=1)
    return Llama(model_config(config), state)


@pytest.fixture(scope='module')
def engines(model, tokenizer):
    "One that samples on the host in numpy, and one that samples in its graph."
    cache = best_cache(model, 200)
    eager = make_engine(model, tokenizer, cache=cache, scheduler=Scheduler(BlockManager(200, 16), 4, 32),
                        runner=EagerRunner(model, cache, best_attend(model)))
    return eager, make_engine(fused(model), tokenizer, num_blocks=200, max_num_seqs=4, max_num_batched_tokens=32)


@pytest.fixture
def plugins():
    "The registry of plugins, empty before the test and restored after it."
    kept = dict(PLUGINS)
    PLUGINS.clear()
    yield PLUGINS
    PLUGINS.clear()
    PLUGINS.update(kept)


def answers(engine, params, prompts=None):
    "Run requests to their ends; no block is left in use."
    assert not engine.requests
    outs = [engine.add_request(i, prompts[i] if prompts else [7, 8, 9 + i], p) for i, p in enumerate(params)]
    while engine.has_unfinished_requests():
        engine.step()
    pool = engine.scheduler.blocks.pool
    assert len(pool.free) == len(pool.blocks) - 1
    return outs


def tokens(outs):
    "The token ids of all answers of each request."
    return [[c.token_ids for c in out.outputs] for out in outs]


class Favour(LogitsProcessorPlugin):
    "Adds to the logit of one token, more with each token of the output."
    name = 'favour'

    def check_args(self, args):
        if not isinstance(args.get('token'), int):
            raise BadInput('favour takes a token')

    def compute_row(self, args, prompt, output):
        return [args['token'], 0.1 * len(output) + 0.01 * len(prompt)]

    def apply(self, logits, rows):
        ids = Tensor.arange(logits.shape[1]).to(logits.device)
        return logits + (ids == rows[:, :1]).where(rows[:, 1:], 0)
