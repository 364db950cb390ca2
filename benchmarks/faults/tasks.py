"""What the models learn: synthetic, endless, and the same for the same seed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.faults.models import CLASSES, CONTEXT, FEATURES, SIDE, TOKENS

Batch = tuple[Tensor, Tensor]


class Task:
    """Batches for one rank. Drawn by a generator of its own, from a teacher that all ranks of a run share."""

    def __init__(
        self, model: str, loss: str, *, seed: int, stream: int, length: int, noise: float, tail: float
    ) -> None:
        """stream: which of the endless ones; ranks have one each. noise: standard deviation of the targets' own.

        tail: inputs are Student-t with so many degrees of freedom; 0: normal.
        """
        self.loss = loss
        self.length = length
        self.noise, self.tail = noise, tail
        self.kind = _KINDS.get(model, "vectors")
        teacher = torch.Generator().manual_seed(seed)
        self._teacher = torch.randn(_SIZES.get(self.kind, 1), CLASSES, generator=teacher)
        self._chain = torch.softmax(2.0 * torch.randn(TOKENS, TOKENS, generator=teacher), dim=1)
        self._draw = torch.Generator().manual_seed(10_000 * seed + stream)

    @property
    def outputs(self) -> int:
        return CLASSES

    def batch(self, size: int, scale: float = 1.0) -> Batch:
        """size: of the batch. scale: of the inputs."""
        if self.kind == "tokens":
            return self._tokens(size)
        shape = {
            "vectors": (size, FEATURES),
            "images": (size, 1, SIDE, SIDE),
            "sequences": (size, self.length, FEATURES),
        }[self.kind]
        x = torch.randn(shape, generator=self._draw)
        if self.tail:
            # A normal value over the root of a mean of squares: Student's t, drawn per sample.
            squares = torch.randn(size, int(self.tail), generator=self._draw).square().mean(dim=1)
            x = x / squares.sqrt().reshape(-1, *[1] * (x.dim() - 1))
        seen = x[:, : FEATURES // 2].mean(dim=1) if self.kind == "sequences" else x.flatten(1)
        values = seen @ self._teacher[: seen.shape[1]] / seen.shape[1] ** 0.5
        noise = self.noise * torch.randn(values.shape, generator=self._draw)
        x = x * scale
        return (x, (values + noise).argmax(dim=1)) if self.loss == "entropy" else (x, values + noise)

    def _tokens(self, size: int) -> Batch:
        sequence = torch.randint(TOKENS, (size, 1), generator=self._draw)
        for _ in range(CONTEXT):
            following = torch.multinomial(self._chain[sequence[:, -1]], 1, generator=self._draw)
            sequence = torch.cat([sequence, following], dim=1)
        return sequence[:, :-1], sequence[:, 1:]

    def value(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar."""
        if self.kind == "tokens":
            return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())
        if self.loss == "entropy":
            return nn.functional.cross_entropy(output, target)
        return (nn.functional.mse_loss if self.loss == "square" else nn.functional.smooth_l1_loss)(output, target)


_KINDS = {
    "cnn": "images",
    "plain_cnn": "images",
    "mixer": "images",
    "rnn": "sequences",
    "relu_rnn": "sequences",
    "lstm": "sequences",
    "gru": "sequences",
    "transformer": "tokens",
    "dropout_transformer": "tokens",
}
_SIZES = {"vectors": FEATURES, "images": SIDE * SIDE, "sequences": FEATURES}
