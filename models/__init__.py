"""Small real networks for tests, examples and the demo."""
