"""Passes over the graph, one file a pass."""
