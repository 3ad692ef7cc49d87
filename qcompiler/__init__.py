"""A quantization compiler: a model goes in, fused low-bit kernels come out, and what is left unfused is refused."""
