"""What captures a model from a runtime, and emits and judges an artifact for it."""
