"""The caches of a recipe: what each must be made of, whether it is there, and how it is built.

`memory.cache` names the backbones that may be read from a cache. Where a cache of just this recipe is there, it is used and
the backbone isn't loaded; where there is none, training runs the backbone and says how to build one; where there are only
caches of something else, that is an error.
"""

from hf_vla.caching.build import build_caches, describe_use
from hf_vla.caching.keys import cacheable
from hf_vla.caching.use import caches_of, find_caches, fit_views, read_from_caches, settle_caches, with_cache

__all__ = [
    "build_caches",
    "cacheable",
    "caches_of",
    "describe_use",
    "find_caches",
    "fit_views",
    "read_from_caches",
    "settle_caches",
    "with_cache",
]
