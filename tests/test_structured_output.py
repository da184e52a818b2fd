"""Structured output: grammars against Python, parsers that follow their outputs, grammars that mean harm."""
import random
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies as st
from support.constraints import answers, cases, engines, model, seeds, tokenizer, tokens  # noqa: F401

from tinyvllm.engine.llm import LLM
from tinyvllm.errors import BadInput
from tinyvllm.sampling import structured_output
from tinyvllm.sampling.logits_processors import unpack_mask
from tinyvllm.sampling.params import SamplingParams, StructuredOutputs
from tinyvllm.sampling.structured_output import GrammarCache, bind_constraints, convert_grammar, get_grammar_cache

form = StructuredOutputs

def grammar_for(tokenizer, V=512, **outputs):
    "The logits processor of a request with only this form."
    params = SamplingParams(structured_outputs=form(**outputs))
    return bind_constraints(params, tokenizer, SimpleNamespace(vocab_size=V)).processors[0]


def accepts(grammar, tokenizer, text):
    "Does the grammar let all of it pass, and an end after it?"
    output = []
    for token in [*tokenizer.encode(text, add_bos=False, parse_special=False), tokenizer.eos_ids[0]]:
        if not unpack_mask(grammar.compute_mask(output), 512)[token]:
            return False
        output.append(token)
    return True


# --- grammars -------------------------------------------------------------------------------------------------

@settings(cases, max_examples=12)
@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=4, unique=True), st.text(min_size=1, max_size=6))
def test_a_choice_is_exactly_its_texts(tokenizer, choice, other):
    "Quotes, bound characters, emoji: whatever JSON can hold."
    grammar = grammar_for(tokenizer, choice=choice)
    assert all(accepts(grammar.copy(), tokenizer, text) for text in choice)
    assert accepts(grammar.copy(), tokenizer, other) == (other in choice)


@pytest.mark.parametrize('pattern', ['a+b?', 'a/b', r'[^\n"]{2}', r'(x|yy)\.z', 'é{2}', r'\d+(\.\d)?'])
def test_a_regex_is_the_same_as_in_python(tokenizer, pattern):
    grammar, rng, alphabet = grammar_for(tokenizer, regex=pattern), random.Random(0), 'abxyz/."é17\n'
    texts = [''.join(rng.choices(alphabet, k=rng.randint(1, 4))) for _ in range(60)] + ['aab', 'a/b', 'yy.z', 'éé', '17.1']
    for text in texts:
        assert accepts(grammar.copy(), tokenizer, text) == bool(re.fullmatch(pattern, text)), text


def test_unused_rows_are_never_allowed(tokenizer):
    "The model has 512 rows, the tokenizer 257 tokens; a special token is no text."
    mask = unpack_mask(grammar_for(tokenizer, regex='(.|\n)+').compute_mask([]), 512)
    assert not mask[257:].any() and not mask[list(tokenizer.special_ids)].any() and mask.sum() > 150


def test_gbnf_and_lark_are_both_grammars(tokenizer):
    for text in ('root ::= "<" [a-z]+ ">"', 'start: "<" /[a-z]+/ ">"'):
        grammar = grammar_for(tokenizer, grammar=text)
        assert accepts(grammar.copy(), tokenizer, '<ab>') and not accepts(grammar.copy(), tokenizer, '<>')


@settings(cases, max_examples=20)
@given(seeds)
def test_a_parser_rolls_back_to_where_outputs_agree(tokenizer, seed):
    "Guesses that were taken back leave nothing."
    rng, first = random.Random(seed), grammar_for(tokenizer, regex='([a-c]{1,3}[0-9]?)+')
    walking, output = first.copy(), []
    for _ in range(12):
        output = output[:rng.randint(max(0, len(output) - 3), len(output))]
        fresh = first.copy()
        mask = unpack_mask(walking.compute_mask(output), 512)
        assert (mask == unpack_mask(fresh.compute_mask(output), 512)).all()
        output.append(rng.choice(mask[:256].nonzero()[0].tolist()))


def test_after_the_end_the_step_that_is_dropped_does_not_fail(tokenizer):
    grammar = grammar_for(tokenizer, choice=['ab'])
    output = [*tokenizer.encode('ab'), tokenizer.eos_ids[0]]
    for n in range(len(output) + 1):
        grammar.compute_mask(output[:n])


def test_answers_of_one_request_have_parsers_of_their_own(engines, tokenizer):
    out, = answers(engines[1], [SamplingParams(temperature=2, max_tokens=30, n=4, seed=5,
                                               structured_outputs=form(regex='[a-z]{3,12}'))])
    texts = {answer.text for answer in out.outputs}
    assert len(texts) > 1 and all(re.fullmatch('[a-z]{3,12}', text) for text in texts)


def test_compiled_cache_are_shared_and_bounded(tokenizer):
    cache = GrammarCache(tokenizer, 512, capacity=3 * 2**20)
    text = [convert_grammar(form(regex=f'a{{{n}}}')) for n in range(1, 6)]
    built = [cache.new_matcher(t) for t in text]
    assert list(cache.matchers) == text[-3:] and len({id(m) for m in built}) == 5
    cache.new_matcher(text[2]), cache.new_matcher(text[0])
    assert list(cache.matchers) == [text[4], text[2], text[0]]    # the least used went


def test_threads_compile_at_the_same_time(tokenizer):
    made, wrong = [], []

    def ask(n):
        try:
            made.append(grammar_for(tokenizer, regex=f'[a-z]{{{n % 3 + 1}}}'))
        except BaseException as error:
            wrong.append(error)
    threads = [threading.Thread(target=ask, args=(n,)) for n in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len({id(grammar.matcher) for grammar in made}) == 9
    assert get_grammar_cache(tokenizer, 512) is get_grammar_cache(tokenizer, 512)


# --- hostile input --------------------------------------------------------------------------------------------

def nested(n, leaf='{"type": "string"}'):
    return '{"items":' * n + leaf + '}' * n


HOSTILE = {
    'unclosed regex': (dict(regex='((('), 'invalid regex'), 'look-ahead': (dict(regex='(?=a)b'), 'invalid regex'),
    'backslash': (dict(regex='ab\\'), 'ends in a backslash'), 'never': (dict(regex=r'[^\s\S]'), 'structured_outputs'),
    'long regex': (dict(regex='a' * 70_000), '70000 bytes'), 'surrogate': (dict(regex='\ud800'), 'not valid Unicode'),
    'no JSON': (dict(json='{"a'), 'not JSON'), 'deep': (dict(json=nested(70)), '71 levels'),
    'very deep': (dict(json='[' * 50_000), 'nested too deeply'), 'false': (dict(json='false'), 'structured_outputs.json'),
    'unknown type': (dict(json='{"type": "strin"}'), 'structured_outputs.json'),
    'not honoured': (dict(json='{"not": {"type": "string"}}'), 'not'),
    'remote': (dict(json='{"$ref": "http://127.0.0.1:9/x.json"}'), 'does not fetch'),
    'a schema in itself': (dict(json='{"allOf": [{"$ref": "#"}]}'), 'structured_outputs'),
    'doubling tokens': (dict(grammar='start: R0\n' + ''.join(f'R{i}: R{i + 1} R{i + 1}\n' for i in range(40)) + 'R40: "a"'),
                        'structured_outputs.grammar'),
    'no grammar': (dict(grammar='hello'), 'structured_outputs.grammar'), 'bad GBNF': (dict(grammar='root ::= ((('), 'grammar'),
    'overflows the stack': (dict(grammar='start: r0\n' + ''.join(f'r{i}: r{i + 1}\n' for i in range(4000)) + 'r4000: "a"'),
                            'too complex'),
    'slow numbers': (dict(json='{"type": "integer", "multipleOf": 999983}'), 'too complex'),
    'never ends': (dict(grammar='start: A\nA: ' + ' & '.join(f'/(.|\\n)*a{i}.{{5}}(.|\\n)*/' for i in range(30))),
                   'too complex'),
    'many choices': (dict(choice=['x' * 50 + str(i) for i in range(2000)]), 'bytes'),
    'choice of half a character': (dict(choice=['\ud83d']), 'structured_outputs.choice'),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_a_hostile_grammar_is_refused_in_time(name, tokenizer, monkeypatch):
    monkeypatch.setattr(structured_output, 'TRIAL_SECONDS', 1)
    outputs, message = HOSTILE[name]
    start = time.process_time()
    with pytest.raises(BadInput, match=re.escape(message)) as error:
        grammar_for(tokenizer, **outputs)
    assert time.process_time() - start < 20    # and not the hour that some would take; a machine may be busy
    assert error.value.param == 'structured_outputs'
    assert len(str(error.value)) < 250 and '\n' not in str(error.value)


@pytest.mark.parametrize('outputs', [dict(regex='[a-z]{1,2000}'), dict(regex='(a{1,9999}){1,9999}'), dict(regex='(.|\n)*a(.|\n){200}'),
                                  dict(json={'enum': [f'value{i}' for i in range(4000)]}), dict(json={'type': 'string', 'maxLength': 10**6}),
                                  dict(json={'type': 'object', 'properties': {f'p{i}': {'type': 'string'} for i in range(500)}}),
                                  dict(grammar='start: e\ne: e e | "a" | "a" "a"'), dict(json=nested(60))])
def test_a_large_grammar_is_allowed_or_refused_but_fast(outputs, tokenizer):
    "A dozen steps along it: neither the compiler nor a mask takes long."
    try:
        grammar, output, slowest, rng = grammar_for(tokenizer, **outputs), [], 0, random.Random(0)
        for _ in range(12):
            start = time.process_time()
            free = unpack_mask(grammar.compute_mask(output), 512).nonzero()[0].tolist()
            slowest = max(slowest, time.process_time() - start)
            output.append(rng.choice(free))
            if output[-1] in tokenizer.eos_ids:
                break
        assert slowest < 5    # 3 ms on a quiet machine
    except BadInput as error:
        assert error.param == 'structured_outputs'


def test_a_bad_grammar_after_a_good_one(engines, tokenizer):
    "vLLM's engine died of this once."
    good = SamplingParams(temperature=0, max_tokens=6, structured_outputs=form(choice=['yes', 'no']))
    first = tokens(answers(engines[1], [good]))
    with pytest.raises(BadInput):
        engines[1].add_request('bad', [1], SamplingParams(structured_outputs=form(regex='(')))
    assert tokens(answers(engines[1], [good])) == first


@pytest.mark.parametrize('which', [0, 1])
def test_a_grammar_that_gives_up_ends_its_own_request_only(engines, monkeypatch, which):
    make, calls = structured_output.fill_mask, []

    def tired(matcher, words):
        calls.append(matcher)
        if len(calls) == 5:
            raise BadInput('structured_outputs: too complex')
        return make(matcher, words)
    shape = form(regex='[ab]{30}')
    asked = SamplingParams(temperature=0, max_tokens=20, structured_outputs=shape)
    good = tokens(answers(engines[which], [asked]))[0]
    monkeypatch.setattr(structured_output, 'fill_mask', tired)
    a, b = answers(engines[which], [asked, asked], [[7, 8, 9]] * 2)
    failed, fine = sorted((a, b), key=lambda out: out.error is None)
    assert 'too complex' in str(failed.error) and tokens([fine])[0] == good
    assert answers(engines[which], [asked])[0].error is None    # and nothing is left of it


def test_without_llguidance_the_error_says_what_to_do(tokenizer, monkeypatch):
    monkeypatch.setattr(structured_output, 'find_spec', lambda name: None)
    monkeypatch.setitem(sys.modules, 'llguidance', None)    # importing it fails
    monkeypatch.setitem(vars(tokenizer), 'grammar_caches', {})
    with pytest.raises(BadInput, match=re.escape("pip install 'tinyvllm[serve]'")):
        grammar_for(tokenizer, regex='abc')
    assert bind_constraints(SamplingParams(logit_bias={3: 1}), tokenizer, SimpleNamespace(vocab_size=512))


# --- a real model ---------------------------------------------------------------------------------------------

def test_random_schemas_are_obeyed_by_a_real_model(monkeypatch):
    "`benchmarks/json_schemas.py` does this with 200 larger ones."
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / 'benchmarks')
    pytest.importorskip('jsonschema')
    import json_schemas
    llm, rng = LLM('smollm2', num_blocks=300, max_num_seqs=8), random.Random(7)
    schemas = [json_schemas.random_schema(rng, depth=1) for _ in range(24)]
    right, cut, bad = json_schemas.judged(llm, schemas, constrained=True, max_tokens=60)
    assert not bad and right >= 20 and right + cut == 24
