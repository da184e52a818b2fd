"Sizes and parts that an engine is refused, and parts that a device refuses."
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from support.engines import greedy, model  # noqa: F401
from tinyvllm import metalsim
from tinyvllm.engine.args import count_token_ops
from tinyvllm.engine.llm import LLM
from tinyvllm.errors import BadInput
from tinyvllm.kernels.metal import find_refusal
from tinyvllm.kv_cache.paged import PagedKVCache, paged_attend
from tinyvllm.metalsim import capturing
from tinyvllm.metalsim.source import signatures
from tinyvllm.models.fused import fused, state_of
from tinyvllm.models.llama import Llama, dense_attend
from tinyvllm.quant.pack import warn_once
from tinyvllm.reference.kvcache import KVCache
from tinyvllm.runner.eager import EagerRunner

ROOT = Path(__file__).resolve().parents[1]

simulated = pytest.mark.skipif(sys.platform != 'linux', reason='a Mac cannot be made to refuse')


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


# --- what a Mac's driver refuses

PROMPTS = [[1, 2, 3, 4], [7, 9] * 12]


def answers(engine):
    llm = LLM(engine, num_blocks=32)
    outputs = llm.generate(PROMPTS, greedy(4), use_tqdm=False)
    return [out.outputs[0].token_ids for out in outputs], type(llm.engine.runner).__name__


@pytest.fixture(scope='module')
def on_metal(model):
    state = {name: t.to('METAL').realize() for name, t in state_of(model).items()}
    return Llama(model.config, state)


@pytest.fixture(scope='module')
def portable(model):
    cache = PagedKVCache(model, 32)
    llm = LLM(model, cache=cache, attend=paged_attend, runner=EagerRunner(model, cache, paged_attend))
    return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, greedy(4), use_tqdm=False)]


@simulated
@pytest.mark.parametrize('kernel, runner, why', [
    ('nothing', 'JitRunner', None),
    pytest.param('paged_decode', 'JitRunner', 'attention runs in portable operations', marks=pytest.mark.slow),
    ('merge_partials', 'JitRunner', 'attention runs in portable operations'),    # only long contexts need it
    ('publish', 'EagerRunner', 'steps run one kernel after the other, and the host samples'),
    pytest.param('apply_constraints', 'EagerRunner', 'steps run one kernel after the other, and the host samples',
                 marks=pytest.mark.slow),
    pytest.param('rope_write', 'JitRunner', 'METAL takes the slow, portable path', marks=pytest.mark.slow),
    ('linear_lanes', 'JitRunner', 'METAL takes the slow, portable path')])
def test_what_the_driver_refuses_runs_in_portable_operations(kernel, runner, why, on_metal, portable, monkeypatch):
    "With one warning, and the same tokens."
    monkeypatch.setenv('METALSIM_REFUSE', kernel)
    find_refusal.cache_clear()
    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        assert answers(fused(on_metal)) == (portable, runner)
    find_refusal.cache_clear()
    assert [why in str(w.message) and f'kernel {kernel} cannot run on METAL' in str(w.message) for w in told] == [True] * bool(why)


@simulated
def test_each_kernel_of_an_engine_declares_the_threads_that_it_is_launched_with(on_metal):
    with capturing() as sources, metalsim.counting() as dispatches:
        LLM(fused(on_metal), num_blocks=32).generate(PROMPTS[0], greedy(2), use_tqdm=False)
    ours = {name: source for source, names in sources.items() for name in names if '#line 1 "' in source}
    launched = {d.name: prod(d.threads) for d in dispatches if d.name in ours}
    assert {'prepare', 'linear_lanes', 'rope_write', 'paged_decode', 'sample', 'publish'} <= {*launched}
    declared = {name: {k.max_threads for source, names in sources.items() if name in names for k in signatures(source)}
                for name in launched}
    assert all(threads in declared[name] for name, threads in launched.items())
    assert all('[[max_total_threads_per_threadgroup(' in source for source in ours.values())


@simulated
def test_the_graph_of_a_prompt_takes_no_more_than_the_rule_says(on_metal):
    "Kernels say what they compute: the watchdog adds it up, and `limit_metal_step` bounds it."
    llm, config = LLM(fused(on_metal), num_blocks=32), on_metal.config
    llm.generate([[1] * 200], greedy(1), use_tqdm=False)
    (step,) = [graph for (tokens, *_), graph in llm.engine.runner.graphs.items() if tokens == 256]
    head = 2 * config.vocab_size * config.hidden_size    # of one row only
    least = 256 * (count_token_ops(replace(config, max_position_embeddings=0)) - head)
    most = 256 * count_token_ops(replace(config, max_position_embeddings=256))
    assert least <= step.replay.graph.estimates.ops <= most


OLD = """
import json, sys, warnings
sys.path.insert(0, sys.argv[1])
import test_defaults as t
from support.engines import tiny
from tinyvllm.metalsim import capturing
model = tiny(1)
state = {name: x.to('METAL').realize() for name, x in t.state_of(model).items()}
with warnings.catch_warnings(record=True) as told, capturing() as sources:
    warnings.simplefilter('always')
    found = t.answers(t.fused(t.Llama(model.config, state)))
print(json.dumps([found, [str(w.message) for w in told], sources.kernels]))
"""


@simulated
@pytest.mark.parametrize('family', ['Apple5', pytest.param('Mac2', marks=pytest.mark.slow)])
def test_a_gpu_before_the_m1_gets_portable_operations(family, portable):
    environment = {**os.environ, 'METALSIM_ARCH': family, 'PYTHONPATH': str(ROOT)}
    environment |= dict(METALSIM_CHECK='0', METALSIM_LINT='0')
    done = subprocess.run([sys.executable, '-c', OLD, str(ROOT / 'tests')], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, told, kernels = json.loads(done.stdout)
    assert found == [portable, 'EagerRunner']
    assert told == ['our kernels need a GPU of family Apple7 (M1) or later, and this one is '
                    f'{family}: portable operations run in their place']
    assert not {'publish', 'sample', 'linear_lanes', 'paged_decode', 'rope_write', 'kv_write'} & {*kernels}


def test_an_engine_is_taken_as_it_is(model):
    engine = LLM(model, num_blocks=16).engine
    assert LLM(engine).engine is engine
    with pytest.raises(BadInput, match='engine is complete'):
        LLM(engine, num_blocks=32)
