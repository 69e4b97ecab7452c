"""Exact, tabular preference games: no models, no I/O. Enable JAX's float64 to have them to machine precision."""
