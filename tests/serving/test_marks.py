"""Prompts of models that expect a beginning mark."""

import asyncio

import pytest

from logitjax.decoding import Ensemble
from logitjax.leakage import LogitPolicy
from logitjax.models import load_tokenizer
from logitjax.serving import ServerConfig, build_app
from tests.decoding._bags import bag_of_words
from tests.models._marks import llama_like, with_mark
from tests.serving.inside import call, running

VOCAB, MARK = 257, 256


@pytest.mark.slow
def test_texts_begin_with_the_mark_ids_as_they_are_given_and_an_echo_is_what_was_sent():
    tokenizer = with_mark(load_tokenizer("tiny"), MARK)
    config = ServerConfig(
        model="bag", policy=LogitPolicy(top_k=2), slots=2, max_length=16, max_tokens=4
    )
    app = build_app(Ensemble(bag_of_words(2, VOCAB)), tokenizer, (), config)
    body = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    ids = tokenizer.encode("ab")

    async def ask():
        async with running(app):
            prompts = ("ab", [MARK, *ids], ids, "<|end|>ab")
            path = "/v1/completions"
            return [await call(app, path, body | {"prompt": prompt}) for prompt in prompts]

    answers = asyncio.run(ask())
    assert [status for status, _ in answers] == [200] * 4
    text, marked, bare, spelt = (answer for _, answer in answers)
    assert text["usage"]["prompt_tokens"] == 3
    assert bare["usage"]["prompt_tokens"] == 2
    choice = text["choices"][0]
    assert choice["text"].startswith("ab")
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2]
    for same in (marked, spelt):
        assert same["choices"] == text["choices"]
    assert bare["choices"][0]["logprobs"] != choice["logprobs"]


@pytest.mark.slow
def test_a_completion_keeps_the_space_of_its_first_word_and_a_chat_s_answer_has_none():
    tokenizer = llama_like()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    policy = LogitPolicy(top_k=2, bias="sampling")
    config = ServerConfig(model="bag", policy=policy, slots=2, max_length=16, max_tokens=4)
    app = build_app(Ensemble(bag_of_words(2, 7)), tokenizer, (), config)
    body = {"max_tokens": 2, "logit_bias": {"4": 100}}

    async def ask():
        async with running(app):
            turn = {"role": "user", "content": "."}
            _, text = await call(app, "/v1/completions", body | {"prompt": [0, 1, 2, 3]})
            _, chat = await call(app, "/v1/chat/completions", body | {"messages": [turn]})
            return text["choices"][0]["text"], chat["choices"][0]["message"]["content"]

    assert asyncio.run(ask()) == (" Paris Paris", "Paris Paris")
