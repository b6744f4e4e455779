"""Inference: the engine, its key-value cache and compiled kernels."""
