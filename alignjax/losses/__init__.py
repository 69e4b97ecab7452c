"""Losses: equations on arrays."""
