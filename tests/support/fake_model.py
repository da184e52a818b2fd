"A fake model for tests of the scheduler: the next token is a function of all tokens before it."
import random
from zlib import crc32

VOCAB, EOS = 40, 0


def next_token(ids):
    "The token after these."
    return crc32(bytes(ids)) % VOCAB


def prompt(n, seed=0):
    "Token ids of a prompt."
    rng = random.Random(f'{n} {seed}')
    return [rng.randrange(VOCAB) for _ in range(n)]


def alone(prompt_ids, params):
    "Tokens, prompt included, and finish reason of a request without a scheduler."
    ids, output = list(prompt_ids), []
    while len(output) < params.max_tokens:
        output.append(next_token(ids + output))
        if output[-1] == EOS and not params.ignore_eos or output[-1] in params.stop_token_ids:
            return ids + output, 'stop'
    return ids + output, 'length'
