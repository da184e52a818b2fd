"""Do constrained answers obey their schemas? Random JSON schemas, a small model, temperature 1.

    python benchmarks/json_schemas.py                # 200 schemas; adds a row to benchmarks/results/control.jsonl
    python benchmarks/json_schemas.py --schemas 20   # prints only

SmolLM2 gets each schema in its prompt, with `structured_outputs`; the first 40 also without. An answer counts as valid if
`jsonschema` accepts it; one that was cut by `max_tokens` is counted apart. Needs `pip install jsonschema`.
"""
import argparse
import json
import random
import time
from importlib.metadata import version

import jsonschema
from common import RESULTS, write_row
from tinyvllm.engine.llm import LLM
from tinyvllm.measure import machine_name
from tinyvllm.sampling.params import SamplingParams, StructuredOutputs
from tinygrad import Device

OUT = RESULTS / 'control.jsonl'
PATTERNS = '^[a-z]+[0-9]?$', '^[A-Z]{2}-[0-9]{3}$', '^(red|green|blue)$', '[0-9]{1,4}$'
FORMATS = 'date', 'email', 'ipv4', 'uuid'
WORDS = 'name age city tags price colour kind note size count'.split()


def random_text(rng):
    "A schema of strings."
    low = rng.randrange(4)
    return rng.choice([
        {'type': 'string', 'maxLength': 12}, {'type': 'string', 'minLength': low, 'maxLength': low + rng.randrange(9)},
        {'type': 'string', 'pattern': rng.choice(PATTERNS)}, {'type': 'string', 'format': rng.choice(FORMATS)},
        {'enum': [rng.choice(['a "quoted" word', 'é', '', 'x\\y\n', '日本']), 'plain', 3, None]}])


def random_number(rng):
    "A schema of numbers, or of other single values."
    low = rng.randrange(-1000, 1000)
    return rng.choice([
        {'type': 'integer', 'minimum': low, 'maximum': low + rng.randrange(500)}, {'type': 'boolean'}, {'type': 'null'},
        {'type': 'number', 'minimum': low / 8, 'exclusiveMaximum': low / 8 + 3}, {'const': low},
        {'type': ['integer', 'null'], 'minimum': 0, 'maximum': 99}])


def random_schema(rng, depth=3):
    "A schema whose values are short, so that answers end."
    kind = rng.choice(['text', 'number', 'object', 'object', 'array', 'any']) if depth else rng.choice(['text', 'number'])
    if kind == 'text':
        return random_text(rng)
    if kind == 'number':
        return random_number(rng)
    if kind == 'any':
        return {'anyOf': [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    if kind == 'array':
        low = rng.randrange(3)
        return {'type': 'array', 'items': random_schema(rng, depth - 1), 'minItems': low, 'maxItems': low + rng.randrange(3)}
    names = rng.sample(WORDS, rng.randint(1, 4))
    return {'type': 'object', 'properties': {n: random_schema(rng, depth - 1) for n in names}, 'additionalProperties': False,
            'required': rng.sample(names, rng.randint(0, len(names)))}


def valid(text, schema):
    "Is it JSON, and does it obey?"
    try:
        judge = jsonschema.Draft202012Validator
        judge(schema, format_checker=judge.FORMAT_CHECKER).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def answers(llm, schemas, constrained, max_tokens):
    "An answer to each schema, in one batch: (text, finish reason, error)."
    prompts = [llm.engine.tokenizer.apply_chat_template([{'role': 'user', 'content': f'Write JSON that follows this '
               f'schema, nothing else: {json.dumps(s)}'}]) for s in schemas]
    params = [SamplingParams(max_tokens=max_tokens, temperature=1, seed=i, structured_outputs=StructuredOutputs(json=s)
                             if constrained else None) for i, s in enumerate(schemas)]
    outs = llm.generate(prompts, params, use_tqdm=False)
    return [(out.outputs[0].text, out.outputs[0].finish_reason, out.error) for out in outs]


def judged(llm, schemas, constrained, max_tokens=200):
    "How many answers are valid, how many were cut; those that are neither."
    done, bad, cut = answers(llm, schemas, constrained, max_tokens), [], 0
    for (text, reason, error), schema in zip(done, schemas):
        if reason == 'length':
            cut += 1
        elif error or not valid(text, schema):
            bad.append((schema, text, error))
    return len(done) - cut - len(bad), cut, bad


def main():
    args = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    args.add_argument('--schemas', type=int, default=200)
    args.add_argument('--seed', type=int, default=0)
    args = args.parse_args()
    rng, start = random.Random(args.seed), time.perf_counter()
    llm, schemas = LLM('smollm2', num_blocks=600, max_num_seqs=16), [random_schema(rng) for _ in range(args.schemas)]
    right, cut, bad = judged(llm, schemas, constrained=True)
    for schema, text, error in bad:
        print('INVALID', json.dumps(schema), repr(text), repr(error))
    free, free_cut, _ = judged(llm, schemas[:40], constrained=False)
    row = dict(what='json schemas', schemas=args.schemas, valid=right, cut=cut, invalid=len(bad),
               free=min(40, args.schemas), free_valid=free, free_cut=free_cut, model='SmolLM2-135M', temperature=1, seed=args.seed,
               seconds=round(time.perf_counter() - start), machine=machine_name(Device.DEFAULT), device=Device.DEFAULT,
               llguidance=version('llguidance'), tinygrad=version('tinygrad'))
    print(row)
    if args.schemas >= 200:
        write_row(OUT, row)


if __name__ == '__main__':
    main()
