"""`tiny_dense.py` with the convolution that the memories of `tiny.py` have.

The same five taps convolve what the MLP reads in the two blocks where the
memories read, at the same FLOPs per token: what of `tiny.py`'s lead over
`tiny_dense.py` remains is due to the memories.
"""

from configs import tiny_dense


def get_config():
  c = tiny_dense.get_config()
  c.model.update(mlp_conv=5, mlp_conv_blocks="1/3")
  return c
