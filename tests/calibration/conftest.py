"""The fitted toy model, for all tests of this folder."""

from tests.calibration.fitted import fit, reader, spool, written

__all__ = ["fit", "reader", "spool", "written"]
