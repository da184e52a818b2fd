"A terminal's view of a running server: `tinyvllm top`."
import http.client
import json
import math
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from tinyvllm.errors import BadInput

URL = 'http://127.0.0.1:8000'
TIMEOUT = 20    # seconds without data from the server
EXAMPLES = """\
examples:
  tinyvllm top                                     the server on this machine
  tinyvllm top http://192.168.1.7:8000 --api-key-file key.txt
  tinyvllm top --count 1 --json                    one look, for a program
A terminal shows one picture that changes; a file or a pipe gets a line a second. Ctrl-C leaves.
The key may also stand in $TINYVLLM_API_KEY."""


def top_options(p) -> None:
    "Which server, and how often."
    p.add_argument('url', nargs='?', default=URL, help=f'default {URL}')
    p.add_argument('--api-key-file', metavar='FILE', help='its first line is the key')
    p.add_argument('--count', type=int, metavar='N', help='how many looks, one a second; default: until Ctrl-C')
    p.add_argument('--json', action='store_true', help='print the snapshots of the server, a JSON object a line')


def top(args) -> int:
    "`tinyvllm top`: show what a server does, until it stops or you do. Raises `BadInput`."
    if args.count is not None and args.count < 1:
        raise BadInput(f'--count is {args.count}; use 1 or more')
    drawn = sys.stdout.isatty() and not args.json
    try:
        for n, stats in enumerate(watch(args.url, api_key(args.api_key_file)), 1):
            show(stats, args.json, drawn)
            if n == args.count:
                break
    except KeyboardInterrupt:
        print()
    return 0


def api_key(path: str | None) -> str | None:
    "The first line of a file, or the environment's; raises `BadInput`."
    if path is None:
        return os.environ.get('TINYVLLM_API_KEY')
    key = secret(path, 'key').partition('\n')[0].strip()
    if not key or not key.isascii() or not key.isprintable():
        raise BadInput(f'the first line of {path} is no key')
    return key


def secret(path: str, what: str) -> str:
    "The text of a file. Raises `BadInput`."
    try:
        return Path(path).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, 'strerror', None) or 'it is not UTF-8 text'
        raise BadInput(f'cannot read the {what} in {path}: {why}') from None


# --- asking ------------------------------------------------------------------------------------------------

class NoRedirect(urllib.request.HTTPRedirectHandler):
    "Refuses redirects: another host must not get the key."

    def redirect_request(self, *_):
        "Follow no redirect."
        return None


def watch(url: str, key: str | None) -> Iterator[dict]:
    "Yield the server's snapshots, one a second; wait while it loads. Raises `BadInput`."
    while True:
        try:
            with connect(url, key) as stream:
                yield from snapshots(stream, url)
            return
        except Loading as error:
            print(error, file=sys.stderr)
            time.sleep(1)


class Loading(Exception):
    "The server is not ready; the message is its reason."


def connect(url: str, key: str | None):
    "An open stream of `/stats`. Raises `BadInput`, and `Loading` for a 503."
    if urlsplit(url).scheme not in ('http', 'https') or not urlsplit(url).hostname:
        raise BadInput(f'{url!r} is no address of a server; {URL} is one')
    request = urllib.request.Request(url.rstrip('/') + '/stats', headers={'Accept': 'text/event-stream'})
    if key:
        request.add_unredirected_header('Authorization', f'Bearer {key}')
    try:
        return urllib.request.build_opener(NoRedirect).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            raise refusal(error, url) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise BadInput(f'no server at {url}: {plain(getattr(error, "reason", None) or error)}') from None


def refusal(error: urllib.error.HTTPError, url: str) -> Exception:
    "Why the server does not show its numbers."
    if error.code == 401:
        return BadInput(f'{url} needs a key: --api-key-file FILE, or $TINYVLLM_API_KEY')
    if error.code != 503:
        return BadInput(f'{url}/stats answers {error.code}; is it a tinyvllm server?')
    try:
        return Loading(plain(json.loads(error.read(10_000))['error']['message']))
    except (OSError, ValueError, TypeError, KeyError):
        return Loading('the server is not ready')


def snapshots(stream, url: str) -> Iterator[dict]:
    "Yield the events of a stream. Raises `BadInput` for anything else, and when no data comes."
    try:
        while line := stream.readline(100_000):
            if line.startswith(b'data:') and line.strip() != b'data: [DONE]':
                yield checked(json.loads(line[5:]))
    except (ValueError, TypeError, KeyError):
        raise BadInput(f'{url}/stats does not answer like a tinyvllm server') from None
    except (OSError, http.client.HTTPException) as error:
        raise BadInput(f'{url} stopped sending: {plain(error)}') from None


NUMBERS = ('tok_s', 'prompt_tok_s', 'running', 'waiting', 'kv_usage', 'num_blocks', 'fragmentation', 'preemptions',
           'requests', 'memory_bytes', 'uptime_s')


def checked(stats: dict) -> dict:
    "With numbers where numbers belong; raises `TypeError` or `KeyError`."
    for name in NUMBERS:
        if type(stats[name]) not in (int, float) or not math.isfinite(stats[name]):
            raise TypeError(name)
    return stats


def plain(text) -> str:
    "One line that a terminal can print."
    return ''.join(c if c.isprintable() else ' ' for c in str(text))[:200]


# --- showing -----------------------------------------------------------------------------------------------

def show(stats: dict, as_json: bool, drawn: bool) -> None:
    "A JSON line, a line of text, or a picture over the one before."
    if as_json:
        print(json.dumps(stats), flush=True)
    elif drawn:
        print('\x1b[H\x1b[2J' + picture(stats), flush=True)
    else:
        print(line(stats), flush=True)


def line(stats: dict) -> str:
    "Format a snapshot as one line: speeds, requests, blocks."
    return (f'{stats["tok_s"]:8.1f} tok/s  prompts {stats["prompt_tok_s"]:8.1f} tok/s  running {stats["running"]:4.0f}  '
            f'waiting {stats["waiting"]:4.0f}  blocks {stats["kv_usage"]:6.1%}')


def picture(stats: dict, width: int = 40) -> str:
    "Format all of a snapshot as a block of text."
    filled = round(min(1, max(0, stats['kv_usage'])) * width)
    lines = [
        f'speed     {stats["tok_s"]:,.1f} tok/s answered, {stats["prompt_tok_s"]:,.1f} tok/s of prompts read',
        f'requests  {stats["running"]:.0f} running, {stats["waiting"]:.0f} waiting, {stats["requests"]:,.0f} ever'
        + counts(stats.get('ended')) + counts(stats.get('rejected'), 'turned away: '),
        f'blocks    [{"#" * filled}{"." * (width - filled)}] {stats["kv_usage"]:.1%} of {stats["num_blocks"]:,.0f}',
        f'          {stats["fragmentation"]:.1%} of their slots empty, {stats["preemptions"]:,.0f} preemptions',
        f'waits     first token {spread(stats.get("ttft_s"))}, next token {spread(stats.get("gap_s"))}',
        f'step      {parts(stats.get("step_us"))}',
        f'memory    {stats["memory_bytes"] / 1e9:.2f} GB, up {stats["uptime_s"] / 60:,.0f} min']
    return '\n'.join(lines)


def numbers(value) -> dict[str, float]:
    "The numbers of an object, by name."
    found = value.items() if isinstance(value, dict) else ()
    return {plain(k): v for k, v in found if type(v) in (int, float) and math.isfinite(v)}


def counts(value, before: str = '') -> str:
    "Format the counts that are not zero."
    found = ', '.join(f'{n:,.0f} {k}' for k, n in numbers(value).items() if n)
    return f'\n          {before}{found}' if found else ''


def spread(value) -> str:
    "Format a median and a 99th percentile."
    found = numbers(value)
    if 'p50' not in found or 'p99' not in found:
        return '-'
    return f'{seconds(found["p50"])} (99 %: {seconds(found["p99"])})'


def seconds(s: float) -> str:
    "Format seconds with a fitting unit."
    return f'{s:.1f} s' if s >= 1 else f'{s * 1e3:.0f} ms' if s >= 0.01 else f'{s * 1e3:.1f} ms'


def parts(value) -> str:
    "Where the time of a step goes."
    return ', '.join(f'{k} {us:,.0f} µs' for k, us in numbers(value).items()) or '-'
