"""The recorder: one process per node and run that reads the ranks' rings and owns gRPC. Never imports torch."""
