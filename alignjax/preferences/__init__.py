"""Preference models, judges and tournaments."""
