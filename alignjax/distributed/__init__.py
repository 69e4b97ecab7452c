"""Meshes, shardings, processes and storage."""
