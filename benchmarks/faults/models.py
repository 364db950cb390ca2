"""The models of the corpus: tiny ones of every kind, a millisecond or two a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

FEATURES, CLASSES, SIDE, TOKENS, CONTEXT = 16, 8, 8, 24, 12
"""Of vectors, of images (side by side), and of token sequences."""


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    # Plain ReLUs die where weights explode, and the gradient with them.
    "leaky": lambda: nn.LeakyReLU(0.1),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class MLP(nn.Module):
    """Vectors in, values or logits out."""

    def __init__(
        self, outputs: int, *, depth: int = 3, width: int = 48, activation: str = "leaky", norm: bool = True
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        size = FEATURES
        for _ in range(depth - 1):
            layers += [nn.Linear(size, width), *([nn.LayerNorm(width)] if norm else []), ACTIVATIONS[activation]()]
            size = width
        self.layers = nn.Sequential(*layers, nn.Linear(size, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class CNN(nn.Module):
    """Images in."""

    def __init__(self, outputs: int, *, norm: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.second = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16 * 4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(leaky_relu(self.norm(self.first(x)), 0.1), 2)
        x = nn.functional.max_pool2d(leaky_relu(self.second(x), 0.1), 2)
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """Sequences of vectors in; the last state tells."""

    def __init__(self, kind: str, outputs: int, *, width: int = 32, nonlinearity: str = "tanh") -> None:
        super().__init__()
        extra = {"nonlinearity": nonlinearity} if kind == "RNN" else {}
        self.recurrent = getattr(nn, kind)(FEATURES, width, batch_first=True, **extra)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.recurrent(x)
        return self.head(states[:, -1])  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Token sequences in, logits of the next token at each place out."""

    def __init__(self, *, layers: int = 2, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, width)
        self.place = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, TOKENS)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        hidden = self.embedding(x) + self.place[: x.shape[1]]
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask)
        return self.head(self.norm(hidden))  # type: ignore[no-any-return]


class Mixer(nn.Module):
    """Images in: rows as tokens, mixed along rows and along columns, with residual connections."""

    def __init__(self, outputs: int, *, layers: int = 2, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Linear(SIDE, width)
        self.tokens = nn.ModuleList(nn.Linear(SIDE, SIDE) for _ in range(layers))
        self.channels = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.squeeze(1))
        for tokens, channels, norm in zip(self.tokens, self.channels, self.norms, strict=True):
            x = x + tokens(norm(x).transpose(1, 2)).relu().transpose(1, 2)
            x = x + channels(norm(x)).relu()
        return self.head(x.mean(dim=1))  # type: ignore[no-any-return]


def build(name: str, outputs: int) -> nn.Module:
    """A model by the name that cases give it."""
    made: dict[str, Callable[[], nn.Module]] = {
        "mlp": lambda: MLP(outputs),
        "plain_mlp": lambda: MLP(outputs, norm=False),
        "deep_mlp": lambda: MLP(outputs, depth=20, norm=False),
        "deep_tanh": lambda: MLP(outputs, depth=16, norm=False, activation="tanh"),
        "deep_sigmoid": lambda: MLP(outputs, depth=12, norm=False, activation="sigmoid"),
        "cnn": lambda: CNN(outputs),
        "plain_cnn": lambda: CNN(outputs, norm=False),
        "rnn": lambda: Recurrent("RNN", outputs),
        "relu_rnn": lambda: Recurrent("RNN", outputs, nonlinearity="relu"),
        "lstm": lambda: Recurrent("LSTM", outputs),
        "gru": lambda: Recurrent("GRU", outputs),
        "transformer": Transformer,
        "dropout_transformer": lambda: Transformer(dropout=0.2),
        "mixer": lambda: Mixer(outputs),
    }
    return made[name]()
