"""Rules of the house: layout, layers, packaging, text."""
