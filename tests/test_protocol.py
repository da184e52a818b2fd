"OpenAI's wire format: every parameter has a fate, every fault a short answer, and a stream is its plain reply."
import json
import random
import time

import pytest

pytest.importorskip('pydantic')

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from jsonschema import Draft202012Validator  # noqa: E402

from tinyvllm.engine.outputs import CompletionOutput, Logprob, RequestOutput
from tinyvllm.errors import BadInput  # noqa: E402
from tinyvllm.server.errors import APIError, to_api_error  # noqa: E402
from tinyvllm.server.openapi import REQUESTS, RESPONSES, build_schemas  # noqa: E402
from tinyvllm.server.parameters import Limits  # noqa: E402
from tinyvllm.server.protocol import (  # noqa: E402
    ChatCompletionRequest, CompletionRequest, GenerateRequest, check_model, get_treatment, list_unknown_names,
    read_request)
from tinyvllm.server.replies import DONE_EVENT, REPLIES, format_event  # noqa: E402
from tinyvllm.server.tokenize import DetokenizeRequest, TokenizeRequest  # noqa: E402
from tinyvllm.models.tokenizer import Tokenizer  # noqa: E402

PLAIN = '{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}bot: {% endif %}'
THINKS = PLAIN + '{% if false %}</think>{{ tools }}{% endif %}'
TOOL = {'type': 'function', 'function': {'name': 'now', 'parameters': {
    'type': 'object', 'properties': {'zone': {'type': 'string'}}}}}
HI = [{'role': 'user', 'content': 'Hi'}]


def tokenizer(template=PLAIN, **more):
    "A token is a byte; 256 ends a text, 257 begins one."
    pieces = {i: bytes([i]) for i in range(256)} | {256: b'<eos>', 257: b'<bos>'}
    return Tokenizer(pieces, frozenset({256, 257}), encoder=lambda text, special: [*text.encode()],
                     eos_ids=(256,), bos_id=257, chat_template=template, **more)


def ask(kind=CompletionRequest, limits=Limits(), **body):
    return read_request(kind, json.dumps(body).encode(), limits)


def chat(**body): return ask(ChatCompletionRequest, **{'messages': HI} | body)


def refusal(*args, **body):
    with pytest.raises(APIError) as caught: (ask(*args, **body) if body else read_request(*args))
    assert caught.value.status == 400 and len(caught.value.message) <= 2300
    assert set(caught.value.to_dict()['error']) == {'message', 'type', 'param', 'code'}
    return caught.value


# ---- every parameter has a fate

@pytest.mark.parametrize('kind, module', [(CompletionRequest, 'openai.types.completion_create_params'),
                                          (ChatCompletionRequest, 'openai.types.chat.completion_create_params')])
def test_no_parameter_of_the_openai_package_is_unknown(kind, module):
    params = pytest.importorskip(module).CompletionCreateParamsStreaming.__annotations__
    assert {name for name in params if get_treatment(kind, name) == 'unknown'} == set()
    assert {name for name in params if get_treatment(kind, name) == 'handled'} > {'model', 'stream', 'n', 'seed', 'logprobs'}


def test_handled_parameters_arrive():
    given = dict(n=2, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, presence_penalty=1.0, frequency_penalty=-1.0,
                 repetition_penalty=1.5, seed=-7, stop=['a', 'b'], stop_token_ids=[3], ignore_eos=True, min_tokens=2,
                 allowed_token_ids=[1, 2], bad_words=['no'], include_stop_str_in_output=True,
                 skip_special_tokens=False, prompt_logprobs=3, max_tokens=9, logprobs=4)
    params = ask(prompt='x', logit_bias={'65': -100}, **given).to_sampling_params(100, tokenizer())
    for name, value in given.items(): assert getattr(params, name) == (tuple(value) if isinstance(value, list) else value)
    assert params.logit_bias == ((65, -100.0),)


def test_nulls_are_defaults():
    fields = {name: None for name in ChatCompletionRequest.model_fields if name not in ('messages', 'structured_outputs')}
    params = chat(**fields, unknown=None).to_sampling_params(50, tokenizer())
    assert params == chat().to_sampling_params(50, tokenizer()) and params.max_tokens == 50


@pytest.mark.parametrize('body', [{'guided_json': None}, {'typical_p': 1.0}, {'mirostat': 0}, {'priority': 0},
                                  {'best_of': 2, 'n': 2}, {'best_of': 1}, {'suffix': ''}, {'use_beam_search': False},
                                  {'logit_bias': {}}, {'stop': []}, {'user': {'any': ['thing']}}, {'colour': 3}])
def test_what_asks_for_nothing_is_taken(body):
    taken = ask(prompt='x', **body)
    assert taken.to_sampling_params(9, tokenizer()).max_tokens == 16
    assert [n for n in list_unknown_names(taken) if n == 'colour'] == [n for n in body if n == 'colour']


@pytest.mark.parametrize('constraint', [{'regex': ''}, {'grammar': ''}, {'json': ''}])
def test_an_empty_constraint(constraint):
    with pytest.raises(APIError): ask(prompt='x', structured_outputs=constraint).to_sampling_params(9, tokenizer())


def test_max_tokens():
    assert ask(prompt='x').to_sampling_params(99, tokenizer()).max_tokens == 16
    assert ask(prompt='x', max_tokens=0, echo=True).to_sampling_params(99, tokenizer()).max_tokens == 0
    assert chat(max_tokens=3).to_sampling_params(99, tokenizer()).max_tokens == 3
    assert chat(max_tokens=3, max_completion_tokens=4).to_sampling_params(99, tokenizer()).max_tokens == 4


def test_logprobs_in_both_forms():
    assert chat(logprobs=True).to_sampling_params(9, tokenizer()).logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).to_sampling_params(9, tokenizer()).logprobs == 3
    assert chat(logprobs=False).to_sampling_params(9, tokenizer()).logprobs is None
    assert ask(prompt='x', logprobs=2, echo=True).to_sampling_params(9, tokenizer()).prompt_logprobs == 2


@pytest.mark.parametrize('constraint, made', [
    ({'response_format': {'type': 'text'}}, None),
    ({'response_format': {'type': 'json_object'}}, ('json_object', True)),
    ({'response_format': {'type': 'json_schema', 'json_schema': {'name': 'n', 'strict': True, 'schema': {'type': 'null'}}}},
     ('json', '{"type": "null"}')),
    ({'structured_outputs': {'json': {'type': 'null'}}}, ('json', '{"type": "null"}')),
    ({'structured_outputs': {'json': '{}'}}, ('json', '{}')),
    ({'structured_outputs': {'regex': 'a+'}}, ('regex', 'a+')),
    ({'structured_outputs': {'choice': ['a', 'b']}}, ('choice', ('a', 'b'))),
    ({'structured_outputs': {'grammar': 'start: "a"'}}, ('grammar', 'start: "a"')),
    ({'structured_outputs': {'json_object': True}}, ('json_object', True)),
])
def test_constraints(constraint, made):
    for body in ask(prompt='x', **constraint), chat(**constraint):
        asked = body.to_sampling_params(9, tokenizer()).structured_outputs
        assert asked is None if made is None else getattr(asked, made[0]) == made[1]


# ---- faults

REFUSED = [
    ('suffix', {'suffix': 'x'}), ('best_of', {'best_of': 3}), ('best_of', {'best_of': 1, 'n': 2}),
    ('guided_json', {'guided_json': {}}), ('grammar', {'grammar': 'root ::= "a"'}), ('format', {'format': 'json'}),
    ('chat_template', {'chat_template': '{{ 1 }}'}), ('use_beam_search', {'use_beam_search': True}),
    ('priority', {'priority': 1}), ('prompt_embeds', {'prompt_embeds': 'AAAA'}), ('n', {'n': 10**6}), ('n', {'n': 0}),
    ('n', {'n': 2**63}), ('temperature', {'temperature': -0.1}), ('temperature', {'temperature': '1'}),
    ('temperature', {'temperature': True}), ('temperature', {'temperature': 10**400}), ('top_p', {'top_p': 0}),
    ('seed', {'seed': 2**63}), ('seed', {'seed': 1.5}), ('max_tokens', {'max_tokens': -1}),
    ('logprobs', {'logprobs': 21}), ('stop', {'stop': ['x'] * 5}), ('stop', {'stop': 'x' * 129}),
    ('stop[1]', {'stop': ['x', '']}), ('logit_bias', {'logit_bias': {str(i): 1 for i in range(1025)}}),
    ('logit_bias.x', {'logit_bias': {'x': 1}}), ('logit_bias.1', {'logit_bias': {'1': 101}}),
    ('stop_token_ids[0]', {'stop_token_ids': [-1]}), ('stop_token_ids[0]', {'stop_token_ids': [2**31]}),
    ('stream_options', {'stream_options': {'include_usage': True}}), ('cache_salt', {'cache_salt': 'a/b'}),
    ('prompt_logprobs', {'prompt_logprobs': 1, 'stream': True}), ('structured_outputs', {'structured_outputs': {}}),
    ('structured_outputs', {'structured_outputs': {'regex': 'a', 'json': {}}}),
    ('structured_outputs.tag', {'structured_outputs': {'tag': 'x'}}),
    ('response_format.type', {'response_format': {'type': 'structural_tag'}}),
    ('response_format', {'response_format': {'type': 'json_object'}, 'structured_outputs': {'regex': 'a'}}),
    ('response_format.json_schema.schema', {'response_format': {'type': 'json_schema', 'json_schema': {'name': 'n'}}}),
    ('response_format.json_schema.schema', {'response_format': {'type': 'json_schema', 'json_schema': {
        'schema': {'x': 'y' * 70_000}}}}),
]


@pytest.mark.parametrize('param, body', REFUSED)
def test_what_is_refused(param, body):
    error = refusal(CompletionRequest, **{'prompt': 'x'} | body)
    assert error.param == param or error.param == f'{param}.?', error.message


@pytest.mark.parametrize('body', [{'prompt': ''}, {'prompt': []}, {'prompt': [[]]}, {'prompt': ['']}, {'prompt': None},
                                  {'prompt': {}}, {'prompt': [1, 'a']}, {'prompt': [[1], 2]}, {'prompt': [-1]},
                                  {'prompt': ['x'] * 65}, {'prompt': [2**63]}, {'x': 1}])
def test_prompts_that_are_none(body):
    assert refusal(CompletionRequest, **body).param.startswith('prompt')


@pytest.mark.parametrize('param, body', [
    ('messages', {'messages': []}), ('messages[0].content', {'messages': [{'role': 'user'}]}),
    ('messages[0].role', {'messages': [{'role': 'god', 'content': 'x'}]}),
    ('messages[0].content[0].type', {'messages': [{'role': 'user', 'content': [
        {'type': 'image_url', 'image_url': {'url': 'http://169.254.169.254/'}}]}]}),
    ('tools', {'tools': []}), ('tool_choice', {'tool_choice': 'required'}), ('top_logprobs', {'top_logprobs': 1}),
    ('tool_choice', {'tools': [TOOL], 'tool_choice': {'type': 'function', 'function': {'name': 'other'}}}),
    ('tool_choice', {'tools': [TOOL], 'tool_choice': 'required', 'response_format': {'type': 'json_object'}}),
    ('tools[0].type', {'tools': [{'type': 'custom', 'custom': {'name': 'x'}}]}),
    ('tools[0].function.name', {'tools': [{'type': 'function', 'function': {'name': 'a b'}}]}),
    ('functions', {'functions': [{'name': 'f'}]}), ('modalities', {'modalities': ['text', 'audio']}),
    ('moderation', {'moderation': {'model': 'x'}}), ('max_tokens', {'max_tokens': 0}),
])
def test_chats_that_are_refused(param, body):
    with pytest.raises(APIError) as caught: chat(**body).get_prompts(tokenizer())
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize('raw', [b'', b'nul', b'[]', b'"x"', b'\xff{}', b'{"prompt": "x", "stop": "\\ud800"}',
                                 b'{"prompt": "x", "y": NaN}', b'{"prompt": "x", "y": -Infinity}', b'{"prompt": "x", "min_p": 1e999}',
                                 b'[' * 100_000, b'{"a":' * 100_000, b'{"prompt": [' + b'1' * 5000 + b']}'])
def test_bodies_that_are_no_request(raw):
    start = time.process_time()
    refusal(CompletionRequest, raw)
    assert time.process_time() - start < 1


@pytest.mark.parametrize('body', [{'prompt': ['x', *[1] * 500_000]}, {'prompt': [1, *['x'] * 300_000]},
                                  {'prompt': 'x', 'logit_bias': {f'x{i}': i for i in range(100_000)}},
                                  {'prompt': 'x', 'stop': ['x'] * 400_000},
                                  {'prompt': 'x', 'structured_outputs': {str(i): 1 for i in range(50_000)}}])
def test_a_large_body_gets_a_small_answer(body):
    start = time.process_time()
    error = refusal(CompletionRequest, **body)
    assert len(error.message) < 2300 and time.process_time() - start < 2


def test_a_fault_does_not_repeat_what_was_sent():
    secret = 'hunter2'
    for body in ({'temperature': secret}, {'stop': {secret: 1}}, {'n': [secret]}, {'logit_bias': {secret + '!': 1}},
                 {'structured_outputs': {secret + ' x': 1}}):
        error = refusal(CompletionRequest, **{'prompt': 'x'} | body)
        assert secret not in error.message and secret not in str(error.param)


def test_a_long_fault_is_cut():
    error = APIError.from_validation([{'loc': ('prompt', '(ids)', n), 'msg': 'x' * 10_000} for n in range(11)])
    assert error.param == 'prompt[0]' and len(error.message) < 10 * 202 + 20 and error.message.endswith('; and 1 more')


def test_faults_of_the_server_stay_there():
    reported = to_api_error(RuntimeError('/home/me/key.pem at 0x7f00deadbeef'))
    assert reported.status == 500 and 'home' not in reported.message and reported.type == 'server_error'
    reported = to_api_error(BadInput('no file /home/me/model.gguf at 0x7f00deadbeef', param='x', code='y'))
    assert '/home' not in reported.message and 'deadbeef' not in reported.message and (reported.param, reported.code) == ('x', 'y')
    assert APIError.too_many_requests(7).headers == {'Retry-After': '7'} and APIError.too_many_requests(7).status == 429


def test_models():
    check_model(None, ['a']), check_model('', ['a']), check_model('a', ['a'])
    with pytest.raises(APIError) as caught: check_model('../../etc/passwd', ['a'])
    assert (caught.value.status, caught.value.code) == (404, 'model_not_found')


def test_limits_are_the_servers():
    limits = Limits(max_n=2, max_prompts=1, max_logprobs=0, max_stop=9)
    ask(limits=limits, prompt='x', n=2, logprobs=0, stop=['x'] * 9)
    for body in {'n': 3}, {'logprobs': 1}, {'prompt': ['a', 'b']}: refusal(CompletionRequest, limits, **{'prompt': 'x'} | body)
    document = build_schemas(limits)['CompletionRequest']['properties']
    assert document['n']['anyOf'][0]['maximum'] == 2 and document['stop']['anyOf'][0]['oneOf'][1]['maxItems'] == 9
    assert 'x-limit' not in json.dumps(document)


@settings(max_examples=150, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner:
       st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
           [*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields, 'role', 'content', 'type', 'json']), inner)))
def test_any_json_is_a_request_or_a_400(value):
    for kind in REQUESTS:
        try: read_request(kind, json.dumps(value).encode())
        except APIError as error: assert error.status == 400


# ---- conversations

def test_a_conversation_is_rendered():
    turns = [{'role': 'developer', 'content': 'Be kind.'}, {'role': 'user', 'content': [
        {'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]}]
    assert chat(messages=turns).get_prompts(tokenizer()) == ['system: Be kind.\nuser: a\nb\nbot: ']
    assert chat(messages=HI, add_generation_prompt=False).get_prompts(tokenizer()) == ['user: Hi\n']
    going_on = [*HI, {'role': 'assistant', 'content': 'Hello, '}]
    assert chat(messages=going_on, continue_final_message=True).get_prompts(tokenizer())[0].endswith('assistant: Hello,')
    with pytest.raises(APIError): chat(continue_final_message=True).get_prompts(tokenizer())


@pytest.mark.parametrize('names', [{'messages': []}, {'_budget': 1}, {'bos_token': 'x'}, {'a b': 1}])
def test_a_template_gets_no_name_that_is_its_own(names):
    with pytest.raises(APIError): chat(chat_template_kwargs=names).get_prompts(tokenizer())


def test_extra_names_reach_the_template():
    body = chat(chat_template_kwargs={'enable_thinking': False})
    assert body.get_prompts(tokenizer('{{ enable_thinking }}')) == ['False']


def test_tools_are_in_the_prompt_and_forced():
    body = chat(tools=[TOOL], tool_choice='required')
    assert '"now"' in body.get_prompts(tokenizer())[0]
    params = body.to_sampling_params(99, tokenizer())
    assert 'now' in params.structured_outputs.grammar and not params.skip_special_tokens
    assert chat(tools=[TOOL]).to_sampling_params(99, tokenizer()).structured_outputs is None
    assert chat(tools=[TOOL], tool_choice='none').to_sampling_params(99, tokenizer()).skip_special_tokens
    choice = {'type': 'allowed_tools', 'allowed_tools': {'mode': 'required', 'tools': [
        {'type': 'function', 'function': {'name': 'now'}}]}}
    other = {'type': 'function', 'function': {'name': 'later'}}
    tools, mode = chat(tools=[TOOL, other], tool_choice=choice).get_tools()
    assert [t['function']['name'] for t in tools] == ['now'] and mode == 'required'


def test_tokenizing_has_no_sampling_parameters():
    names = set(ChatCompletionRequest.model_fields) - set(TokenizeRequest.model_fields)
    assert {'temperature', 'n', 'stop', 'stream', 'max_tokens', 'logprobs', 'response_format', 'user', 'store'} <= names
    assert {'messages', 'tools', 'tool_choice', 'chat_template_kwargs', 'add_generation_prompt'} <= set(TokenizeRequest.model_fields)
    assert 'temperature' not in build_schemas()['TokenizeRequest']['properties']
    body = ask(TokenizeRequest, prompt='x', temperature=9, n=10**9)    # as every unknown name: ignored, with a warning
    assert list_unknown_names(body) == ['temperature', 'n'] and body.tokenize(tokenizer(), 64)['count'] == 1
    for wrong in {'chat_template': '{{ 1 }}'}, {'truncate_prompt_tokens': 3}, {'functions': [{'name': 'f'}]}:
        refusal(TokenizeRequest, **{'messages': HI} | wrong)


def test_tokenize_and_detokenize():
    body = ask(TokenizeRequest, prompt='é', return_token_strs=True)
    assert body.tokenize(tokenizer(), 64) == {'count': 2, 'max_model_len': 64, 'tokens': [195, 169],
                                           'token_strs': ['bytes:\\xc3', 'bytes:\\xa9']}
    assert bytes(ask(TokenizeRequest, messages=HI).tokenize(tokenizer(), 64)['tokens']) == b'user: Hi\nbot: '
    assert ask(DetokenizeRequest, tokens=[195, 169]).detokenize(tokenizer()) == {'prompt': 'é'}
    with pytest.raises(APIError): ask(DetokenizeRequest, tokens=[258]).detokenize(tokenizer())
    for wrong in {}, {'prompt': 'x', 'messages': HI}: refusal(TokenizeRequest, json.dumps(wrong).encode())


# ---- replies

def make_output(text, n, end=None, prompt='Hi', answers=1, logprobs=True):
    "What the engine reports after n tokens, of which a token is a byte."
    ids = [*text.encode()][:n]
    reported = [{i: Logprob(-0.25 * (i % 7), ''), 32: Logprob(-9.0, '')} for i in ids] if logprobs else None
    shown = bytes(ids).decode(errors='replace' if end else 'ignore')
    out = RequestOutput('r', prompt, [*prompt.encode()], [
        CompletionOutput(k, shown, list(ids), 0, reported, end) for k in range(answers)], finished=bool(end))
    out.prompt_logprobs = [None] + [{i: Logprob(-1.0, '')} for i in out.prompt_token_ids[1:]]
    return out


def replying(body, template=PLAIN):
    t = tokenizer(template)
    return REPLIES[type(body)](body, '1', 'm', 'fp', body.get_prompts(t), t)


def streamed(body, text, looks, end='stop', template=PLAIN):
    reply, size = replying(body, template), len(text.encode())
    n = body.n or 1
    chunks = [c for look in looks for c in reply.add(0, make_output(text, look, answers=n))]
    return chunks + reply.add(0, make_output(text, size, end, answers=n)) + reply.finish()


def joined(chunks, key):
    "The parts of each answer of a stream, put together as a client does."
    out = {}
    for choice in (c for chunk in chunks for c in chunk['choices']):
        one = out.setdefault(choice['index'], {'text': '', 'reasoning': '', 'calls': {}, 'reported': [], 'end': None})
        part = choice['delta'] if key == 'delta' else choice
        one['text'] += part.get('content') or part.get('text') or ''
        one['reasoning'] += part.get('reasoning_content') or ''
        for call in part.get('tool_calls', ()):
            name, arguments = one['calls'].get(call['index'], ('', ''))
            one['calls'][call['index']] = (name + call['function'].get('name', ''), arguments + call['function']['arguments'])
        reported = choice['logprobs'] or {}
        one['reported'] += reported.get('content') or [*zip(*reported.values())] if reported else []
        assert one['end'] is None    # nothing comes behind the end
        one['end'] = choice['finish_reason']
    return out


ANSWERS = ['', 'a', 'Wait 🐻 é\n', 'x <tool_call>\n{"name": "now", "arguments": {"zone": "🌍"}}\n</tool_call>', '<tool_call>{',
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n'
        '</tool_call>', '<think>\nso 🐻\n</think>\n\nyes', '<think>never ends', '</tool_call> <think>']


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ANSWERS) | st.text(max_size=20), st.sets(st.integers(0, 120)), st.sampled_from([PLAIN, THINKS]),
       st.booleans(), st.integers(1, 2))
def test_a_chat_stream_joined_is_the_plain_reply(text, looks, template, tools, n):
    body = chat(logprobs=True, top_logprobs=1, n=n, **({'tools': [TOOL]} if tools else {}))
    looks = sorted(k for k in looks if k <= len(text.encode()))
    parts = joined(streamed(body, text, looks, template=template), 'delta')
    plain = replying(body, template).to_response([make_output(text, 999, 'stop', answers=n)])
    for choice in plain['choices']:
        one, message = parts[choice['index']], choice['message']
        assert one['text'] == (message['content'] or '') and one['end'] == choice['finish_reason']
        assert one['reasoning'] == message.get('reasoning_content', '')
        assert one['reported'] == choice['logprobs']['content'] and len(one['reported']) == len(text.encode())
        calls = [c['function'] for c in message.get('tool_calls', ())]
        assert [*one['calls'].values()] == [(c['name'], c['arguments']) for c in calls]
        assert bool(calls) == (one['end'] == 'tool_calls')
        if '<' not in text: assert one['text'] == text


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20), st.sets(st.integers(0, 60)), st.booleans(), st.integers(1, 3))
def test_a_completion_stream_joined_is_the_plain_reply(text, looks, echo, n):
    body = ask(prompt='Hi', logprobs=1, echo=echo, n=n)
    looks = sorted(k for k in looks if k <= len(text.encode()))
    parts = joined(streamed(body, text, looks, 'length'), 'text')
    for choice in replying(body).to_response([make_output(text, 999, 'length', answers=n)])['choices']:
        one, reported = parts[choice['index']], choice['logprobs']
        assert one['text'] == choice['text'] == 'Hi' * echo + text and one['end'] == choice['finish_reason'] == 'length'
        assert one['reported'] == [*zip(*reported.values())]
        for token, at in zip(reported['tokens'], reported['text_offset']):
            assert token.startswith('bytes:') or choice['text'][at:at + len(token)] == token


def test_logprobs_have_openais_shapes():
    reported = replying(chat(logprobs=True, top_logprobs=1)).to_response([make_output('é', 2, 'stop')])['choices'][0]['logprobs']
    assert reported['content'][0] == {'token': 'bytes:\\xc3', 'logprob': -1.5, 'bytes': [195], 'top_logprobs': [
        {'token': 'bytes:\\xc3', 'logprob': -1.5, 'bytes': [195]}]}
    out = make_output('b', 1, 'stop')
    out.outputs[0].logprobs = [{98: Logprob(float('-inf'), '')}]
    reported = replying(ask(prompt='Hi', logprobs=1, echo=True)).to_response([out])['choices'][0]['logprobs']
    assert reported == {'tokens': ['H', 'i', 'b'], 'token_logprobs': [None, -1.0, -9999.0],
                    'top_logprobs': [None, {'i': -1.0}, {'b': -9999.0}], 'text_offset': [0, 1, 2]}


def test_echo_of_ids_and_of_a_bos():
    out = make_output('b', 1, 'stop')
    out.prompt_token_ids, out.prompt_logprobs = [257, 72, 105], [None, {72: Logprob(-1, '')}, {105: Logprob(-1, '')}]
    reported = replying(ask(prompt='Hi', logprobs=0, echo=True)).to_response([out])['choices'][0]
    assert reported['text'] == 'Hib' and reported['logprobs']['text_offset'] == [0, 0, 1, 2]
    out.prompt = None
    reported = replying(ask(prompt=[257, 72, 105], logprobs=0, echo=True)).to_response([out])['choices'][0]
    assert reported['text'] == '<bos>Hib' and reported['logprobs']['text_offset'] == [0, 5, 6, 7]


def test_usage_counts_a_prompt_once():
    reply = replying(ask(prompt=['Hi', 'Hey'], n=2))
    outs = [make_output('abc', 3, 'stop', answers=2), make_output('abc', 3, 'stop', 'Hey', answers=2)]
    plain = reply.to_response(outs)
    assert plain['usage'] == {'prompt_tokens': 5, 'completion_tokens': 12, 'total_tokens': 17,
                              'prompt_tokens_details': {'cached_tokens': 0}}
    assert [c['index'] for c in plain['choices']] == [0, 1, 2, 3]


def test_usage_in_a_stream():
    chunks = streamed(chat(stream=True, stream_options={'include_usage': True}), 'abc', [1, 2])
    assert all(c['usage'] is None for c in chunks[:-1]) and chunks[-1]['choices'] == []
    assert chunks[-1]['usage']['completion_tokens'] == 3
    chunks = streamed(chat(stream=True, stream_options={'continuous_usage_stats': True}), 'abc', [1, 2])
    assert [c['usage']['completion_tokens'] for c in chunks] == [1, 1, 2, 3, 3]
    assert 'usage' not in streamed(chat(stream=True), 'abc', [1])[0]


def test_a_function_by_name_stops_and_is_called_once():
    named = {'type': 'function', 'function': {'name': 'now'}}
    twice = ANSWERS[5]
    for choice, end, calls in (named, 'stop', 1), ('required', 'tool_calls', 2), ('auto', 'tool_calls', 2):
        (first,) = replying(chat(tools=[TOOL], tool_choice=choice)).to_response([make_output(twice, 999, 'stop')])['choices']
        assert first['finish_reason'] == end and len(first['message']['tool_calls']) == calls
        assert first['message']['content'] is None


@pytest.mark.parametrize('end, reported', [('stop', 'stop'), ('length', 'length'), ('abort', 'length'), ('error', 'length')])
def test_reasons(end, reported):
    for body in chat(), ask(prompt='Hi'):
        assert replying(body).to_response([make_output('a', 1, end)])['choices'][0]['finish_reason'] == reported


def test_a_finish_reason_is_reported_once():
    for body in chat(n=2), ask(prompt='Hi', n=2):
        reply, one, both = replying(body), make_output('ab', 1, answers=2), make_output('ab', 2, 'stop', answers=2)
        one.outputs[0] = both.outputs[0]    # the first has ended before the second
        ends = [c['finish_reason'] for out in (one, both, both) for chunk in reply.add(0, out) for c in chunk['choices']]
        assert ends.count('stop') == 2


def test_of_two_tokens_with_one_text_the_likelier_is_kept():
    t = tokenizer()
    t.pieces[255] = b'b'
    out = make_output('b', 1, 'stop')
    out.outputs[0].logprobs = [{255: Logprob(-0.1, 'b'), 98: Logprob(-2.0, 'b')}]
    body = ask(prompt='Hi', logprobs=1)
    reported = REPLIES[CompletionRequest](body, '1', 'm', None, ['Hi'], t).to_response([out])['choices'][0]['logprobs']
    assert reported['top_logprobs'] == [{'b': -0.1}] and reported['token_logprobs'] == [-2.0]


def test_token_ids_on_demand():
    chunks = streamed(chat(return_token_ids=True), 'é', [1])
    assert chunks[0]['prompt_token_ids'] == [72, 105]
    assert [i for c in chunks for i in c['choices'][0].get('token_ids', ())] == [195, 169]
    plain = replying(ask(prompt='Hi', return_token_ids=True)).to_response([make_output('é', 2, 'stop')])['choices'][0]
    assert plain['token_ids'] == [195, 169] and plain['prompt_token_ids'] == [72, 105]


def test_generate():
    body = ask(GenerateRequest, prompt='Hi', n=2)
    plain = replying(body).to_response([make_output('abc', 3, 'stop', answers=2)])
    assert plain['text'] == ['abc'] * 2 and plain['token_ids'] == [[97, 98, 99]] * 2
    assert plain['finish_reasons'] == ['stop'] * 2 and plain['usage']['completion_tokens'] == 6
    chunks = streamed(body, 'abc', [2])
    assert ''.join(c['text'] for c in chunks if c['index'] == 1) == 'abc'


def test_events_are_ascii():
    assert format_event({'x': '\ud800é\n\ndata: '}) == b'data: {"x":"\\ud800\\u00e9\\n\\ndata: "}\n\n' and DONE_EVENT.endswith(b'\n\n')


def test_replies_have_the_published_shapes():
    document = build_schemas()
    def check(name, value):
        schema = {'$ref': f'#/$defs/{name}', '$defs': json.loads(json.dumps(document).replace(
            '#/components/schemas/', '#/$defs/'))}
        Draft202012Validator(schema).validate(value)
        known = {k for m in RESPONSES if m.__name__ == name for k in m.model_fields}
        assert set(value) <= known, name
    text, rich = ANSWERS[3], dict(tools=[TOOL], logprobs=True, top_logprobs=2, return_token_ids=True, n=2)
    check('ChatCompletion', replying(chat(**rich, prompt_logprobs=1)).to_response([make_output(text, 999, 'stop', answers=2)]))
    for chunk in streamed(chat(**rich), text, [1, 3, 9]): check('ChatCompletionChunk', chunk)
    old = dict(prompt='Hi', logprobs=2, echo=True, return_token_ids=True)
    check('Completion', replying(ask(**old, prompt_logprobs=1)).to_response([make_output(text, 999, 'stop')]))
    for chunk in streamed(ask(**old), text, [1, 3, 9]): check('Completion', chunk)
    check('Generated', replying(ask(GenerateRequest, prompt='Hi', logprobs=1)).to_response([make_output(text, 999, 'stop')]))
    check('ErrorResponse', APIError(400, 'x').to_dict())
    check('Tokenized', ask(TokenizeRequest, prompt='é').tokenize(tokenizer(), 64))


def test_the_openai_package_reads_the_replies_strictly():
    types = pytest.importorskip('openai.types')
    body = chat(tools=[TOOL], logprobs=True, top_logprobs=1)
    plain = replying(body).to_response([make_output(ANSWERS[3], 999, 'stop')])
    assert types.chat.ChatCompletion.model_validate(plain, strict=True).choices[0].message.tool_calls
    for chunk in streamed(body, ANSWERS[3], range(1, 60, 7)):
        types.chat.ChatCompletionChunk.model_validate(chunk, strict=True)
    types.Completion.model_validate(replying(ask(prompt='Hi', logprobs=1)).to_response([make_output('é', 2, 'stop')]), strict=True)


def test_a_slow_reader_costs_no_more_than_a_quick_one():
    body, text = chat(), 'abc ' * 2000
    looks = sorted(random.Random(0).sample(range(1, 8000), 2000))
    states = [make_output(text, n, logprobs=False) for n in looks]
    reply, start = replying(body), time.process_time()
    for state in states: reply.add(0, state)
    assert (time.process_time() - start) / len(looks) < 0.002    # seconds; it looks at what is new, not at all
