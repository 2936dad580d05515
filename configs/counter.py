"""As dynamic, but an id must be seen three times before it owns a row; counted exactly."""

from ml_collections import ConfigDict

from configs import dynamic


def get_config() -> ConfigDict:
  """See the top of the file."""
  config = dynamic.get_config()
  config.embedding.admission.name = 'counter'
  config.embedding.admission.threshold = 3
  return config
