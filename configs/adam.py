"""Adam in TensorFlow's form, lazy on table rows: only rows of the batch move."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """See the top of the file."""
  config = base.get_config()
  config.optimizer.name = 'adam'
  return config
