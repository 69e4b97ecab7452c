"""Damaged input to everything that the package reads: it works as its referee says, or one line refuses it.

Every entry of the JSON files of a checkpoint, of its tokenizer and of an adapter is changed in some thirty ways, and so
is every kind of data line. Only two outcomes are allowed, each within a bounded time and memory:

- the package reads the input, and its results are the referee's (transformers and PEFT on torch, or Python's json);
- the package raises one UserError: one line that names the file, and in data the line.
"""
