"""Training: its configuration, the objectives, the loop, warm starts, results and plots."""
