# SPDX-License-Identifier: Apache-2.0
"""The sizes of the demo."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoConfig:
    """What the demo trains, and for how long. The defaults take about two minutes on two CPU cores."""

    seed: int = 0  # seed of the choice of held-out topics, of the weights and of the order of the training data
    held_out_fraction: float = 0.1  # about how much of the text is held out of training
    vocab_size: int = 1024  # size of the tokenizer's vocabulary
    hidden_size: int = 96  # hidden size of the Llama
    intermediate_size: int = 256  # intermediate size of its MLPs
    num_layers: int = 3  # number of its transformer blocks
    block_size: int = 128  # tokens in a sequence, in training and evaluation
    batch_size: int = 16  # sequences in a batch
    dense_steps: int = 600  # optimizer steps of the dense model's training
    dense_learning_rate: float = 6e-3  # learning rate of the dense model's training
    calibration_batches: int = 4  # batches of the training text that Wanda is calibrated with
    tuning_steps: int = 200  # optimizer steps of fine-tuning, for SPP and LoRA alike
    # learning rate of SPP. Neither this nor LoRA's is tuned finely: with either method, twice the rate gains one or
    # two percent more in perplexity.
    spp_learning_rate: float = 4e-2
    lora_learning_rate: float = 4e-3
