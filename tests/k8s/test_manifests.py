"""The manifests hold, alone and together; each planted error is caught; what README.md has users type works."""

import os
import re
import subprocess
import sys
import time

import pytest
import yaml

from tests.k8s.checks import FOLDER, VERSIONS, complaints, dig, load, spec_of

TRAINERS = ['job-bf16', 'job-fp32', 'jobset-bf16', 'jobset-fp32']
MANIFESTS = [*TRAINERS, 'pvc', 'storage']


def text_of(name):
  return (FOLDER / f'{name}.yaml').read_text()


def pod_of(name):
  """Spec of the pods of a trainer."""
  document = load(text_of(name))[-1]
  return dig(document, 'spec.template.spec') or dig(document, 'spec.replicatedJobs.0.template.spec.template.spec')


def test_no_manifest_is_left_out():
  assert sorted(path.stem for path in FOLDER.glob('*.yaml')) == MANIFESTS


@pytest.mark.parametrize('name', MANIFESTS)
def test_each_manifest_holds(name):
  assert complaints(load(text_of(name))) == []


@pytest.mark.parametrize('name', TRAINERS)
def test_the_program_understands_the_arguments(name, repository):
  arguments = [argument.replace('$(CPUS)', '8') for argument in pod_of(name)['containers'][0]['args']]
  code = 'import sys; from dlrm_jax import main, spec; print(spec.from_config(main.parse(sys.argv)))'
  command = [sys.executable, '-W', 'ignore', '-c', code, *arguments]
  done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == str(spec_of(arguments))


# What is replaced, by what, and words of the complaint. Of all four ways to train:
ERRORS = [
  # Misspelled.
  ('completions:', 'completion:', ['completion']),
  ('livenessProbe:', 'livenessprobe:', ['livenessprobe']),
  ('podAntiAffinity:', 'podAntiafinity:', ['podAntiafinity']),
  ('runAsNonRoot:', 'runAsNonroot:', ['runAsNonroot']),
  ('--config.save_steps', '--config.save_step', ['config.save_step', 'save_steps']),
  ('DLRM_NUM_PROCESSES', 'DLRM_PROCESSES', ['DLRM_NUM_PROCESSES']),
  ('DLRM_COORDINATOR', 'DLRM_CORDINATOR', ['DLRM_COORDINATOR']),
  ('"8"', '8 cores', ['resources', 'cpu']),
  ('24Gi', '24GB', ['resources', 'memory']),
  # Wrong type.
  ('completions: 10', 'completions: "10"', ['completions', 'integer']),
  ('"10"  # workers', '10  # workers', ['env', 'string']),
  ('containerPort: 8476', 'containerPort: coordinator', ['containerPort']),
  (r'drop: \[ALL\]', 'drop: ALL', ['drop', 'array']),
  ('name: DLRM_HEARTBEAT', 'DLRM_HEARTBEAT: x', ['env', 'name']),
  # Missing.
  (r'limits:\n +cpu: "8"\n', 'limits:\n', ['resources', 'cpu']),
  (r'requests:\n +cpu: "7"\n', 'requests:\n', ['resources', 'cpu']),
  (r' +runAsNonRoot: true\n', '', ['runAsNonRoot']),
  (r' +- --config.checkpoint=.*\n', '', ['checkpoint']),
  (r' +- --config=.*\n', '', ['no such file']),
  (r' +restartPolicy: Never\n', '', ['restartPolicy']),
  (r' +startupProbe:\n( +)exec:\n(\1 .*\n|\1[a-z].*\n)*', '', ['startupProbe']),
  # Wrong count.
  ('completions: 10', 'completions: 9', ['parallelism', 'completions=9']),
  ('parallelism: 10', 'parallelism: 11', ['parallelism 11']),
  ('"10"  # workers', '"11"  # workers', ['DLRM_NUM_PROCESSES']),
  ('batch_size=5120', 'batch_size=512', ['batch_size=512', '10 processes']),
  ('streams=20', 'streams=9', ['data.streams=9']),
  (r'cpu: "7"', 'cpu: "9"', ['resources', 'cpu', 'request <= limit']),
  ('failureThreshold: 90', 'failureThreshold: 3', ['startupProbe', 'short']),
  ('terminationGracePeriodSeconds: 300', 'terminationGracePeriodSeconds: 30', ['terminationGracePeriodSeconds']),
  # Wrong names.
  (':8476', ':8477', ['DLRM_COORDINATOR', '8477']),
  (r'value: dlrm-', 'value: other-', ['DLRM_COORDINATOR', 'first pod']),
  ('claimName: deeprec', 'claimName: deeprek', ['deeprec']),
  ('configs/b', 'configs/x', ['configs/x', 'no such file']),
  ('image: dlrm-jax:0.1.0', 'image: dlrm-jax:latest', ['image']),
  ('topologyKey: kubernetes.io/hostname', 'topologyKey: topology.kubernetes.io/zone', ['podAntiAffinity']),
  (r'(matchLabels:\n +app.kubernetes.io/name: )dlrm', r'\1else', ['podAntiAffinity']),
  (r'mountPath: /pvc', 'mountPath: /data', ['/pvc']),
  ('containerName: trainer', 'containerName: other', ['podFailurePolicy']),
  # Well-formed, but not what is meant.
  ('podAntiAffinity:', 'podAffinity:', ['podAntiAffinity']),
  ('livenessProbe:', 'readinessProbe:', ['livenessProbe']),
  (r'test -n .*\]', "true']", ['livenessProbe', 'HEARTBEAT']),
  ('completionMode: Indexed', 'completionMode: NonIndexed', ['completionMode']),
  ('restartPolicy: Never', 'restartPolicy: OnFailure', ['restartPolicy']),
  ('runAsUser: 1000', 'runAsUser: 0', ['root']),
  ('readOnlyRootFilesystem: true', 'readOnlyRootFilesystem: false', ['readOnlyRootFilesystem']),
  ('allowPrivilegeEscalation: false', 'allowPrivilegeEscalation: true', ['allowPrivilegeEscalation']),
  ('type: RuntimeDefault', 'type: Unconfined', ['seccompProfile']),
  (r'drop: \[ALL\]', 'drop: [NET_RAW]', ['capabilities']),
  ('value: /tmp/heartbeat', 'value: /app/heartbeat', ['DLRM_HEARTBEAT']),
  ('name: DLRM_HEARTBEAT', 'name: DLRM_PROCESS_ID', ['DLRM_PROCESS_ID']),
  ('checkpoint=/pvc', 'checkpoint=/tmp', ['checkpoint']),
  ('data_location=/pvc', 'data_location=', ['data_location']),
  ('output_dir=/pvc', 'output_dir=/tmp', ['output_dir']),
  ('automountServiceAccountToken: false', 'automountServiceAccountToken: true', ['automountServiceAccountToken']),
  ('fsGroup: 1000', 'fsGroup: 0', ['fsGroup']),
  ('runAsGroup: 1000', 'runAsGroup: 0', ['root']),
  (r'emptyDir:\n +sizeLimit: 1Gi', 'configMap: {name: tmp}', ['/tmp', 'emptyDir']),
  (r'(volumes:\n +- name: )deeprec', r'\1shared', ['volumeMounts']),
  ('save_steps=500', 'save_steps=0', ['save_steps']),
  ('save_steps=500', 'save_steps=often', ['save_steps', 'whole number']),
  (r'intra=\$\(CPUS\)', 'intra=64', ['intra']),
  (r'values: \[2\]', 'values: [1]', ['podFailurePolicy']),
  ('action: FailJob\n', 'action: Ignore\n', ['podFailurePolicy']),
  ('podReplacementPolicy: Failed', 'podReplacementPolicy: TerminatingOrFailed', ['podReplacementPolicy']),
]
OF_JOBSETS = [
  ('replicatedJobs:', 'replicatedJob:', ['replicatedJob']),
  ('maxRestarts:', 'maxRestart:', ['maxRestart']),
  ('maxRestarts: 10', 'maxRestarts: "10"', ['maxRestarts', 'integer']),
  ('maxRestarts: 10', 'maxRestarts: 0', ['maxRestarts']),
  ('jobset.x-k8s.io/v1alpha2', 'jobset.x-k8s.io/v1', ['apiVersion']),
  ('replicas: 1', 'replicas: 10', ['replicas']),
  ('replicas: 1', 'replicas: -1', ['replicas']),
  ('backoffLimit: 0', 'backoffLimit: 6', ['backoffLimit']),
  ('trainer-0-0', 'trainer-0', ['DLRM_COORDINATOR']),
  ('subdomain: dlrm-', 'subdomain: dlrm-x', ['DLRM_COORDINATOR']),
  ('subdomain: dlrm-', 'subdomain: dlrm_', ['subdomain']),
  ('- name: trainer\n      replicas', '- name: worker\n      replicas', ['DLRM_COORDINATOR', 'worker-0-0']),
  ('publishNotReadyAddresses: true', 'publishNotReadyAddresses: false', ['publishNotReadyAddresses']),
  ('enableDNSHostnames: true', 'enableDNSHostnames: false', ['enableDNSHostnames']),
  ('enableDNSHostnames: true', 'enableDNSHostnames: "true"', ['enableDNSHostnames', 'boolean']),
  ('action: FailJobSet', 'action: Fail', ['action']),
  ('action: FailJobSet', 'action: RestartJobSet', ['failurePolicy']),
  ('wrongCommand', 'wrong-command', ['wrong-command']),
  (r'\[PodFailurePolicy\]', '[PodFailure]', ['PodFailure']),
]
OF_JOBS = [
  ('kind: Job', 'kind: Jobs', ['Jobs']),
  ('clusterIP: None', 'clusterIp: None', ['clusterIp']),
  (r' +clusterIP: None\n', '', ['clusterIP']),
  ('publishNotReadyAddresses: true', 'publishNotReadyAddresses: false', ['publishNotReadyAddresses']),
  ('job-name: dlrm-', 'job-name: other-', ['selector']),
  ('subdomain: dlrm-', 'subdomain: other-', ['subdomain']),
  ('value: dlrm-(....)-0', r'value: dlrm-\1-1', ['DLRM_COORDINATOR']),
  ('backoffLimitPerIndex: 10', 'backoffLimitPerIndex: 0', ['backoffLimitPerIndex']),
  ('backoffLimitPerIndex: 10', 'backoffLimitPerIndex: ten', ['backoffLimitPerIndex', 'integer']),
  ('maxFailedIndexes: 0', 'maxFailedIndexes: 9', ['maxFailedIndexes']),
]
OF_PVC = [
  ('kind: PersistentVolumeClaim', 'kind: PersistentVolumClaim', ['PersistentVolumClaim']),
  ('name: deeprec', 'name: dlrm', ['deeprec']),
  ('accessModes:', 'accessMode:', ['accessMode']),
  (r'\[ReadWriteMany\]', 'ReadWriteMany', ['accessModes', 'array']),
  ('ReadWriteMany', 'ReadWriteOnce', ['accessModes']),
  ('storage: 50Gi', 'storage: 50Mi', ['storage']),
  ('storage: 50Gi', 'storage: 50G i', ['storage']),
]
OF_STORAGE = [
  ('securityContext:', 'securitycontext:', ['securitycontext']),
  (r'\[tini, .*\]', 'sleep infinity', ['command', 'array']),
  ('claimName: deeprec', 'claimName: other', ['deeprec']),
  ('image: dlrm-jax', 'image: python', ['image']),
  ('runAsNonRoot: true', 'runAsNonRoot: false', ['runAsNonRoot']),
  ('name: tmp\n          mountPath', 'name: temp\n          mountPath', ['volumeMounts']),
  ('memory: 2Gi', 'memory: two', ['resources', 'memory']),
]
PLANTED = [
  *((name, error) for name in TRAINERS for error in ERRORS),
  *((name, error) for name in TRAINERS for error in (OF_JOBSETS if name.startswith('jobset') else OF_JOBS)),
  *(('pvc', error) for error in OF_PVC),
  *(('storage', error) for error in OF_STORAGE),
]


@pytest.mark.parametrize(('name', 'error'), PLANTED)
def test_a_planted_error_is_caught(name, error):
  pattern, replacement, words = error
  text, count = re.subn(pattern, replacement, text_of(name), count=1)
  assert count == 1, f'{pattern!r} is not in {name}.yaml'
  found = complaints(load(text), VERSIONS[-1:])
  assert found
  assert all(word in '\n'.join(found) for word in words), found


def test_the_service_of_a_job_may_not_be_left_out():
  assert 'a Job needs its Service' in complaints(load(text_of('job-fp32'))[1:], VERSIONS[-1:])


@pytest.mark.parametrize('form', ['job', 'jobset'])
def test_bf16_is_fp32_with_another_name_and_config(form):
  text = text_of(f'{form}-fp32').replace('configs/base.py', 'configs/bf16.py').replace('fp32', 'bf16')
  assert text.replace('FP32', 'BF16') == text_of(f'{form}-bf16')


@pytest.mark.parametrize('precision', ['bf16', 'fp32'])
def test_jobs_and_jobsets_have_the_same_pods(precision):
  job, jobset = pod_of(f'job-{precision}'), pod_of(f'jobset-{precision}')
  del job['subdomain']  # the controller of JobSets sets it
  for pod in (job, jobset):
    [coordinator] = [entry for entry in pod['containers'][0]['env'] if entry['name'] == 'DLRM_COORDINATOR']
    coordinator.pop('value')
  assert job == jobset


@pytest.mark.parametrize('name', TRAINERS)
def test_the_probes_kill_only_what_makes_no_progress_any_more(name, tmp_path):
  container = pod_of(name)['containers'][0]

  def passes(probe):
    environment = {**os.environ, 'DLRM_HEARTBEAT': str(heartbeat)}
    command = container[probe]['exec']['command']
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0

  heartbeat = tmp_path / 'heart beat'
  assert not passes('startupProbe')
  assert not passes('livenessProbe')
  heartbeat.touch()
  for age, alive in ((0, True), (4 * 60, True), (7 * 60, False)):
    os.utime(heartbeat, (time.time() - age,) * 2)
    assert passes('startupProbe')
    assert passes('livenessProbe') == alive


def recipe():
  """The words of README.md's command that changes the number of workers and the name of the image."""
  text = (FOLDER / 'README.md').read_text()
  return re.search(r"^    sed (-e '[^']+' -e \"[^\"]+\") k8s/\S+\.yaml", text, re.MULTILINE)[1]


@pytest.mark.parametrize('name', TRAINERS)
def test_the_number_of_workers_changes_as_readme_says(name):
  command = f"IMAGE=dlrm-jax:0.1.0 && sed {recipe()} k8s/{name}.yaml"
  done = subprocess.run(['bash', '-c', command], cwd=FOLDER.parent, capture_output=True, text=True, check=True)
  documents = load(done.stdout)
  assert complaints(documents, VERSIONS[-1:]) == []
  job = dig(documents[-1], 'spec.replicatedJobs.0.template.spec') or documents[-1]['spec']
  assert job['completions'] == 4


def test_readme_names_only_files_that_are_there():
  named = set(re.findall(r'\bk8s/[\w.-]*\w', (FOLDER / 'README.md').read_text()))
  assert {f'k8s/{name}.yaml' for name in MANIFESTS} <= named
  assert [path for path in named if not (FOLDER.parent / path).exists()] == []


def test_names_in_readme_are_those_of_the_manifests():
  names = {document['metadata']['name'] for name in MANIFESTS for document in yaml.safe_load_all(text_of(name))}
  named = set(re.findall(r'\b(?:dlrm-(?:fp32|bf16)[\w-]*|deeprec-\w+)', (FOLDER / 'README.md').read_text()))
  assert named <= names | {'dlrm-fp32-trainer-0'}
