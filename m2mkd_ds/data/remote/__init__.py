"""Shards that lie elsewhere: addresses, transports, retries, and the cache on this machine."""
