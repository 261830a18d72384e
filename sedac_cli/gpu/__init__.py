"""Kernels and their plain-torch twins. This room imports nothing else of the project."""
