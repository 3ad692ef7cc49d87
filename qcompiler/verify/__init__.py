"""Findings, the static verdict, and the shape of runtime evidence."""
