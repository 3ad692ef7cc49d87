"""The report of a compilation or a verification: as JSON, in a terminal, and as one HTML page."""
