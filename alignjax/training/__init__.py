"""Collecting, learning and the loop around them."""
