"""Who takes part: clients, their data, and the task they share."""

from fedgrove.federation.federation import Client, Federation, build

__all__ = ["Client", "Federation", "build"]
