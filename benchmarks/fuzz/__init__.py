"""Random histories and random messages through the collector: whatever comes, it answers, and in finite numbers.

`tests/collector/ingest/test_fuzz.py` runs some hundreds of each, `make fuzz` as many as one likes.
"""
