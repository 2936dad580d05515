"""As counter, but a counting Bloom filter of 96 MB counts; one id in a hundred comes too early."""

from ml_collections import ConfigDict

from configs import counter


def get_config() -> ConfigDict:
  """See the top of the file."""
  config = counter.get_config()
  config.embedding.admission.name = 'counting_bloom'
  config.embedding.admission.expected_ids = 10_000_000
  return config
