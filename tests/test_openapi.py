"The OpenAPI document and the running server, held against each other by schemathesis."
import os
from collections import Counter

import pytest

schemathesis = pytest.importorskip('schemathesis')

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

from tinyvllm.engine import LLM  # noqa: E402
from tinyvllm.server import serving  # noqa: E402

ALWAYS = [not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
          checks.response_schema_conformance, checks.response_headers_conformance]
POSTS = ['/v1/completions', '/v1/chat/completions', '/generate', '/tokenize', '/detokenize']
GETS = ['/v1/models', '/v1/models/{name}', '/tokenizer_info', '/health', '/version', '/metrics']
SIZE = int(os.environ.get('OPENAPI_CASES', 12))    # cases of each operation and mode
SEEN = Counter()


@pytest.fixture(scope='module')
def schema(folder):
    "The document, as the server publishes it. A short context keeps long answers short."
    llm = LLM(folder, num_blocks=64, max_model_len=32)
    with serving(llm.engine, names=('tiny',)) as server:
        yield schemathesis.openapi.from_url(server.url + '/openapi.json')
    assert llm.engine.scheduler.blocks.num_free == 63    # nothing that was sent has left a block behind


def sent(operation, mode, n):
    "Send `n` cases and check every answer."
    @settings(max_examples=n, deadline=None, database=None, derandomize=True,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case):
        if isinstance(case.body, dict) and 'model' in case.body and mode is GenerationMode.POSITIVE:
            case.body['model'] = 'tiny'    # every other one is a 404
        response = case.call(timeout=60)
        SEEN[operation.path, mode.value, response.status_code] += 1
        more = [checks.negative_data_rejection] if mode is GenerationMode.NEGATIVE else []
        case.validate_response(response, checks=ALWAYS + more)
    send()


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
    "The same, 600 cases in all."
    sent(schema[path]['POST'], mode, 60)
    print({key: n for key, n in SEEN.items() if key[0] == path})
