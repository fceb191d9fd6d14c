PYTHON ?= python3
# --no-compile: of the modules that come along most are never imported, and the others compile themselves the first time;
# only that time, whatever the machine's environment says (Docker's images forbid to keep what was compiled)
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL = -m pip install --no-compile --quiet --disable-pip-version-check --constraint constraints.txt --editable
SOURCES = aape_kernels python tests benchmarks docs examples setup.py
INSTALLED_FROM = pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/* csrc/cpu/* csrc/cuda/*)
SIDE_BY_SIDE = -n $(or $(JOBS),2) --dist loadgroup
QUICK = tests/test_stem.py tests/test_sblu.py tests/test_bad_input.py tests/test_geometry.py tests/test_ranges.py \
  tests/test_sizes.py tests/test_surgery.py tests/aape_ssl/test_house.py tests/aape_ssl/test_model.py \
  tests/aape_ssl/test_masks.py tests/aape_ssl/test_objective.py
# A cleared environment for the tests, so that nothing installed by hand can hide a missing step.
TEST_VENV = .venv-test

.DEFAULT_GOAL := help
.PHONY: help demo test test-all quick ssl bench gpu gpu-install gpu-tests gpu-bench gpu-search gpu-sanitize gpu-precision wheels docs lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

demo: .venv/demo  ## from audio files to tokens: a table and one picture a clip (ARGS="FILE ... --out DIR")
	.venv/bin/aape-ssl demo $(ARGS)

# Without a GPU the CUDA kernels could only be loaded, which is a slow test.
test: export AAPE_CUDA ?= $(if $(wildcard /dev/nvidia*),auto,off)
test: test-venv  ## the tests, in a fresh virtual environment
	$(TEST_VENV)/bin/pytest $(SIDE_BY_SIDE) -m "not slow"

test-all: test-venv  ## and the slow ones: every compiler target, sanitizers, killed processes, old versions
	$(TEST_VENV)/bin/pytest $(SIDE_BY_SIDE)
	.ci/oldest

quick: .venv/dev  ## under a minute, while you work: the stem on every CPU backend, its errors, drop-in, the trainer's model
	.venv/bin/pytest $(SIDE_BY_SIDE) -q $(QUICK)

ssl: .venv/ssl  ## five stems pre-trained alike on real sound: frozen, fine-tuned, shifted (ARGS="--small --steps 20")
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt tinysoundfont
	.venv/bin/python -m benchmarks.evidence.compare $(ARGS)

# One shell, so that the table is printed also where a peer was refused and its row has no figure.
bench: .venv/dev  ## throughput beside the peers, as one table (nothing else should be running)
	@mkdir -p build/bench; status=0; \
	.venv/bin/pytest benchmarks --benchmark-json=build/bench/run.json || status=$$?; \
	.venv/bin/pytest benchmarks -k "(test_stem or test_other) and not compile" --allocator default \
	    --benchmark-json=build/bench/default.json || status=$$?; \
	.venv/bin/python -m benchmarks.table build/bench/run.json --default-allocator build/bench/default.json; exit $$status

# In the environment of $(PYTHON): a GPU machine may have no network to fill one of its own. Each takes under 8 minutes.
gpu:  ## on a machine with a GPU: install, then all of the next five that there is time for; results in build/gpu, or OUT
	@PYTHON="$(PYTHON)" OUT="$(OUT)" .ci/gpu

gpu-install:  ## what these build and install, into build/gpu-site: elsewhere for a GPU that AAPE_CUDA_ARCHS=90 names
	@PYTHON="$(PYTHON)" OUT="$(OUT)" .ci/gpu install

gpu-tests:  ## every test of the GPU backends, those of 2^31 elements by themselves
	@PYTHON="$(PYTHON)" OUT="$(OUT)" .ci/gpu tests large

gpu-bench:  ## stem and sblu beside their peers, and the steps that they are made of
	@PYTHON="$(PYTHON)" OUT="$(OUT)" .ci/gpu bench

gpu-search:  ## what AAPE_AUTOTUNE=1 finds, and gains
	@PYTHON="$(PYTHON)" OUT="$(OUT)" .ci/gpu search

gpu-sanitize:  ## the CUDA kernels under compute-sanitizer
	@PYTHON="$(PYTHON)" OUT="$(OUT)" .ci/gpu sanitize

gpu-precision:  ## Triton's float32 products, exact and as three of TF32
	@PYTHON="$(PYTHON)" OUT="$(OUT)" .ci/gpu precision

wheels: .venv/dev  ## sdist, pure-Python wheel and manylinux wheel with the CPU module, into dist/ (or OUT)
	.ci/wheels .venv/bin/python "$(or $(OUT),dist)"

docs: .venv/dev  ## the site, into build/docs: open build/docs/index.html
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

lint: .venv/dev  ## ruff and mypy
	.venv/bin/ruff check $(SOURCES)
	.venv/bin/ruff format --check $(SOURCES)
	.venv/bin/mypy

format: .venv/dev  ## let ruff rewrite
	.venv/bin/ruff check --fix $(SOURCES)
	.venv/bin/ruff format $(SOURCES)

clean:  ## remove environments, builds and outputs
	rm -rf .venv $(TEST_VENV) build dist demo-output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f aape_kernels/_native*

.PHONY: test-venv
test-venv:
	$(PYTHON) -m venv --clear --upgrade-deps $(TEST_VENV)
	$(TEST_VENV)/bin/python $(PIP_INSTALL) ".[dev]"

.venv/demo .venv/dev .venv/ssl: .venv/%: $(INSTALLED_FROM)
	test -d .venv || $(PYTHON) -m venv .venv
	.venv/bin/python $(PIP_INSTALL) ".[$*]"
	touch $@
