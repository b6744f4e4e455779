"""The HTTP port of a process: metrics, health, and the live page of the daemon."""
