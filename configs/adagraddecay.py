"""Adagrad whose accumulator decays, for long runs: every 100,000 steps by a factor of 0.9."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """See the top of the file."""
  config = base.get_config()
  config.optimizer.name = 'adagraddecay'
  config.optimizer.learning_rate = 0.05
  return config
