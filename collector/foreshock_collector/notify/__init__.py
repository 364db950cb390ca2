"""Notifications that the collector itself sends, for teams without Prometheus."""
