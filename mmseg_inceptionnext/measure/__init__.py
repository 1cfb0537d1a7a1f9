"""Measure parameters, MACs, speed and memory, beside what the paper prints."""
