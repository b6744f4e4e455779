"""Inference: the engine, its cache of keys and values, compiled kernels, ranking, the approximate index."""
