"The pool fits into what is free, and a step into what was kept for it."
import subprocess
import sys

import pytest
from tinygrad import Device

from tinyvllm.engine import args as args_module
from tinyvllm.errors import BadInput
from tinyvllm.models.llama import Llama, kv_bytes, model_config
from tinyvllm.engine.args import EngineArgs, estimate_activation_bytes, read_free_memory, size_pool
from tinyvllm.models.weights import tiny_checkpoint


@pytest.fixture(scope='module')
def model():
    config, state = tiny_checkpoint(seed=0)
    return Llama(model_config(config), state)


def test_pool_is_sized_by_what_is_free(model, monkeypatch):
    block, args = 16 * kv_bytes(model), EngineArgs(max_num_seqs=4).with_step_limit('CPU')
    reserve = estimate_activation_bytes(model.config, args)

    def with_memory(free, **change):
        monkeypatch.setattr(args_module, 'read_free_memory', lambda device: free)
        return size_pool(model, EngineArgs(max_num_seqs=4, **change))
    assert with_memory(10**9) == 4 * 256 // 16 + 1            # no more than four contexts
    free = -(-(reserve + 20 * block) * 10 // 9)               # nine tenths of it: 20 blocks are left
    assert with_memory(free) == 20
    assert with_memory(free, gpu_memory_utilization=1.0) > 20
    assert with_memory(free, num_blocks=7) == 7
    for change in (dict(num_blocks=22), dict(gpu_memory_utilization=0.5), dict(max_num_batched_tokens=4096)):
        with pytest.raises(BadInput, match='GB free'):
            with_memory(free, **change)


def test_memory_of_a_card_is_read_from_nvidia_smi(monkeypatch):
    monkeypatch.setattr(subprocess, 'check_output', lambda command, text: '80000\n100\n')
    assert read_free_memory('CUDA') == 80000 * 2**20
    assert read_free_memory('CPU') > 0


STEP = '''
import resource, numpy as np
from tinyvllm.models.llama import Llama, model_config
from tinyvllm.kv_cache.paged import *
from tinyvllm.engine.args import *
from tinyvllm.runner.eager import *
from tinyvllm.core.scheduler import *
from tinyvllm.core.sequence import *
from tinyvllm.core.blocks import BlockManager
from tinyvllm.measure import peak_memory
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.models.weights import tiny_checkpoint
config, state = tiny_checkpoint(seed=0, max_position_embeddings=2048, num_attention_heads=16, num_key_value_heads=4,
                                num_hidden_layers=1)
model = Llama(model_config(config), state)
args = EngineArgs(max_num_seqs=2, max_num_batched_tokens=1024)
scheduler, runner = Scheduler(BlockManager(260), 2, 1024), EagerRunner(model, PagedKVCache(model, 260), paged_attend)
scheduler.add(Sequence(0, [1] * 2047, SamplingParams(max_tokens=1)))
scheduler.add(Sequence(1, [1] * 1, SamplingParams(max_tokens=9)))
before = peak_memory()
for _ in range(2):
    batch = scheduler.schedule()
    scheduler.update_from_output(batch, runner(batch))
print(peak_memory() - before, estimate_activation_bytes(model.config, args))
'''


@pytest.mark.skipif(Device.DEFAULT != 'CPU', reason='the process is measured, not the card')
def test_a_step_stays_within_what_was_reserved_for_it():
    used, reserved = map(int, subprocess.check_output([sys.executable, '-c', STEP], text=True).split())
    compiling = 80_000_000
    assert reserved / 4 < used < reserved + compiling, (used, reserved)
