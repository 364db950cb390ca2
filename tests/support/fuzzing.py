"""How much of random examples a test tries."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings


def bounded(examples: int) -> settings:
    """The same examples each time. What one shrinks to is for whoever looks into it, by `make fuzz`."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
