"""What `tinyvllm bench` measures: the loops of 01 and 01b on one prompt, the engine on several.

Rung 04a is the engine with portable operations, rung 08 the same with the kernels of the device.

Prompts and answers of one measurement have equal lengths and start together, so every step after the
first is decoding alone, and its speed can be held against the memory limit.
"""
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import trange

from tinyvllm.engine import LLMEngine, make_engine
from tinyvllm.errors import BadInput
from tinyvllm.generate import generate, same_greedy
from tinyvllm.kvcache import KVCache
from tinyvllm.llama import Llama, NoCache, kv_bytes, weight_bytes
from tinyvllm.measure import LadderRow, ladder_row, measure_stream
from tinyvllm.paged import PagedKVCache, paged_attend
from tinyvllm.sampling import SamplingParams

__all__ = ['RUNGS', 'Workload', 'engine_stream', 'measure_rung']

RUNGS = {'01': '01_greedy', '01b': '01b_kvcache', '04a': '04a_engine', '08': '08_flash'}  # rung: its notebook


@dataclass(frozen=True)
class Workload:
    "What one measurement computes."
    prompt_tokens: int = 32
    tokens: int = 16  # generated per request
    requests: int = 1  # at the same time

    def __str__(self) -> str: return f'{self.prompt_tokens}+{self.tokens}'

    @property
    def room(self) -> int:
        "Tokens of one request in all."
        return self.prompt_tokens + self.tokens

    def prompts(self, vocab_size: int) -> list[list[int]]:
        "Random token ids, the same every time and different for every request."
        return np.random.default_rng(0).integers(0, vocab_size, (self.requests, self.prompt_tokens)).tolist()


def measure_rung(
    rung: str,  # a key of `RUNGS`
    model: Llama,  # on its device
    work: Workload,  # what to compute
    repeat: int = 3,  # measured runs; one more comes first and compiles
    name: str = '',  # of the model
) -> LadderRow:  # of the median run
    "Measure a rung and check its tokens. Raises `BadInput` for a workload beyond the context."
    if work.room > (context := model.config.max_position_embeddings):
        raise BadInput(f'{work} tokens are {work.room}, and the context is {context}; ask for fewer')
    prompts = work.prompts(model.config.vocab_size)
    stream = rung_stream(rung, model, work, prompts)
    bar = trange(1 + repeat, desc=f'{rung} ×{work.requests}', unit='run')
    runs = [measure_stream(stream) for _ in bar][1:]
    answers = (runs[0].tokens[i::work.requests] for i in range(work.requests))  # a step has one of each
    equal = [same_greedy(model, prompt, answer) for prompt, answer in zip(prompts, answers)]
    return ladder_row(runs, weight_bytes(model), kv_bytes(model) * work.room, work.requests, rung=rung,
                      notebook=RUNGS[rung], model=name, dtype=model.dtype, workload=str(work),
                      greedy_equal=all(equal))


def rung_stream(rung: str, model: Llama, work: Workload, prompts: list[list[int]]) -> Callable[[], Iterable]:
    "How a rung starts to answer: a function without arguments that yields what `measure_stream` takes."
    if rung in ('04a', '08'):
        parts = dict(cache=portable_cache(model, work), attend=paged_attend) if rung == '04a' else {}
        engine = make_engine(model, max_num_seqs=work.requests, max_model_len=work.room,
                             max_num_batched_tokens=work.requests * work.prompt_tokens, **parts)
        return lambda: engine_stream(engine, prompts, work.tokens)
    cache = {'01': NoCache, '01b': lambda: KVCache(model, work.room)}[rung]
    return lambda: generate(model, prompts[0], work.tokens, cache=cache())


def portable_cache(model: Llama, work: Workload, block_size: int = 16) -> PagedKVCache:
    "A pool with room for all requests, written by tinygrad's own kernels."
    return PagedKVCache(model, work.requests * -(-work.room // block_size) + 1, block_size)


def engine_stream(
    engine: LLMEngine,  # has nothing else to do
    prompts: list[list[int]],  # token ids
    max_tokens: int,  # for each of them
) -> Iterator[list[int]]:  # the tokens of each step, in the order of the prompts
    "Answer prompts together, greedily and to the full length. Raises what a request failed with."
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    outputs = [engine.add_request(i, ids, params) for i, ids in enumerate(prompts)]
    while engine.has_unfinished_requests():
        said = [len(out.outputs[0].token_ids) for out in outputs]
        for out in engine.step():
            if out.error: raise out.error
        if new := [t for out, n in zip(outputs, said) for t in out.outputs[0].token_ids[n:]]:
            yield new
