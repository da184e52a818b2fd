"Sizes and parts that an engine is refused."
import pytest

from support.engines import model  # noqa: F401
from tinyvllm.engine.llm import LLM
from tinyvllm.errors import BadInput
from tinyvllm.reference.kvcache import KVCache
from tinyvllm.models.llama import dense_attend


@pytest.mark.parametrize('sizes, names', [
    (dict(num_blocks=0), 'num_blocks is 0'), (dict(num_blocks=1), 'num_blocks is 1'), (dict(block_size=0), 'block_size'),
    (dict(max_num_seqs=0), 'max_num_seqs'), (dict(max_num_batched_tokens=0), 'max_num_batched_tokens'),
    (dict(max_model_len=4096), "context is 1024"), (dict(gpu_memory_utilization=1.5), 'gpu_memory_utilization'),
    (dict(gpu_memory_utilization=0), 'gpu_memory_utilization'), (dict(num_blocks=10**9), 'GB free')])
def test_sizes_that_cannot_be(model, sizes, names):
    with pytest.raises(BadInput, match=names):
        LLM(model, **sizes)


def test_a_cache_without_blocks_wants_a_scheduler(model):
    with pytest.raises(BadInput, match='KVCache'):
        LLM(model, cache=KVCache(model, 16), attend=dense_attend)


def test_an_engine_is_taken_as_it_is(model):
    engine = LLM(model, num_blocks=16).engine
    assert LLM(engine).engine is engine
    with pytest.raises(BadInput, match='engine is complete'):
        LLM(engine, num_blocks=32)
