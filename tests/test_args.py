"The pool fits into what is free, and a step into what was kept for it."
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
from tinygrad import Device

from tinyvllm.engine import args as args_module
from tinyvllm.errors import BadInput
from tinyvllm.metalsim import command_buffers
from tinyvllm.metalsim.command_buffers import estimate_seconds
from tinyvllm.models.llama import Llama, ModelConfig, kv_bytes, model_config
from tinyvllm.engine.args import (GPU_TIMEOUT, M1_OPS, STEP_SECONDS, EngineArgs, count_token_ops, estimate_activation_bytes,
                                  read_free_memory, size_pool, warn_of_timeout)
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


LLAMA_8B = ModelConfig('llama', vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                       num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192)
SMALL = ModelConfig('llama', vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                    num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192)


def test_a_token_takes_two_operations_for_each_weight_and_four_for_each_number_that_it_looks_at():
    weights, context = 7_504_658_432, 4 * 32 * 32 * 128 * 8192    # Llama 3 8B: of 8.03 billion, without embedding and norms
    assert count_token_ops(LLAMA_8B) == 2 * weights + context


@pytest.mark.parametrize('config, context, tokens', [
    (LLAMA_8B, 8192, 32), (LLAMA_8B, 2048, 32), (LLAMA_8B, 131072, 16), (SMALL, 8192, 512), (SMALL, 512, 512)])
def test_a_step_on_a_mac_is_what_an_m1_computes_in_a_second(config, context, tokens):
    config, args = replace(config, max_position_embeddings=context), EngineArgs()
    assert args.with_step_limit('METAL', config).max_num_batched_tokens == tokens
    assert args.with_step_limit('METAL:1', config).max_num_batched_tokens == tokens
    assert args.with_step_limit('CUDA', config).max_num_batched_tokens == 2048
    assert EngineArgs(max_num_batched_tokens=99).with_step_limit('METAL', config).max_num_batched_tokens == 99
    seconds = estimate_seconds(tokens * count_token_ops(config), 0)    # as the simulator's watchdog has it
    assert seconds < STEP_SECONDS or tokens == 16 and seconds < GPU_TIMEOUT / 2


def test_the_largest_model_still_has_a_step():
    "Where an M1 needs more than a second for one token."
    config = replace(LLAMA_8B, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
                     max_position_embeddings=131072)
    assert count_token_ops(config) > M1_OPS * STEP_SECONDS
    assert EngineArgs().with_step_limit('METAL', config).max_num_batched_tokens == 16


def test_the_rule_is_the_watchdogs():
    assert (M1_OPS, GPU_TIMEOUT) == (command_buffers.SHARE * command_buffers.M1_FLOPS, command_buffers.GPU_TIMEOUT)


@pytest.mark.parametrize('tokens, config, told', [
    (8192, LLAMA_8B, True), (512, LLAMA_8B, True), (128, LLAMA_8B, False), (32, LLAMA_8B, False), (512, SMALL, False)])
def test_a_step_that_macos_would_stop_is_told(tokens, config, told):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        warn_of_timeout(tokens, config)
    assert bool(found) == told and all(f'a step of {tokens} tokens takes an M1 about' in str(w.message) for w in found)


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
