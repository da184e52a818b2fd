"""Logits processors: rules in numpy by themselves, what binding refuses, plugins by name."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, strategies as st
from support.constraints import Favour, answers, cases, engines, model, plugins, seeds, tokenizer, tokens  # noqa: F401

from tinyvllm.errors import BadInput
from tinyvllm.sampling import logits_processors
from tinyvllm.sampling.logits_processors import (
    AllowedTokens, BadWords, BoundPlugin, LogitBias, LogitsProcessorPlugin, LogitsProcessors, MinTokens, bind_logits_processors,
    load_plugins, pack_mask, register_plugin, unpack_mask)
from tinyvllm.sampling.params import SamplingParams, StructuredOutputs
from tinyvllm.sampling.structured_output import bind_constraints

form = StructuredOutputs


# --- rules ----------------------------------------------------------------------------------------------------

@cases
@given(seeds, st.integers(1, 200))
def test_a_mask_unpacks_to_what_was_packed(seed, V):
    ids = np.flatnonzero(np.random.default_rng(seed).random(V) < 0.4)
    assert unpack_mask(pack_mask(ids, V), V).nonzero()[0].tolist() == ids.tolist()


@cases
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=5), st.lists(st.integers(0, 3), max_size=6))
def test_bad_words_are_never_completed(words, output):
    "Forbidden is exactly what would complete one of them."
    rule = BadWords([tuple(w) for w in words])
    forbidden = {token for token, add in rule.compute_edits(output) if add == -math.inf}
    assert forbidden == {t for t in range(4) if any([*output, t][-len(w):] == w for w in words)}
    assert rule.needs_output_tokens == any(len(w) > 1 for w in words)


def test_edits_add_up_and_masks_meet():
    bound = LogitsProcessors([LogitBias([(1, 2.0), (3, 1.0)]), MinTokens([3, 9], 2), BadWords([(1,)])])
    assert dict(bound.compute_edits([5])) == {1: -math.inf, 3: -math.inf, 9: -math.inf}
    assert dict(bound.compute_edits([5, 5])) == {1: -math.inf, 3: 1.0}
    assert not bound.needs_output_tokens and bound.compute_mask([]) is None
    masks = LogitsProcessors([AllowedTokens([1, 2, 40], 50), AllowedTokens([2, 40, 49], 50)])
    assert unpack_mask(masks.compute_mask([]), 50).nonzero()[0].tolist() == [2, 40]
    assert masks.apply(np.zeros(50), [])[[1, 2, 49]].tolist() == [-math.inf, 0, -math.inf]


# --- what is refused ------------------------------------------------------------------------------------------

WRONG = [(dict(logit_bias={512: 1}), 'logit_bias'), (dict(allowed_token_ids=[3, 600]), 'allowed_token_ids'),
         (dict(logits_processors={'none such': {}}), 'logits_processors'),
         (dict(bad_words=['x' * 300, 'y' * 300]), 'bad_words'),
         (dict(structured_outputs=form(choice=['a']), ignore_eos=True), 'structured_outputs'),
         (dict(structured_outputs=form(choice=['a']), min_tokens=3), 'structured_outputs')]


@pytest.mark.parametrize('asked,param', WRONG, ids=lambda x: x if isinstance(x, str) else '')
def test_parameters_that_cannot_hold_are_refused(tokenizer, asked, param):
    with pytest.raises(BadInput) as error:
        bind_constraints(SamplingParams(**asked), tokenizer, SimpleNamespace(vocab_size=512))
    assert error.value.param == param


def test_without_a_tokenizer_there_is_no_text(tokenizer):
    config = SimpleNamespace(vocab_size=512)
    for asked in (dict(bad_words=['a']), dict(structured_outputs=form(regex='a'))):
        with pytest.raises(BadInput, match='no tokenizer'):
            bind_constraints(SamplingParams(**asked), None, config)
    assert bind_constraints(SamplingParams(logit_bias={3: 1}), None, config).compute_edits([]) == [(3, 1)]
    assert bind_constraints(SamplingParams(), None, config) is None


def test_structured_outputs_need_their_binder(tokenizer):
    "Without the seam's function they are refused; contradictions are refused first."
    config = SimpleNamespace(vocab_size=512)
    with pytest.raises(BadInput, match='without structured outputs'):
        bind_logits_processors(SamplingParams(structured_outputs=form(choice=['a'])), tokenizer, config)
    with pytest.raises(BadInput, match='ignore_eos'):
        bind_logits_processors(SamplingParams(structured_outputs=form(choice=['a']), ignore_eos=True), tokenizer, config)


# --- plugins --------------------------------------------------------------------------------------------------

def test_plugins_are_loaded_by_name_only(plugins, monkeypatch):
    class Point(SimpleNamespace):
        def load(self):
            loaded.append(self.name)
            return self.thing
    loaded = []
    points = [Point(name='favour', thing=Favour), Point(name='evil', thing=1 / 1), Point(name='other', thing=Favour())]
    monkeypatch.setattr(logits_processors, 'entry_points', lambda group: points if group == 'tinyvllm.logits_processors' else [])
    load_plugins([])
    assert not loaded and not plugins
    load_plugins(['favour'])
    assert loaded == ['favour'] and isinstance(plugins['favour'], Favour)
    for name, message in (('nothing', 'there are: favour, evil, other'), ('evil', 'no LogitsProcessorPlugin'), ('other', 'has another name')):
        with pytest.raises(BadInput, match=message):
            load_plugins([name])


def test_arguments_are_checked_at_admission(plugins):
    register_plugin(Favour())
    with pytest.raises(BadInput, match='takes a token'):
        bind_constraints(SamplingParams(logits_processors={'favour': {}}), None, SimpleNamespace(vocab_size=8))
    with pytest.raises(BadInput, match='an object'):
        BoundPlugin('favour', '[1]', [])


def test_greedy_requests_skip_what_keeps_the_likeliest(plugins):
    class Calm(LogitsProcessorPlugin):
        name, argmax_invariant = 'calm', True
    register_plugin(Calm())
    config, used = SimpleNamespace(vocab_size=8), {'calm': {}}
    assert bind_constraints(SamplingParams(temperature=0, logits_processors=used), None, config) is None
    assert len(bind_constraints(SamplingParams(temperature=1, logits_processors=used), None, config).plugins) == 1


def test_a_plugin_changes_only_rows_that_use_it(engines, plugins):
    register_plugin(Favour())
    free = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    uses = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logits_processors={'favour': {'token': 77}})
    want = tokens(answers(engines[1], [free, free]))
    a, b, c = answers(engines[1], [free, uses, free], [[7, 8, 9], [7, 8, 9], [7, 8, 10]])
    assert tokens([a, c]) == want and tokens([b]) == tokens(answers(engines[0], [uses]))
