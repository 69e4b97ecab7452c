"""The machinery. It knows no science: it is handed functions."""
