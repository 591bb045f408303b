# Every target first makes .venv and installs the course into it, once; then it goes.
#   make course     run the six notebooks (copies, in outputs/) and print the scores before and after
#   make test       every test, the slow ones too
#   make lint       check style and format with ruff
#   make lab        JupyterLab on the notebooks
#   make notebooks  run the notebooks, store their outputs in place, and take the pictures anew
#   make screenshots  the pictures alone; the chat box speaks with the adapter in outputs/, where there is one
#   make bench      measure the speed here, and write benchmarks/speed.md: over an hour
# Variables:
#   PYTHON=...       the Python (3.11 or newer) to make .venv with
#   TORCH_INDEX=cpu  take torch from PyTorch's CPU index (Linux without a GPU: a far smaller download);
#                    also cu130 (needs NVIDIA's driver 580), cu126 (driver 525; for V100 and older cards),
#                    or a whole address; `python -m glm4_helpers doctor` names the one that fits
#   PYTEST=...       arguments for pytest, for example PYTEST="-m 'not slow'"
# Kept to what GNU make 3.81 knows, since macOS ships that. Paths are relative, so that spaces in the
# folder's own path do no harm.

.DEFAULT_GOAL := course
.PHONY: course test lint lab notebooks screenshots bench install clean

RUN = .venv/bin/python
INSTALLED = .venv/installed
PYTEST =
# Jupyter refuses root, which is the only user of most containers.
AS_ROOT = $(if $(filter 0,$(shell id -u)),--allow-root)
# Without a browser there would be no new screenshots: that has to be seen.
SCREENSHOTS = GLM4_SCREENSHOTS=images/screenshots GLM4_REQUIRE_BROWSER=1 HF_HUB_OFFLINE=1 $(RUN) -m pytest \
	tests/test_browser.py tests/test_plots.py -k 'browser or without_any_chinese_font'

course: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(RUN) -m glm4_helpers course

test: $(INSTALLED)
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(RUN) -m pytest $(PYTEST)

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

lab: $(INSTALLED)
	$(RUN) -m jupyter lab notebooks $(AS_ROOT)

notebooks: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(RUN) -m glm4_helpers course --in-place
	$(RUN) images/from_notebook.py
	$(SCREENSHOTS)

screenshots: $(INSTALLED)
	$(SCREENSHOTS)

bench: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(RUN) -m benchmarks.speed

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@sh .ci/install "$(PYTHON)" "$(TORCH_INDEX)"
	@touch $(INSTALLED)

clean:
	rm -rf .venv outputs
