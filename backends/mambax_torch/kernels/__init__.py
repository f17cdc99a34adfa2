"""Triton kernels for NVIDIA GPUs, and the operators made of them. Imported on demand: Triton may be missing.

Under ``TRITON_INTERPRET=1`` they run on the CPU, slowly, which is how they are tested where there is no GPU.
"""
