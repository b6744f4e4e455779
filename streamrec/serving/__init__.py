"""The way of a click: append, predict, publish, judge; worker.py spells it out."""
