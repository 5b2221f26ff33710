# `make demo` distils a small Whisper with the five shipped configs; `make check` is what CI runs first.

PYTHON ?= python3
BIN := .venv/bin
STEPS := run_pseudo_labelling create_student_model run_distillation offline_inference eval

.PHONY: demo compare test check slow real bench clean

demo: .venv/installed
	@set -e; for step in $(STEPS); do \
		echo "== python $$step.py $$step.json"; $(BIN)/python $$step.py $$step.json; \
	done

# Teacher, pruned, distilled and exported student in one report, after `make demo`.
compare: .venv/installed
	$(BIN)/python offline_inference.py demo/inference_teacher.json
	$(BIN)/python offline_inference.py demo/inference_pruned.json
	$(BIN)/python -m simpler_distil_whisper.export export.json
	$(BIN)/python eval.py demo/compare.json

# A process more than CI has cores, since some tests wait.
test: .venv/installed
	$(BIN)/python -m pytest -n 3 --dist worksteal

slow: .venv/installed
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

# With OpenAI's weights, on all recordings of people: the variables are in CONTRIBUTING.md.
real: .venv/installed
	SDW_REAL_CLIPS=0 $(BIN)/python -m pytest -m real

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(MAKE) test

# The speed of decoding and of a training step beside that of others: hours on two quiet cores.
bench: .venv/installed
	$(BIN)/python -m benchmarks.decoding
	$(BIN)/python -m benchmarks.distillation_step

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,export]'
	touch $@

clean:
	rm -rf .venv outputs
