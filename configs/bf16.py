"""The MLPs' matrix products in bfloat16 with float32 sums; everything else float32. AUC as base, faster."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """See the top of the file."""
  config = base.get_config()
  config.model.dtype = 'bfloat16'
  return config
