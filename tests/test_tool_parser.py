"Tool calls out of text, however it is cut; broken ones as content; forced ones by grammar."
import json
import random
import re

import pytest
from hypothesis import example, given, settings, strategies as st

from tinyvllm.errors import BadInput
from tinyvllm.server.tools import check_tools, tool_grammar, insert_tools
from tinyvllm.server.tool_parser import (HERMES, LLAMA, ObjectScanner, Event, make_parser, read_call,
    detect_format)
from tinyvllm.models.chat_template import render_chat

HERMES_TEMPLATE, LLAMA_TEMPLATE, THINKER = '<tool_call>', '<|python_tag|>', '</think>'


def tool(name, properties=None, required=(), **function):
    schema = {'type': 'object', 'properties': properties or {}, 'required': list(required)}
    return {'type': 'function', 'function': {'name': name, 'parameters': schema} | function}


TOOLS = [tool('weather', {'city': {'type': 'string'}}, ['city']), tool('time')]
NAMES = {'weather', 'time'}


def parse(parser, pieces): return [e for p in pieces for e in parser.add(p)] + parser.finish()


def joined(events):
    "Content, reasoning, calls."
    content, reasoning = (''.join(e.text for e in events if e.kind == k)
                          for k in ('content', 'reasoning'))
    heads = [e for e in events if e.kind == 'call']
    calls = [(e.name, e.text) for e in events if e.kind == 'arguments']
    assert [(e.index, e.name) for e in heads] == [(i, name) for i, (name, _) in enumerate(calls)]
    return content, reasoning, calls


def auto(template, *pieces, **more):
    return joined(parse(make_parser(TOOLS, 'auto', template, **more), pieces))


# ---- an oracle that has the whole text and all the time ----

def object_end(text):
    "The first place where the braces outside of strings balance; None if there is none."
    for end in range(1, len(text) + 1):
        bare = re.sub(r'"(?:[^"\\]|\\.)*"', '', text[:end], flags=re.S)
        if '"' in bare or bare[-1:] not in ('}', ']'): continue
        if sum(map(bare.count, '{[')) == sum(map(bare.count, '}]')): return end


def oracle(text, format):
    "Content and calls, read from the front."
    content, calls, first = '', [], True    # first: nothing was said since the last call

    def call_at(rest):
        body = rest.lstrip()
        end = object_end(body) if body.startswith('{') else None
        return None if end is None else (body[:end], body[end:])
    while text:
        bare = format.bare and first and text.lstrip().startswith('{')
        if not bare and not text.startswith(format.start):
            content, first, text = content + text[0], first and text[0].isspace(), text[1:]
            continue
        rest = text.lstrip() if bare else text[len(format.start):]
        found = call_at(rest)
        if found is None and (rest.lstrip().startswith('{') or not rest.strip()):
            content, text = content + text, ''    # it breaks off
        elif found is None: content, first, text = content + format.start, False, rest
        elif call := read_call(found[0], NAMES):
            if not calls and not content.strip(): content = None    # leading space belongs to it
            content, first, text = content or '', True, found[1]
            calls.append(call)
            if text.lstrip().startswith(format.end): text = text.lstrip()[len(format.end):]
            elif format.end.startswith(text.lstrip()): text = ''
        else: content, first, text = content + text[:len(text) - len(found[1])], False, found[1]
    return (content.rstrip() if calls else content), calls


FRAGMENTS = ['<tool_call>', '</tool_call>', '<|python_tag|>', '<tool', '_call>', '</tool_', '<',
             '>', '{"name": "time"}', '{"name": "weather", "arguments": {"city": "a </tool_call> b"}}',
             '{"name": "weather", "parameters": {"city": "{"}}', '{"name": "nope"}',
             '{"name": "time"', '{', '}', '[', ']', '"', '\\', '\\"', ' ', '\n', ';', 'word', 'é', '😀', '\ud83d', '{}']
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=14).map(''.join)


def split(text, cuts):
    cuts = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    return [text[a:b] for a, b in zip(cuts, cuts[1:])]


@settings(max_examples=400, deadline=None)
@given(texts, st.lists(st.integers(0, 10**4), max_size=12), st.sampled_from([HERMES, LLAMA]))
@example('<tool_call> {"name": "time"} </tool_call> x', [], HERMES)
@example('{"name": "time"}; {"name": "time"} and {"name": "time"}', [3, 9], LLAMA)
def test_like_the_oracle_however_it_is_cut(text, cuts, format):
    content, reasoning, calls = auto(format.start, *split(text, cuts))
    expected, expected_calls = oracle(text, format)
    assert calls == expected_calls and reasoning == ''
    if not calls: assert content == expected == text    # nothing is lost
    # beside calls, space belongs to nobody: only where words begin is compared
    assert content.split() == expected.split() and content == content.rstrip() or not calls
    assert auto(format.start, *text) == auto(format.start, text) == (content, '', calls)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*FRAGMENTS, '<think>', '</think>', '<thi', 'nk>']), max_size=10)
       .map(''.join), st.lists(st.integers(0, 10**4), max_size=9),
       st.sampled_from(['', '<think>\n']), st.booleans())
def test_thoughts_however_they_are_cut(text, cuts, tail, tools):
    parser = lambda: make_parser(TOOLS if tools else [], 'auto', THINKER, tail)
    whole = joined(parse(parser(), [text]))
    assert joined(parse(parser(), split(text, cuts))) == whole
    assert bool(whole[1]) <= (bool(tail) or text.lstrip().startswith('<think>'))
    if not tools and not whole[1] and not tail and '<think>' not in text: assert whole[0] == text


@pytest.mark.parametrize('text, expected', [
    ('Hello.', ('Hello.', '', [])),
    ('<think>\nHm.\n</think>\n\nYes.', ('Yes.', 'Hm.', [])),
    ('<think>no end', ('', 'no end', [])),
    ('<think></think>x', ('x', '', [])),
    ('a <think>b</think>', ('a <think>b</think>', '', [])),
    (' <think> <tool_call>{"name": "time"}</tool_call> </think> c',
     ('c', '<tool_call>{"name": "time"}</tool_call>', []))])
def test_thoughts(text, expected): assert auto(THINKER, text) == expected


def test_thoughts_only_where_the_template_knows_them():
    text = '<think>a</think>b'
    assert auto('<tool_call>', text) == (text, '', [])
    assert joined(parse(make_parser([], 'none', None), [text])) == (text, '', [])
    assert auto(THINKER, '\na \n</think>\n b', prompt_tail='hi\n<think>\n') == ('b', 'a', [])


def test_parallel_calls():
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>\n'
    text = ''.join(call % city for city in 'abc')
    assert auto(HERMES_TEMPLATE, text)[2] == [('weather', f'{{"city": "{c}"}}') for c in 'abc']
    assert auto(HERMES_TEMPLATE, text, parallel=False) == ('', '', [('weather', '{"city": "a"}')])


def test_without_tools_nothing_waits():
    parser = make_parser([], 'none', '<tool_call>')
    assert parser.add('a <tool_call') == [Event('content', 'a <tool_call')]
    parser = make_parser(TOOLS, 'none', '<tool_call>')
    assert parser.add(' \n') == [Event('content', ' \n')] and parser.finish() == []


def test_content_does_not_wait_for_more_than_a_marker():
    parser, said = make_parser(TOOLS, 'auto', HERMES_TEMPLATE), ''
    for n, c in enumerate('a < b <tool c', 1):
        said += ''.join(e.text for e in parser.add(c))
        assert n - len(said) <= len('<tool_call>')
    assert said == 'a < b <tool c'


@pytest.mark.parametrize('broken', [
    '{"name": "nope", "arguments": {}}', '{"name": 3}', '{"name": ["time"]}', '{"arguments": {}}',
    '{"name": "time", "arguments": []}', '{"name": "time", "arguments": "no json"}', '{}',
    '{"a" 1}', '{"name": "time", "arguments": {"x": NaN}}', '{"name": "time", "arguments": {"x": 1e999}}',
    '{"name": "time", "arguments": {"x": "\\ud800"}}', '{"name": "time", "arguments": {]}',
    '{"name": "time", "arguments": {"x": ' + '9' * 5000 + '}}', '{"name": "time\\u0000"}',
    '{"name": "time", "arguments": ' + '{"a":' * 5000 + '1' + '}' * 5001])
def test_a_broken_call_is_content(broken):
    for template, text in ((HERMES_TEMPLATE, f'<tool_call>{broken}</tool_call>'),
                           (LLAMA_TEMPLATE, broken), (LLAMA_TEMPLATE, f'<|python_tag|>{broken}')):
        assert auto(template, text) == (text, '', [])


def test_a_refused_object_hides_no_call():
    evil = '<tool_call>{"name": nope, "arguments": {"x": <tool_call>{"name": "time"}</tool_call>}}'
    assert auto(HERMES_TEMPLATE, evil) == (evil, '', [])


def test_a_string_may_quote_markers():
    text = '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call><tool_call>{"}}'
    assert auto(HERMES_TEMPLATE, text)[2] == [('weather', '{"city": "</tool_call><tool_call>{"}')]


@pytest.mark.parametrize('text, content', [
    (' \nC\nx', 'x'), ('a \nC\n', 'a'), ('a\n\nC b ', 'a\n\n b'), (' C C ', ''), (' a', ' a')])
def test_space_beside_calls(text, content):
    call = '<tool_call>{"name": "time"}</tool_call>'
    said, _, calls = auto(HERMES_TEMPLATE, text.replace('C', call))
    assert said == content and len(calls) == text.count('C')


def test_cut_in_the_end_marker():
    text = '<tool_call>{"name": "time"}\n</tool_'
    assert auto(HERMES_TEMPLATE, text) == ('', '', [('time', '{}')])


@pytest.mark.parametrize('template', [HERMES_TEMPLATE, LLAMA_TEMPLATE, THINKER])
@pytest.mark.parametrize('start', ['', '<tool_call>', '{', '<think>', '{"name": "time"}',
                                   '<tool_call>{"name": "time"}'])
@pytest.mark.parametrize('piece', ['\n', '<tool_call>', '<tool_call', '{"', '\\"', '{}', ' <t'])
def test_nothing_is_looked_at_again_and_again(template, start, piece):
    "Hostile answers: what is held, and so searched again, is never longer than a marker."
    parser = make_parser(TOOLS, 'auto', template)
    for c in start + piece * 60:
        parser.add(c)
        assert len(parser.held) + len(parser.mark) <= 2 * len('<|python_tag|>')


def test_braces():
    for text in ('{}', '{"a": "}"}', '{"\\"}": [{}]}', '{"\\\\": 1}'):
        assert ObjectScanner().add(text + '}') == len(text) == object_end(text)


def test_formats():
    assert detect_format(None) is detect_format('{{ tools }}') is HERMES
    assert detect_format('<tool_call> {"name": x, "parameters": y}') is HERMES
    assert detect_format('respond with {"name": function name, "parameters": dict}') is LLAMA


def deep(n):
    schema = {}
    for _ in range(n): schema = {'not': schema}
    return schema


@pytest.mark.parametrize('tools', [
    [], None, {}, 'time', [None], [{}], [{'type': 'function'}], [tool('a', type='object') | {'type': 'x'}],
    [{'function': {'name': 5}}], [tool('')], [tool('a' * 65)], [tool('a b')], [tool('a\n')],
    [tool('é')], [tool('none')], [tool('a'), tool('a')], [tool(f'f{i}') for i in range(129)],
    [tool('a', parameters=[])], [tool('a', parameters='x')], [tool('a', parameters=False)],
    [tool('a', parameters={'type': 'string'})], [tool('a', parameters={'type': ['object']})],
    [tool('a', parameters=deep(65))], [tool('a', parameters=deep(100_000))],
    [tool('a', parameters={'description': 'x' * 65_536})]])
def test_bad_tools(tools):
    with pytest.raises(BadInput) as error: check_tools(tools)
    assert len(str(error.value)) < 200 and '\n' not in str(error.value)


def test_good_tools():
    check_tools([tool(f'f_{i}-X') for i in range(128)], 'f_7-X')
    check_tools([tool('a', parameters=None), {'function': {'name': 'b'}}], 'required')
    check_tools([tool('a', parameters=deep(64))], 'none')
    with pytest.raises(BadInput, match='tool_choice'): check_tools(TOOLS, 'other')


# ---- into the prompt ----

CALL = {'id': 'c', 'type': 'function', 'function': {'name': 'time', 'arguments': '{"x": "é"}'}}
TALK = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Now?'},
        {'role': 'assistant', 'content': None, 'tool_calls': [CALL]},
        {'role': 'tool', 'tool_call_id': 'c', 'content': '12:00'}]
CHATML = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] + '' }}{% endfor %}"


def test_a_template_without_tools():
    before = json.dumps(TALK)
    messages, names = insert_tools(TALK, TOOLS, CHATML)
    text = render_chat(CHATML, messages, **names)
    assert names == {} and text.startswith('<system>Be brief.\n\nYou can call') and '"city"' in text
    assert '<tool_call>\n{"name": "time", "arguments": {"x": "é"}}\n</tool_call>' in text
    assert '<user><tool_response>\n12:00\n</tool_response>' in text and 'None' not in text
    assert auto(HERMES_TEMPLATE, messages[2]['content'])[2] == [('time', '{"x": "é"}')]
    assert insert_tools(TALK[1:], TOOLS, CHATML)[0][0]['role'] == 'system'
    assert insert_tools(TALK[1:], [], CHATML)[0][0]['role'] == 'user'
    assert json.dumps(TALK) == before    # the request is left as it is


def test_a_template_with_tools():
    template = "{% for t in tools %}{{ t | tojson }}{% endfor %}{% for m in messages %}{% for c " \
               "in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    messages, names = insert_tools(TALK, TOOLS, template)
    assert names == {'tools': TOOLS} and messages[0] == TALK[0]
    assert render_chat(template, messages, **names).endswith('{"x": "é"}')
    assert insert_tools(TALK, [], template)[1] == {}


@pytest.mark.parametrize('arguments', ['[]', 'x', '{"a": NaN}', '3', '[' * 10**5])
def test_bad_calls_in_the_conversation(arguments):
    call = {'function': {'name': 'time', 'arguments': arguments}}
    with pytest.raises(BadInput, match=r'messages\[0\]\.tool_calls\[0\]\.function\.arguments'):
        insert_tools([{'role': 'assistant', 'tool_calls': [call]}], [], None)


# ---- forced by grammar ----

SCHEMAS = [{'city': {'type': 'string', 'maxLength': 6}, 'days': {'type': 'integer', 'minimum': 0,
                                                                 'maximum': 99}},
           {'kind': {'enum': ['a', 'b</tool_call>', 'é', 'x/y']}, 'on': {'type': 'boolean'}},
           {'place': {'$ref': '#/$defs/P'}}]
FORCED = [tool('weather', SCHEMAS[0], ['city'], strict=True), tool('switch', SCHEMAS[1], ['kind']),
          tool('goto', SCHEMAS[2], ['place']), tool('free', parameters=None)]
FORCED[2]['function']['parameters']['$defs'] = {'P': {'type': 'object', 'required': ['x'],
    'additionalProperties': False, 'properties': {'x': {'type': 'integer', 'maximum': 9}}}}


@pytest.fixture(scope='module')
def vocabulary():
    "Bytes, an end, and two markers that are tokens of their own."
    llguidance = pytest.importorskip('llguidance')

    class Bytes:
        tokens = [*(bytes([i]) for i in range(256)), b'<eos>', b'<tool_call>', b'</tool_call>',
                  b'</think>']
        bos_token_id, eos_token_id, special_token_ids = None, 256, [256, 257, 258, 259]
        def __call__(self, text): return list(text if isinstance(text, bytes) else text.encode())
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))

    def matcher(grammar):
        found = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(grammar))
        assert not found.get_error(), found.get_error()
        return found

    def walk(grammar, rng, start=b'', limit=1500):
        "Random tokens that the grammar allows, spelt out; None if they do not end."
        m, said = matcher(grammar), b''
        assert m.try_consume_tokens(list(start)) == len(start)
        for _ in range(limit):
            if m.is_stopped(): return start + said
            mask = m.compute_bitmask()
            ids = [i for i in range(260) if mask[i // 8] >> i % 8 & 1]
            ends = [i for i in ids if i in (34, 125, 256)]    # or free strings never end
            token = rng.choice(ends if ends and rng.random() < 0.2 else ids)
            assert m.consume_token(token)
            if token == 256: return start + said
            said += Bytes.tokens[token]
    return walk, matcher


@pytest.mark.parametrize('template', [HERMES_TEMPLATE, LLAMA_TEMPLATE])
@pytest.mark.parametrize('special', [(), ('<tool_call>', '</tool_call>', '</think>')])
def test_a_forced_call_is_a_call(vocabulary, template, special):
    jsonschema, (walk, _), rng = pytest.importorskip('jsonschema'), vocabulary, random.Random(0)
    schemas = {t['function']['name']: t['function']['parameters'] or {} for t in FORCED}
    seen = set()
    for n in range(24):
        choice, parallel = ('required', 'switch')[n % 2], n % 3 == 0
        tail, start = ('<think>\n', b'so...</think>\n\n') if n % 4 == 1 else ('', b'')
        if start and special: start = b''
        tail = tail if start else ''
        grammar = tool_grammar(FORCED, choice, template + THINKER, parallel, tail, special)
        text = walk(grammar, rng, start)
        if text is None: continue
        parser = make_parser(FORCED, choice, template + THINKER, tail, parallel)
        content, reasoning, calls = joined(parse(parser, split(text.decode(), range(0, 999, 7))))
        assert not content and calls and len(calls) <= 16 and bool(reasoning) == bool(start), text
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), schemas[name])
            assert choice in ('required', name) and (parallel or len(calls) == 1)
            seen.add(name)
    assert len(seen) >= 3


def test_strict_under_auto(vocabulary):
    walk, matcher = vocabulary
    grammar = tool_grammar(FORCED, 'auto', HERMES_TEMPLATE)

    def allows(text, grammar=grammar):
        m = matcher(grammar)
        return m.try_consume_tokens(list(text.encode())) == len(text.encode()) and m.is_accepting()
    call = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
    assert allows('') and allows('just {"name": "text"} < é')
    assert allows('ok ' + call % ('free', '{"x": 1}') + '\n' + call % ('switch', '{"kind": 3}'))
    assert allows(call % ('weather', '{"city": "Bern"}') + ' and so on')
    assert not allows(call % ('weather', '{"town": "Bern"}')) and not allows('<tool_call> no')
    llama = tool_grammar(FORCED, 'auto', LLAMA_TEMPLATE)
    assert allows('text', llama) and allows('{"name": "free", "parameters": {}}', llama)
    assert not allows('{"name": "other", "parameters": {}}', llama)


def test_no_property_is_invented(vocabulary):
    def allows(parameters, arguments):
        grammar = tool_grammar([tool('f', parameters=parameters)], 'f', HERMES_TEMPLATE)
        text = '<tool_call>\n{"name": "f", "arguments": ' + arguments
        return vocabulary[1](grammar).try_consume_tokens(list(text.encode())) == len(text.encode())
    listed = {'properties': {'a': {}}}
    assert allows(listed, '{"a": 1}') and not allows(listed, '{"b": 1}')
    assert allows(None, '{}') is not allows(None, '{"b": 1}')
    for open_ in ({'properties': {'a': {}}, 'additionalProperties': True}, {'required': ['b']},
                  {'properties': {'a': {}}, 'anyOf': [{'required': ['b']}, {}]}):
        assert allows(open_, '{"b": 1}'), open_


def test_nothing_forced():
    assert tool_grammar(TOOLS, 'auto', None) is None and tool_grammar(TOOLS, 'none', None) is None


@pytest.mark.parametrize('schema', [
    {'required': 5}, {'required': [[]]}, {'properties': 3}, {'properties': {}, 'required': ['x']},
    {'type': 'object', 'allOf': [{'properties': {'a': {}}}]}, {'x-guidance': 1},
    {'a': '\n%json {"'}])
def test_odd_schemas_make_a_grammar(schema):
    "Whether it compiles is for `control` to say."
    grammar = tool_grammar([tool('a', parameters=schema)], 'required', None)
    assert grammar.count('\n') == len(grammar.splitlines()) == 5


def test_a_name_picks_its_function():
    grammar = tool_grammar(FORCED, 'goto', None)
    assert 'goto' in grammar and 'weather' not in grammar
