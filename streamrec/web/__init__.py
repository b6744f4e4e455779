"""The HTTP port: metrics, health and the live page."""
