"""Tests, in the shape of the package. A regular package: no other `tests` on the path can stand in for it."""
