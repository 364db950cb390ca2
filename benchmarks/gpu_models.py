"""Models that `benchmarks.gpu` trains: stacks of linear layers of several sizes, and a GPT of 124 M parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import foreshock

LEARNING_RATE = 1e-5
"""So small that a model hardly moves: every step of a measurement has the same work."""
LAYERS, BATCH = 8, 8


@dataclass(kw_only=True)
class Training:
    """Holds what a training step of one variant needs."""

    model: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]
    """The forward pass, on the same batch each time."""
    watch: foreshock.Watch | None = None


@dataclass(frozen=True, kw_only=True)
class Model:
    """Describes a model and the batch that it is trained on."""

    build: Callable[[], nn.Module]
    batch: Callable[[nn.Module, torch.device], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    """Of the model's output and the batch's second half."""
    autocast: bool = False
    """Forward in bfloat16; weights and gradients stay in float32."""

    def parameter_count(self) -> int:
        """Return how many parameters it has; shared ones count once."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build().parameters())

    def training(self, device: torch.device, *, views: bool) -> Training:
        """Build the model, its DDP and its fused AdamW. views: gradients are views of DDP's buckets."""
        torch.manual_seed(0)
        module = self.build().to(device)
        x, y = self.batch(module, device)
        model = DistributedDataParallel(module, gradient_as_bucket_view=views)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

        def loss() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
                output = model(x)
            return self.loss(output, y)

        return Training(model=model, optimizer=optimizer, loss=loss)


def width_of(millions: float) -> int:
    """Return the width of a stack of `LAYERS` square layers with about so many parameters, a multiple of 32."""
    width = int((millions * 1e6 / LAYERS) ** 0.5)
    return width - width % 32


def _stack(millions: float) -> Model:
    width = width_of(millions)

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(LAYERS):
            layers += [nn.Linear(width, width), nn.Tanh()]
        return nn.Sequential(*layers)

    def batch(_: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.randn(BATCH, width, device=device), torch.randn(BATCH, width, device=device)

    return Model(build=build, batch=batch, loss=nn.functional.mse_loss)


class _Block(nn.Module):
    """Applies attention, then two linear layers, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inputs, self.outputs = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.inputs(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.outputs(attended.transpose(1, 2).reshape(batch, length, width))
        output: Tensor = x + self.mlp(self.norm2(x))
        return output


class Gpt(nn.Module):
    """Predicts the next token: GPT-2's smallest shape by default, with the weights of embedding and output shared."""

    def __init__(
        self, *, vocabulary: int = 50304, width: int = 768, blocks: int = 12, heads: int = 12, context: int = 1024
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return nn.functional.linear(self.norm(x), self.tokens.weight)


def _gpt(sequences: int, build: Callable[[], Gpt]) -> Model:
    def batch(module: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
        assert isinstance(module, Gpt)
        shape = (sequences, module.positions.num_embeddings)
        tokens = torch.randint(module.tokens.num_embeddings, shape, device=device)
        return tokens, tokens.roll(-1, dims=1)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return Model(build=build, batch=batch, loss=loss, autocast=True)


MODELS = {
    "mlp_1m": _stack(1),
    "mlp_25m": _stack(25),
    "mlp_100m": _stack(100),
    "mlp_400m": _stack(400),
    "gpt_124m": _gpt(16, Gpt),
}
"""Models by name. The small stacks are bound by the host, the large ones by the optimizer, the GPT by its matmuls."""


def monitor_by_hand(model: nn.Module, max_norm: float) -> None:
    """Clip as people do it themselves: a loop over parameters that reads each norm, then a multiplication."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = sum(gradient.norm().item() ** 2 for gradient in gradients) ** 0.5
    if norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / (norm + 1e-6))
