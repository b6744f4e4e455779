"""Evaluation of models: ranking metrics, held-out events, count-based baselines."""
