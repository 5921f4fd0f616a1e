# SPDX-License-Identifier: Apache-2.0
"""
The suite of a pretrained model: any folder of Transformers, pruned here, tuned, and asked questions.

- `suite`: what is run, as data;
- `comparison`, `results`: what was measured on one pruned model, and how it is read from a store;
- `findings`, `details`: what the page says first, and below each table;  `phrases`, `prose`: its words;
- `page`, `picture`: the page and its picture.
"""
