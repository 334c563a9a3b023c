"""What a run gives away: attacks on its own result."""
