"""Preference pairs without human labels."""
