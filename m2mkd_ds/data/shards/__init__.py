"""Making, indexing and checking shard files; nothing here is used while training."""
