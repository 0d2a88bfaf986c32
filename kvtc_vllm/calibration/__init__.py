"""Fitting artifacts: spooled rows -> PCA -> bit plans -> files, and finding them again."""
