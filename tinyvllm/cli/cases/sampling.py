"""Cases of what follows the logits: penalties, masks and edits, the token that is drawn, the most likely ones.

The oracles are those of the host: `process_logits`, `LogitConstraints.apply_to`, `Sampler`. Random numbers are chosen
so that a draw does not point at the edge between two tokens, where float32 and float64 may differ.
"""
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from tinygrad import Tensor

from tinyvllm.kernels.cases import Case, CaseLimits, make_large_tensor
from tinyvllm.kernels.sampler import pack_sampling_params
from tinyvllm.sampling.logits_processors import LogitConstraints
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.sampling.sampler import log_softmax, process_logits, select_top_ids, softmax

__all__ = ['CONSTRAINTS', 'PENALTIES', 'SAMPLE', 'TOP_TOKENS', 'ConstraintCases', 'PenaltyCases', 'SampleCases',
           'TopTokenCases', 'choose_token', 'draw_params', 'random_logits', 'replay_launches']

ROWS, SIZES = (4, 3, 5, 1), (70, 257, 1037, 8200)    # of logits: no multiple of 32, of a tile, or of all threads


def random_logits(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    "Draw logits of every kind: sharp and flat, with ties, with forbidden tokens, with zeros of both signs."
    x = (rng.standard_normal((rows, size)) * rng.choice([0.1, 1, 5], (rows, 1))).astype(np.float32)
    kinds = rng.integers(0, 5, rows)
    x[kinds == 1] = np.round(x[kinds == 1])             # -0.0 and 0.0 are equal
    x[kinds == 2] = np.where(rng.random((rows, size)) < 0.6, -np.inf, x)[kinds == 2]
    x[kinds == 3] = x[kinds == 3, :1]                   # all are equal
    x[:, rng.integers(size)] = 0.5
    return x


def draw_params(rng: np.random.Generator) -> SamplingParams:
    "Draw how a request samples."
    def pick(*choices):
        return choices[rng.integers(len(choices))]
    return SamplingParams(temperature=pick(0, 0.3, 1, 1.7), top_k=pick(0, 1, 5, 10**6), top_p=pick(1, 0.9, 0.3, 1e-6),
                          min_p=pick(0, 0.05, 0.2, 1), repetition_penalty=pick(1, 1.3, 0.5),
                          presence_penalty=pick(0, 0.5, -1), frequency_penalty=pick(0, 0.25, -2), seed=0)


def replay_launches(launch: Callable, count: int) -> Callable[[], list[Tensor]]:
    "Return a function that launches the same work so many times, and realizes all of it."
    def chain() -> list[Tensor]:
        outs = []
        for _ in range(count):
            out = launch()
            outs += out if isinstance(out, tuple) else (out,)
        Tensor.realize(*outs)
        return outs
    return chain


class TopTokenCases:
    "`launch(logits, k)`: the largest logits of each row, equal ones in the order of their ids."
    variant, shapes = '', 4

    @staticmethod
    def make_case(rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw rows; every other case asks for as many tokens as an API may."
        x, k = random_logits(rng, ROWS[n % 4], SIZES[n % 3]), (20, 3)[n % 2]
        x[np.isinf(x)] = -1e30      # so many are there
        ids = np.array([select_top_ids(row, k) for row in x])
        below = np.take_along_axis(x, ids, 1).astype(np.float64) - x.max(1, keepdims=True)
        return Case(dict(logits=x), (ids, below), call=lambda launch, tensors: launch(tensors['logits'], k))

    @staticmethod
    def make_load(launch: Callable, dtype: str) -> tuple[Callable, int, int]:
        "Return launches over 8 rows of a vocabulary of 131,072, and the bytes that one must move."
        x = make_large_tensor((8, 2**17), 'float32')
        return replay_launches(partial(launch, x, 20), 4), 4, x.nbytes()


class PenaltyCases:
    "`launch(logits, seen, counts, begins, settings)`: what `process_logits` does with the tokens of a sequence."
    variant, shapes = '', 4

    @staticmethod
    def make_case(rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw prompts and outputs, some of them empty; behind the last token lies one that belongs to no row."
        rows, size = ROWS[n % 4], SIZES[n % 3]
        x, params = rng.standard_normal((rows, size)).astype(np.float32) * 3, [draw_params(rng) for _ in range(rows)]
        prompts, outputs = ([rng.integers(0, size, rng.integers(0, 9)).tolist() for _ in range(rows)] for _ in 'po')
        lists = [[(t, Counter(out)[t]) for t in {*prompt, *out}] for prompt, out in zip(prompts, outputs)]
        pairs = np.array([pair for seen in lists for pair in seen] + [(size - 1, 9)], np.int32)
        settings = np.array([pack_sampling_params(p) for p in params], np.float32)
        inputs = dict(logits=x, seen=pairs[:, 0].copy(), counts=pairs[:, 1].copy(),
                      begins=np.cumsum([0, *map(len, lists)]).astype(np.int32), settings=settings)
        want = np.stack([penalised(*row) for row in zip(x, params, prompts, outputs)])
        return Case(inputs, (want,))

    @staticmethod
    def make_load(launch: Callable, dtype: str) -> tuple[Callable, int, int]:
        "Return launches over 8 rows of 131,072 logits with 1,024 tokens each, and the bytes that one must move."
        x, seen = make_large_tensor((8, 2**17), 'float32'), np.arange(8 * 1024, dtype=np.int32)
        begins, settings = np.arange(9, dtype=np.int32) * 1024, np.ones((8, 8), np.float32)
        tensors = [Tensor(a).realize() for a in (seen, seen % 2, begins, settings)]
        return replay_launches(partial(launch, x, *tensors), 4), 4, 2 * x.nbytes()


def penalised(row: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int]) -> np.ndarray:
    "Apply the three penalties, and nothing else, in float64."
    only = SamplingParams(repetition_penalty=params.repetition_penalty, presence_penalty=params.presence_penalty,
                          frequency_penalty=params.frequency_penalty, seed=0)
    return process_logits(row.astype(np.float64), only, {*prompt, *output}, Counter(output))


class ConstraintCases:
    "`launch(logits, x, steps)`: masks and edits of `LogitConstraints`, in a staging buffer that is not the first."
    variant, shapes = '', 4
    BUFFERS, STEPS = 3, 4

    def make_case(self, rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw rows with a mask, with edits, with both or with neither; noise where nothing should be read."
        rows, size = ROWS[n % 4], (70, 257, 8200, 16500)[n % 4]
        logits, held = rng.standard_normal((rows, size)).astype(np.float32), random_constraints(rng, rows, size)
        buffer, words = int(rng.integers(self.BUFFERS)), -(-size // 32)
        masks = np.full((self.BUFFERS, rows, words), 0x5a5a5a5a, np.int32)
        for row, constraints in enumerate(held):
            if constraints.mask is not None:
                masks[buffer, row] = constraints.mask
        pairs = [pair for constraints in held for pair in constraints.edits] + [(3, 7e7)] * 5
        tokens, adds = zip(*pairs)
        x = dict(masked=[c.mask is not None for c in held], edges=np.cumsum([0, *(len(c.edits) for c in held)]),
                 edited=tokens, masks=masks.reshape(-1), step_to_slot=[9, buffer * self.STEPS + 2, 0], step_counter=[4])
        inputs = dict(logits=logits) | {name: np.array(part, np.int32) for name, part in x.items()}
        want = np.stack([c.apply_to(row) for row, c in zip(logits, held)]).astype(np.float64)
        return Case(inputs | dict(adds=np.array(adds, np.float32)), (want,), call=self.call)

    def call(self, launch: Callable, tensors: dict[str, Tensor]) -> Tensor:
        "Hand over the logits, and all else by name."
        return launch(tensors['logits'], {name: t for name, t in tensors.items() if name != 'logits'}, self.STEPS)

    def make_load(self, launch: Callable, dtype: str) -> tuple[Callable, int, int]:
        "Return launches over 8 rows of 131,072 logits, all with a mask, and the bytes that one must move."
        rows, size = 8, 2**17
        x = dict(masked=np.ones(rows), edges=np.arange(rows + 1), edited=np.arange(rows), adds=np.ones(rows),
                 masks=np.full(rows * size // 32, -1), step_to_slot=np.zeros(1), step_counter=np.zeros(1))
        tensors = {name: Tensor(part.astype(np.float32 if name == 'adds' else np.int32)).realize()
                   for name, part in x.items()}
        logits = make_large_tensor((rows, size), 'float32')
        return replay_launches(partial(launch, logits, tensors, self.STEPS), 4), 4, 2 * logits.nbytes()


def random_constraints(rng: np.random.Generator, rows: int, size: int) -> list[LogitConstraints]:
    "Draw for each row a mask or none, edits or none. Bits behind the vocabulary are noise."
    held = []
    for _ in range(rows):
        mask = rng.integers(-2**31, 2**31, -(-size // 32)).astype(np.int32) if rng.random() < 0.6 else None
        tokens = rng.permutation(size)[:rng.integers(0, min(size, 9))].tolist() if rng.random() < 0.7 else []
        held.append(LogitConstraints(mask, [(t, float(rng.choice([-np.inf, -3.5, 0.25, 100]))) for t in tokens]))
    return held


def choose_token(
    rng: np.random.Generator,
    row: np.ndarray, # (V,) logits after penalties and masks
    params: SamplingParams, # the penalties aside
) -> tuple[int, float, float]: # token id, top-p, uniform number
    "Choose a number that draws a likely token, near one of its edges; a top-p that cuts between two is lifted."
    wide, top_p = row.astype(np.float64), params.top_p
    cut = replace(params, repetition_penalty=1, presence_penalty=0, frequency_penalty=0)
    line = np.cumsum(np.sort(softmax(process_logits(wide, replace(cut, top_p=1.0), set(), {})))[::-1])
    if np.abs(line - top_p).min() < 1e-5:
        top_p = 1.0
    final = process_logits(wide, replace(cut, top_p=top_p), set(), {})
    if params.greedy: return int(final.argmax()), top_p, 0.5
    p = softmax(final)
    token = int(rng.choice(np.flatnonzero(p >= min(1e-4, p.max()))))
    return token, top_p, np.cumsum(p)[token] - p[token] * rng.choice([0.1, 0.9])


class SampleCases:
    "`launch(logits, settings, raw_logits)`: a token for each row, as `Sampler` draws it, and its log-probability."
    variant, shapes = '', 4

    def make_case(self, rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw rows and how they sample; one is broken, and one has a token that is forced upon it."
        rows, size = ROWS[n % 4] + 2, SIZES[n % 4]
        raw = random_logits(rng, rows, size)
        logits = raw + (rng.random((rows, size)) < 0.3).astype(np.float32) * np.float32(-1.5)
        params = [draw_params(rng) for _ in range(rows)]
        settings = np.array([pack_sampling_params(p) for p in params], np.float32)
        ids = np.zeros(rows, int)
        for row, p in enumerate(params):
            ids[row], settings[row, 2], settings[row, 4] = choose_token(rng, logits[row], p)
        (raw, logits)[n % 2][0, rng.integers(size)] = rng.choice([np.nan, np.inf])
        ids[0], ids[1] = -1, rng.integers(size)
        raw[1, ids[1]], settings[1, 3] = 0.25, -1 - ids[1]
        with np.errstate(invalid='ignore'):
            logprobs = [log_softmax(row.astype(np.float64))[token] if token >= 0 else 0 for row, token in zip(raw, ids)]
        inputs = dict(logits=logits, settings=settings, raw_logits=raw)
        return Case(inputs, (ids, np.array(logprobs)), call=self.call)

    @staticmethod
    def call(launch: Callable, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        "Put the parts of a log-probability together."
        ids, parts = launch(*tensors.values())
        return ids, parts[:, 0] - parts[:, 1].log()

    @staticmethod
    def make_load(launch: Callable, dtype: str) -> tuple[Callable, int, int]:
        "Return launches over 8 rows of 131,072 logits with top-k and top-p, and the bytes that one must move."
        x, params = make_large_tensor((8, 2**17), 'float32'), SamplingParams(top_k=50, top_p=0.9, seed=0)
        settings = np.tile(np.float32(pack_sampling_params(params)), (8, 1))
        settings[:, 4] = 0.5
        return replay_launches(partial(launch, x, Tensor(settings).realize()), 4), 4, 2 * x.nbytes()


TOP_TOKENS, PENALTIES, CONSTRAINTS, SAMPLE = TopTokenCases(), PenaltyCases(), ConstraintCases(), SampleCases()
