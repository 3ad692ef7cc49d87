"""Calibration: data sets, observers of activations, and the loop that runs a graph over the one for the other."""
