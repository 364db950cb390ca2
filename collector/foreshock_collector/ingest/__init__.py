"""gRPC in: decode, validate, keep, commit."""
