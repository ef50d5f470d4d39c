# Every command sets itself up.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PHANTOMS := runs/phantom
HOSPITALS := north south east west
SEEDS := 0,1,2,3,4,5,6,7,8,9
# For every platform; versions that are pinned stay unless something forces them.
LOCK := $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate \
  $(UPGRADE) pyproject.toml
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --durations=15
# The kernels of a CPU without AVX-512: of PyTorch, oneDNN, MKL, and NumPy's OpenBLAS.
AS_OLDER := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2 OPENBLAS_CORETYPE=Haswell

.DEFAULT_GOAL := help
.PHONY: help install lock sbom audit demo deployment-demo test test-unit test-isa test-all format clean

help: ## Show the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make .venv with pinned versions (several GB, minutes)

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into .venv (PyTorch is several GB: this takes minutes, once) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r constraints.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

lock: ## Pin versions and hashes anew; UPGRADE=--upgrade takes the newest that pyproject.toml allows
	@$(LOCK) --extra dev -o constraints.txt
	@$(LOCK) --extra dev --extra ray -c constraints.txt -o constraints-ray.txt
	@$(LOCK) --extra dev --extra export -c constraints.txt -o constraints-export.txt
	@$(LOCK) --extra dev --extra mlflow -c constraints.txt -o constraints-mlflow.txt

sbom: $(INSTALLED) ## Write the software bill of materials of .venv, sbom.json (CycloneDX)
	@$(BIN)/python -m tools.sbom > sbom.json

audit: $(INSTALLED) ## Known weaknesses of .venv, by ADVISORIES=<folder>; fails if it cannot look, too
	@$(BIN)/python -m tools.audit "$(ADVISORIES)"

demo: $(INSTALLED) ## Four phantom hospitals train together, beside local and pooled training, on ten seeds
	@$(BIN)/consilium-simulate phantom $(PHANTOMS)
	@$(BIN)/consilium-simulate run configs/demo.yaml --compare --seeds $(SEEDS) $(HOSPITALS:%=--site $(PHANTOMS)/%)

deployment-demo: $(INSTALLED) ## A coordinator and three phantom hospitals over TLS, on this machine
	@rm -rf runs/deployment
	@$(BIN)/consilium-simulate deployment runs/deployment

test: $(INSTALLED) ## Lint, types, import rules, tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PYTHONPATH=. $(BIN)/lint-imports --no-logo
	@$(PYTEST)

test-unit: $(INSTALLED) ## The tests that start no process, in three minutes
	@$(PYTEST) -m "not slow and not system"

test-isa: $(INSTALLED) ## The tests that compare numbers, as on a CPU without AVX-512
	@$(AS_OLDER) $(PYTEST) -m "numbers and not slow"

test-all: $(INSTALLED) ## Also the proofs that take minutes
	@$(MAKE) --no-print-directory test test-isa
	@$(BIN)/python -m pytest -m slow --durations=15
	@$(AS_OLDER) $(BIN)/python -m pytest -m "numbers and slow" --durations=15

format: $(INSTALLED) ## Format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean: ## Remove the environment and every run
	rm -rf .venv runs
