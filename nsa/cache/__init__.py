"""Keys and values of earlier calls, in pages: what both backends decode with."""

from nsa.cache.state import Cache

__all__ = ["Cache"]
