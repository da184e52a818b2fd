"""What does it cost to sample only tokens that are allowed?

    python benchmarks/control.py              # prints rows and adds them to benchmarks/results/control.jsonl
    python benchmarks/control.py --dry        # prints only

`mask`: microseconds to consume a token and to compute the next mask, along answers that are drawn at random from what is
allowed. `admission`: milliseconds until a grammar is ready: its trial in a process of its own, compiling, and both for one
that is known. `kernel`: microseconds of `apply_constraints` for a row, replayed. `step`: milliseconds of a step of SmolLM2 for sequences
that are free, biased, or held by a grammar, in turns, the median of each; and the kernels of their graphs. Times are the
processor's, of the thread that works (on a GPU: the clock's), so that neighbours count less. How schemas are obeyed is in
`json_schemas.py`.
"""
import argparse
import json
import resource
import time
from importlib.metadata import version

import numpy as np
import tinyvllm  # noqa: F401  picks device and compiler before tinygrad looks
from common import RESULTS, write_row
from tinygrad import Device, Tensor
from tinyvllm.kernels.masks import apply_constraints
from tinyvllm.sampling.logits_processors import pack_mask, unpack_mask
from tinyvllm.sampling.structured_output import bind_grammar, convert_grammar, get_grammar_cache, run_trial
from tinyvllm.engine.llm import LLM
from tinyvllm.measure import machine_name
from tinyvllm.runner.graphs import capture
from tinyvllm.sampling.params import SamplingParams, StructuredOutputs
from tinyvllm.models.tokenizer_files import load_tokenizer
from tinyvllm.models.hub import resolve

OUT = RESULTS / 'control.jsonl'
PERSON = {'type': 'object', 'properties': {'name': {'type': 'string'}, 'age': {'type': 'integer'}, 'tags': {
    'type': 'array', 'items': {'type': 'string'}}}, 'required': ['name', 'age', 'tags'], 'additionalProperties': False}
FIELDS = [f'p{i}' for i in range(500)]
MANY = {'type': 'object', 'properties': {name: {'type': 'string'} for name in FIELDS}, 'required': FIELDS}
SUMS = 'start: e\ne: t | e ("+" | "-") t\nt: f | t ("*" | "/") f\nf: /[0-9]+/ | "(" e ")"'
GRAMMARS = {'json_object': dict(json_object=True), 'json schema, 3 fields': dict(json=PERSON),
            'json schema, 500 fields': dict(json=MANY), 'enum of 4,000': dict(json={'enum': [f'value {i}' for i in range(4000)]}),
            'regex': dict(regex=r'\([0-9]{3}\) [0-9]{3}-[0-9]{4}( ext\. [0-9]+)?'), 'regex that counts': dict(regex='[a-z ]{400}'),
            'choice of 2': dict(choice=['yes', 'no']), 'sums (Lark)': dict(grammar=SUMS)}
ROUNDS, TOKENS = 8, 24
CLOCK = time.thread_time if Device.DEFAULT == 'CPU' else time.perf_counter


def masks(tokenizer, outputs, walks=12, most=40):
    "Microseconds of each step of a grammar: consume a token, compute a mask."
    V, rng, took = tokenizer.vocab_size, np.random.default_rng(0), []
    for _ in range(walks):
        grammar, output = bind_grammar(StructuredOutputs(**outputs), tokenizer, V), []
        while len(output) < most and not (output and output[-1] in tokenizer.eos_ids):
            start = CLOCK()
            mask = grammar.compute_mask(output)
            took.append((CLOCK() - start) * 1e6)
            output.append(int(rng.choice(unpack_mask(mask, V).nonzero()[0])))
    return took


def admission(tokenizer, outputs):
    "Milliseconds of the trial, of compiling, and of both for a grammar that is known."
    V, shape = tokenizer.vocab_size, StructuredOutputs(**outputs)
    cache, times = get_grammar_cache(tokenizer, V), []
    kind = next(k for k in ('json', 'regex', 'choice', 'grammar') if getattr(shape, k) is not None)
    text = getattr(shape, kind) if kind != 'choice' else json.dumps(shape.choice)
    def ready():
        return cache.new_matcher(convert_grammar(shape))
    for ask in (lambda: run_trial(kind, text), ready, ready):
        if len(times) == 1:
            convert_grammar(shape)    # its trial is not counted twice
            cache.matchers.clear()
        start, before = time.thread_time(), resource.getrusage(resource.RUSAGE_CHILDREN)
        ask()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        child = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        times.append((time.thread_time() - start + child) * 1e3)
    return times


def kernel(V, R=8):
    "Microseconds of the kernel for a row with a mask and 8 edits."
    mask = np.tile(pack_mask(range(0, V, 3), V), (R, 1))
    x = dict(masked=np.ones(R), edges=np.arange(R + 1) * 8, edited=np.tile(np.arange(8) * 50, R))
    x = {name: Tensor(part.astype(np.int32)).realize() for name, part in x.items()}
    x['adds'] = Tensor(np.ones(8 * R, np.float32)).realize()
    logits, words = Tensor.randn(R, V).realize(), Tensor(mask.reshape(-1)).realize()
    slots, counter = (Tensor(np.zeros(4, np.int32)).realize() for _ in range(2))
    x |= dict(masks=words, step_to_slot=slots, step_counter=counter)
    replay, best = capture(lambda: apply_constraints(logits, x).realize()), np.inf
    for _ in range(40):
        start = CLOCK()
        replay()
        Device[Device.DEFAULT].synchronize()
        best = min(best, CLOCK() - start)
    return best / R * 1e6


def step_times(llm, params, n):
    "Seconds of each step in which n sequences decode."
    engine, ids, times = llm.engine, [5] * 8, []
    outs = [engine.add_request(i, ids, params) for i in range(n)]
    engine.step(), engine.step()
    while engine.has_unfinished_requests():
        start = CLOCK()
        engine.step()
        times.append(CLOCK() - start)
    if outs[0].error:
        raise outs[0].error
    return times[:-2]    # the last ones only read tokens


def steps(llm, n):
    "Milliseconds of a step, and kernels, for each kind of request."
    shape = StructuredOutputs(regex='[a-z ]+!{9}')    # it does not end early
    ways = {'free': dict(ignore_eos=True), 'biased': dict(ignore_eos=True, logit_bias={i: -5 for i in range(20)}),
            'grammar': dict(structured_outputs=shape)}
    params = {way: SamplingParams(temperature=0, max_tokens=TOKENS, **more) for way, more in ways.items()}
    times = {way: [] for way in ways}
    for turn in range(ROUNDS + 1):
        for way in ways:
            took = step_times(llm, params[way], n)
            times[way] += took if turn else []    # the first compiles
    graphs = llm.engine.runner.graphs
    free = next(key for key in graphs if key[0] == key[1] == n and key[-1] == ())
    size = {'free': free, 'biased': (*free[:-1], (256 if n > 3 else 64, ())), 'grammar': (*free[:-1], (64, ()))}
    for way in ways:
        yield dict(what='step', way=way, rows=n, ms=round(float(np.median(times[way])) * 1e3, 2),
                   kernels=len(graphs[size[way]].replay.graph.calls))


def main():
    args = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    args.add_argument('--dry', action='store_true', help='write nothing')
    args = args.parse_args()
    tokenizer, rows = load_tokenizer(resolve('smollm2')), []
    start = CLOCK()
    get_grammar_cache(tokenizer, tokenizer.vocab_size)
    rows.append(dict(what='vocabulary', ms=round((CLOCK() - start) * 1e3)))
    for name, outputs in GRAMMARS.items():
        if 'json_object' not in outputs:
            trial, new, known = admission(tokenizer, outputs)
            rows.append(dict(what='admission', grammar=name, trial_ms=round(trial), new_ms=round(new, 2),
                             known_ms=round(known, 3)))
        took = masks(tokenizer, outputs)
        rows.append(dict(what='mask', grammar=name, masks=len(took), mean_us=round(float(np.mean(took)), 1),
                         p99_us=round(float(np.percentile(took, 99)), 1), max_us=round(max(took), 1)))
    rows.append(dict(what='kernel', us=round(kernel(tokenizer.vocab_size), 1)))
    llm = LLM('smollm2', num_blocks=200, max_num_seqs=8)
    for n in (1, 8):
        rows += steps(llm, n)
    about = dict(model='SmolLM2-135M', vocab=tokenizer.vocab_size, machine=machine_name(Device.DEFAULT), device=Device.DEFAULT,
                 llguidance=version('llguidance'), tinygrad=version('tinygrad'))
    for row in rows:
        print(row)
        if not args.dry:
            write_row(OUT, row | about)


if __name__ == '__main__':
    main()
