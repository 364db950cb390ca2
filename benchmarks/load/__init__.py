"""Simulated ranks over the real wire, and a collector in a process of its own to send them to."""
