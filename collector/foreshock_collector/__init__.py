"""The collector: step records in, Prometheus series and verdicts out. Never imports torch."""
