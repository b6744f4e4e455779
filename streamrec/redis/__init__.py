"""The Redis side: only this package imports redis."""
