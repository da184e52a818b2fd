"Tiny models of every supported architecture: transformers' names for them, and weights that any machine repeats."
import zlib

import numpy as np

LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 32, 'rope_theta': 10000.0}
LINEAR = {'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 10000.0}
TINY = dict(vocab_size=160, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
            num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256)
FAMILIES = {  # name: (transformers' class of its configuration, what differs from TINY)
    'llama': ('LlamaConfig', {}),
    'llama-tied': ('LlamaConfig', {'tie_word_embeddings': True}),
    'llama-biased': ('LlamaConfig', {'attention_bias': True, 'mlp_bias': True}),
    'llama-3-scaling': ('LlamaConfig', {'rope_parameters': LLAMA3}),
    'linear-scaling': ('LlamaConfig', {'rope_parameters': LINEAR}),
    'mistral': ('MistralConfig', {'head_dim': 16, 'sliding_window': None}),
    'qwen2': ('Qwen2Config', {}),
    'qwen3': ('Qwen3Config', {'head_dim': 16}),
}
IDS = [(7*i*i + 3*i) % 160 for i in range(50)]  # the prompt of all


def weight(name: str, shape: list[int]) -> np.ndarray:
    "Float32 values between -1/4 and 1/4 for a tensor, around 1 for a norm: bits of a generator that never changes."
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    values = (bits >> np.uint64(40)).astype(np.float32) / np.float32(2**25) - np.float32(0.25)
    return values.reshape(shape) + np.float32('norm' in name)
