# SPDX-License-Identifier: Apache-2.0
"""Sentence Transformers trains, saves, loads and resumes a pruned model with SPP."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


pytest.importorskip("datasets")
pytest.importorskip("sentence_transformers", minversion="6.0")

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from peft_spp import SPPConfig
from peft_spp.merge import merge_checkpoint
from peft_spp.sparsity import compare_sparsity

from helpers.tiny import block_linears, prune_


WORDS = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(50))])}


@pytest.fixture
def pruned(tmp_path):
    """A folder with a pruned BERT."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes))
    for layer in block_linears(model).values():
        prune_(layer.weight, "2:4")
    model.save_pretrained(tmp_path / "pruned")
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        tmp_path / "pruned"
    )
    return tmp_path / "pruned"


def test_an_adapter_is_trained_resumed_saved_loaded_and_merged(pruned, tmp_path):
    model = SentenceTransformer(modules=[Transformer(str(pruned)), Pooling(32)], device="cpu")
    before = model.encode(["w1 w2"])
    model.add_adapter(SPPConfig(task_type="FEATURE_EXTRACTION", r=4))
    assert np.array_equal(model.encode(["w1 w2"]), before)
    pairs = Dataset.from_dict(
        {"anchor": [f"w{i} w{i + 1}" for i in range(40)], "positive": [f"w{i + 1} w{i}" for i in range(40)]}
    )

    def train(steps, **options):
        arguments = SentenceTransformerTrainingArguments(
            str(tmp_path / "out"),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
        )
        loss = losses.MultipleNegativesRankingLoss(model)
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=pairs, loss=loss)
        trainer.train(**options)
        return trainer.state.global_step

    assert train(2) == 2 and train(4, resume_from_checkpoint=True) == 4
    after = model.encode(["w1 w2"])
    assert not np.allclose(after, before)
    model.save_pretrained(str(tmp_path / "adapter"))
    again = SentenceTransformer(str(tmp_path / "adapter"), device="cpu")
    assert np.array_equal(again.encode(["w1 w2"]), after)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    merge_checkpoint(None, tmp_path / "adapter", tmp_path / "merged")
    assert compare_sparsity(pruned, tmp_path / "merged").kept
    merged = SentenceTransformer(modules=[Transformer(str(tmp_path / "merged")), Pooling(32)], device="cpu")
    assert np.allclose(merged.encode(["w1 w2"]), after, atol=1e-5)
