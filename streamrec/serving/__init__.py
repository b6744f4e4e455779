"""The path of a click: append, predict, publish, evaluate; worker.py has all steps."""
