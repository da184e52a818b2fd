"""Which kernels an engine launches: small engines of all kinds run, and what they call is recorded.

`tinyvllm doctor` checks that each of these kernels has a row of its own, so that none can be forgotten.
"""
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from tinygrad import Tensor, dtypes

from tinyvllm.cli.cases.products import FORMAT_NAMES, pack_parts, random_parts, shrink_parts
from tinyvllm.engine.llm import LLM
from tinyvllm.kernels.recording import RecordedKernels, recording
from tinyvllm.models.fused import FusedLlama
from tinyvllm.models.llama import Llama, model_config
from tinyvllm.models.weights import tensor_shapes, tiny_checkpoint
from tinyvllm.quant.pack import PackedLlama
from tinyvllm.sampling.params import SamplingParams

__all__ = ['KINDS', 'ModelKind', 'find_unchecked', 'make_model', 'record_engines', 'requests_for']

SIZES = dict(hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
             num_hidden_layers=1, vocab_size=288)
FEATURES = (dict(temperature=0), dict(temperature=0.8, top_k=5, top_p=0.9, seed=1), dict(logprobs=2),
            dict(prompt_logprobs=2), dict(repetition_penalty=1.2, frequency_penalty=0.1), dict(logit_bias={3: 1.0}),
            dict(allowed_token_ids=[4, 5]))


@dataclass(frozen=True)
class ModelKind:
    "A small model, and which features its requests use."
    format: str                                   # of its matrices
    config: dict = field(default_factory=dict)    # what differs from `SIZES`
    features: tuple[dict, ...] = FEATURES[:1]
    is_fused: bool = True

    def __str__(self) -> str:
        return f"{self.format} {self.config.get('model_type', 'llama')}" + ('' if self.is_fused else ' as it is stored')


QWEN3, BIASED = dict(model_type='qwen3', tie_word_embeddings=True), dict(attention_bias=True)
KINDS = (ModelKind('f32', is_fused=False), ModelKind('f16', is_fused=False), ModelKind('f32', features=FEATURES),
         ModelKind('f16', QWEN3, FEATURES),
         *(ModelKind(name, BIASED) for name in FORMAT_NAMES[2:] if name not in ('int8-g32', 'int4-g64')))


def random_state(config: dict, name: str, device: str) -> Iterator[tuple[str, object]]:
    "Draw the matrices of a model in a format, and its norms and biases."
    rng = np.random.default_rng(0)
    for key, shape in tensor_shapes(config).items():
        if len(shape) == 2:
            parts = shrink_parts(*random_parts(rng, name, *shape))
            yield key, pack_parts(name, [Tensor(part, device=device).realize() for part in parts], shape[1])
        else:
            yield key, Tensor(rng.uniform(0.5, 1.5, shape).astype(np.float32), device=device).realize()


def make_model(kind: ModelKind, device: str) -> Llama:
    "Make a random model in the form that an engine gives it, or as it is stored."
    overrides = SIZES | kind.config
    if kind.is_fused:
        config, _ = tiny_checkpoint(**overrides)
        return FusedLlama(PackedLlama(model_config(config), dict(random_state(config, kind.format, device))))
    config, state = tiny_checkpoint(**overrides)
    dtype = dict(f32=dtypes.float, f16=dtypes.half)[kind.format]
    state = {key: x.to(device).cast(dtype).contiguous().realize() for key, x in state.items()}
    return Llama(model_config(config), state)


def requests_for(kind: ModelKind, device: str) -> list[tuple[list[int], SamplingParams]]:
    "Return prompts with their parameters: each feature once, with prompts shorter and longer than a tile."
    lengths = (12, 100) if device.startswith('CUDA') else (12,)
    base = dict(max_tokens=2, ignore_eos=True)
    more = [([5, 6, 7], SamplingParams(**base, **feature)) for feature in kind.features]
    return more + [(np.random.default_rng(0).integers(0, 256, n).tolist(), SamplingParams(**base)) for n in lengths]


def run_engine(kind: ModelKind, device: str) -> None:
    "Run the requests of a small model, one after the other. Raises what the engine raises."
    llm = LLM(make_model(kind, device), num_blocks=16, block_size=32, max_num_seqs=4, max_num_batched_tokens=128)
    for prompt, params in requests_for(kind, device):
        for output in llm.generate([prompt], params, use_tqdm=False):
            if output.error:
                raise RuntimeError(f'{kind}: {output.error}')


def record_engines(
    device: str, # tinygrad's name
    kinds: tuple[ModelKind, ...] = KINDS, # of models
) -> RecordedKernels: # every kernel of ours that was launched
    "Run small engines and record their kernels. A warning, such as that a kernel was refused, is an error."
    with recording() as calls, warnings.catch_warnings():
        warnings.simplefilter('error')
        for kind in kinds:
            if kind.format == 'bf16' and not device.startswith('CPU'): continue    # no kernel of GPUs reads it
            run_engine(kind, device)
    return calls


def find_unchecked(
    captured: RecordedKernels, # of engines
    checked: RecordedKernels, # of checks
    by_text: bool, # two kernels are alike if their texts are; else if their names are
) -> list[str]: # names, empty if all are checked
    "Name the kernels that engines launch and no check does."
    known = set(checked) if by_text else set(checked.names)
    return sorted({k.signature.name for k in captured if (k if by_text else k.signature.name) not in known})
