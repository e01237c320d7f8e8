"""What a run would need, from its own programs compiled but not run, and what would fit."""
