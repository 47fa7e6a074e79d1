"""Which experts a token goes to, and with what weights."""

from kernels.route.naive import Routing, route

__all__ = ["Routing", "route"]
