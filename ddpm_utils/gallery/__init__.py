"""The networks of the source tutorials as published, including their faults.

All are called in the same way: `model(x_t, t, y=None)`.
"""

from torch import nn

from .anime import Anime
from .article import Article
from .guide import Guide
from .mnist32 import Mnist32

NETWORKS = {"anime": Anime, "article": Article, "guide": Guide, "mnist32": Mnist32}
ANY_CHANNELS = ("anime", "guide")  # the others were published for gray images alone
HAVE_A_TABLE = ("article", "mnist32")  # of times, with as many rows as the schedule


def names() -> list[str]:
    """Return the names of the available networks."""
    return sorted(NETWORKS)


def build(name: str, timesteps: int = 1000, channels: int | None = None, **settings) -> nn.Module:
    """Return the network `name` with fresh weights; `settings` go to its class.

    Without `channels`, the network has as many channels as the published one. Raises ValueError on
    an unknown name, with the names that exist, and on a number of channels that the network does
    not support.
    """
    if name not in NETWORKS:
        raise ValueError(
            f"no network {name!r} in the gallery: choose from {', '.join(map(repr, names()))}"
        )
    if name in HAVE_A_TABLE:
        settings["timesteps"] = timesteps
    if channels is not None and name in ANY_CHANNELS:
        settings["channels"] = channels
    elif channels not in (None, 1):
        raise ValueError(
            f"channels={channels}: the network {name!r} was published for gray images, with 1 "
            "channel"
        )
    return NETWORKS[name](**settings)
