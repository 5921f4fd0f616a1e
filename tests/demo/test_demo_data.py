# SPDX-License-Identifier: Apache-2.0
from pydoc_data.topics import topics

import pytest

from peft_spp.demo.data import END_OF_TEXT, join_texts, paragraph_key, split_topics, token_blocks, train_tokenizer


def paragraphs(texts: list[str]) -> list[str]:
    return [paragraph_key(paragraph) for text in texts for paragraph in text.split("\n\n")]


@pytest.mark.parametrize("seed", range(5))
def test_held_out_text_is_disjoint_from_training_text(seed: int) -> None:
    train, held_out = split_topics(topics, 0.1, seed)
    assert not set(paragraphs(train)) & set(paragraphs(held_out))
    train_size, held_out_size = sum(map(len, train)), sum(map(len, held_out))
    assert 0.05 < held_out_size / (train_size + held_out_size) < 0.2
    # Nothing is made up, and nothing else is lost.
    everything = {paragraph_key(paragraph) for text in topics.values() for paragraph in text.split("\n\n")}
    assert sorted([*paragraphs(train), *paragraphs(held_out)]) == sorted(everything - {""})


def test_quoted_topics_are_removed_from_the_training_text() -> None:
    quoted = {"a": "one", "b": "one\n\ntwo", "c": "  one\n\nthree\n\nfour\n\nfive\n\nsix"}
    for seed in range(5):
        train, held_out = split_topics(quoted, 0.15, seed)
        assert held_out == ["one"]
        assert sorted(train) == ["three\n\nfour\n\nfive\n\nsix", "two"]


def test_split_depends_on_the_seed_only() -> None:
    assert split_topics(topics, 0.1, 3) == split_topics(dict(reversed(topics.items())), 0.1, 3)
    assert split_topics(topics, 0.1, 3) != split_topics(topics, 0.1, 4)


def test_tokenizer_and_blocks_give_the_text_back() -> None:
    text = join_texts(['She said: "naïve — 日本語"', "second\n\n  text " * 20])
    tokenizer = train_tokenizer(["some other text"], vocab_size=300)
    dataset = token_blocks(tokenizer, text, block_size=8)
    tokens = tokenizer(text)["input_ids"]
    assert [token for block in dataset["input_ids"] for token in block] == tokens[: len(tokens) // 8 * 8]
    assert tokenizer.decode(tokens) == text
    assert tokens.count(tokenizer.convert_tokens_to_ids(END_OF_TEXT)) == 2
