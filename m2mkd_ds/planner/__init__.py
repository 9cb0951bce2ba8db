"""What a run will cost, from its architectures alone: nothing is built in memory and nothing runs."""
