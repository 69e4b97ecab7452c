"""Exact, tabular preference games: no models, no I/O. Enable JAX's float64 for machine precision."""

from alignjax.games import dynamics, game, simulation, solve, text, zoo

__all__ = ["dynamics", "game", "simulation", "solve", "text", "zoo"]
