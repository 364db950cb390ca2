"""A CUDA runtime that only pretends to pin memory."""

from __future__ import annotations


class Cudart:
    """Registers what it is asked to, or answers with an error."""

    def __init__(self, status: int = 0) -> None:
        self._status = status
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        assert flags == 0
        if not self._status:
            self.registered[address] = size
        return self._status

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        return 0 if self.registered.pop(address, 0) else 1
