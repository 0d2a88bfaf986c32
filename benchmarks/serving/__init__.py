"""Time to first token of a prompt that comes back, against computing it again."""
