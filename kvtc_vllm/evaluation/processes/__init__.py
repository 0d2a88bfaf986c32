"""Parent processes (`*suite`) that start a child process per method, and what the children run."""
