#!/usr/bin/env bash
# What `gpu.sh` needs on a machine with a GPU and no network: wheels that its Python lacks, and the packages of sound.
#
#     benchmarks/evidence/wheels.sh [FOLDER]     into .ev unless given; about 20 MB, to be kept out of the repository
#
# PYTHON_THERE (3.12) is the other machine's Python; it is taken to have torch, torchaudio, lightning, scikit-learn, PyYAML,
# huggingface_hub, safetensors and matplotlib. The drum recordings, 190 MB, are left out.
set -eu -o pipefail
cd "$(dirname "$0")/../.."
folder=${1:-.ev}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$folder/wheels" "$folder/packages"
rm -f "$folder"/wheels/*.whl "$folder"/packages/*.deb
platforms=()
for tag in manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014; do
  platforms+=(--platform "${tag}_x86_64")
done
# pip's constraints would be those of this machine's Python: names with their versions, and none of what they need
versions=$(sed -nE '/^(jsonargparse|tinysoundfont)==/p' constraints.txt)
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version "${PYTHON_THERE:-3.12}" --implementation cp "${platforms[@]}" --dest "$folder/wheels" \
  $versions soundfile soxr docstring-parser typeshed-client importlib-resources cffi pycparser
(cd "$folder/packages" && apt-get --quiet download timgm6mb-soundfont gcin-voice)
du -sh "$folder"
