"""Makes files of this project from its code: `python -m tools.NAME`. Not part of the package."""
