"""The collector: takes step records in over gRPC, detects and diagnoses, exports Prometheus series. Never imports torch."""
