"""The MLPs' matrix products in bfloat16 with float32 sums; everything else float32. AUC as base, faster.

Several processes send each other the MLPs' gradients as bfloat16, too, and sum them in float32.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """See the top of the file."""
  config = base.get_config()
  config.model.dtype = config.model.reduce_dtype = 'bfloat16'
  return config
