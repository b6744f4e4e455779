"""Training: configuration, objectives, the loop."""
