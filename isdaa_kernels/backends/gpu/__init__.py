"""What the backends for GPUs share: passes on the host, which launch the kernels of a kernel set (`kernels.Kernels`) that they are given.

No backend itself: it imports none of them, and needs neither triton nor a compiled part.
"""
