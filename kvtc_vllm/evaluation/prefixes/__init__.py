"""Methods that work on the tokens of a stored prefix, run through transformers."""
