"""Functions of ``triton.jit``. These modules import triton, and nothing imports them before a launch or a proof."""
