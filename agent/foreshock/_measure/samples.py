"""Norms of many tensors, from a fixed sample of their elements: to read all of weights and moments costs too much."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

SAMPLES = 512
"""Elements read of a tensor, evenly spread; of a smaller one, all. For values that are normally distributed, the
estimate of the norm then has a standard error of 1 / sqrt(2 * 512), 3.1 %, and a fraction of it over many tensors."""


class TensorSampler:
    """Reads the same elements of tensors with given sizes, again and again.

    The views are kept between reads, which is safe: they keep the memory that they look at.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        """like: tensors with the sizes and the device of those that will be read."""
        self._width = min(SAMPLES, max(tensor.numel() for tensor in like))
        self._strides = [_stride(tensor) for tensor in like]
        self._counts = [-(-tensor.numel() // stride) for tensor, stride in zip(like, self._strides, strict=True)]
        factors = [tensor.numel() / max(1, count) for tensor, count in zip(like, self._counts, strict=True)]
        self._factors = torch.tensor(factors, dtype=torch.float64, device=like[0].device)
        self._addresses: list[int] = []
        self._views: list[Tensor] = []

    def read(self, *groups: Sequence[Tensor | None]) -> Tensor:
        """Return the samples of several groups of tensors: [groups, tensors, width], float32 or float64.

        None: a tensor of zeros. The first tensor of the first group is none.
        """
        addresses = [0 if tensor is None else tensor.data_ptr() for group in groups for tensor in group]
        if addresses != self._addresses:
            first = groups[0][0]
            assert first is not None
            zeros = first.new_zeros(self._width)
            self._views = [view for group in groups for view in self._padded(group, zeros)]
            # A copy would go on showing what it was made of.
            present = (tensor for group in groups for tensor in group if tensor is not None)
            self._addresses = addresses if all(_in_memory_order(t).is_contiguous() for t in present) else []
        samples = torch.cat(self._views).view(len(groups), len(self._counts), self._width)
        return samples.to(torch.promote_types(samples.dtype, torch.float32))

    def squares(self, samples: Tensor) -> Tensor:
        """Estimate the sum of squares of each whole tensor: [groups, tensors], float64. samples: as from `read`."""
        norms: Tensor = torch.linalg.vector_norm(samples, dim=2, dtype=torch.float64)
        return norms.square_().mul_(self._factors)

    def _padded(self, group: Sequence[Tensor | None], zeros: Tensor) -> Iterator[Tensor]:
        for tensor, stride, count in zip(group, self._strides, self._counts, strict=True):
            if tensor is not None:
                yield _in_memory_order(tensor.detach()).reshape(-1)[::stride]
            padding = self._width - (0 if tensor is None else count)
            if padding:
                yield zeros[:padding]


def _stride(tensor: Tensor) -> int:
    """Return the distance between sampled elements."""
    stride = max(1, -(-tensor.numel() // SAMPLES))
    row = tensor.numel() // tensor.shape[0] if tensor.dim() and tensor.numel() else 1
    # With a common divisor, the samples of a matrix would all lie in a few of its columns.
    while stride > 1 and math.gcd(stride, row) > 1:
        stride += 1
    return stride


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Return a view with dimensions in the order of the memory: contiguous wherever the elements lie densely."""
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
