"""What must hold of a manifest: the schemas, and how its parts fit together. A complaint is one line."""

import functools
import importlib
import re
from pathlib import Path
from typing import NamedTuple

import jsonschema
import kubernetes_validate
import yaml

from dlrm_jax import spec as specs

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / 'k8s'
# From the first in which backoffLimitPerIndex and podReplacementPolicy are on by default.
VERSIONS = [f'1.{minor}' for minor in range(29, int(kubernetes_validate.latest_version().split('.')[1]) + 1)]
CLAIM = 'deeprec'
UNITS = {'': 1, 'm': 1e-3, 'Ki': 2**10, 'Mi': 2**20, 'Gi': 2**30, 'Ti': 2**40}


class Trainer(NamedTuple):
  """One set of processes, whichever way it is started."""

  job: dict  # spec of the Job
  host: str  # of process 0, in the namespace
  form: list[tuple[bool, str]]  # what must hold of this way of starting, and the complaint if it does not


def load(text):
  """The documents of a file."""
  return list(yaml.safe_load_all(text))


def dig(tree, path):
  """What lies at a dotted path; an empty dict where there is nothing."""
  for part in path.split('.'):
    try:
      tree = tree[int(part) if part.isdigit() else part]
    except (KeyError, IndexError, TypeError):
      return {}
  return tree


def complaints(documents, versions=VERSIONS):
  """All that is wrong with a file; against the schemas alone, if those are violated."""
  found = [line for document in documents for line in schema_complaints(document, versions)]
  if found:
    return found
  holders = [document for document in documents if document['kind'] in ('Pod', 'Job', 'JobSet')]
  rules = [rule for document in documents if document['kind'] == 'PersistentVolumeClaim' for rule in claim(document)]
  for document in holders:
    if document['kind'] == 'Pod':
      rules += pod_rules(document['spec'])
      continue
    trainer = of_jobset(document) if document['kind'] == 'JobSet' else of_job(document, documents)
    rules += [*pod_rules(dig(trainer.job, 'template.spec')), *trainer.form, *trainer_rules(trainer)]
  return [text for holds, text in rules if not holds]


def schema_complaints(document, versions):
  """What the API server would refuse for its form."""
  if document['kind'] == 'JobSet':
    errors = list(jobset_validator().iter_errors(document))
    if errors:
      return [f'{error.json_path}: {error.message}' for error in errors]
    jobs = [part['template'] for part in document['spec']['replicatedJobs']]
    document = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': document['metadata'], 'spec': jobs[0]['spec']}
  found = []
  for version in versions:
    try:
      kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
      found.append(f'{version}: {error.json_path}: {error.message}')
    except kubernetes_validate.SchemaNotFoundError as error:
      found.append(error.message)
  return found


@functools.cache
def jobset_validator():
  """Of the JobSet around the Job."""
  return jsonschema.Draft202012Validator(yaml.safe_load((Path(__file__).parent / 'jobset_schema.yaml').read_text()))


def claim(document):
  """The claim that all pods name."""
  return [
    (dig(document, 'metadata.name') == CLAIM, f'the claim must be called {CLAIM}'),
    (dig(document, 'spec.accessModes') == ['ReadWriteMany'], 'accessModes: many machines write at once'),
    (quantity(dig(document, 'spec.resources.requests.storage')) >= 10 * 2**30, 'storage: data and two checkpoints'),
  ]


def of_jobset(document):
  """A JobSet of one replicated Job, all of whose pods start again when one fails."""
  name, part = document['metadata']['name'], document['spec']['replicatedJobs'][0]
  network, failure = dig(document, 'spec.network'), dig(document, 'spec.failurePolicy')
  subdomain = network.get('subdomain', name)
  form = [
    (len(document['spec']['replicatedJobs']) == 1, 'replicatedJobs: one holds all processes'),
    (part.get('replicas', 1) == 1, 'replicas: one Job holds all processes'),
    (network.get('enableDNSHostnames') is True, 'enableDNSHostnames: pods need host names'),
    (network.get('publishNotReadyAddresses') is True, 'publishNotReadyAddresses: pods meet early'),
    (dig(part, 'template.spec.backoffLimit') == 0, 'backoffLimit: one pod that fails must fail the Job'),
    ((failure.get('maxRestarts') or 0) > 0, 'maxRestarts: a failed Job must start again'),
    (
      [(rule['action'], rule.get('onJobFailureReasons')) for rule in failure.get('rules', ())]
      == [('FailJobSet', ['PodFailurePolicy'])],
      'failurePolicy.rules: a wrong command must end the JobSet',
    ),
  ]
  return Trainer(part['template']['spec'], f'{name}-{part["name"]}-0-0.{subdomain}', form)


def of_job(document, documents):
  """An Indexed Job beside its headless Service, each of whose pods starts again by itself."""
  name, job = document['metadata']['name'], document['spec']
  services = [other for other in documents if other['kind'] == 'Service']
  service = services[0] if services else {}
  subdomain = dig(job, 'template.spec.subdomain')
  form = [
    (len(services) == 1, 'a Job needs its Service'),
    (dig(service, 'metadata.name') == subdomain, f'subdomain {subdomain}: must be the name of the Service'),
    (dig(service, 'spec.clusterIP') == 'None', 'clusterIP: the Service must be headless'),
    (dig(service, 'spec.publishNotReadyAddresses') is True, 'publishNotReadyAddresses: pods meet early'),
    (dig(service, 'spec.selector') == {'batch.kubernetes.io/job-name': name}, f'selector: must be the pods of {name}'),
    (job.get('backoffLimitPerIndex', 0) > 0, 'backoffLimitPerIndex: a process that fails must start again'),
    (job.get('maxFailedIndexes') == 0, 'maxFailedIndexes: without one process the others wait for ever'),
  ]
  return Trainer(job, f'{name}-0.{subdomain}', form)


def pod_rules(pod):
  """Of every pod: who it runs as, what it may use and write."""
  container, security = pod['containers'][0], pod.get('securityContext', {})
  own, resources = container.get('securityContext', {}), container.get('resources', {})
  mounts = {mount['mountPath']: mount['name'] for mount in container.get('volumeMounts', ())}
  volumes = {volume['name']: volume for volume in pod.get('volumes', ())}
  requests, limits = resources.get('requests', {}), resources.get('limits', {})
  rules = [
    (len(pod['containers']) == 1, 'containers: there is one'),
    (container['image'] == image(), f'image {container["image"]}: must be {image()}, as elsewhere'),
    (security.get('runAsNonRoot') is True, 'runAsNonRoot: must be true'),
    (security.get('runAsUser', 0) > 0 and security.get('runAsGroup', 0) > 0, 'runAsUser, runAsGroup: not root'),
    (security.get('fsGroup', 0) > 0, 'fsGroup: without it volumes may not be writable'),
    (dig(security, 'seccompProfile.type') == 'RuntimeDefault', 'seccompProfile: must be RuntimeDefault'),
    (own.get('allowPrivilegeEscalation') is False, 'allowPrivilegeEscalation: must be false'),
    (own.get('readOnlyRootFilesystem') is True, 'readOnlyRootFilesystem: must be true'),
    (dig(own, 'capabilities') == {'drop': ['ALL']}, 'capabilities: must drop ALL and add none'),
    (pod.get('automountServiceAccountToken') is False, 'automountServiceAccountToken: nothing talks to the API server'),
    (pod.get('restartPolicy') == 'Never', 'restartPolicy: must be Never'),
    (sorted(mounts.values()) == sorted(volumes), f'volumeMounts {mounts}: must be those of the volumes'),
    (dig(volumes, f'{mounts.get("/pvc")}.persistentVolumeClaim.claimName') == CLAIM, f'/pvc: must be {CLAIM}'),
    ('emptyDir' in volumes.get(mounts.get('/tmp'), {}), '/tmp: must be an emptyDir'),
  ]
  for name in ('cpu', 'memory', 'ephemeral-storage'):
    rules += [
      (name in requests and name in limits, f'resources: {name} needs a request and a limit'),
      (0 < quantity(requests.get(name)) <= quantity(limits.get(name)), f'resources: {name}: 0 < request <= limit'),
    ]
  return rules


def trainer_rules(trainer):
  """Of all the processes of a run together."""
  job, pod = trainer.job, dig(trainer.job, 'template.spec')
  container = pod['containers'][0]
  environment = {variable['name']: variable.get('value') for variable in container.get('env', ())}
  workers, cpus = job.get('completions', 1), quantity(dig(container, 'resources.limits.cpu'))
  host, _, port = (environment.get('DLRM_COORDINATOR') or '').partition(':')
  ports = [str(entry['containerPort']) for entry in container.get('ports', ())]
  heartbeat = environment.get('DLRM_HEARTBEAT') or ''
  on_codes = {'containerName': container['name'], 'operator': 'In', 'values': [2]}
  near = dig(pod, 'affinity.podAntiAffinity.requiredDuringSchedulingIgnoredDuringExecution.0')
  apart = dig(near, 'labelSelector.matchLabels')
  return [
    (job.get('completionMode') == 'Indexed', 'completionMode: must be Indexed'),
    (job.get('parallelism') == workers, f'parallelism {job.get("parallelism")}: must be completions={workers}'),
    (environment.get('DLRM_NUM_PROCESSES') == str(workers), f'DLRM_NUM_PROCESSES: must be completions={workers}'),
    ('DLRM_PROCESS_ID' not in environment, 'DLRM_PROCESS_ID: is the same in all pods; leave it to the Job'),
    (host == trainer.host, f'DLRM_COORDINATOR {host}: the first pod is {trainer.host}'),
    (ports == [port], f'DLRM_COORDINATOR: port {port} must be the container port {ports}'),
    (job.get('podReplacementPolicy') == 'Failed', 'podReplacementPolicy: a process must end before it starts again'),
    (
      dig(job, 'podFailurePolicy.rules') == [{'action': 'FailJob', 'onExitCodes': on_codes}],
      'podFailurePolicy: a wrong command (exit code 2), and that alone, must not be repeated',
    ),
    (pod.get('terminationGracePeriodSeconds', 30) >= 120, 'terminationGracePeriodSeconds: too short for a checkpoint'),
    (near.get('topologyKey') == 'kubernetes.io/hostname', 'podAntiAffinity: pods must be on different machines'),
    (
      bool(apart) and apart.items() <= dig(job, 'template.metadata.labels').items(),
      f'podAntiAffinity: {apart} must be labels of these pods',
    ),
    (heartbeat.startswith('/tmp/'), f'DLRM_HEARTBEAT {heartbeat}: must be where the process may write'),
    *((watches(container.get(probe)), f'{probe}: must look at $DLRM_HEARTBEAT') for probe in PROBES),
    (
      span(container.get('startupProbe')) >= 600,
      'startupProbe: too short to meet, build the kernels, restore and compile',
    ),
    *arguments_rules(container.get('args', []), workers, cpus),
  ]


PROBES = ('startupProbe', 'livenessProbe')


def watches(probe):
  """Whether a probe looks at the file that the program touches, and has more than a moment for it."""
  return '$DLRM_HEARTBEAT' in ' '.join(dig(probe, 'exec.command')) and probe.get('timeoutSeconds', 1) > 1


def span(probe):
  """Seconds until a probe that fails has its way."""
  return probe.get('periodSeconds', 10) * probe.get('failureThreshold', 3) if probe else 0


def arguments_rules(arguments, workers, cpus):
  """The experiment that these arguments name, and how it fits the processes."""
  try:
    spec = spec_of([argument.replace('$(CPUS)', f'{cpus:.0f}') for argument in arguments])
  except specs.SpecError as error:
    return [(False, str(error))]
  return [
    (spec.batch_size % workers == 0, f'batch_size={spec.batch_size}: must be a multiple of {workers} processes'),
    (spec.data.streams % workers == 0, f'data.streams={spec.data.streams}: must be a multiple of {workers} processes'),
    (spec.intra == cpus, f'intra={spec.intra}: must be the limit of {cpus} cores'),
    (spec.data_location.startswith('/pvc/'), 'data_location: must be on the shared storage'),
    (spec.output_dir.startswith('/pvc/'), 'output_dir: must be on the shared storage'),
    (spec.checkpoint.startswith('/pvc/'), 'checkpoint: all must start again from one folder on the shared storage'),
    (spec.save_steps > 0, 'save_steps: without checkpoints a failure starts from nothing'),
  ]


def spec_of(arguments):
  """The spec of a command line of --config=FILE and --config.field=value."""
  fields = dict(argument.removeprefix('--').split('=', 1) for argument in arguments)
  path = Path(fields.pop('config', 'nothing'))
  if not (ROOT / path).is_file():
    raise specs.SpecError(f'--config={path}: no such file')
  config = importlib.import_module('.'.join(path.with_suffix('').parts)).get_config()
  for field, value in fields.items():
    name = field.removeprefix('config.')
    specs.check_override(name, value)
    config.update_from_flattened_dict({name: specs.field_type(name)(value)})
  return specs.from_config(config)


def quantity(text):
  """A number of cores or bytes; NaN, which nothing equals, if it cannot be read."""
  match = re.fullmatch(r'(\d+(?:\.\d+)?)([A-Za-z]*)', str(text))
  return float(match[1]) * UNITS.get(match[2], float('nan')) if match else float('nan')


@functools.cache
def image():
  """Name and tag under which the Dockerfile says to build, with the version of the project."""
  version = re.search(r'^version = "(.+)"', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)[1]
  name = re.search(r'^#.*docker build .* -t (\S+):', (FOLDER / 'Dockerfile').read_text(), re.MULTILINE)[1]
  return f'{name}:{version}'
