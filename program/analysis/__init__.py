"""Analyses of a graph: attention sites, token axes, stacks of blocks."""
