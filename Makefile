# `make help` lists the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
NPROC ?= 1
INPUT ?=
GPU_PYTHON ?= python3
MEGATRON ?= 0.19.2
# Releases of megatron-core that contain Megatron-LM's own trainer.
TRAINERS ?= 0.17.1 0.18.2 0.19.2
BRIDGE ?= 0.6.2
# Transformer Engine, and the oldest release that pyproject.toml allows.
TE ?= 2.20.2
OLDEST_TE ?= 2.1.0
# Where Emerging-Optimizers is installed from.
EMERGING ?= git+https://github.com/NVIDIA-NeMo/Emerging-Optimizers
NVRX ?= 0.4.1
# Results of `make test-gpu`, and the seconds it may take: called again, it goes on.
GPU_REPORT ?= gpu_report
GPU_SECONDS ?= 540
# A pre-release of megatron-core, or a folder with `megatron` in it. Default: the newest release of all.
PRERELEASE ?=
PRERELEASE_FOLDER = $(if $(wildcard $(PRERELEASE:=/megatron)),$(PRERELEASE),$(CURDIR)/.megatron-prerelease)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.up-to-date

.DEFAULT_GOAL := help
JOBS ?= 2
# In the folders' order, so that the longest files (tests/distributed) start first.
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Slower kernels than the processor's own, which every x86-64 processor has.
OTHER_KERNELS := ATEN_CPU_CAPABILITY=default FAISS_SIMD_LEVEL=NONE FAISS_OPT_LEVEL=generic \
	MKL_ENABLE_INSTRUCTIONS=SSE4_2 OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive

.PHONY: help env quickstart test test-slow test-kernels test-versions test-prerelease test-muon test-local test-bridge test-te test-parity test-gpu docs style format lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

env: $(STAMP) ## make the project's environment (.venv) from pinned CPU requirements

$(STAMP): requirements/cpu.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --no-compile -r requirements/cpu.txt
	$(INSTALL) --no-deps --no-build-isolation -e .
	@# On every core: pip compiles on one.
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests/' $(VENV)/lib || true
	@touch $(STAMP)

quickstart: env ## real text to a trained Retro on CPU (NPROC=2: tensor parallel; INPUT=my.jsonl or a folder)
	$(BIN)/python examples/quickstart/run.py --nproc $(NPROC) $(if $(INPUT),--input "$(INPUT)")

test: env ## run the tests (JOBS=2 at a time)
	$(PYTEST) -m "not slow and not parity and not gpu"

test-slow: env .clients/.up-to-date ## run the tests that take longer: every parallel layout, the quickstart's chain
	$(INSTALL) -r requirements/lm_eval.txt -r requirements/huggingface_tools.txt
	@# Where these do not import, the tests would skip.
	PYTHONPATH=$(CURDIR)/.clients $(BIN)/python -c "import langchain_openai, llama_index.llms.openai_like"
	$(PYTEST) -m "slow and not parity and not gpu and not te and not bridge"
	PYTHONPATH=$(CURDIR)/.clients $(BIN)/python -m pytest -m slow -k "langchain or llama" \
		tests/integration/test_serve_clients.py

.clients/.up-to-date: $(STAMP) requirements/clients.txt
	rm -rf $(@D)
	$(INSTALL) --no-deps --target $(@D) -r requirements/clients.txt
	@touch $@

test-kernels: env ## run what computes once more, with other kernels than this processor's own
	$(OTHER_KERNELS) $(PYTEST) -m "not slow and not parity and not gpu" -k "not (refused or named or told)" \
		tests/distributed/test_tensor_parallel.py \
		$(addprefix tests/unit/checkpoint/test_,upstream.py huggingface.py families.py) \
		tests/unit/huggingface/test_against_megatron.py \
		$(addprefix tests/unit/evaluation/test_,documents.py layout_and_batches.py perplexity.py qa_batches.py) \
		$(addprefix tests/unit/inference/test_,decoders.py generation.py sampling.py) tests/unit/model \
		$(addprefix tests/unit/platform/test_,attention.py mlp.py) \
		$(addprefix tests/unit/retrieval/test_,embedders.py index.py list_order.py megatron_bert.py \
		neighbor_search.py precision.py rescoring.py retriever.py search.py static_embedder.py stored_vectors.py)

test-versions: env $(patsubst %,.megatron-%/.up-to-date,$(sort $(MEGATRON) $(TRAINERS))) ## run what stands on megatron-core on MEGATRON=0.19.2 as well, and Megatron-LM's trainers
	PYTHONPATH=$(CURDIR)/.megatron-$(MEGATRON) $(PYTEST) -m "not slow and not parity and not gpu" \
		tests/distributed tests/unit/platform tests/unit/model tests/unit/checkpoint/test_checkpoints.py \
		$(addprefix --ignore tests/distributed/test_,data_pipeline.py index_steps.py near_duplicates.py) \
		$(addprefix tests/unit/training/test_,trainer.py training_options.py model_flags.py providers.py \
		token_mean.py parametrization.py flags.py)
	@# One process for each release: the tests of one share its runs.
	printf '%s\n' $(TRAINERS) | xargs -P $(JOBS) -I VERSION env PYTHONPATH=$(CURDIR)/.megatron-VERSION \
		$(BIN)/python -m pytest tests/distributed/test_megatron_lm.py

.megatron-%/.up-to-date: $(STAMP)
	$(INSTALL) --ignore-requires-python --no-deps --upgrade --target $(@D) megatron-core==$*
	@touch $@

test-prerelease: env ## run the tests of the model on the newest pre-release (PRERELEASE=0.20.0rc0, or a folder)
	$(if $(wildcard $(PRERELEASE:=/megatron)),,$(INSTALL) --pre --ignore-requires-python --no-deps --upgrade \
		--target $(PRERELEASE_FOLDER) megatron-core$(addprefix ==,$(PRERELEASE)))
	PYTHONPATH=$(PRERELEASE_FOLDER) $(PYTEST) -m "not slow and not parity and not gpu" \
		tests/distributed/test_tensor_parallel.py tests/unit/platform tests/unit/model \
		tests/unit/checkpoint/test_checkpoints.py tests/unit/training/test_providers.py

test-muon: env .emerging-v0.1.0/.up-to-date .emerging-v0.2.0/.up-to-date .megatron-$(MEGATRON)/.up-to-date ## run the tests of Muon, Lion and SOAP, on the pinned megatron-core and on MEGATRON=0.19.2
	@# Where it cannot be built, the tests would skip.
	for folders in .emerging-v0.1.0 .emerging-v0.2.0:$(CURDIR)/.megatron-$(MEGATRON); do \
		export PYTHONPATH=$(CURDIR)/tests/muon:$(CURDIR)/$$folders; \
		$(BIN)/python -W ignore -c "import retro_mcore; from retro_mcore.platform.other_optimizers import \
			check_available; check_available('muon')" \
		&& $(BIN)/python -m pytest tests/unit/training/test_optimizers.py tests/distributed/test_optimizers.py \
		|| exit 1; \
	done

.emerging-%/.up-to-date: $(STAMP)
	$(INSTALL) --ignore-requires-python --no-deps --upgrade --target $(@D) "$(EMERGING)@$*" absl-py
	@touch $@

test-local: env .nvrx-$(NVRX)/.up-to-date ## run the tests of local checkpoints, with nvidia-resiliency-ext in a folder of its own
	PYTHONPATH=$(CURDIR)/.nvrx-$(NVRX) $(BIN)/python -m pytest tests/distributed/test_local_checkpoints.py

# Beside it megatron-core 0.17 and later cannot be imported, so it is not in the environment.
.nvrx-%/.up-to-date: $(STAMP)
	$(INSTALL) --no-deps --upgrade --target $(@D) nvidia-resiliency-ext==$*
	@touch $@

test-bridge: env .bridge-$(BRIDGE)/.up-to-date ## train in Megatron-Bridge, installed into a folder of its own
	PYTHONPATH=$(CURDIR)/.bridge-$(BRIDGE) $(BIN)/python -m pytest -m bridge tests/bridge

.bridge-%/.up-to-date: $(STAMP) requirements/bridge.txt
	$(INSTALL) --ignore-requires-python --no-deps --upgrade --target $(@D) megatron-bridge==$* -r requirements/bridge.txt
	@touch $@

test-te: env .te-$(TE)/.up-to-date .megatron-$(MEGATRON)/.up-to-date ## compare models of Transformer Engine's modules with local ones, without a GPU (needs nvcc 13; builds for up to an hour, once)
	@# Transformer Engine looks for these libraries in the environment's own folder, where they are not.
	export LD_LIBRARY_PATH=$$(echo $(CURDIR)/.te-$(TE)/nvidia/*/lib | tr ' ' :) \
		CUDNN_HOME=$(CURDIR)/.te-$(TE)/nvidia/cudnn NVRTC_HOME=$(CURDIR)/.te-$(TE)/nvidia/cu13 \
		CURAND_HOME=$(CURDIR)/.te-$(TE)/nvidia/cu13; \
	for megatron in "" :$(CURDIR)/.megatron-$(MEGATRON); do \
		PYTHONPATH=$(CURDIR)/.te-$(TE)$$megatron $(BIN)/python -m pytest -m te tests/te || exit 1; \
	done

.te-%/.up-to-date: $(STAMP) requirements/transformer_engine.sh requirements/transformer_engine.txt
	JOBS=$(JOBS) requirements/transformer_engine.sh $(CURDIR)/$(BIN)/python $* $(OLDEST_TE) $(CURDIR)/$(@D)
	@touch $@

test-parity: env ## compare live with megatron-core 0.15.3, installed into .parity
	$(BIN)/python -m pytest -m parity

test-gpu: ## run the tests that need a GPU, with the machine's own Python (GPU_PYTHON=python3); again: go on
	GPU_REPORT="$(GPU_REPORT)" GPU_SECONDS=$(GPU_SECONDS) $(GPU_PYTHON) -m pytest -m gpu tests/gpu

docs: env ## build the documentation and API reference into docs/_build; a broken reference fails
	$(INSTALL) -r requirements/docs.txt
	$(BIN)/python -W ignore -m sphinx --quiet --fail-on-warning --keep-going -b html docs docs/_build

style: env ## check format, lint, types, the direction of imports; Dockerfile, shell scripts and manifests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(INSTALL) -r requirements/lint.txt
	$(BIN)/python -m pytest --quiet tests/integration/test_linters.py

format: env ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: ## pin requirements/cpu.txt from requirements/cpu.in
	rm -rf $(VENV) && $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet -r requirements/cpu.in
	{ sed -n '/^#/p' requirements/cpu.txt; $(BIN)/python -m pip freeze --all | grep -v '^pip==' | sed 's/+cpu//'; } > requirements/cpu.new
	mv requirements/cpu.new requirements/cpu.txt

clean: ## remove the environment and the quickstart's output
	rm -rf $(VENV) .megatron-* .bridge-* $(filter-out %/wheels,$(wildcard .te-*/*)) .te-*/.up-to-date .emerging-* .nvrx-* .clients quickstart
