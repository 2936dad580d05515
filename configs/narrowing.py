"""As dynamic, but a vector has one to four blocks of four numbers, by how often its id is seen."""

from ml_collections import ConfigDict

from configs import dynamic


def get_config() -> ConfigDict:
  """See the top of the file."""
  config = dynamic.get_config()
  config.embedding.width.name = 'dynamic'
  config.embedding.width.every = 1000
  return config
