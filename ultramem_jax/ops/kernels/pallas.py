"""The lookup kernels in Pallas.

A module of its own because Pallas takes long to import.
"""

from ultramem_jax.ops.kernels import gpu, tpu

# By the platform that a program is lowered for; see `lookup.Kernels`.
KERNELS = (("cuda", gpu), ("tpu", tpu))
