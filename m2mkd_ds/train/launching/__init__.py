"""The `deepspeed` command of a job, what its hosts are told, and what is wrong with them."""
