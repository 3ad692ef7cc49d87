"""Device code: functions of ``triton.jit``. These modules import triton; nothing imports them before a launch or a proof."""
