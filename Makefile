# Every target first makes .venv and installs the course into it, once; then it goes.
#   make course     run the five notebooks (copies, in outputs/) and print the scores before and after
#   make test       every test, the slow ones too
#   make lab        JupyterLab on the notebooks
#   make notebooks  run the notebooks, store their outputs in place, and take the pictures anew
#   make screenshots  the pictures alone; the chat box speaks with the adapter in outputs/, where there is one
#   make bench      train and score again from nothing, and print the time it took
# Variables:
#   PYTHON=...       the Python (3.11 or newer) to make .venv with
#   TORCH_INDEX=cpu  take torch from PyTorch's CPU index (Linux without a GPU: a far smaller download);
#                    also cu128 and so on, or a whole address
#   PYTEST=...       arguments for pytest, for example PYTEST="-m 'not slow'"
# Kept to what GNU make 3.81 knows, since macOS ships that. Paths are relative, so that spaces in the
# folder's own path do no harm.

.DEFAULT_GOAL := course
.PHONY: course test lab notebooks screenshots bench install clean

RUN = .venv/bin/python
INSTALLED = .venv/installed
PYTEST =
# JupyterLab refuses to start as root, which is the only user in most containers, unless it is told to.
AS_ROOT = $(if $(filter 0,$(shell id -u)),--allow-root)
# Without a browser there would be no new screenshots: that has to be seen.
SCREENSHOTS = GLM4_SCREENSHOTS=images/screenshots GLM4_REQUIRE_BROWSER=1 HF_HUB_OFFLINE=1 $(RUN) -m pytest \
	tests/test_browser.py tests/test_plots.py -k 'browser or without_any_chinese_font'

course: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(RUN) -m glm4_helpers course

test: $(INSTALLED)
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(RUN) -m pytest $(PYTEST)

lab: $(INSTALLED)
	$(RUN) -m jupyter lab notebooks $(AS_ROOT)

notebooks: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(RUN) -m glm4_helpers course --in-place
	$(RUN) images/from_notebook.py
	$(SCREENSHOTS)

screenshots: $(INSTALLED)
	$(SCREENSHOTS)

bench: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(RUN) -m glm4_helpers train --force --tracking disabled --output outputs/bench
	HF_HUB_OFFLINE=1 $(RUN) -m glm4_helpers evaluate --adapter outputs/bench

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@sh .ci/install "$(PYTHON)" "$(TORCH_INDEX)"
	@touch $(INSTALLED)

clean:
	rm -rf .venv outputs
