"""Decode steps as CUDA graphs."""

from sedac_cli.runtime.graph.engine import GraphEngine

__all__ = ["GraphEngine"]
