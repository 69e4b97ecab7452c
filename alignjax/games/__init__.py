"""Exact, tabular preference games: no models, no I/O. Enable JAX's float64 for machine precision."""
