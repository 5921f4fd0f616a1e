"""Sparsity-preserving fine-tuning (SPP) for Hugging Face PEFT."""
