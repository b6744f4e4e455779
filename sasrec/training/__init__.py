"""Training: its configuration, the estimators' arguments, the objectives, the loop, warm starts, results and plots."""
