"""As dynamic, but every 1000 steps the ids that were not seen for 4000 steps lose their rows."""

from ml_collections import ConfigDict

from configs import dynamic


def get_config() -> ConfigDict:
  """See the top of the file."""
  config = dynamic.get_config()
  config.embedding.eviction.name = 'global_step'
  config.embedding.eviction.every = 1000
  return config
