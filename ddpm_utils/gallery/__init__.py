"""The networks of the source tutorials as published, faults included, behind one contract: `model(x_t, t, y=None)`."""

from torch import nn

from .article import Article

NETWORKS = {"article": Article}


def names() -> list[str]:
    """The networks there are."""
    return sorted(NETWORKS)


def build(name: str, **settings) -> nn.Module:
    """The network `name` with fresh weights; `settings` go to its class. Raises ValueError that lists the names there are."""
    if name not in NETWORKS:
        raise ValueError(f"no network {name!r} in the gallery: choose from {', '.join(map(repr, names()))}")
    return NETWORKS[name](**settings)
