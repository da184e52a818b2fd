"""Cases of what a step does around the model: its inputs from a staging buffer, RoPE and the cache, its outputs."""
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from tinygrad import Tensor

from tinyvllm.cli.cases.products import EPS
from tinyvllm.cli.cases.sampling import replay_launches
from tinyvllm.kernels.cases import Case, CaseLimits, make_large_tensor, random_normal
from tinyvllm.models.llama import RMSNorm
from tinyvllm.runner.inputs import NUM_STEPS, THREADS, lay_out, prepare_constants, staging_parts
from tinyvllm.runner.sampled_tokens import MAX_LOGPROBS

__all__ = ['PREPARE', 'PUBLISH', 'ROPE_WRITE', 'PrepareCases', 'PublishCases', 'RopeCases', 'StepSizes']


class RopeCases:
    "`launch(qkv, k_pool, v_pool, table, slots, norms)`: queries and keys are turned, keys and values stored."
    variant, shapes = '', 6
    #          tokens, query heads, KV heads, head dimension, normalised
    SHAPES = ((7, 9, 3, 64, False), (5, 4, 2, 16, True), (3, 3, 1, 80, True), (1, 8, 1, 128, False),
              (16, 2, 2, 96, True), (2, 1, 1, 2, False))

    def make_case(self, rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw projections and slots; some tokens are padding, whose slot is 0, and slot 1 belongs to another sequence."
        T, H, K, D, normed = self.SHAPES[n % self.shapes]
        num_slots = T + 9
        qkv, pools = 3 * random_normal(rng, dtype, T, (H + 2 * K) * D), random_normal(rng, dtype, 2, num_slots, K, D)
        angles = rng.uniform(0, 300, (T, 1, D // 2))
        slots = (2 + rng.permutation(num_slots - 2))[:T].astype(np.int32)
        slots[2:][rng.random(len(slots[2:])) < 0.3] = 0
        inputs = dict(qkv=qkv, k_pool=pools[0], v_pool=pools[1], cosines=np.cos(angles).astype(np.float32),
                      sines=np.sin(angles).astype(np.float32), slots=slots)
        if normed:
            inputs |= {f'{name}_norm': rng.uniform(0.3, 2, D).astype(np.float32) for name in 'qk'}
        return Case(inputs, rotated_and_written(**inputs), call=self.call)

    @staticmethod
    def call(launch: Callable, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        "Hand over the table and the norms in pairs."
        qkv, k_pool, v_pool, cosines, sines, slots, *norms = tensors.values()
        norms = tuple(RMSNorm(weight, EPS) for weight in norms) or None
        return launch(qkv, k_pool, v_pool, (cosines, sines), slots, norms)

    @staticmethod
    def make_load(launch: Callable, dtype: str) -> tuple[Callable, int, int]:
        "Return a chain of launches over 2,048 tokens with 32 query and 8 KV heads, and the bytes that one must move."
        T, H, K, D = 2048, 32, 8, 64
        qkv, pools = make_large_tensor((T, (H + 2 * K) * D), dtype), [make_large_tensor((4 * T, K, D), dtype)
                                                                      for _ in 'kv']
        table = tuple(make_large_tensor((T, 1, D // 2), 'float32') for _ in 'cs')
        slots = Tensor(np.random.default_rng(0).permutation(T).astype(np.int32)).realize()

        def chain() -> list[Tensor]:
            written, outs = pools, []
            for _ in range(8):
                q, *written = launch(qkv, *written, table, slots)
                outs.append(q)
            Tensor.realize(*outs, *written)
            return outs
        return chain, 8, 2 * qkv.nbytes() + 2 * table[0].nbytes()


def rotated_and_written(qkv, k_pool, v_pool, cosines, sines, slots, q_norm=None, k_norm=None) -> tuple[np.ndarray, ...]:
    "Compute queries, and both pools after the write, in float64."
    K, D = k_pool.shape[1:]
    x, T = qkv.astype(np.float64).reshape(len(qkv), -1, D), len(qkv)
    H = x.shape[1] - 2 * K

    def rotate(y, weight):
        if weight is not None:
            y = y / np.sqrt((y * y).mean(-1, keepdims=True) + EPS) * weight
        a, b, cos, sin = y[..., :D // 2], y[..., D // 2:], cosines.astype(np.float64), sines.astype(np.float64)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    pools = k_pool.astype(np.float64), v_pool.astype(np.float64)
    real = np.arange(T)[slots > 0]
    for pool, new in zip(pools, (rotate(x[:, H:H + K], k_norm), x[:, H + K:])):
        pool[slots[real]] = new[real]
    return rotate(x[:, :H], q_norm), *pools


class StepSizes(NamedTuple):
    "Sizes of a step, all with padding."
    tokens: int
    rows: int
    width: int    # of the block tables
    steps: int    # replays of a staging buffer


class PrepareCases:
    "`launch(inputs, tokens, ..., buffers, step_to_slot, step_counter, last_tokens)`: all inputs of a step."
    variant, shapes = '', 5
    SIZES = (StepSizes(8, 8, 16, 4), StepSizes(16, 4, 16, 1), StepSizes(1024, 64, 16, 1), StepSizes(33, 5, 7, 1),
             StepSizes(1, 1, 64, 16))
    BLOCK, BUFFERS, LAST = 4, 3, 9    # tokens of a block, staging buffers, rows of the last tokens

    def make_case(self, rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw a decision of the scheduler, in one of the staging buffers; others hold noise."
        size, buffer = self.SIZES[n % self.shapes], int(rng.integers(self.BUFFERS))
        later = int(rng.integers(0, size.steps)) if size.tokens == size.rows else 0
        step, last = self.draw_step(rng, size), rng.integers(1, 10**6, self.LAST).astype(np.int32)
        kinds = staging_parts(*size[:3], 0, size.steps)
        begins, length = lay_out(kinds)
        filled = np.full(length, -7, np.int32)
        for name, part in step.items():
            filled[begins[name]:begins[name] + part.size] = part.reshape(-1).view(np.int32)
        inputs, buffers = rng.integers(0, 9, length), rng.integers(0, 9, (self.BUFFERS, length)).astype(np.int32)
        buffers[buffer] = buffers[buffer] if later else filled    # the first replay has copied it
        step_id, step_to_slot = int(rng.integers(1, 1000)), np.full(NUM_STEPS, 10**6, np.int32)
        step_to_slot[step_id % NUM_STEPS] = buffer * size.steps + later
        arguments = dict(inputs=filled.copy() if later else inputs.astype(np.int32)) | self.empty_outputs(size) | dict(
            buffers=buffers.reshape(-1), step_to_slot=step_to_slot, step_counter=np.int32([step_id]), last_tokens=last)
        want = filled, *self.expect(step, size, later, last)
        return Case(arguments, want, call=partial(self.call, prepare_constants(kinds)))

    @staticmethod
    def empty_outputs(size: StepSizes) -> dict[str, np.ndarray]:
        "Fill what is written with what no step has."
        outs = {name: np.full(size.tokens, -1, np.int32) for name in ('tokens', 'positions', 'slots', 'owners')}
        return outs | dict(rows=np.full(size.rows, -1, np.int32), settings=np.full(8 * size.rows, np.nan, np.float32))

    def draw_step(self, rng: np.random.Generator, size: StepSizes) -> dict[str, np.ndarray]:
        "Draw prompts in parts, or single tokens; some tokens only the device knows; rows and tokens of padding."
        count, spare = int(rng.integers(1, size.rows + 1)), size.tokens - size.rows
        new = np.zeros(size.rows, int)
        for row in range(count):
            more = int(rng.integers(0, min(spare, size.width * self.BLOCK // 2) + 1))
            new[row], spare = 1 + more, spare - more
        room = size.width * self.BLOCK - new - size.steps
        ints = dict(starts=np.append(0, np.cumsum(new)), first_positions=rng.integers(0, room + 1),
                    previous_rows=np.where(rng.random(size.rows) < 0.5, rng.integers(0, self.LAST, size.rows), -1),
                    known_tokens=rng.integers(1, 10**6, size.tokens),
                    tables=rng.integers(1, 10**5, (size.rows, size.width)))
        floats = dict(settings=rng.standard_normal((size.rows, 8)), uniforms=rng.random((size.rows, size.steps)))
        step = {name: x.astype(np.int32) for name, x in ints.items()}
        return step | {name: x.astype(np.float32) for name, x in floats.items()}

    def expect(self, step: dict, size: StepSizes, later: int, last: np.ndarray) -> tuple[np.ndarray, ...]:
        "Compute tokens, positions, slots, owners, rows and settings in loops, one token after the other."
        made = np.zeros((4, size.tokens), np.int64)
        for row, (start, end) in enumerate(zip(step['starts'], step['starts'][1:])):
            for i in range(start, end):
                position, previous = step['first_positions'][row] + later + i - start, step['previous_rows'][row]
                token, is_last = step['known_tokens'][i], i == end - 1
                if later or previous >= 0 and is_last:
                    token = last[row if later else previous]
                block = step['tables'][row, position // self.BLOCK]
                made[:, i] = token, position, block * self.BLOCK + position % self.BLOCK, row
        settings = step['settings'].copy()
        settings[:, 4] = step['uniforms'][:, later]
        return *made, step['starts'][1:] - 1, settings.reshape(-1)

    def call(self, constants: dict[str, int], launch: Callable, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        "Launch with the sizes of the step."
        sizes = dict(THREADS=THREADS, NUM_STEPS=NUM_STEPS, BLOCK=self.BLOCK)
        return launch(*tensors.values(), threads=(THREADS,), **sizes, **constants)

    def make_load(self, launch: Callable, dtype: str) -> tuple[Callable, int, int]:
        "Return launches for a prompt's step of 1,024 tokens, and the bytes that one must move."
        case = self.make_case(np.random.default_rng(0), 2, dtype, None)
        tensors = {name: Tensor(x).realize() for name, x in case.inputs.items()}
        moved = 2 * sum(x.nbytes for x in case.want)
        return replay_launches(lambda: case.call(launch, tensors), 8), 8, moved


class PublishCases:
    "`launch(slots, last_tokens, step_counter, ids, parts, top_ids, below)`: what a step leaves for the host."
    variant, shapes = '', 4

    def make_case(self, rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw the results of a step in a ring of slots; all other slots must stay as they are."
        rows, top, most = (4, 1, 64, 300)[n % 4], (MAX_LOGPROBS, 0)[n % 2], (4, 16, 64, 1024)[n % 4]
        size, step_id = 1 + most * (3 + 2 * MAX_LOGPROBS), int(rng.integers(1, 500))
        ids, top_ids = rng.integers(-1, 10**6, rows), rng.integers(0, 10**6, (rows, top or 1))
        parts, below = (rng.standard_normal((rows, k)).astype(np.float32) for k in (2, top or 2))
        slots = rng.integers(-2**31, 2**31, (NUM_STEPS, size)).astype(np.int32)
        written, left = [np.int32([step_id]), ids, parts.view(np.int32)], slots.copy()
        written += [top_ids, below.view(np.int32)] if top else []
        flat = np.concatenate([x.reshape(-1) for x in written])
        left[step_id % NUM_STEPS, :len(flat)] = flat
        last = rng.integers(0, 10**6, most)
        arguments = dict(slots=slots.reshape(-1), last_tokens=last, step_counter=np.int32([step_id]), ids=ids,
                         parts=parts, top_ids=top_ids if top else ids, below=below)
        arguments = {name: x if x.dtype == np.float32 else x.astype(np.int32) for name, x in arguments.items()}
        want = left.reshape(-1), np.append(ids, last[rows:]), np.array([step_id + 1])
        order = dict(kernel='publish', publish=(0, 4 * (step_id % NUM_STEPS) * size, 4))    # the step id comes last
        return Case(arguments, want, call=partial(self.call, dict(SIZE=size, ROWS=rows, TOP=top)), simulation=order)

    @staticmethod
    def call(constants: dict[str, int], launch: Callable, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        "Launch with the sizes of the step."
        return launch(*tensors.values(), threads=(256,), NUM_STEPS=NUM_STEPS, **constants)

    def make_load(self, launch: Callable, dtype: str) -> tuple[Callable, int, int]:
        "Return launches for a step of 64 rows, and the bytes that one must move."
        case = self.make_case(np.random.default_rng(0), 2, dtype, None)
        tensors = {name: Tensor(x).realize() for name, x in case.inputs.items()}
        moved = 2 * sum(tensors[name].nbytes() for name in ('ids', 'parts', 'top_ids', 'below'))
        return replay_launches(lambda: case.call(launch, tensors), 8), 8, moved


ROPE_WRITE, PREPARE, PUBLISH = RopeCases(), PrepareCases(), PublishCases()
