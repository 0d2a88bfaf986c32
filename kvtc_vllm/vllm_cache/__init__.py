"""vLLM's paged cache as we read it: releases, cache groups, element types, pages, RoPE tables.

Serving and calibration read it alike, so that what is calibrated is what will be coded.
"""
