"""Networks as pairs of pure functions over nested dicts of parameters."""
