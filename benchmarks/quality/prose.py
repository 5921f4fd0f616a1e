# SPDX-License-Identifier: Apache-2.0
"""The sentences of the page that do not depend on results. Line breaks do not matter: they are filled again."""

OPENING = """
Pruning costs a model quality. How much of it does SPP win back, with the zeros kept, and how much do the methods that
it competes with? This page is written by `python -m benchmarks.quality` from the JSON files that it names; nothing on
it is written by hand.
"""

INCOMPLETE = """
**The suite has not run to its end yet.** What follows is what has been measured so far; the command below measures
what is missing and writes this page anew.
"""

NOT_MEASURED = """
The suite has these as well, which have not been run yet: {names}.
"""

HOW_TO_READ = """
*Won back*: the share of the log-perplexity lost by pruning, 100% being the dense model. ± is the standard deviation
over the seeds. *Step*: the median of the ratios of single steps, measured side by side in interleaved rounds. Of
HiRA, masked LoRA and Supertuning there is each a variant with SPP's number of parameters, as near as it goes; of the
first two one with as many steps as fit in SPP's time, at the learning rate chosen for the method without this. *SPP,
positive start* is `SPPConfig(init_weights="positive")`, which draws A without negative values. Sizes of adapters,
sparsities and the memory of a step are in the JSON.
"""

ALL_PRUNINGS = """
Perplexity, and in brackets what was won back. Wanda's 2:4 and 75% have three seeds and learning rates of their own;
the others have one seed, at the rates of whichever of these two is closer in sparsity.
"""

RATES = """
Each method's rate is the one with the lowest perplexity on the validation text, with the first seed. Where the best
was at the edge of the grid, the grid was extended, up to twice; *(edge)* says that it still is at the edge. Then the
rates halfway between the best and its neighbors were tried.
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
the transformer blocks; embeddings, norms and head stay as they are. The text is that of the base model's training, so
this measures recovery and not the learning of something new.
"""

DEPLOYED = """
Measured is the deployed model: the adapter is saved, merged into the pruned model from disk, the result saved as
safetensors and loaded again by plain Transformers. LoRA is trained once and deployed in three ways.
"""

PERPLEXITY = "Perplexity is over {test} sequences of test text."

NO_ANSWERS = """
GSM8K answers are not scored: models of this size get none right, so an exact match would say nothing.
"""

MACHINE = """
{machine}, Python {python}, PEFT {peft}, Transformers {transformers}. All {count} runs of fine-tuning took {cpu:.0f}
minutes of processor time over all cores, and {wall:.0f} minutes of wall time, which other work on the machine
lengthens; the evaluations come on top. Ratios of steps are from interleaved rounds, which meet such noise alike.
"""

SETTINGS = """
One setting changed at a time, each at the best of its learning rates on the validation text, in {steps} steps of
{batch} sequences. `scaling` is s = alpha / r (2 by default); `B_rate_ratio` is the learning rate of B over that of A,
as in LoRA+; `A=ones` and `A=positive` start A as ones, or as the absolute values of the usual draws; `dtype` is that
of the base model and `factors` that of A and B (float32 by default); `B=random` is an adapter that does not start as
the identity. With ± there are three seeds, otherwise it is one. *Largest loss* is over all steps at all rates: an
explosion would show there.
"""

NOT_RUN = """
`accelerate launch -m benchmarks.quality --suite llama --device cuda --data FOLDER` fine-tunes published pruned
checkpoints (Llama-3.1-8B by Wanda at 2:4 and at 50%, Sparse-Llama-3.1-8B-2of4, Llama-2-7b-pruned70-retrained) by SPP,
HiRA, LoRA and masked LoRA, and evaluates them on the tasks of the paper by lm-evaluation-harness (`pip install
".[quality]"`). **It has not been run on these checkpoints yet**; the tests run it on a tiny local model with a
local task.
"""

PEFT = """
`benchmarks/quality/metamathqa` holds settings for PEFT's `method_comparison/MetaMathQA`, to run SPP next to LoRA and
HiRA there. That needs a GPU and has not been done yet.
"""

PRETRAINED_OPENING = """
What tuning wins back of a pruned {model}, with the zeros kept: perplexity on text like that of the tuning and unlike
it, and accuracy on tasks that nobody tuned on. This page is written by `python -m benchmarks.quality --suite
pretrained`.
"""

PRETRAINED_READING = """
*Accuracy*: the mean of acc_norm by lm-evaluation-harness, zero-shot, over the first questions of each test part
({counts}), ± its standard error by the questions. *Against pruned*: the difference on the same questions, in points,
± its standard error. *Probability*: of the right choice among all, each taken to be of their mean length; it moves
with every question, where accuracy moves with the few that are close. Perplexities are over {blocks} sequences of
each text; ± is the standard deviation over seeds where there are several. No training part of any task was tuned on.
*Distilled*: the loss is the divergence from the dense model's predictions instead of the text's own next tokens; *on
samples*: on text that the dense model wrote itself; *on mixed text*: half that and half the tuning text. The dense
model has {dense}.
"""

PRETRAINED_PUBLISHED = """
For comparison, [others report](https://huggingface.co/lldois/SmolLM2-135M-Reasoning-SLERP-Champion) 54.1 (acc) on
ARC-easy and 27.7 (acc_norm) on ARC-challenge for SmolLM2-135M-Instruct by the same harness, zero-shot, on all
questions; the one here was dequantized from 4 bits.
"""

PRETRAINED_RATES = """
Each contender's rate is the one of a stated grid with the lowest perplexity on the validation text after {rate_steps}
steps of one sequence; *(edge)* says that it is at the edge of the grid. Prunings without a line here take the rates of
the first.
"""

PRETRAINED_METHOD = """
{model} was pruned by this project's own `prune`, calibrated on {calibration_blocks} sequences of {sequence} tokens of
the tuning text ({text}; of each a test part is held out), and tuned for {steps} steps of {batch} such sequences:
AdamW, 10% warm-up, cosine to zero, gradients clipped to 1, no dropout, no weight decay. Files are in {dtype} and
computation in {compute}; factors, the weights that full fine-tuning trains, and the optimizer are in float32. Measured
is what is deployed: the adapter saved, merged into the pruned model from disk, saved, and loaded by plain Transformers.
{machine}, Python {python}, PEFT {peft}, Transformers
{transformers}; all {count} runs of tuning took {hours:.1f} hours of processor time, on a machine with other work, so
no time of a single run is given. Command: `{command}`; results: `{results}`.
"""

PRETRAINED_MISSING = """
The same command continues where it was stopped. Not measured yet:
"""
