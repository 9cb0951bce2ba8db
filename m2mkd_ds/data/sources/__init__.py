"""Image collections that shards can be made from; one file each, named in registry.py."""
