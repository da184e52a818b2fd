"Other people's clients against the running server, with the real model: whatever they send, and whatever they expect."
import asyncio
import json
import os

import pytest

os.environ.setdefault('LITELLM_LOCAL_MODEL_COST_MAP', 'True')    # litellm would fetch prices when it is imported
openai = pytest.importorskip('openai')
pytest.importorskip('fastapi')

from openai.types import Completion  # noqa: E402
from openai.types.chat import ChatCompletion, ChatCompletionChunk  # noqa: E402
from pydantic import BaseModel, ConfigDict, Field  # noqa: E402

from tinyvllm.engine.llm import LLM  # noqa: E402
from tinyvllm.reference.generate import answer_logits  # noqa: E402
from tinyvllm.models.llama import load_model  # noqa: E402
from tinyvllm.sampling.sampler import log_softmax
from tinyvllm.server.run import serve_in_background  # noqa: E402
from tinyvllm.models.tokenizer_files import load_tokenizer

KEY, MODEL = 'a-key', 'smollm2'
ASK = [{'role': 'user', 'content': 'Name three colors.'}]
WEATHER = {'type': 'function', 'function': {
    'name': 'get_weather', 'description': 'The weather of a city.', 'parameters': {
        'type': 'object', 'properties': {'city': {'type': 'string', 'maxLength': 20}}, 'required': ['city']}}}
TIME = {'type': 'function', 'function': {'name': 'get_time'}}


class City(BaseModel):
    "What structured replies are parsed into."
    model_config = ConfigDict(extra='forbid')    # a small model would go on inventing properties
    name: str = Field(max_length=20)
    country: str = Field(max_length=20)
    old: bool


@pytest.fixture(scope='module')
def url():
    "A server with a key."
    llm = LLM('smollm2', num_blocks=192, max_num_seqs=8)
    with serve_in_background(llm.engine, names=(MODEL,), api_keys=(KEY,)) as server:
        yield server.url + '/v1'
    assert llm.engine.scheduler.blocks.num_free == 191


@pytest.fixture(scope='module')
def client(url):
    "The openai package as it is, but it asks once."
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client: yield client


def chat(client, **more):
    return client.chat.completions.create(
        **dict(model=MODEL, messages=ASK, max_tokens=6, temperature=0) | more)


def strict(kind, reply):
    "The reply, read again as if every type were meant."
    return kind.model_validate_json(reply.model_dump_json(exclude_unset=True), strict=True)


def test_models(client):
    (card,) = client.models.list().data
    assert card.id == MODEL and client.models.retrieve(MODEL).id == MODEL


def test_chat_is_typed(client):
    reply = strict(ChatCompletion, chat(client, n=2, logprobs=True, top_logprobs=2))
    assert [c.index for c in reply.choices] == [0, 1]
    for choice in reply.choices:
        assert choice.finish_reason == 'length' and choice.message.role == 'assistant'
        assert len(choice.logprobs.content) == 6
        assert b''.join(bytes(t.bytes) for t in choice.logprobs.content).decode() == choice.message.content
        assert all(t.logprob == t.top_logprobs[0].logprob for t in choice.logprobs.content)    # greedy
    assert reply.usage.completion_tokens == 12
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 12
    assert reply.usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize('more', [{}, {'stop': [', b', 'and']}, {'n': 2, 'temperature': 1, 'seed': 1}])
def test_a_stream_joined_is_the_plain_reply(client, more):
    plain = chat(client, logprobs=True, **more)
    chunks = [strict(ChatCompletionChunk, c) for c in
              chat(client, logprobs=True, stream=True, stream_options={'include_usage': True}, **more)]
    assert chunks[0].choices[0].delta.role == 'assistant' and chunks[-1].choices == []
    assert chunks[-1].usage == plain.usage and all(c.usage is None for c in chunks[:-1])
    for choice in plain.choices:
        parts = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice.index]
        assert ''.join(p.delta.content or '' for p in parts) == choice.message.content
        assert parts[-1].finish_reason == choice.finish_reason and parts[-1].delta.content is None
        reported = [t.token for p in parts if p.logprobs for t in p.logprobs.content]
        assert reported == [t.token for t in choice.logprobs.content]


def test_an_emoji_over_several_chunks(client):
    ask = [{'role': 'user', 'content': 'Repeat: 🐻🌍'}]
    chunks = list(chat(client, messages=ask, max_tokens=16, stream=True))
    received = ''.join(c.choices[0].delta.content or '' for c in chunks)
    assert '🐻' in received and len(received) < len(chunks)    # four tokens make a bear
    assert received == chat(client, messages=ask, max_tokens=16).choices[0].message.content


def test_completions_are_typed(client):
    reply = client.completions.create(model=MODEL, prompt=['The capital of France is', 'One, two,'], max_tokens=3,
                                      temperature=0, logprobs=2, echo=True)
    strict_reply = reply.model_copy(deep=True)
    for choice in strict_reply.choices:
        choice.logprobs.token_logprobs.pop(0), choice.logprobs.top_logprobs.pop(0)    # None: OpenAI's types forbid it
    strict(Completion, strict_reply)
    paris = reply.choices[0]
    assert paris.text.startswith('The capital of France is Paris') and reply.choices[1].index == 1
    assert paris.text == ''.join(paris.logprobs.tokens)
    assert [paris.text[at:at + len(t)] for at, t in zip(paris.logprobs.text_offset, paris.logprobs.tokens)] \
        == paris.logprobs.tokens


def test_echo_scores_a_text(client):
    def score(text):
        reported = client.completions.create(model=MODEL, prompt=text, max_tokens=0, echo=True, logprobs=0)
        assert reported.choices[0].text == text and reported.usage.completion_tokens == 0
        return reported.choices[0].logprobs.token_logprobs
    likely, unlikely = score('The sky is blue'), score('The sky is spoon')
    assert likely[0] is None and likely[1:3] == pytest.approx(unlikely[1:3], abs=1e-3) and likely[3] > unlikely[3] + 3


def test_echo_scores_as_the_forward_pass_does(folder):
    model, text = load_model(folder, dtype='float32'), 'Hello 🐻, a text of some length.'
    ids = load_tokenizer(folder).encode(text)
    rows = [log_softmax(row.astype('f8')) for row in answer_logits(model, ids[:1], ids[1:])]
    with serve_in_background(LLM(folder, num_blocks=64).engine) as server:
        client = openai.OpenAI(base_url=server.url + '/v1', api_key='none', max_retries=0)
        ask = dict(model='', prompt=text, max_tokens=2, echo=True, logprobs=3, seed=1)
        reported = client.completions.create(**ask).choices[0].logprobs
        parts = [c.choices[0].logprobs.token_logprobs for c in client.completions.create(stream=True, **ask)]
        by_ids = client.completions.create(model='', prompt=ids, max_tokens=1, echo=True, logprobs=0).choices[0]
    n = len(ids)
    assert sum(parts, [])[1:] == pytest.approx(reported.token_logprobs[1:], abs=1e-3)
    assert reported.token_logprobs[1:n] == pytest.approx([row[i] for row, i in zip(rows, ids[1:])], abs=1e-3)
    assert [max(top.values()) for top in reported.top_logprobs[1:n]] == pytest.approx([r.max() for r in rows], abs=1e-3)
    assert by_ids.text.startswith(text) and by_ids.logprobs.token_logprobs[1:n] == reported.token_logprobs[1:n]


@pytest.mark.parametrize('more, error, param, code', [
    ({'temperature': 9.0}, openai.BadRequestError, 'temperature', None),
    ({'n': 10**6}, openai.BadRequestError, 'n', None),
    ({'model': '../smollm2'}, openai.NotFoundError, 'model', 'model_not_found'),
    ({'tool_choice': 'required'}, openai.BadRequestError, 'tool_choice', None),
    ({'extra_body': {'guided_json': {}}}, openai.BadRequestError, 'guided_json', None),
    ({'functions': [{'name': 'f'}]}, openai.BadRequestError, 'functions', None),
    ({'messages': [{'role': 'user', 'content': 'word ' * 9000}]}, openai.BadRequestError, None,
     'context_length_exceeded'),
    ({'logit_bias': {'999999': 1}}, openai.BadRequestError, 'logit_bias', None),
    ({'response_format': {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': {'type': 'nonsense'}}}},
     openai.BadRequestError, None, None),
])
@pytest.mark.parametrize('stream', [False, True])
def test_errors_have_the_right_class(client, more, error, param, code, stream):
    with pytest.raises(error) as caught: chat(client, stream=stream, **more)
    assert caught.value.code == code and caught.value.body['message']
    assert param is None or caught.value.param == param
    assert caught.value.type == ('not_found_error' if code == 'model_not_found' else 'invalid_request_error')


def test_a_wrong_key(url):
    for key in ('other', 'a-keY'):
        with pytest.raises(openai.AuthenticationError) as caught:
            openai.OpenAI(base_url=url, api_key=key, max_retries=0).models.list()
        assert caught.value.code == 'invalid_api_key'


@pytest.mark.parametrize('choice', ['required', {'type': 'function', 'function': {'name': 'get_weather'}}])
def test_a_call_that_must_come(client, choice):
    ask = dict(messages=[{'role': 'user', 'content': 'What is the weather in Paris?'}], tools=[WEATHER],
               tool_choice=choice, parallel_tool_calls=False, max_tokens=80)
    reply = strict(ChatCompletion, chat(client, **ask))
    (call,) = reply.choices[0].message.tool_calls
    assert call.function.name == 'get_weather' and [*json.loads(call.function.arguments)] == ['city']
    assert reply.choices[0].finish_reason == ('tool_calls' if choice == 'required' else 'stop')
    parts = [p for c in chat(client, stream=True, **ask) for p in c.choices[0].delta.tool_calls or ()]
    assert parts[0].function.name == 'get_weather' and parts[0].id.startswith('call_')
    assert ''.join(p.function.arguments for p in parts) == call.function.arguments


def test_the_result_of_a_call_goes_back(client):
    turns = [{'role': 'user', 'content': 'What is the weather in Paris?'},
             {'role': 'assistant', 'tool_calls': [{'id': 'call_1', 'type': 'function', 'function': {
                 'name': 'get_weather', 'arguments': '{"city": "Paris"}'}}]},
             {'role': 'tool', 'tool_call_id': 'call_1', 'content': 'sunny, 20 degrees'}]
    assert chat(client, messages=turns, tools=[WEATHER, TIME]).choices[0].message.content


def test_parse(client):
    reply = client.chat.completions.parse(
        model=MODEL, messages=[{'role': 'user', 'content': 'Tell me about Rome as JSON.'}],
        response_format=City, temperature=0, max_tokens=80)
    assert isinstance(reply.choices[0].message.parsed, City)


def test_parse_a_strict_tool(client):
    tool = openai.pydantic_function_tool(City)
    reply = client.chat.completions.parse(
        model=MODEL, messages=[{'role': 'user', 'content': 'Tell me about Rome.'}], tools=[tool],
        tool_choice='required', parallel_tool_calls=False, temperature=0, max_tokens=120)
    assert isinstance(reply.choices[0].message.tool_calls[0].function.parsed_arguments, City)


def test_json_mode_and_choice(client):
    received = chat(client, messages=[{'role': 'user', 'content': 'A small JSON object, please.'}], max_tokens=100,
                response_format={'type': 'json_object'}, logit_bias={}).choices[0]
    assert received.finish_reason == 'length' or isinstance(json.loads(received.message.content), dict)
    received = chat(client, extra_body={'structured_outputs': {'choice': ['red', 'blue']}}).choices[0]
    assert received.message.content in ('red', 'blue') and received.finish_reason == 'stop'


def test_many_at_once(url):
    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            async def one(i):
                stream = await client.completions.create(model=MODEL, prompt=f'{i}, {i + 1},', max_tokens=4,
                                                         temperature=0, stream=True)
                return ''.join([c.choices[0].text async for c in stream])
            together = await asyncio.gather(*map(one, range(4)))
            return together, [await one(i) for i in range(4)]
    together, alone = asyncio.run(all_of_them())
    assert together == alone


def test_litellm(url):
    litellm = pytest.importorskip('litellm')
    ask = dict(model=f'openai/{MODEL}', api_base=url, api_key=KEY, messages=ASK, max_tokens=8, temperature=0,
               num_retries=0)
    plain = litellm.completion(**ask)
    assert plain.usage.completion_tokens == 8 and plain.choices[0].finish_reason == 'length'
    chunks = list(litellm.completion(stream=True, **ask))
    assert ''.join(c.choices[0].delta.content or '' for c in chunks) == plain.choices[0].message.content
    text = litellm.text_completion(model=f'text-completion-openai/{MODEL}', api_base=url, api_key=KEY,
                                   prompt='The capital of France is', max_tokens=2, temperature=0)
    assert text.choices[0].text.startswith(' Paris')
    with pytest.raises(litellm.BadRequestError): litellm.completion(**ask | {'n': 99})


def test_langchain(url):
    langchain_openai = pytest.importorskip('langchain_openai')
    model = langchain_openai.ChatOpenAI(base_url=url, api_key=KEY, model=MODEL, temperature=0, max_tokens=80,
                                        max_retries=0)
    plain = model.invoke('Name a color.')
    assert plain.content and plain.usage_metadata['output_tokens'] > 0
    assert ''.join(chunk.text for chunk in model.stream('Name a color.')) == plain.text
    called = model.bind_tools([WEATHER], tool_choice='get_weather', parallel_tool_calls=False).invoke('Paris?')
    assert called.tool_calls[0]['name'] == 'get_weather' and 'city' in called.tool_calls[0]['args']
    assert isinstance(model.with_structured_output(City, method='json_schema').invoke('Rome'), City)
    assert isinstance(model.with_structured_output(City, method='function_calling').invoke('Rome'), City)


def test_instructor(client):
    instructor = pytest.importorskip('instructor')
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        ask = instructor.from_openai(client, mode=mode)
        city = ask.chat.completions.create(model=MODEL, messages=[{'role': 'user', 'content': 'Rome'}],
                                           response_model=City, max_tokens=120, temperature=0, max_retries=0)
        assert isinstance(city, City)
