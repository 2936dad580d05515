"""DeepRec's AdamAsync, the default of base: numbers as Adam's, on rows lazy."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """See the top of the file."""
  config = base.get_config()
  config.optimizer.name = 'adamasync'
  return config
