"""Adagrad. Its accumulator only grows, so it wants a larger learning rate than Adam."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """See the top of the file."""
  config = base.get_config()
  config.optimizer.name = 'adagrad'
  config.optimizer.learning_rate = 0.05
  return config
