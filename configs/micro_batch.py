"""A large batch whose top MLP runs over 8 slices: memory of 1024 examples, numbers of 8192."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """See the top of the file."""
  config = base.get_config()
  config.batch_size = 8192
  config.micro_batch = 8
  return config
