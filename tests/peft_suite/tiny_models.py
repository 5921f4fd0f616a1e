# SPDX-License-Identifier: Apache-2.0
"""Tiny random models under the names that PEFT's tests load from the Hub.

A relative folder of that name in the working directory takes precedence over the Hub, so the tests need no patching.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PretrainedConfig, PreTrainedTokenizerFast


_DECODER = {
    "vocab_size": 1000,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 1,
}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
_ENCODER = {
    "vocab_size": 1124,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_GPT2 = {"vocab_size": 1000, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512}
_OPT = {
    "vocab_size": 1000,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 4,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_T5 = {
    "decoder_start_token_id": 0,
    "vocab_size": 1000,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 3,
    "num_heads": 4,
}
_BART = {
    "vocab_size": 1024,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 4,
    "decoder_ffn_dim": 4,
}

# Hub name -> (model class, settings of its configuration)
TINY_MODELS: dict[str, tuple[str, dict]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", _OPT),
    "peft-internal-testing/opt-125m": (
        "OPTForCausalLM",
        {**_OPT, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 12},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", _GPT2),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT2),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**_GPT2, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", _DECODER),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        {"vocab_size": 1000, "hidden_size": 32, "n_layer": 5, "n_head": 4},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _DECODER),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _DECODER),
    "HuggingFaceM4/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _DECODER),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _DECODER),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4ForCausalLM",
        {**_DECODER, **_MOE, "intermediate_size_mlp": 64},
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOssForCausalLM", {**_DECODER, **_MOE}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", _DECODER),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", {**_DECODER, "use_sliding_window": False}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", {**_DECODER, "head_dim": 8}),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", _BART),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", _ENCODER),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", _ENCODER),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", _ENCODER),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", _ENCODER),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", _ENCODER),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        _ENCODER,
    ),
    "peft-internal-testing/tiny-clip-text-2": (
        "CLIPTextModelWithProjection",
        {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 4},
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", _DECODER),
}


def write_tiny_models(folder: Path) -> None:
    """Write every model of `TINY_MODELS`, with a tokenizer, below `folder`."""
    tokenizer = _tokenizer()
    for name, (class_name, settings) in TINY_MODELS.items():
        torch.manual_seed(0)
        model_class = getattr(transformers, class_name)
        config: PretrainedConfig = model_class.config_class(**settings)
        model = model_class(config)
        # random weights of the usual 0.02 make logits so small that tests of differing outputs compare nothing
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=0.2)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=200, special_tokens=["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog", "to be or not to be"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
    )
