"""The fault corpus: real small training jobs with causes put in, watched by the probe, kept as small traces."""
