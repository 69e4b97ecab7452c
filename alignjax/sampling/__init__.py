"""Processes, their mixtures, samplers, and text in, text out."""
