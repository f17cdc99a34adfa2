"""GPU kernels of the MLX backend: one source for Apple's GPUs (Metal) and NVIDIA's (CUDA).

The bodies lie beside this file, ``*.metal``. They are written in Metal's names; ``metal.h`` and ``cuda.h`` say what
each dialect calls them. :mod:`launch` hands a body to ``mx.fast.metal_kernel`` or ``mx.fast.cuda_kernel``,
:mod:`scan` and :mod:`convolution` are the fused ops of the seam, differentiable, by these kernels.
"""
