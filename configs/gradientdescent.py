"""Plain gradient descent, the cheapest in memory: tables without slots."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """See the top of the file."""
  config = base.get_config()
  config.optimizer.name = 'gradientdescent'
  config.optimizer.learning_rate = 0.1
  return config
