"""Meshes and shardings, several processes, and storage on disks and in buckets."""
