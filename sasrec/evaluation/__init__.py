"""Ranking metrics and counted baselines."""
