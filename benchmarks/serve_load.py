"""A bad day for a server: 64 streams, people who hang up, people who read a byte a second, far too many at once.

    python benchmarks/serve_load.py                          # five minutes; adds a row to results/serve_load.jsonl
    python benchmarks/serve_load.py --seconds 60 --streams 32 --num-blocks 96

A `tinyvllm serve` is started with a pool of blocks that is too small for all streams, so that it preempts, and a short
queue. Against it, all at the same time: readers that check that each answer has exactly the tokens it asked for, half
of them streams and half plain calls; clients that drop the connection at any byte of their request, or in the middle
of the answer; readers of one byte a second; bursts of ten times the queue; and `/health`, five times a second. At the
end everybody leaves, and the blocks must be free. The row tells the counts and, under `checks`, what was true.
"""
import argparse
import asyncio
import json
import random
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import tinyvllm  # noqa: F401  picks device and compiler before tinygrad looks
from common import RESULTS, write_row


@dataclass
class Day:
    "What happens, and what has happened."
    port: int
    seconds: float = 300
    streams: int = 64          # readers at the same time
    droppers: int = 8
    slow: int = 4              # readers of a byte a second
    queue: int = 16            # of the server
    burst_every: float = 30    # seconds
    longest: int = 48          # tokens of a prompt, and of an answer
    pid: int | None = None     # of the server, to watch its memory
    seed: int = 0
    counts: dict = field(default_factory=dict)
    wrong: list = field(default_factory=list)      # what must never be
    health: list = field(default_factory=list)     # seconds
    memory: list = field(default_factory=list)     # bytes

    def count(self, name: str, n: int = 1) -> None: self.counts[name] = self.counts.get(name, 0) + n

    @property
    def over(self) -> bool: return time.monotonic() >= self.end


def as_http(body: dict | None, path: str = '/v1/completions') -> bytes:
    "A request on a connection of its own."
    raw = json.dumps(body).encode() if body is not None else b''
    head = f'{"POST" if raw else "GET"} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n'
    return f'{head}Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n'.encode() + raw


async def send(day: Day, data: bytes, small: bool = False):
    "A connection over which this was sent; `small`: the system buffers next to nothing."
    sock = socket.socket()
    if small: sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ('127.0.0.1', day.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=2**20)
    writer.write(data)
    await writer.drain()
    return reader, writer


async def head(reader) -> tuple[int, dict]:
    "Status and headers."
    lines = (await reader.readuntil(b'\r\n\r\n')).decode().split('\r\n')
    return int(lines[0].split()[1]), {k.lower(): v for k, _, v in (line.partition(': ') for line in lines[1:])}


def draw(day: Day, rng: random.Random, **more) -> dict:
    "A request, and how many tokens it must get."
    prompt = [rng.randrange(200) for _ in range(rng.randint(1, day.longest))]
    return dict(prompt=prompt, max_tokens=rng.randint(1, day.longest), ignore_eos=True, return_token_ids=True,
                temperature=rng.choice([0, 1]), seed=rng.randrange(2**31)) | more


async def streamed(reader) -> tuple[int, dict | None]:
    "Tokens of a stream, and the usage at its end; None without an end."
    tokens, usage, done = 0, None, False
    async for line in reader:
        if line.startswith(b'data: [DONE]'): done = True
        elif line.startswith(b'data: '):
            event = json.loads(line[6:])
            if 'error' in event: return tokens, None
            tokens += sum(len(choice['token_ids']) for choice in event['choices'])
            usage = event.get('usage') or usage
    return tokens, usage if done else None


async def one(day: Day, body: dict) -> None:
    "Ask and check; a refusal must say when to come back."
    reader, writer = await send(day, as_http(body))
    try:
        status, headers = await head(reader)
        if status == 429:
            day.count('refused')
            if not headers.get('retry-after', '').isdigit(): day.wrong.append('429 without Retry-After')
            return await asyncio.sleep(1)
        if status != 200: return day.wrong.append(f'status {status}: {(await reader.read(300)).decode()}')
        if body.get('stream'): tokens, usage = await streamed(reader)
        else:
            reply = json.loads(await reader.read())
            tokens, usage = len(reply['choices'][0]['token_ids']), reply['usage']
        told = usage and usage['completion_tokens']
        if not tokens == told == body['max_tokens']:
            day.wrong.append(f"{tokens} tokens came, {told} were told, {body['max_tokens']} were due")
        day.count('finished'); day.count('tokens', tokens)
    finally: writer.close()


async def reading(day: Day, rng: random.Random) -> None:
    "One reader after the other."
    while not day.over:
        stream = dict(stream=True, stream_options={'include_usage': True}) if rng.random() < 0.5 else {}
        await one(day, draw(day, rng, **stream))


async def dropping(day: Day, rng: random.Random) -> None:
    "Hang up: in the request, before the answer, in the answer."
    while not day.over:
        data = as_http(draw(day, rng, stream=rng.random() < 0.7, max_tokens=4 * day.longest))
        cut = rng.choice([rng.randrange(len(data)), len(data), len(data)])
        reader, writer = await send(day, data[:cut])
        if cut == len(data):
            try: await asyncio.wait_for(reader.read(rng.choice([1, 400, 4000])), rng.random() * 3)
            except TimeoutError: pass
        writer.transport.abort() if rng.random() < 0.5 else writer.close()
        day.count('dropped')
        await asyncio.sleep(rng.random() / 4)


async def crawling(day: Day, rng: random.Random) -> None:
    "A byte a second, to the end of the day."
    body = draw(day, rng, stream=True, n=8, logprobs=5, max_tokens=day.longest)
    reader, writer = await send(day, as_http(body), small=True)
    while not day.over:
        day.count('slow_bytes', len(await reader.read(1)))
        await asyncio.sleep(1)
    writer.close()


async def bursting(day: Day, rng: random.Random) -> None:
    "Ten times the queue at once."
    while not day.over:
        bodies = [draw(day, rng, max_tokens=4) for _ in range(10 * day.queue)]
        day.count('bursts')
        await asyncio.gather(*(one(day, body) for body in bodies))
        await asyncio.sleep(day.burst_every * (0.5 + rng.random()))


def probe(port: int, seconds: float) -> None:
    "Ask for `/health` five times a second, from a process of its own: nothing else here may delay it."
    times, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.perf_counter()
        with socket.create_connection(('127.0.0.1', port)) as s:
            s.sendall(as_http(None, '/health'))
            ok = s.recv(100).startswith(b'HTTP/1.1 200')
        times.append((time.perf_counter() - start) if ok else float('inf'))
        time.sleep(0.2)
    print(json.dumps(times))


async def watching(day: Day) -> None:
    "How long `/health` takes, and how much memory the server has."
    command = sys.executable, __file__, '--probe', str(day.port), str(day.seconds)
    prober = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    while not day.over:
        if day.pid: day.memory.append(psutil.Process(day.pid).memory_info().rss)
        await asyncio.sleep(0.2)
    day.health = json.loads((await prober.communicate())[0])
    if float('inf') in day.health: day.wrong.append('/health was not 200')


async def stats(day: Day) -> dict:
    "What the engine says about itself."
    reader, writer = await send(day, as_http(None, '/stats'))
    async for line in reader:
        if line.startswith(b'data: '):
            writer.close()
            return json.loads(line[6:])


async def live(day: Day) -> dict: # the row
    "The whole day, and the quiet after it."
    before, day.end = await stats(day), time.monotonic() + day.seconds
    rngs = [random.Random(day.seed + i) for i in range(day.streams + day.droppers + day.slow + 1)]
    jobs = [reading] * day.streams + [dropping] * day.droppers + [crawling] * day.slow + [bursting]
    await asyncio.gather(watching(day), *(job(day, rng) for job, rng in zip(jobs, rngs)))
    for _ in range(600):
        after = await stats(day)
        if not after['running'] and not after['waiting']: break
        await asyncio.sleep(0.1)
    return report(day, before, after)


def report(day: Day, before: dict, after: dict) -> dict:
    "Counts and checks."
    health, quarter = sorted(day.health), len(day.memory) // 4
    at = lambda share: round(1000 * health[min(len(health) - 1, int(share * len(health)))], 1)
    row = dict(seconds=day.seconds, streams=day.streams, droppers=day.droppers, slow_readers=day.slow,
               queue=day.queue, **day.counts, preemptions=after['preemptions'] - before['preemptions'],
               num_blocks=after['num_blocks'], free_before=before['free_blocks'], free_after=after['free_blocks'],
               health_ms=dict(n=len(health), p50=at(0.5), p99=at(0.99), max=at(1), over_100=sum(t > 0.1 for t in health)),
               wrong=day.wrong[:5])
    if quarter:
        second, last = (sorted(day.memory[i * quarter:(i + 1) * quarter])[quarter // 2] for i in (1, 3))
        row['memory_mb'] = dict(second_quarter=round(second / 1e6, 1), last_quarter=round(last / 1e6, 1),
                                most=round(max(day.memory) / 1e6, 1))
    checks = dict(answers_exact=not day.wrong, blocks_free=row['free_before'] == row['free_after'],
                  nobody_left=not after['running'] and not after['waiting'], preempted=row['preemptions'] > 0,
                  refused=day.counts.get('refused', 0) > 0, health_below_100_ms=row['health_ms']['max'] < 100)
    if quarter: checks['memory_flat'] = last - second < 0.02 * second
    return row | dict(checks=checks)


def main() -> int:
    if sys.argv[1:2] == ['--probe']: return probe(int(sys.argv[2]), float(sys.argv[3]))
    from serve_speed import our_server
    from tinyvllm.measure import machine_name
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--seconds', type=float, default=300)
    p.add_argument('--streams', type=int, default=64)
    p.add_argument('--queue', type=int, default=16)
    p.add_argument('--num-blocks', type=int, default=128)
    p.add_argument('--model', default='smollm2')
    p.add_argument('--out', type=Path, default=RESULTS / 'serve_load.jsonl', help='the row is added here')
    args = p.parse_args()
    with our_server('--model', args.model, '--num-blocks', args.num_blocks, '--max-queue', args.queue,
                    '--max-num-seqs', args.streams) as (process, port):
        day = Day(port, args.seconds, args.streams, queue=args.queue, pid=process.pid)
        row = dict(model=args.model) | asyncio.run(live(day))
    write_row(args.out, row | dict(machine=machine_name()))
    print(json.dumps(row, indent=1))
    return 0 if all(row['checks'].values()) else 1


if __name__ == '__main__':
    sys.exit(main())
