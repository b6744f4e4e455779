"""Servers, clusters and daemons as child processes, and sample data."""
