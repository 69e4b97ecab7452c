"""Experiments: configuration, stages, and running them."""
