"""Pools of finished adapters on one base: a router chooses, for each input, who answers.

    pool = fg.pool(["runs/clinics", "adapters/visitor"], router="retrieve")
    pool.route(["chest pain since the morning"])
    pool.save("pools/clinics")

Nothing is trained. A pool is an assembly of frozen terms with a router (``adapters.routers``) as
its mix, so it runs, measures and is kept as any other model.
"""

from fedgrove.pools.pool import Pool, open_pool, pool

__all__ = ["Pool", "open_pool", "pool"]
