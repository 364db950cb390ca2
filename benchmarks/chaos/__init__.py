"""Faults at random moments between ranks, recorder and collector, and what they cost: `make chaos`."""
