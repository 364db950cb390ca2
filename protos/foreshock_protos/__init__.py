"""The contract between recorder and collector: `foreshock.v1` and what both must agree on."""

SCHEMA_VERSION = 1
"""`Hello.schema_version` of the messages in `foreshock_protos.v1.telemetry_pb2`."""

DEFAULT_GRPC_PORT = 4327
"""Where a collector takes telemetry in, unless told otherwise."""

DEFAULT_HTTP_PORT = 9327
"""Where a collector serves `/metrics`, the API and the page, unless told otherwise."""
