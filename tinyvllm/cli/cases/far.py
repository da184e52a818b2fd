"""Cases with indices beyond 2**31 and 2**32: what a kernel that counts in 32 bits reads or writes in the wrong place.

The arrays are `SparseArray`s. A simulator runs only the last threadgroups of a launch: the others take too long, and
have small indices. Rows of results that are not looked at may hold anything.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from tinygrad import Tensor, dtypes

from tinyvllm.cli.cases.products import EPS, call_product, expected_product, pack_parts, random_parts, take_parts
from tinyvllm.cli.cases.steps import RopeCases, rotated_and_written
from tinyvllm.kernels.cases import Case, CaseLimits, random_normal, reference_attention
from tinyvllm.kernels.linear_gpu import plan
from tinyvllm.kernels.sampler import pack_sampling_params
from tinyvllm.kernels.sparse import SparseArray
from tinyvllm.sampling.params import SamplingParams

__all__ = ['FAR', 'FARTHER', 'FAR_CONSTRAINTS', 'FAR_NORM', 'FAR_PENALTIES', 'FAR_ROPE', 'FAR_ROWS', 'FAR_SAMPLE',
           'FAR_TOP_TOKENS', 'FarAttentionCases', 'FarEmbedCases', 'FarProductCases', 'FarWriteCases']

WRAPS = 2**31, 2**32          # where indices of 32 bits, with a sign or without, begin again
FAR, FARTHER = 2**32, 2**34    # elements of a pool; in the larger one an index that counts vectors of four ends, too
COLUMNS, VOCABULARY = 4096, 2**16


class FarCases:
    "What all of these have in common: one case."
    shapes, elements = 1, FAR

    @property
    def variant(self) -> str:
        "How far."
        return 'far' if self.elements == FAR else 'farther'


def far_rows(elements: int, size: int) -> np.ndarray:
    "Which rows of so many elements lie behind 2**31, 2**32, ..., up to the size of the array."
    return np.array([2**n // size + n - 30 for n in range(31, 64) if 2**n <= elements], np.int32)


def scatter(shape: tuple[int, ...], dtype: str, rows: dict[int, np.ndarray]) -> SparseArray:
    "Put rows of the first axis into an array of which nothing else is there."
    size = int(np.prod(shape[1:]))
    return SparseArray(shape, dtype, {int(row) * size: values for row, values in rows.items()})


@dataclass(frozen=True)
class FarAttentionCases(FarCases):
    "`launch(q, k, v, tables, owners, positions)`, and `starts`: the first block, and blocks behind 2**31, 2**32, ..."
    has_starts: bool = False
    elements: int = FAR

    def make_case(self, rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw a context whose last block is not full, and its last tokens."
        S, K, D, H, T = 16, 2, 64, 4, 3 if self.has_starts else 1
        size = S * K * D
        blocks = np.insert(far_rows(self.elements, size), 1, 1)
        L = len(blocks) * S - 11
        keys, values = random_normal(rng, dtype, 2, len(blocks), S, K, D)
        keys[-1, 5:] = values[-1, 5:] = np.nan
        pools = [scatter((self.elements // size + 9, S, K, D), dtype, dict(zip(blocks, x))) for x in (keys, values)]
        rest = dict(owners=np.zeros(T, np.int32), positions=np.arange(L - T, L, dtype=np.int32))
        if self.has_starts:
            rest['starts'] = np.array([0, T], np.int32)
        q = random_normal(rng, dtype, T, H, D)
        want = reference_attention(q, keys, values, np.arange(len(blocks))[None], **rest)
        return Case(dict(q=q, k=pools[0], v=pools[1], tables=blocks[None]) | rest, (want,))


def far_pools(slots: np.ndarray, elements: int, K: int, D: int, dtype: str) -> list[SparseArray]:
    "Return pools of keys and values, with NaN where indices of 32 bits would end."
    ends = {int(slot) * K * D % (wrap * unit) // (K * D) for slot in slots for wrap in WRAPS for unit in (1, 4)}
    empty = {slot: np.full((K, D), np.nan, dtype) for slot in sorted(ends - set(slots.tolist()))}
    return [scatter((elements // (K * D) + 9, K, D), dtype, empty) for _ in 'kv']


def after_write(pool: SparseArray, slots: np.ndarray, rows: np.ndarray) -> SparseArray:
    "Return what must be in a pool: the rows in their slots, and NaN where they do not belong."
    written = scatter(pool.shape, 'float64', dict(zip(slots, rows)))
    return SparseArray(pool.shape, 'float64', pool.parts | written.parts)


@dataclass(frozen=True)
class FarWriteCases(FarCases):
    "`launch(k_pool, v_pool, k, v, slots)`: keys and values go beyond 2**31 elements, and to no other place."
    elements: int = FAR

    def make_case(self, rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw a few tokens."
        K, D = 2, 64
        slots = far_rows(self.elements, K * D)
        new, pools = random_normal(rng, dtype, 2, len(slots), K, D), far_pools(slots, self.elements, K, D, dtype)
        inputs = dict(k_pool=pools[0], v_pool=pools[1], k=new[0], v=new[1], slots=slots)
        return Case(inputs, tuple(after_write(pool, slots, rows) for pool, rows in zip(pools, new)))


class FarRopeCases(FarCases):
    "`launch(qkv, k_pool, v_pool, table, slots)`: keys are turned, and written beyond 2**31 elements."

    @staticmethod
    def make_case(rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw two tokens."
        H, K, D = 3, 2, 64
        slots, angles = far_rows(FAR, K * D), rng.uniform(0, 9, (2, 1, D // 2))
        qkv, pools = random_normal(rng, dtype, 2, (H + 2 * K) * D), far_pools(slots, FAR, K, D, dtype)
        near = dict(qkv=qkv, cosines=np.cos(angles).astype(np.float32), sines=np.sin(angles).astype(np.float32))
        empty = np.zeros((3, K, D))
        q, *rows = rotated_and_written(k_pool=empty, v_pool=empty, slots=np.arange(1, 3), **near)
        inputs = dict(qkv=near.pop('qkv'), k_pool=pools[0], v_pool=pools[1]) | near | dict(slots=slots)
        written = (after_write(pool, slots, new[1:]) for pool, new in zip(pools, rows))
        return Case(inputs, (q, *written), call=RopeCases.call)


def far_matrix(rng: np.random.Generator, name: str, rows: np.ndarray, N: int) -> tuple[dict, np.ndarray]:
    "Draw some rows of a matrix of N rows; return the parts of the whole, and these rows as numbers."
    parts, w = random_parts(rng, name, len(rows), COLUMNS)
    return {f'part {i}': scatter((N, *part.shape[1:]), part.dtype.name, dict(zip(rows, part)))
            for i, part in enumerate(parts)}, w


@dataclass(frozen=True)
class FarEmbedCases(FarCases):
    "`launch(w, tokens, dtype)`: rows of a matrix of more than 2**32 numbers."
    format: str

    @property
    def variant(self) -> str:
        "The format of the weights, too."
        return f'{self.format} far'

    def make_case(self, rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw four rows."
        N = WRAPS[1] // COLUMNS + 7
        tokens = np.array([N - 1, WRAPS[0] // COLUMNS + 1, 3, WRAPS[1] // COLUMNS + 2], np.int32)
        parts, w = far_matrix(rng, self.format, tokens, N)

        def call(launch: Callable, tensors: dict[str, Tensor]) -> Tensor:
            w = pack_parts(self.format, take_parts(tensors), COLUMNS)
            return launch(w, tensors['tokens'], getattr(dtypes, dtype))
        return Case(parts | dict(tokens=tokens), (w,), call=call)


@dataclass(frozen=True)
class FarProductCases(FarCases):
    "`launch(x, w)`: a matrix of more than 2**32 numbers, of which the last rows are looked at."
    format: str
    rung: str = ''

    @property
    def variant(self) -> str:
        "Which kernel of the family."
        return f'{self.rung} {self.format} far'.strip()

    def make_case(self, rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw the last rows."
        T, N = {'tiles': 9}.get(self.rung, 1), WRAPS[1] // COLUMNS + 40
        rows = np.arange(N - 9, N)
        parts, w = far_matrix(rng, self.format, rows, N)
        x = random_normal(rng, dtype, T, COLUMNS)
        y = expected_product(w, x, False, EPS)
        want = SparseArray((T, N), 'float64', {int(rows[0]) + t * N: y[t] for t in range(T)})
        origin = (0, 0, 0)
        if self.rung in ('lanes', 'tiles'):
            grid = plan(self.rung, 'METAL', T, N, False)[0]
            origin = (grid[0] - 3, 0, 0) if self.rung == 'lanes' else (0, grid[1] - 2, 0)
        how = dict(simulation=dict(origin=origin)) if self.rung else {}
        return Case(parts | dict(x=x), (want,), call=partial(call_product, self.format, self.rung), **how)


class FarRowCases(FarCases):
    "`launch('all_rows', w, dtype)`: more than 2**31 numbers are written."

    @staticmethod
    def make_case(rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw the last rows of a matrix in 4 bits."
        N = WRAPS[0] // COLUMNS + 7
        rows = np.arange(N - 2, N)
        parts, w = far_matrix(rng, 'int4-g32', rows, N)

        def call(launch: Callable, tensors: dict[str, Tensor]) -> Tensor:
            return launch('all_rows', pack_parts('int4-g32', take_parts(tensors), COLUMNS), getattr(dtypes, dtype))
        last = (N * COLUMNS // 8 - 1) // 256    # threadgroup: a thread writes 8 numbers
        want = scatter((N, COLUMNS), 'float64', dict(zip(rows, w)))
        return Case(parts, (want,), call=call, simulation=dict(origin=(last - 4, 0, 0)))


class FarNormCases(FarCases):
    "`launch(x, norm, eps)`: the last of so many tokens that they have more than 2**31 numbers."

    @staticmethod
    def make_case(rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw two tokens."
        T, x = WRAPS[0] // COLUMNS + 3, random_normal(rng, dtype, 2, COLUMNS)
        norm, wide = (1 + rng.standard_normal(COLUMNS) / 4).astype(np.float32), x.astype(np.float64)
        y = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + EPS) * norm
        rows = T - 2, T - 1
        return Case(dict(x=scatter((T, COLUMNS), dtype, dict(zip(rows, x))), norm=norm),
                    (scatter((T, COLUMNS), 'float64', dict(zip(rows, y))),),
                    call=lambda launch, tensors: launch(*tensors.values(), EPS), simulation=dict(origin=(T - 2, 0, 0)))


def far_logits(rng: np.random.Generator) -> tuple[SparseArray, np.ndarray, int]:
    "Draw the last row of so many that there are more than 2**31 logits; the row, and how many rows there are."
    R, row = WRAPS[0] // VOCABULARY + 2, rng.standard_normal(VOCABULARY).astype(np.float32)
    return scatter((R, VOCABULARY), 'float32', {R - 1: row}), row, R


class FarTopTokenCases(FarCases):
    "`launch(logits, k)`: the largest logits of the last row."

    @staticmethod
    def make_case(rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw a row."
        logits, row, R = far_logits(rng)
        ids = np.argsort(-row, kind='stable')[:3]
        want = (scatter((R, 3), 'float64', {R - 1: x}) for x in (ids, row[ids].astype(np.float64) - row.max()))
        return Case(dict(logits=logits), tuple(want), call=lambda launch, tensors: launch(tensors['logits'], 3),
                    simulation=dict(origin=(R - 1, 0, 0)))


class FarPenaltyCases(FarCases):
    "`launch(logits, seen, counts, begins, settings)`: the last row has one token that was seen."

    @staticmethod
    def make_case(rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw a row."
        logits, row, R = far_logits(rng)
        settings = np.ones((R, 8), np.float32)
        settings[:, 6:] = 0.5, 0.25
        begins = np.append(np.zeros(R), 1).astype(np.int32)
        want = row.astype(np.float64)
        want[77] -= 0.5 + 2 * 0.25
        return Case(dict(logits=logits, seen=np.int32([77]), counts=np.int32([2]), begins=begins, settings=settings),
                    (scatter(logits.shape, 'float64', {R - 1: want}),), simulation=dict(origin=(R - 1, 0, 0)))


class FarConstraintCases(FarCases):
    "`launch(logits, x, steps)`: the last row has an edit."

    @staticmethod
    def make_case(rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw a row."
        logits, row, R = far_logits(rng)
        x = dict(masked=np.zeros(R), edges=np.append(np.zeros(R), 1), edited=np.array([77]), step_to_slot=np.zeros(1),
                 step_counter=np.zeros(1))
        want = row.astype(np.float64)
        want[77] += 3
        masks = SparseArray((R * VOCABULARY // 32,), 'int32')
        inputs = dict(logits=logits, masks=masks, adds=np.float32([3])) | {k: v.astype(np.int32) for k, v in x.items()}
        return Case(inputs, (scatter(logits.shape, 'float64', {R - 1: want}),), call=FarConstraintCases.call,
                    simulation=dict(origin=(0, R - 1, 0)))

    @staticmethod
    def call(launch: Callable, tensors: dict[str, Tensor]) -> Tensor:
        "Hand over the logits, and all else by name."
        return launch(tensors['logits'], {name: t for name, t in tensors.items() if name != 'logits'})


class FarSampleCases(FarCases):
    "`launch(logits, settings)`: the token of the last row, which is drawn."

    @staticmethod
    def make_case(rng: np.random.Generator, n: int, dtype: str, limits: CaseLimits) -> Case:
        "Draw five likely tokens; all others have weights that a sum in half rounds down. The third one is drawn."
        row, R = np.full(VOCABULARY, np.log(0.5306), np.float32), WRAPS[0] // VOCABULARY + 2
        kept = np.sort(rng.permutation(VOCABULARY)[:5])
        row[kept] = rng.uniform(-0.1, 0, 5)
        logits = scatter((R, VOCABULARY), 'float32', {R - 1: row})
        p = np.exp(row[kept].astype(np.float64) - row.max())
        settings = np.tile(np.float32(pack_sampling_params(SamplingParams(top_k=5, seed=0))), (R, 1))
        settings[:, 4] = (p[:2].sum() + p[2] / 2) / p.sum()
        parts = row[kept[2]] - row.max(), np.exp(row.astype(np.float64) - row.max()).sum()
        want = SparseArray((R,), 'float64', {R - 1: kept[2:3]}), scatter((R, 2), 'float64', {R - 1: np.array(parts)})
        return Case(dict(logits=logits, settings=settings), want, simulation=dict(origin=(R - 1, 0, 0)))


FAR_ROPE, FAR_ROWS, FAR_NORM = FarRopeCases(), FarRowCases(), FarNormCases()
FAR_TOP_TOKENS, FAR_PENALTIES, FAR_CONSTRAINTS = FarTopTokenCases(), FarPenaltyCases(), FarConstraintCases()
FAR_SAMPLE = FarSampleCases()
