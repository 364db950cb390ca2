"""The contract between recorder and collector: `foreshock.v1` and what both must agree on."""

SCHEMA_VERSION = 2
"""Newest version of the messages in `foreshock_protos.v1.telemetry_pb2`; all older ones are understood as well."""
BLOCKS_VERSION = 2
"""The first version with `StepBlock`."""

DEFAULT_GRPC_PORT = 4327
"""Default port on which a collector takes records in."""

DEFAULT_HTTP_PORT = 9327
"""Default port on which a collector serves `/metrics`, the API and the page."""
