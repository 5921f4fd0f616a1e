# SPDX-License-Identifier: Apache-2.0
"""The demo's data: the language reference that every CPython ships as the text of `help()`."""

import random
from collections.abc import Iterable

from datasets import Dataset  # type: ignore[import-untyped]
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast


END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"


def split_topics(topics: dict[str, str], held_out_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """
    Split the topics into texts to train on and texts to hold out, which have no paragraph in common.

    Whole topics are held out. As some topics quote others in full, that is not enough: a paragraph that is held out,
    or has come before, is removed from the rest.

    It returns the texts to train on and those held out.
    """
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    allowance = held_out_fraction * sum(map(len, topics.values()))
    held_out_names = []
    for name in names:
        if len(topics[name]) <= allowance:
            held_out_names.append(name)
            allowance -= len(topics[name])

    seen: set[str] = set()
    held_out = [_without_seen_paragraphs(topics[name], seen) for name in held_out_names]
    train = [_without_seen_paragraphs(topics[name], seen) for name in names if name not in held_out_names]
    return [text for text in train if text], [text for text in held_out if text]


def paragraph_key(paragraph: str) -> str:
    """The paragraph as compared with others: indentation and line breaks do not make a difference."""
    return " ".join(paragraph.split())


def _without_seen_paragraphs(text: str, seen: set[str]) -> str:
    """Remove the paragraphs that are in `seen` from `text`, and add the others to `seen`."""
    kept = []
    for paragraph in text.split("\n\n"):
        key = paragraph_key(paragraph)
        if key and key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can encode any text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PADDING)


def join_texts(texts: Iterable[str]) -> str:
    """One string of all texts, each closed by the end-of-text token."""
    return "".join(text + END_OF_TEXT for text in texts)


def token_blocks(tokenizer: PreTrainedTokenizerFast, text: str, block_size: int) -> Dataset:
    """Tokenize the text and cut it to blocks of `block_size` tokens, without the rest that fills no block."""
    token_ids = tokenizer(text)["input_ids"]
    starts = range(0, len(token_ids) - block_size + 1, block_size)
    return Dataset.from_dict({"input_ids": [token_ids[start : start + block_size] for start in starts]})
