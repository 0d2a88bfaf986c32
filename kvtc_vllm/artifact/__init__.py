"""What calibration leaves behind and a serving engine reads: artifact files, and whose they are."""
