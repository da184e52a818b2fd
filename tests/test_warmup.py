"After a warm-up nothing is compiled or captured any more."
import pytest

from support.engines import model  # noqa: F401
from tinyvllm.engine.llm import LLM
from tinyvllm.engine.defaults import make_engine
from tinyvllm.engine.warmup import warm_up
from tinyvllm.kv_cache.paged import PagedKVCache, paged_attend
from tinyvllm.runner.eager import EagerRunner
from tinyvllm.sampling.params import SamplingParams


@pytest.mark.parametrize('sizes', [dict(num_blocks=40, max_num_seqs=4, max_num_batched_tokens=32),
                                   dict(num_blocks=40, max_num_seqs=4, max_num_batched_tokens=32, num_scheduler_steps=4),
                                   dict(num_blocks=3, max_num_seqs=64, max_num_batched_tokens=512)])
def test_after_a_warm_up_nothing_is_captured(model, sizes, capsys):
    engine = LLM(model, **sizes).engine
    known = warm_up(engine)
    assert known == len(engine.runner.graphs) > 0 and 'warm-up' in capsys.readouterr().err
    graphs, params = dict(engine.runner.graphs), SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for n in range(min(3, sizes['num_blocks'] - 1)):
        engine.add_request(n, [5], params)
    while engine.has_unfinished_requests():
        engine.step()
    engine.add_request('long', list(range(20)), params)
    while engine.has_unfinished_requests():
        engine.step()
    assert engine.runner.graphs == graphs    # the same objects
    assert engine.scheduler.blocks.num_free == sizes['num_blocks'] - 1
    assert engine.requests == {} and not engine.scheduler.sequences


def test_a_warm_up_without_graphs_is_silent(model, capsys):
    cache = PagedKVCache(model, 20)
    runner = EagerRunner(model, cache, paged_attend)
    engine = make_engine(model, cache=cache, runner=runner, max_num_seqs=2, max_num_batched_tokens=16)
    assert warm_up(engine, use_tqdm=False) == 0 and capsys.readouterr().err == ''
