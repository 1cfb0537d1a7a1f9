"""Hooks of a training run."""
