"""Whole text-to-image systems: families, components, pipelines."""
