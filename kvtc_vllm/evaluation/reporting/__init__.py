"""From the records of examples to figures, tables, plots and an artifact's quality card."""
