"Vocabularies of all kinds: ids equal to the reference, text that comes back, streams that join, errors in one line."
import importlib.util
import io
import json
import re
import time
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Tokenizer as FastTokenizer, decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel

from tinyvllm.errors import BadInput
from tinyvllm.models.tokenizer import byte_alphabet
from tinyvllm.models.tokenizer_files import word_cutter
from tinyvllm.models.chat_template import render_chat
from tinyvllm.models.tokenizer_files import (BYTE, CONTROL, WORD_PATTERNS, TOKEN, UNKNOWN, USER,
    load_tokenizer)
from tinyvllm.models.weights import open_checkpoint
from tinyvllm.models.hub import resolve

GOLDEN = json.loads((Path(__file__).parent / 'golden/smollm2.json').read_text(encoding='utf-8'))['items']
TEXTS = ['', ' ', 'a', '  two  spaces ', 'The river rose in the night.', "it's 2026, isn't it?\n\n\tyes\r\n",
         'La rivière est montée; Übermaß, żółć, ñ', 'Ночью река поднялась', 'ارتفع النهر في الليل', 'रात में नदी',
         '夜里河水上涨，早晨桥已经不见了。', '朝には橋が', '강물이 불어나', 'สะพานหายไป', '🌧🌉 👩‍👩‍👧 🏳️‍🌈', 'e\u0301 \u200d \ufeff \u2028',
         'x' * 300, 'def f(x):\n    return {"a": [x ** 2]}\n', '\ufffd and \U0010ffff', '1234567890 ²³ Ⅷ']
plain_text = st.one_of(st.text(max_size=40), st.text(alphabet='ab \n\t1é東🌉', max_size=40), st.sampled_from(TEXTS))
quick = settings(max_examples=150, deadline=None)


# -- the vocabularies

def mistral_file(name):
    spec = importlib.util.find_spec('mistral_common')
    if spec is None: pytest.skip('needs the mistral_common wheel')
    return Path(spec.origin).parent / 'data' / name


def trained_bpe():
    "A small byte-level BPE with special tokens, trained here."
    engine = FastTokenizer(models.BPE())
    engine.pre_tokenizer, engine.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    engine.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=ByteLevel.alphabet(), show_progress=False,
        special_tokens=['<|end|>', '<|user|>']))
    return engine


def trained_spm(**kw):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([t for t in TEXTS if t.strip()] * 5), model_writer=model, vocab_size=420,
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, **dict(
            model_type='bpe', normalization_rule_name='identity', remove_extra_whitespaces=False) | kw)
    return model.getvalue()


def gguf_of(engine):
    "The metadata that a GGUF converter would write for a sentencepiece model."
    n = range(engine.vocab_size())
    kind = lambda i: next((k for k, test in ((CONTROL, engine.is_control), (UNKNOWN, engine.is_unknown),
                                             (BYTE, engine.is_byte)) if test(i)), TOKEN)
    return {'tokenizer.ggml.model': 'llama', 'tokenizer.ggml.tokens': [engine.id_to_piece(i) for i in n],
            'tokenizer.ggml.scores': [engine.get_score(i) for i in n],
            'tokenizer.ggml.token_type': [kind(i) for i in n],
            'tokenizer.ggml.bos_token_id': engine.bos_id(), 'tokenizer.ggml.eos_token_id': engine.eos_id()}


def llama_json(engine):
    "A tokenizer.json in Llama 2's style, with the pieces of a sentencepiece model and few merges."
    pieces = {engine.id_to_piece(i): i for i in range(engine.vocab_size())}
    merges = [(p[0], p[1]) for p in pieces if len(p) == 2 and p[0] in pieces and p[1] in pieces]
    fast = FastTokenizer(models.BPE(pieces, merges, unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    fast.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(' ', 1, 0)])
    fast.add_special_tokens([AddedToken(t, normalized=False) for t in ('<unk>', '<s>', '</s>')])
    return fast


@pytest.fixture(scope='session')
def smol(): return load_tokenizer(resolve('smollm2'))


@pytest.fixture(scope='session')
def spm_engine(): return sentencepiece.SentencePieceProcessor(model_proto=trained_spm())


@pytest.fixture(scope='session')
def kinds(smol, spm_engine, tmp_path_factory):
    "One tokenizer of every kind."
    folder = tmp_path_factory.mktemp('kinds')
    trained_bpe().save(str(folder / 'bpe.json'))
    llama_json(spm_engine).save(str(folder / 'llama.json'))
    (folder / 'spm.model').write_bytes(trained_spm())
    (folder / 'unigram.model').write_bytes(trained_spm(model_type='unigram'))
    found = {name: load_tokenizer(folder / name) for name in ('bpe.json', 'llama.json', 'spm.model', 'unigram.model')}
    return found | {'gguf gpt2': smol, 'gguf llama': load_tokenizer(gguf_of(spm_engine))}


KINDS = ['bpe.json', 'llama.json', 'spm.model', 'unigram.model', 'gguf gpt2', 'gguf llama']


# -- the real vocabulary

@pytest.mark.parametrize('item', GOLDEN, ids=lambda item: item['name'])
def test_golden_ids_and_text(smol, item):
    assert smol.encode(item['prompt']) == item['prompt_ids']
    assert smol.decode(item['greedy_ids']) == item['greedy_text']
    assert streamed(smol, item['greedy_ids']) == item['greedy_text']


def test_smollm2_special_tokens(smol):
    assert (smol.vocab_size, smol.bos_id, smol.eos_ids, smol.add_bos) == (49152, 1, (2, 0), False)
    assert smol.special_ids == frozenset(range(17))
    assert smol.encode('<|im_end|>') == [2] and 2 not in smol.encode('<|im_end|>', parse_special=False)
    assert smol.decode(smol.encode('<|im_end|>', parse_special=False)) == '<|im_end|>'
    assert smol.decode([1, 504, 2], skip_special_tokens=True) == 'The'


def test_smollm2_chat_template_gives_the_golden_prompt(smol):
    item = next(i for i in GOLDEN if i['name'] == 'chat_code')
    content = re.search(r'user\n(.*?)<\|im_end\|>', item['prompt'])[1]
    assert smol.apply_chat_template([{'role': 'user', 'content': content}]) == item['prompt']
    assert smol.encode(item['prompt']) == item['prompt_ids']


# -- text comes back

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('text', TEXTS)
def test_round_trip(kinds, kind, text):
    tok = kinds[kind]
    assert tok.decode(tok.encode(text), skip_special_tokens=True) == text
    assert streamed(tok, tok.encode(text), True) == text


@quick
@given(st.data(), st.sampled_from([k for k in KINDS if k not in ('gguf gpt2', 'unigram.model')]))
def test_round_trip_of_any_text(kinds, data, kind):
    text = data.draw(plain_text).replace('▁', '')
    ids = kinds[kind].encode(text, add_bos=False, parse_special=False)
    assert kinds[kind].decode(ids) == text


def test_bytes_without_a_token_are_dropped(smol):
    assert smol.decode(smol.encode('a\x04b')) == 'ab', 'as Hugging Face does'


# -- streaming

def streamed(tok, ids, skip=False):
    detok = tok.stream(skip_special_tokens=skip)
    return ''.join([detok.add(i) for i in ids]) + detok.finish()


@settings(max_examples=600, deadline=None)
@given(st.data(), st.sampled_from(KINDS), st.booleans())
def test_pieces_join_to_the_decoded_text(kinds, data, kind, skip):
    tok = kinds[kind]
    low = st.integers(0, min(tok.vocab_size, 300) - 1) # byte and special tokens live here
    ids = data.draw(st.lists(low | st.integers(0, tok.vocab_size - 1), max_size=40))
    detok, sent, full = tok.stream(skip), '', tok.decode(ids, skip)
    for i in ids:
        sent += detok.add(i)
        assert full.startswith(sent), 'text that was handed out is final'
    assert sent + detok.finish() == full


@quick
@given(st.data(), st.sampled_from(KINDS))
def test_streaming_text_never_shows_half_a_character(kinds, data, kind):
    tok, text = kinds[kind], data.draw(plain_text.filter(lambda t: '\ufffd' not in t))
    if '\ufffd' in tok.decode(ids := tok.encode(text)): return # bytes that SmolLM2 has no token for
    detok = tok.stream()
    assert all('\ufffd' not in piece for piece in [*map(detok.add, ids), detok.finish()])


def test_an_answer_keeps_the_space_after_its_prompt(kinds):
    tok = kinds['gguf llama']
    prompt, answer = tok.encode('The river'), tok.encode('rose', add_bos=False)
    detok = tok.stream(prompt_ids=prompt)
    assert ''.join(map(detok.add, answer)) + detok.finish() == ' rose'
    assert streamed(tok, answer) == 'rose'


def test_streaming_costs_the_same_for_every_token(smol):
    detok, ids = smol.stream(), smol.encode('The river rose in the night. 🌧 ') * 2000
    def clock(part):
        start = time.process_time()
        for i in part: detok.add(i)
        return time.process_time() - start
    first = clock(ids[:4000])
    clock(ids[4000:-4000])
    assert clock(ids[-4000:]) < 10 * first + 0.05


# -- equal to the libraries

@quick
@given(st.data())
def test_byte_level_decode_equals_the_library(kinds, data):
    for kind in ('gguf gpt2', 'bpe.json'):
        tok = kinds[kind]
        ids = data.draw(st.lists(st.integers(0, tok.vocab_size - 1), max_size=30))
        for skip in (False, True):
            assert tok.decode(ids, skip) == tok.encoder.engine.decode(ids, skip_special_tokens=skip)


@quick
@given(text=plain_text)
def test_sentencepiece_ids_and_text_equal_the_library(kinds, spm_engine, text):
    for kind in ('spm.model', 'gguf llama'):
        ids = kinds[kind].encode(text, add_bos=False, parse_special=False)
        assert ids == spm_engine.encode(text)
        assert kinds[kind].decode(ids) == spm_engine.decode(ids)


@quick
@given(text=plain_text)
def test_llama_json_text_equals_the_library(kinds, text):
    tok = kinds['llama.json']
    ids = tok.encode(text)
    assert tok.decode(ids) == tok.encoder.engine.decode(ids)


@pytest.fixture(scope='session', params=['tokenizer.model.v1', 'mistral_instruct_tokenizer_240323.model.v3'])
def mistral(request):
    path = mistral_file(request.param)
    engine = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return engine, load_tokenizer(path), load_tokenizer(gguf_of(engine))


def test_real_sentencepiece_models(mistral):
    engine, direct, gguf = mistral
    assert direct.vocab_size == gguf.vocab_size == engine.vocab_size()
    assert direct.special_ids == gguf.special_ids and direct.pieces == gguf.pieces
    assert (direct.bos_id, direct.eos_ids, direct.add_bos) == (gguf.bos_id, gguf.eos_ids, gguf.add_bos) == (1, (2,), True)
    for text in TEXTS + [' '.join(TEXTS)]:
        for tok in (direct, gguf):
            ids = tok.encode(text, add_bos=False)
            assert ids == engine.encode(text) and tok.decode(ids) == engine.decode(ids)
            assert tok.encode(text) == [1, *ids] and tok.decode([1, *ids], True) == text


@quick
@given(text=plain_text)
def test_real_sentencepiece_models_on_any_text(mistral, text):
    engine, direct, gguf = mistral
    ids = engine.encode(text)
    assert direct.encode(text, False, False) == gguf.encode(text, False, False) == ids
    assert gguf.decode(ids) == engine.decode(ids)


def test_sentencepiece_special_tokens_in_text(mistral):
    engine, tok, _ = mistral
    assert tok.encode('<s>Hi</s>') == [1, *engine.encode('Hi'), 2], 'BOS is not put twice'
    assert not {1, 2} & set(tok.encode('<s>Hi</s>', add_bos=False, parse_special=False))


# -- files

def test_gguf_file_and_metadata_agree(smol, spm_engine, tmp_path):
    gguf = pytest.importorskip('gguf')
    path, meta = tmp_path / 'vocab.gguf', gguf_of(spm_engine)
    writer = gguf.GGUFWriter(path, 'llama')
    writer.add_tokenizer_model('llama')
    writer.add_token_list(meta['tokenizer.ggml.tokens'])
    writer.add_token_scores(meta['tokenizer.ggml.scores'])
    writer.add_token_types(meta['tokenizer.ggml.token_type'])
    writer.add_bos_token_id(1), writer.add_eos_token_id(2), writer.add_add_space_prefix(False)
    writer.add_tensor('token_embd.weight', __import__('numpy').zeros((4, 4), 'float32'))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    tok = load_tokenizer(path)
    assert tok.decode(tok.encode('The river', False)) == 'The river' and not tok.strip_space
    assert tok.pieces == load_tokenizer(meta).pieces
    metadata = open_checkpoint(resolve('smollm2')).config
    assert load_tokenizer(metadata).encode(TEXTS[4]) == smol.encode(TEXTS[4])


def test_tokenizer_json_exported_from_gguf(smol, tmp_path):
    smol.encoder.engine.save(str(tmp_path / 'tokenizer.json'))
    tok = load_tokenizer(tmp_path)
    assert tok.pieces == smol.pieces and tok.special_ids == smol.special_ids
    for text in TEXTS + [g['prompt'] for g in GOLDEN]: assert tok.encode(text) == smol.encode(text)


def test_settings_beside_the_tokenizer(tmp_path):
    engine = trained_bpe()
    engine.enable_truncation(3), engine.enable_padding(length=8)
    engine.save(str(tmp_path / 'tokenizer.json'))
    write = lambda name, value: (tmp_path / name).write_text(json.dumps(value))
    write('tokenizer_config.json', {'bos_token': {'content': '<|user|>'}, 'eos_token': '<|end|>', 'add_bos_token': True,
                                    'chat_template': [{'name': 'tool', 'template': 'no'},
                                                      {'name': 'default', 'template': 'D {{ bos_token }}'}]})
    write('generation_config.json', {'eos_token_id': [5, 0, 7]})
    write('config.json', {'eos_token_id': 9, 'bos_token_id': 3})
    tok, chat = load_tokenizer(tmp_path), [{'role': 'user', 'content': 'x'}]
    assert (tok.bos_id, tok.eos_ids, tok.add_bos) == (1, (0, 5, 7, 9), True)
    whole = trained_bpe().encode(TEXTS[4]).ids
    assert len(whole) > 3 and tok.encode(TEXTS[4]) == [1, *whole], 'never truncated'
    assert len(tok.encode('a')) == 2, 'never padded'
    assert tok.apply_chat_template(chat) == 'D <|user|>'
    (tmp_path / 'chat_template.jinja').write_text('file')
    assert load_tokenizer(tmp_path).apply_chat_template(chat) == 'file'
    for broken in ({'eos_token_id': 'x'}, {'eos_token_id': [None, -1, 'x', {}]}):
        write('generation_config.json', broken)
        assert load_tokenizer(tmp_path).eos_ids == (0, 9)


def test_tokens_added_beside_a_sentencepiece_model(tmp_path):
    (tmp_path / 'tokenizer.model').write_bytes(trained_spm())
    n = sentencepiece.SentencePieceProcessor(model_proto=trained_spm()).vocab_size()
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(
        {'eos_token': '<|im_end|>', 'added_tokens_decoder': {str(n): {'content': '<|im_end|>', 'special': True},
                                                             str(n + 1): {'content': '<|im_end|>!'}}}))
    tok = load_tokenizer(tmp_path)
    assert tok.eos_ids == (n, 2) and tok.vocab_size == n + 2
    assert tok.encode('a<|im_end|>!')[-1] == n + 1, 'the longest one that fits'
    assert tok.encode('a<|im_end|>')[-1] == n and tok.decode([n]) == '<|im_end|>'


def test_bos_comes_from_the_files(kinds):
    tok = kinds['gguf llama']
    assert tok.encode('a')[0] == 1 and tok.encode('a', add_bos=False)[0] != 1 and tok.encode('') == [1]
    assert tok.encode('<s>a') == tok.encode('a')
    with pytest.raises(BadInput, match='no BOS'): kinds['bpe.json'].encode('a', add_bos=True)


def gguf_bpe(cut, **kw):
    tokens = [*byte_alphabet(), 'ab', 'abc', '<|eot_id|>', '<user>', '<s>']
    types = [TOKEN] * 258 + [CONTROL, USER, CONTROL]
    return {'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': cut, 'tokenizer.ggml.tokens': tokens,
            'tokenizer.ggml.token_type': types, 'tokenizer.ggml.merges': ['a b', 'ab c'],
            'tokenizer.ggml.bos_token_id': 260} | {f'tokenizer.ggml.{k}': v for k, v in kw.items()}


@pytest.mark.parametrize('pre', WORD_PATTERNS)
def test_word_patterns_cover_all_text(pre):
    tok = load_tokenizer(gguf_bpe(pre))
    for text in TEXTS:
        if pre in ('qwen2', 'deepseek-r1-qwen') and '\u0301' in text: continue # composed by NFC
        assert tok.decode(tok.encode(text), True) == text
    assert tok.add_bos == (pre in ('llama-bpe', 'llama3', 'llama-v3'))


@pytest.mark.parametrize('pre, words', {
    'gpt-2': ["It", "'s", ' 2026', ',', ' ', ' a', '\n', '\n', 'b'],
    'smollm': ["It", "'s", ' ', '2', '0', '2', '6', ',', ' ', ' a', '\n', '\n', 'b'],
    'llama-bpe': ["It", "'s", ' ', '202', '6', ',', ' ', ' a', '\n\n', 'b'],
    'qwen2': ["It", "'s", ' ', '2', '0', '2', '6', ',', ' ', ' a', '\n\n', 'b'],
    'default': ["It", "'", "s", ' ', '202', '6', ',', ' ', ' a', '\n', '\n', 'b'],
}.items())
def test_word_patterns(pre, words):
    cut = word_cutter(pre).pre_tokenize_str("It's 2026,  a\n\nb")
    assert [w.replace('Ġ', ' ').replace('Ċ', '\n') for w, _ in cut] == words


def test_user_defined_and_end_tokens_in_gguf():
    tok = load_tokenizer(gguf_bpe('llama-bpe'))
    assert tok.encode('<user>', add_bos=False) == tok.encode('<user>', False, False) == [259]
    assert tok.eos_ids == (258,) and tok.special_ids == {258, 260}
    assert load_tokenizer(gguf_bpe('gpt-2', eos_token_id=3, eot_token_id=258)).eos_ids == (3, 258)


# -- chat templates

CHAT = [{'role': 'system', 'content': 'be <b>brief</b>'}, {'role': 'user', 'content': 'été?'}]


@pytest.mark.parametrize('template, text', [
    ('{{ messages[0].content }}{{ messages[1]["role"] }}', 'be <b>brief</b>user'),
    ('{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ loop.index }}{{ loop.last }}'
     '{{ loop.length }}{% endfor %}', '2True2'),
    ('{% for m in messages %}{% if m.role == "user" %}{% break %}{% endif %}{{ m.role }}{% endfor %}', 'system'),
    ('{{ messages[1] | tojson }}', '{"role": "user", "content": "été?"}'),
    ('{{ {"a": "<"} | tojson(indent=1) }}', '{\n "a": "<"\n}'),
    ('{% generation %}x{% endgeneration %}', 'x'),
    ('  {% if true %}\n  a\n  {% endif %}\n', '  a\n'),
    ('{{ tools is defined }}{{ add_generation_prompt }}', 'FalseTrue'),
    ('{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n * 3 }}', '6'),
    ('{{ strftime_now("%Y") | length }}', '4'),
    ('{% macro f(n) %}{% if n %}{{ n }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}', '321'),
    ('{{ "-" * 10 }}{{ 7 % 4 }}{{ messages[0].content.split("<")[0].strip() | upper }}', '-' * 10 + '3BE'),
    ('{{ "a" ~ 1 ~ none ~ nothing }}{{ ["a", 2] | join("-") }}{{ "abc".replace("b", "") }}{{ "a\nb" | indent(2) }}',
     'a1Nonea-2aca\n  b'),
    ('{% for k, v in messages[0].items() if k == "role" %}{{ k }}={{ v }}{% endfor %}', 'role=system'),
])
def test_templates(kinds, template, text):
    assert render_chat(template, CHAT, add_generation_prompt=True) == text


@pytest.mark.parametrize('template', [
    "{{ ''.__class__.__mro__ }}", "{{ ''['__class__'] }}", "{{ ''|attr('__class__') }}", "{{ messages.__init__ }}",
    "{{ raise_exception.__globals__ }}", "{{ strftime_now.__globals__['sys'] }}", "{{ self._TemplateReference__context }}",
    "{{ namespace.__init__.__globals__ }}", "{{ '{0.__class__}'.format('') }}", "{{ cycler('a') }}",
    "{% set x = messages.append(1) %}", "{% set x = messages[0].update({'role': 'x'}) %}", "{{ lipsum() }}",
    "{% include 'x' %}", "{% import '/etc/passwd' as x %}", "{% extends 'x' %}",
    "{{ range(10**9) }}", "{{ range(999999999) }}", "{{ 'a' * 999999999 }}", "{{ 999999999 * ['a'] }}",
    "{{ 9 ** 9 ** 9 ** 9 }}", "{{ '%999999999d' % 1 }}", "{{ 'a'.ljust(999999999) }}", "{{ 'a'|center(999999999) }}",
    "{{ '{:999999999}'.format(1) }}", "{{ '%999999999d'|format(1) }}", "{{ 'a'.zfill(999999999) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in [[]] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{% set a = 'x' * 9999999 %}{% for i in range(9999) %}{{ a }}{% endfor %}",
    "{% for x in _budget %}{% endfor %}{% for x in [1] %}{% endfor %}",
    "{% set ns = namespace(a='a') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
    "{% set ns = namespace(a='a') %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a }}",
    "{% set ns = namespace(a='a') %}{% for i in range(60) %}{% set ns.a = ns.a|replace('a', ns.a ~ 'aa') %}{% endfor %}",
    "{% set ns = namespace(a='a') %}{% for i in range(60) %}{% set ns.a = ns.a.replace('a', ns.a ~ 'aa') %}{% endfor %}",
    "{% set ns = namespace(a=['a']) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
    "{% set ns = namespace(a=['a']) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a|tojson }}",
    "{% set ns = namespace(a=['a']) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a ~ '' }}",
    "{{ range(99999)|map('string')|join('x' * 9999) }}", "{{ ('x' * 9999).join(messages[0].role * 9999) }}",
    "{{ 'a\n' * 9999 | indent(999999) }}",
    "{% if %}", "{{ unclosed", "{{ " + "(" * 5000 + ")" * 5000 + " }}", "{{ 1 / 0 }}", "{{ nothing.at.all }}",
    "{{ raise_exception('roles must\\nalternate') }}", "{{ 'a' + 1 }}", "{% for m in 5 %}{% endfor %}",
])
def test_hostile_and_broken_templates(template):
    start = time.process_time()
    with pytest.raises(BadInput) as error: render_chat(template, CHAT)
    assert '\n' not in str(error.value) and time.process_time() - start < 10
    assert CHAT[0]['role'] == 'system'


def test_a_conversation_cannot_be_a_template(smol):
    text = smol.apply_chat_template([{'role': 'user', 'content': "{{ 7 * 7 }}{% raw %}"}])
    assert '{{ 7 * 7 }}{% raw %}' in text


@pytest.mark.parametrize('messages', [None, [], 'hi', {}, ['hi'], [{}], [{'role': 'user'}], [{'content': 'x'}],
                                      [{'role': 1, 'content': 'x'}], [{'role': 'user', 'content': 5}],
                                      [{'role': 'user', 'content': None}], [{'role': 'u', 'content': ['x']}, 3]])
def test_wrong_messages(smol, messages):
    with pytest.raises(BadInput): smol.apply_chat_template(messages)


def test_no_template(kinds):
    with pytest.raises(BadInput, match='chat_template.jinja'): kinds['spm.model'].apply_chat_template(CHAT)


# -- bad input

@pytest.mark.parametrize('text', [None, 5, b'bytes', ['a'], '\ud800', 'a\udfffb'])
def test_text_that_is_not_text(kinds, text):
    for tok in kinds.values():
        with pytest.raises(BadInput): tok.encode(text)


@pytest.mark.parametrize('ids', [[-1], [10**9], ['a'], [None], [1.5]])
def test_ids_that_are_not_ids(kinds, ids):
    for tok in kinds.values():
        with pytest.raises(BadInput): tok.decode(ids)
        with pytest.raises(BadInput): tok.stream().add(ids[0])


def test_vocabulary_and_model_must_fit():
    tok = load_tokenizer(gguf_bpe('gpt-2'))
    with pytest.raises(BadInput, match='261 ids .* 200 embedding rows'): tok.check_vocab(200)
    tok.check_vocab(261)
    with pytest.raises(BadInput): tok.decode([261])
    tok.check_vocab(320)
    assert tok.decode([ord('a') - 33, 300]) == 'a', 'a padding row decodes to nothing'
    with pytest.raises(BadInput): tok.decode([320])


@pytest.mark.parametrize('change', [
    {'model': 'bert'}, {'model': None}, {'pre': 'klingon'}, {'pre': 7}, {'pre': ['gpt-2']}, {'tokens': None}, {'tokens': []}, {'tokens': 'abc'},
    {'tokens': [1, 2]}, {'tokens': 5}, {'token_type': [1]}, {'token_type': None}, {'token_type': ['x'] * 261},
    {'merges': None}, {'merges': ['ab']}, {'merges': ['a zz']}, {'merges': [1]}, {'merges': ['a b c']},
    {'bos_token_id': 261}, {'bos_token_id': -1}, {'bos_token_id': 'x'}, {'eos_token_id': 10**9}, {'eot_token_id': 1.5},
    {'model': 'llama'}, {'model': 'llama', 'scores': [0.0]}, {'model': 'llama', 'scores': [0.0] * 261},
], ids=str)
def test_bad_gguf_vocabulary(change):
    with pytest.raises(BadInput) as error: load_tokenizer(gguf_bpe('gpt-2', **change))
    assert '\n' not in str(error.value)


def test_bad_files(tmp_path):
    (tmp_path / 'empty').mkdir()
    cases = {tmp_path / 'none.json', tmp_path / 'empty'}
    for name, data in {'a.json': b'', 'b.json': b'not json', 'c.json': b'[]', 'd.json': b'{"version": "1.0"}',
                       'e.model': b'', 'f.model': b'garbage', 'g.gguf': b'GGUF', 'h.json': b'\xff\xfe{}'}.items():
        (tmp_path / name).write_bytes(data)
        cases.add(tmp_path / name)
    wordpiece = FastTokenizer(models.WordPiece({'[UNK]': 0, 'a': 1}))
    wordpiece.decoder = decoders.WordPiece()
    wordpiece.save(str(tmp_path / 'wordpiece.json'))
    for path in cases | {tmp_path / 'wordpiece.json'}:
        with pytest.raises(BadInput) as error: load_tokenizer(path)
        assert '\n' not in str(error.value), path


@pytest.mark.parametrize('vocab', [{'a': 2**31, 'b': 1}, {'a': 0, 'b': 0}, {}], ids=str)
def test_vocabularies_that_would_hang_or_lose_tokens(tmp_path, vocab):
    data = json.loads(trained_bpe().to_str())
    data['model'] |= {'vocab': vocab, 'merges': []}
    (tmp_path / 'tokenizer.json').write_text(json.dumps(data | {'added_tokens': []}))
    with pytest.raises(BadInput): load_tokenizer(tmp_path)


def test_a_weights_file_finds_the_tokenizer_beside_it(tmp_path):
    trained_bpe().save(str(tmp_path / 'tokenizer.json'))
    assert load_tokenizer(tmp_path / 'model.safetensors').vocab_size == load_tokenizer(tmp_path).vocab_size


@pytest.mark.parametrize('name', ['tokenizer_config.json', 'config.json', 'generation_config.json'])
@pytest.mark.parametrize('data', ['', '[]', '{"a":', '[' * 100_000], ids=['empty', 'list', 'cut', 'deep'])
def test_bad_settings(tmp_path, name, data):
    trained_bpe().save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / name).write_text(data)
    with pytest.raises(BadInput, match=name): load_tokenizer(tmp_path)


def damaged(data, cuts):
    "`data` with some bytes changed, perhaps cut short."
    data = bytearray(data)
    for place, byte in cuts[1:]: data[int(place * (len(data) - 1))] = byte
    return bytes(data[:int(cuts[0][0] * len(data))] if cuts[0][1] < 128 else data)


damage = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=2, max_size=6)


@pytest.mark.parametrize('name', ['tokenizer.json', 'tokenizer.model'])
def test_damaged_files_give_clean_errors(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp('damaged')
    whole = trained_bpe().to_str().encode() if name.endswith('json') else trained_spm()

    @quick
    @given(damage)
    def check(cuts):
        (folder / name).write_bytes(damaged(whole, cuts))
        try: tok = load_tokenizer(folder / name)
        except BadInput as e: assert '\n' not in str(e)
        else: tok.decode(tok.encode('The river é 🌉'))
    check()
