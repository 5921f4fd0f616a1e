# SPDX-License-Identifier: Apache-2.0
"""
Does fine-tuning win back what pruning cost, and by which method: `python -m benchmarks.quality --suite small`.

Small language models are trained on real text, pruned in several ways, and fine-tuned by SPP and by the methods it
competes with, all on the same number of tokens and each at a learning rate of its own. Measured is what is deployed:
the merged model, saved, and loaded by plain Transformers.

- `design`, `suites`: what a suite is made of, and what is run, as data;
- `methods`: how each method adapts a model, and how it is deployed;
- `data`, `base_models`: the texts, and the dense and pruned models, which are kept between runs;
- `tuning`, `evaluation`, `harness_tasks`: one fine-tuning run, and what is measured;
- `jobs`: one measurement;  `store`: those that are done;  `plan`: which come next, learning rates among them;
- `pretrained`: the suite of a pretrained model, and its page;  `samples`: what that model writes;
- `estimate`: what is left;  `analysis`, `tables`, `pictures`, `page`: what the results say.
"""
