# SPDX-License-Identifier: Apache-2.0
"""The sizes of the demo."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoConfig:
    """
    What the demo trains, and for how long. The defaults take about two minutes on two CPU cores.

    Args:
        seed (`int`): Seed of the choice of held-out topics, of the weights and of the order of the training data.
        held_out_fraction (`float`): About how much of the text is held out of training.
        vocab_size (`int`): Size of the tokenizer's vocabulary.
        hidden_size (`int`): Hidden size of the Llama.
        intermediate_size (`int`): Intermediate size of its MLPs.
        num_layers (`int`): Number of its transformer blocks.
        block_size (`int`): Tokens in a sequence, in training and evaluation.
        batch_size (`int`): Sequences in a batch.
        dense_steps (`int`): Optimizer steps of the dense model's training.
        dense_learning_rate (`float`): Learning rate of the dense model's training.
        calibration_batches (`int`): Batches of the training text that Wanda is calibrated with.
        tuning_steps (`int`): Optimizer steps of fine-tuning, for SPP and LoRA alike.
        spp_learning_rate (`float`):
            Learning rate of SPP. Neither this nor LoRA's is tuned finely: with either method, twice the rate gains one
            or two percent more in perplexity.
        lora_learning_rate (`float`): Learning rate of LoRA.
    """

    seed: int = 0
    held_out_fraction: float = 0.1
    vocab_size: int = 1024
    hidden_size: int = 96
    intermediate_size: int = 256
    num_layers: int = 3
    block_size: int = 128
    batch_size: int = 16
    dense_steps: int = 600
    dense_learning_rate: float = 6e-3
    calibration_batches: int = 4
    tuning_steps: int = 200
    spp_learning_rate: float = 4e-2
    lora_learning_rate: float = 4e-3
