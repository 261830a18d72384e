"""Certified calibration: the loosest setting of a gate whose harm stays under a limit, with a stated confidence."""
