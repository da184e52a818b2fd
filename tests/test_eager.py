"A step of the eager runner reads the weights once, and of the pool what it uses."
import pytest

from tinyvllm.core.blocks import BlockManager
from tinyvllm.models.llama import Llama, model_config, weight_bytes
from tinyvllm.measure import counting
from tinyvllm.kv_cache.paged import PagedKVCache, paged_attend
from tinyvllm.runner.eager import EagerRunner
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.core.scheduler import Scheduler
from tinyvllm.core.sequence import Sequence
from tinyvllm.models.weights import tiny_checkpoint


@pytest.fixture(scope='module')
def model():
    config, state = tiny_checkpoint(seed=0)
    return Llama(model_config(config), state)


def decode_step(model, pool, n, context=20):
    "Counts of a step in which `n` sequences compute one token each."
    scheduler = Scheduler(BlockManager(pool))
    runner = EagerRunner(model, PagedKVCache(model, pool), paged_attend)
    for i in range(n):
        scheduler.add(Sequence(i, [i] * context, SamplingParams(max_tokens=9, seed=0)))
    for _ in range(2):
        batch = scheduler.schedule()
        with counting() as counts:
            tokens = runner(batch)
        scheduler.update_from_output(batch, tokens)
    return counts


def test_a_step_reads_weights_once_and_no_more_of_the_pool_than_it_uses(model):
    one, four = decode_step(model, 64, 1), decode_step(model, 64, 4)
    large = decode_step(model, 4096, 1)          # 65,536 slots: where tinygrad would split the lookup
    assert large.nbytes == one.nbytes and large.kernels == one.kernels <= 24 * len(model.layers)
    assert one.nbytes < 1.35 * weight_bytes(model) and four.nbytes < 1.5 * one.nbytes
