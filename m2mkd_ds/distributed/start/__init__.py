"""Joining a job: which rank this is, by which interface it speaks, and who has not come."""
