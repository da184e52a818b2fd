"Many readers of one engine: each gets its answer, at its pace, and its errors."
import asyncio
import threading

import pytest

from support.engines import model, greedy, is_greedy, all_free  # noqa: F401
from tinyvllm.engine.llm import LLM, LLMEngine
from tinyvllm.engine.async_llm import AsyncLLM
from tinyvllm.errors import BadInput


async def read(engine, prompt, params, **more):
    "All token ids of a stream, and how often it yielded."
    times = 0
    async for out in engine.generate(prompt, params, **more):
        times += 1
        await asyncio.sleep(0)
    return out.outputs[0].token_ids, times


def test_async_streams_are_the_batch(model):
    llm = LLM(model, num_blocks=32)
    prompts = [[1, 2, 3], [4, 5], [6]]
    want = [out.outputs[0].token_ids for out in llm.generate(prompts, greedy(6), use_tqdm=False)]

    async def main():
        engine = AsyncLLM(llm.engine)
        try:
            streams = (read(engine, p, greedy(6)) for p in prompts)
            return await asyncio.gather(*streams)
        finally:
            engine.shutdown()
    assert [tokens for tokens, _ in asyncio.run(main())] == want and all_free(llm)


def test_a_slow_reader_holds_up_no_other_and_misses_nothing(model):
    llm = LLM(model, num_blocks=32)

    async def main():
        engine, fast_has_ended = AsyncLLM(llm.engine), asyncio.Event()

        async def read_slowly():
            times = 0
            async for out in engine.generate([1, 2, 3], greedy(12)):
                times += 1
                await fast_has_ended.wait()
            return out.outputs[0].token_ids, times
        slow = asyncio.create_task(read_slowly())
        fast, _ = await read(engine, [4, 5], greedy(12))
        fast_has_ended.set()
        answer, times = await slow
        engine.shutdown()
        return fast, answer, times
    fast, answer, times = asyncio.run(asyncio.wait_for(main(), 120))
    assert is_greedy(model, [4, 5], fast) and is_greedy(model, [1, 2, 3], answer) and len(answer) == len(fast) == 12
    assert times <= 6    # what came while it waited, it read at once


def test_leaving_a_stream_aborts_its_request_and_no_other(model):
    llm = LLM(model, num_blocks=64)

    async def main():
        engine = AsyncLLM(llm.engine)

        async def leaves():
            async for out in engine.generate([9, 9], greedy(800), request_id='x'):
                if len(out.outputs[0].token_ids) >= 2:
                    return
        stays = asyncio.create_task(read(engine, [1, 2, 3], greedy(10)))
        await leaves()
        tokens, _ = await stays
        cancelled = asyncio.create_task(read(engine, [7], greedy(800)))
        await asyncio.sleep(0.5)
        cancelled.cancel()
        again, _ = await read(engine, [9, 9], greedy(2), request_id='x')
        engine.shutdown()
        return tokens, again
    tokens, again = asyncio.run(main())
    assert is_greedy(model, [1, 2, 3], tokens) and is_greedy(model, [9, 9], again)
    assert all_free(llm) and not llm.engine.core.has_work


async def wait_for_request(llm):
    "Wait until a request has reached the engine."
    while not llm.engine.scheduler.sequences:
        await asyncio.sleep(0.001)


def test_async_errors_reach_their_caller_only(model):
    llm = LLM(model, num_blocks=64)

    async def fails(coroutine, kind, names):
        with pytest.raises(kind, match=names):
            await coroutine

    async def main():
        engine = AsyncLLM(llm.engine)
        good = asyncio.create_task(read(engine, [1, 2, 3], greedy(800), request_id='mine'))
        await wait_for_request(llm)
        await fails(read(engine, [1], greedy(2), request_id='mine'), BadInput, "'mine' is in use")
        await fails(read(engine, [], greedy(2)), BadInput, 'empty')
        await fails(read(engine, [1] * 1023 + [2], greedy(2)), BadInput, '1024 tokens')
        await fails(engine.abort('unknown'), BadInput, "'unknown'")
        tokens, _ = await good
        runner, llm.engine.core.runner = llm.engine.runner, lambda batch: 1 / 0
        await fails(read(engine, [1], greedy(2)), ZeroDivisionError, 'division')
        llm.engine.core.runner = runner
        after, _ = await read(engine, [1], greedy(2))
        hanging = asyncio.create_task(read(engine, [5], greedy(900)))
        await wait_for_request(llm)
        engine.shutdown()
        await fails(hanging, RuntimeError, 'shut down')
        await fails(read(engine, [1], greedy(2)), RuntimeError, 'shut down')
        return tokens, after
    tokens, after = asyncio.run(main())
    assert is_greedy(model, [1, 2, 3], tokens) and len(tokens) == 800 and is_greedy(model, [1], after)
    assert all_free(llm) and threading.active_count() < 10


def test_abort_ends_the_stream(model):
    llm = LLM(model, num_blocks=64)

    async def main():
        engine = AsyncLLM(llm.engine)
        stream = asyncio.create_task(read(engine, [1, 2, 3], greedy(900), request_id=1))
        await wait_for_request(llm)
        await engine.abort(1)
        tokens, _ = await stream
        engine.shutdown()
        return tokens
    tokens = asyncio.run(main())
    assert len(tokens) < 900 and is_greedy(model, [1, 2, 3], tokens) and all_free(llm)


def test_a_reader_that_leaves_is_counted_once(model):
    from tinyvllm.engine.outputs import StatLogger

    class Counts(StatLogger):
        def __init__(self): self.events = []
        def record_arrival(self, request): self.events.append('arrived')
        def record_finish(self, request): self.events.append([o.finish_reason for o in request.output.outputs])

    llm = LLM(model, num_blocks=64)
    counts = Counts()

    async def main():
        engine = AsyncLLM(LLMEngine(llm.engine.core, model.config, stats=counts))
        stream = await engine.submit([1, 2, 3], greedy(900))
        await anext(stream)
        stream.close(); stream.close()
        tokens, _ = await read(engine, [1, 2, 3], greedy(3))
        with pytest.raises(BadInput):
            await engine.submit([1] * 2000, greedy(900))
        assert engine.is_alive
        engine.shutdown(); engine.shutdown()
        assert not engine.is_alive
    asyncio.run(main())
    assert counts.events == ['arrived', ['abort'], 'arrived', ['length']] and all_free(llm)


def test_a_fault_on_the_thread_reaches_its_readers(model):
    llm = LLM(model, num_blocks=64)

    async def main():
        engine = AsyncLLM(llm.engine)

        def dies(batch): raise SystemExit
        llm.engine.core.runner = dies
        with pytest.raises(SystemExit):
            await read(engine, [1, 2, 3], greedy(3))
        assert not engine.is_alive
    asyncio.run(main())


def test_an_id_can_be_used_again_when_its_reader_has_left(model):
    "What the engine reports of the aborted request reaches no reader of the new one."
    llm = LLM(model, num_blocks=64)

    async def main():
        engine = AsyncLLM(llm.engine)
        for _ in range(3):
            stream = await engine.submit([9, 9], greedy(900), request_id='x')
            await anext(stream)
            stream.close()
        tokens, _ = await read(engine, [9, 9], greedy(4), request_id='x')
        engine.shutdown()
        return tokens
    tokens = asyncio.run(main())
    assert len(tokens) == 4 and is_greedy(model, [9, 9], tokens) and all_free(llm) and not llm.engine.requests
