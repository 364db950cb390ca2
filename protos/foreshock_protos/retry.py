"""When to try again, in the metadata of a refused call: google.rpc.RetryInfo, as gRPC's richer error model has it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError

from foreshock_protos.v1 import telemetry_pb2 as pb

DETAILS_KEY = "grpc-status-details-bin"
"""Metadata in which gRPC carries a google.rpc.Status, by its convention."""
_RETRY_INFO = "type.googleapis.com/google.rpc.RetryInfo"


def retry_metadata(code: int, text: str, seconds: float) -> tuple[tuple[str, bytes], ...]:
    """Return trailing metadata that asks a client to try again after so many seconds.

    code, text: status of the call, which the metadata repeats.
    """
    delay = Duration()
    delay.FromNanoseconds(round(seconds * 1e9))
    detail = AnyMessage(type_url=_RETRY_INFO, value=pb.RetryInfo(retry_delay=delay).SerializeToString())
    status = pb.Status(code=code, message=text, details=[detail])
    return ((DETAILS_KEY, status.SerializeToString()),)


def retry_seconds(metadata: Iterable[tuple[str, Any]] | None) -> float | None:
    """Return after how many seconds the other side asks to try again; None if it does not."""
    for key, value in metadata or ():
        if key == DETAILS_KEY:
            try:
                for detail in pb.Status.FromString(value).details:
                    if detail.type_url == _RETRY_INFO:
                        delay = pb.RetryInfo.FromString(detail.value).retry_delay
                        return float(delay.ToNanoseconds() / 1e9)
            except DecodeError:
                return None
    return None
