"The OpenAPI document and the running server, held against each other by schemathesis."
import os
from collections import Counter

import pytest

schemathesis = pytest.importorskip('schemathesis')

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

from tinyvllm.engine.llm import LLM  # noqa: E402
from tinyvllm.server.run import serve_in_background  # noqa: E402

ALWAYS = [not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
          checks.response_schema_conformance, checks.response_headers_conformance]
POSTS = ['/v1/completions', '/v1/chat/completions', '/generate', '/tokenize', '/detokenize']
GETS = ['/v1/models', '/v1/models/{name}', '/tokenizer_info', '/health', '/version', '/metrics']
SIZE = int(os.environ.get('OPENAPI_CASES', 5))    # cases of each operation and mode
SEEN = Counter()


@pytest.fixture(scope='module')
def schema(folder):
    "The document, as the server publishes it. A short context keeps long answers short."
    llm = LLM(folder, num_blocks=64, max_model_len=128)
    with serve_in_background(llm.engine, names=('tiny',)) as server:
        yield schemathesis.openapi.from_url(server.url + '/openapi.json')
    assert llm.engine.scheduler.blocks.num_free == 63    # nothing that was sent has left a block behind


def fitted(body):
    "The same wishes for this model: what a document cannot say (which ids there are, what goes together)."
    if isinstance(body, list): return [fitted(v) for v in body]
    if not isinstance(body, dict): return body % 256 if type(body) is int and body > 255 else body
    loose = {'tool_choice', 'parallel_tool_calls', 'logits_processors', 'structured_outputs', 'response_format',
             'stream_options', 'top_logprobs', 'prompt_logprobs', 'continue_final_message', 'allowed_token_ids',
             'min_tokens', 'best_of', 'chat_template_kwargs', 'tools'}
    body = {k: fitted(v) for k, v in body.items() if k not in loose}
    if isinstance(bias := body.get('logit_bias'), dict):
        body['logit_bias'] = {str(int(k) % 256): v for k, v in bias.items()}
    for message in body.get('messages') or ():
        message.pop('tool_calls', None)
        if not isinstance(message.get('content'), str) or len(message['content']) > 8: message['content'] = 'x'
    if 'messages' in body: body |= {'messages': body['messages'][:3], 'max_tokens': 3, 'max_completion_tokens': 3}
    return body


def sent(operation, mode, n):
    "Send `n` cases and check every answer."
    good = mode is GenerationMode.POSITIVE
    wanted = ALWAYS + ([] if good else [checks.negative_data_rejection])

    @settings(max_examples=n, deadline=None, database=None, derandomize=True,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case):
        for body in [case.body, fitted(case.body)] if good and isinstance(case.body, dict) else [case.body]:
            if good and isinstance(body, dict) and 'model' in body: body['model'] = 'tiny'    # else a 404
            case.body = body
            response = case.call(timeout=60)
            SEEN[operation.path, mode.value, response.status_code] += 1
            case.validate_response(response, checks=wanted)
    send()
    if good and n >= 50: assert SEEN[operation.path, 'positive', 200] > n / 2, SEEN    # not only refusals


@pytest.mark.parametrize('mode', GenerationMode)
@pytest.mark.parametrize('path', POSTS)
def test_posts(schema, path, mode):
    "Bodies that the document allows, and bodies that it does not."
    sent(schema[path]['POST'], mode, SIZE)


@pytest.mark.parametrize('path', GETS)
def test_gets(schema, path):
    "Paths without a body."
    if path in schema.raw_schema['paths']: sent(schema[path]['GET'], GenerationMode.POSITIVE, SIZE)


@pytest.mark.slow
@pytest.mark.parametrize('mode', GenerationMode)
@pytest.mark.parametrize('path', POSTS)
def test_many_posts(schema, path, mode):
    "The same, 900 cases in all."
    sent(schema[path]['POST'], mode, 60)
