"""alignjax: aligning language models by pairwise preference, in JAX."""

__version__ = "0.1.0"
