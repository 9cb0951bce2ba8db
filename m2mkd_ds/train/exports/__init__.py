"""A run's models as folders and files for other people's tools."""
