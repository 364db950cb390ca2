"""Tables that the kernels read: a model's parameters in chunks, where their gradients lie, and their order."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate

import torch
from torch import Tensor

from foreshock._arithmetic.parameters import ParameterPlan
from foreshock._kernels import chunks

KINDS = {
    torch.float32: chunks.FLOAT32.value,
    torch.bfloat16: chunks.BFLOAT16.value,
    torch.float16: chunks.FLOAT16.value,
    torch.float64: chunks.FLOAT64.value,
}
_WARPS = 8
"""256 threads for each program that reads gradients."""


class ChunkTable:
    """Cuts the parameters of a plan into chunks, those of a layer side by side."""

    def __init__(self, plan: ParameterPlan) -> None:
        self.device = plan.device()
        self.dtypes = tuple(parameter.dtype for parameter in plan.parameters)
        sizes = [parameter.numel() for parameter in plan.parameters]
        owners: list[int] = []
        begins: list[int] = []
        self.layers = len(plan.layers)
        layer_begin = [0] * (self.layers + 1)
        for index in sorted(range(len(sizes)), key=lambda index: plan.layer_of[index]):
            # A parameter without elements has a chunk too, so that no table is empty.
            starts = range(0, max(1, sizes[index]), chunks.CHUNK)
            owners += [index] * len(starts)
            begins += starts
            layer_begin[plan.layer_of[index] + 1] = len(owners)
        self.chunks, self.parameters = len(owners), len(sizes)
        self.owner_of_chunk = sent(owners, torch.int32, self.device)
        self.begin_of_chunk = sent(begins, torch.int64, self.device)
        self.size_of_parameter = sent(sizes, torch.int64, self.device)
        self.layer_begin = sent(list(accumulate(layer_begin, max)), torch.int32, self.device)


class GradientSums:
    """Measures gradients of a table's parameters: sums of squares by chunk, and which are not finite."""

    def __init__(self, table: ChunkTable) -> None:
        self.table = table
        self._addresses: list[int] = []
        self._on_device = torch.zeros(table.parameters, dtype=torch.int64, device=table.device)
        self._current = current_device(table.device)
        self._read_as(table.dtypes)
        self._unread = torch.zeros(1, dtype=torch.int64, device=table.device)
        self._copies: list[Tensor] = []
        self.squares = torch.zeros(table.chunks, dtype=torch.float64, device=table.device)
        """[chunks]: sum of the squares of each."""
        self.statuses = torch.zeros(table.parameters, dtype=torch.int64, device=table.device)
        self.measurement = 0
        """Number of the newest measurement, which its statuses carry."""

    def measure(self, gradients: Sequence[Tensor | None], checksum: Tensor | None = None) -> None:
        """Launch the measurement of all parameters' gradients; None: a parameter without one.

        checksum: see `measure_chunks`. Raises `ValueError` where a gradient has moved to another device.
        """
        # A gradient without elements may have no address: it counts as absent.
        addresses = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        if addresses != self._addresses:
            self._move(addresses, gradients)
        table = self.table
        with self._current:
            chunks.measure_chunks[(table.chunks,)](
                self._on_device,
                self._kinds,
                table.size_of_parameter,
                table.owner_of_chunk,
                table.begin_of_chunk,
                self.measurement + 1,
                self.squares,
                self.statuses,
                self._unread if checksum is None else checksum,
                KIND=self._kind,
                BLOCK=chunks.BLOCK,
                CHUNK=chunks.CHUNK,
                num_warps=_WARPS,
            )
        self.measurement += 1

    def norms(self) -> Tensor:
        """Return the norm of each parameter's gradient, 0 where there was none: float64, [parameters]."""
        squares = self.squares.new_zeros(self.table.parameters)
        return squares.index_add_(0, self.table.owner_of_chunk, self.squares).sqrt_()

    def _move(self, addresses: list[int], gradients: Sequence[Tensor | None]) -> None:
        """Send the addresses to the device: with `zero_grad`, the allocator gives mostly the same ones again."""
        self._addresses, self._copies = [], []
        dtypes = tuple(old if g is None else g.dtype for g, old in zip(gradients, self._dtypes, strict=True))
        if dtypes != self._dtypes:
            self._read_as(dtypes)
        read = list(addresses)
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            if gradient.device != self.table.device:
                raise ValueError(f"a gradient has moved from {self.table.device} to {gradient.device}")
            if gradient.dtype not in KINDS or not is_dense(gradient):
                copy = gradient.to(gradient.dtype if gradient.dtype in KINDS else torch.float64).contiguous()
                read[index] = copy.data_ptr()
                self._copies.append(copy)
        self._on_device.copy_(on_host(read, torch.int64, self.table.device), non_blocking=True)
        # Last: after an error the table is sent again, and copies have to be made again at each step.
        self._addresses = [] if self._copies else addresses

    def _read_as(self, dtypes: tuple[torch.dtype, ...]) -> None:
        """Read gradients of these dtypes from now on; what no kernel reads is copied in float64."""
        self._dtypes = dtypes
        kinds = [KINDS.get(dtype, chunks.FLOAT64.value) for dtype in dtypes]
        self._kinds = sent(kinds, torch.int32, self.table.device)
        self._kind: int = kinds[0] if len(set(kinds)) == 1 else chunks.MIXED.value


class ParameterOrder:
    """Says which parameter comes first when several are not finite, and how the collector numbers it."""

    def __init__(self, order: Sequence[int], numbers: Sequence[int], device: torch.device) -> None:
        """order: all positions in the plan, first to last. numbers: by position."""
        places = [0] * len(numbers)
        for place, index in enumerate(order):
            places[index] = place
        self.order = order
        self.positions = sent(places, torch.int32, device)
        self.numbers = sent([numbers[index] for index in order], torch.int64, device)


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Return what makes a device the current one, where Triton launches: a script may use another by default."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements lie side by side, in whatever order: a norm asks for no other."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return not tensor.numel()
        expected *= size
    return True


def on_host(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor from which a copy to the device does not wait."""
    tensor = torch.tensor(values, dtype=dtype)
    # A fresh one each time: PyTorch keeps pinned memory until the copy from it has run.
    return tensor.pin_memory() if device.type == "cuda" else tensor


def sent(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor on the device, without waiting for it."""
    return on_host(values, dtype, device).to(device, non_blocking=True)
