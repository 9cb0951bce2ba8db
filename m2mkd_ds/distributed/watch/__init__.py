"""What each rank is doing, who hangs, and the records that it leaves."""
