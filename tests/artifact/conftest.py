"""The fitted toy model, for all tests of this folder."""

from tests.calibration.fitted import fit, paired_fit, reader, spool, written, written_pairs

__all__ = ["fit", "paired_fit", "reader", "spool", "written", "written_pairs"]
