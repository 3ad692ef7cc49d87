"""Fused low-bit kernels in Triton for CUDA GPUs: their operators, layouts, tiles, rows and proofs."""
