# SPDX-License-Identifier: Apache-2.0
"""The sentences of the page that do not depend on results. Line breaks do not matter: they are filled again."""

OPENING = """
Pruning costs a model quality. This page shows how much of it SPP wins back with the zeros kept, next to the methods it
competes with. `python -m benchmarks.quality` writes the whole page from the JSON files that it names.
"""

INCOMPLETE = """
**The suite has not run to its end yet.** The page has what was measured so far; the command below measures the rest
and rewrites the page.
"""

NOT_MEASURED = """
Also in the suite, but not run yet: {names}.
"""

HOW_TO_READ = """
*Won back*: the share of the log-perplexity lost by pruning, 100% being the dense model. ± is the standard deviation
over the seeds. *Step*: the median ratio of single steps, measured side by side in interleaved rounds. HiRA, masked
LoRA and Supertuning each have a variant with about SPP's number of parameters. HiRA and masked LoRA also have one with
as many steps as fit in SPP's time, at the learning rate chosen for the method without this limit. *SPP, positive
start* is `SPPConfig(init_weights="positive")`, which draws A without negative values. The JSON has adapter sizes,
sparsities and the memory of a step.
"""

ALL_PRUNINGS = """
Perplexity, with the share won back in brackets. Wanda's 2:4 and 75% have three seeds and their own learning rates. The
others have one seed, and the rates of whichever of these two is closer in sparsity.
"""

RATES = """
Each method's rate is the one with the lowest perplexity on the validation text, with the first seed. If the best rate
was at the edge of the grid, the grid was extended, up to twice; *(edge)* marks rates that are still at the edge. Then
the rates halfway between the best and its neighbors were tried.
The rate of LoRA is chosen before merging, and serves all its deployments.
"""

TEXT = "Text: {source}. Validation and test text are held out, with no paragraph in common."

BASES = """
Base models are trained from scratch by the benchmark (the matrices inside the transformer blocks with Muon, the rest
with AdamW; cosine, bfloat16 autocast) and pruned in one shot, calibrated on {calibration} sequences of training text.
All seeds share one base model: they differ in the factors and the order of the data.
"""

TUNING = """
Every method gets the same {tokens:,} tokens in the same order ({steps} steps of {batch} sequences, in float32; AdamW,
10% warm-up, cosine to zero, gradients clipped to 1, no weight decay, no dropout). It adapts all linear layers inside
the transformer blocks; embeddings, norms and head are unchanged. The text is that of the base model's training, so
this measures recovery and not the learning of something new.
"""

DEPLOYED = """
The deployed model is measured: the adapter is saved, merged into the pruned model from disk, and the result saved as
safetensors and loaded by plain Transformers. LoRA is trained once and deployed in three ways.
"""

PERPLEXITY = "Perplexity is over {test} sequences of test text."

NO_ANSWERS = """
GSM8K answers are not scored: models of this size get none right, so exact match would not tell them apart.
"""

MACHINE = """
{machine}, Python {python}, PEFT {peft}, Transformers {transformers}. All {count} fine-tuning runs took {cpu:.0f}
minutes of processor time over all cores and {wall:.0f} minutes of wall time, on a machine with other work; evaluation
is extra. Ratios of steps are from interleaved rounds, which share that noise.
"""

SETTINGS = """
One setting changed at a time, each at the best of its learning rates on the validation text, in {steps} steps of
{batch} sequences. `scaling` is s = alpha / r (2 by default); `B_rate_ratio` is the learning rate of B over that of A,
as in LoRA+; `A=ones` and `A=positive` start A as ones, or as the absolute values of the usual draws; `dtype` is that
of the base model and `factors` that of A and B (float32 by default); `B=random` is an adapter that does not start as
the identity. Rows with ± have three seeds, others one. *Largest loss* is over all steps at all rates, and would show
an explosion.
"""

NOT_RUN = """
`accelerate launch -m benchmarks.quality --suite llama --device cuda --data FOLDER` fine-tunes published pruned
checkpoints (Llama-3.1-8B by Wanda at 2:4 and at 50%, Sparse-Llama-3.1-8B-2of4, Llama-2-7b-pruned70-retrained) with
SPP, HiRA, LoRA and masked LoRA, and evaluates them on the tasks of the paper with lm-evaluation-harness (`pip install
".[quality]"`). With `--plan` it says what that takes: by arithmetic 20 GB of GPU memory, and 13 to 30 hours on an A100
for each checkpoint of 8B. **It has not been run on these checkpoints yet.** The tests run it on a tiny local model
with a local task.
"""

PEFT = """
`benchmarks/quality/metamathqa` has settings for PEFT's `method_comparison/MetaMathQA`, to run SPP next to LoRA and
HiRA there. That needs a GPU and has not been done yet.
"""
