# make repro   the data, the pipeline, the main table       (PROFILE=photos for another profile, JOBS=2 stages side by side)
# make seeds   the same for other seeds and targets, means and intervals: twice as long (PROFILE, JOBS as above)
# make durability  what clean fine-tuning brings back, for every defense
# make harder  drawn triggers, a trigger that may be anywhere, two backdoors in one model, a ViT
# make ablations  what each part of the method is worth, and how few clean images are enough
# make domains  the defense with photographs for a model of pictograms, or the reverse (INVERTUNE_PHOTOS names the photographs)
# make verdict  backdoored or not: a zoo of small models, and how often the verdict is right about them
# make check   do the rows of the main table, and their order, hold against the committed one?
# make test    everything that can be checked in half an hour
# make bench   how fast, as ratios to one plain pass of the model; a minute on a quiet machine
# make lab     JupyterLab on the notebooks
# make docs    HTML of all notebooks in _docs/
# make prepare what to run before a commit: modules, clean notebooks, README
# make outputs run the library notebooks, so that readers see what they show
# make clean   remove what can be made again, but neither results/ nor .venv

PYTHON  ?= python3
PROFILE ?=
BIN     := .venv/bin
READY   := .venv/ready

export HF_HUB_OFFLINE = 1
export PYDEVD_DISABLE_FILE_VALIDATION = 1

.PHONY: repro seeds durability harder ablations domains verdict check test bench lab docs readme prepare outputs clean

repro: $(READY)
	@$(BIN)/python -m invertune.run.scheduler $(if $(PROFILE),--profile $(PROFILE))

# What takes longer than the main job: every attack and defense again for each of the other seeds in params.yaml.
seeds: $(READY)
	@$(BIN)/python -m invertune.run.scheduler seeds $(if $(PROFILE),--profile $(PROFILE))

# Does a removed backdoor come back when the model is fine-tuned on clean pairs?
durability: $(READY)
	@$(BIN)/python -m invertune.run.scheduler durability $(if $(PROFILE),--profile $(PROFILE))

# What do the defenses make of backdoors that they were not made for?
harder: $(READY)
	@$(BIN)/python -m invertune.run.scheduler structured $(if $(PROFILE),--profile $(PROFILE))

# The defense without each of its parts, and with fewer clean images.
ablations: $(READY)
	@$(BIN)/python -m invertune.run.scheduler ablations $(if $(PROFILE),--profile $(PROFILE))

# The defense with images of another domain than the victim's.
domains: $(READY)
	@$(BIN)/python -m invertune.run.scheduler domains $(if $(PROFILE),--profile $(PROFILE))

# Is there a backdoor at all? Models of other towers, classes and seeds, half of them held out.
verdict: $(READY)
	@$(BIN)/python -m invertune.run.scheduler verdict $(if $(PROFILE),--profile $(PROFILE))

# The environment is made once, and again when its description changes.
$(READY): settings.ini constraints.txt setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

check: $(READY)
	@$(BIN)/python -m invertune.lab.tables check $(if $(PROFILE),--profile $(PROFILE))

test: $(READY)
	@echo '== 1/5 modules, notebooks and README belong together'
	@$(BIN)/python -m pytest -q tests/test_sync.py
	@echo '== 2/5 library notebooks'
	@OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print --path nbs --skip_folder_re '^(pipeline|[.])'
	@echo '== 3/5 stage notebooks, with their own small defaults, one after the other'
	@$(BIN)/nbdev_test --n_workers 0 --do_print --path nbs/stages
	@echo '== 4/5 tests'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests --ignore tests/test_sync.py --ignore tests/test_smoke.py
	@echo '== 5/5 the smoke pipeline, twice'
	@$(BIN)/python -m pytest -q -s tests/test_smoke.py
	@echo '== all passed'

bench: $(READY)
	@OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(BIN)/python -m invertune.lab.speed

lab: $(READY)
	$(BIN)/jupyter lab $$(test $$(id -u) -ne 0 || echo --allow-root) nbs

docs: $(READY)
	@$(BIN)/python -m invertune.run.pages docs

readme: $(READY)
	@$(BIN)/python -m invertune.run.pages readme

prepare: $(READY)
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	@$(MAKE) --no-print-directory readme

outputs: $(READY)
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace nbs/[0-9]*.ipynb
	$(BIN)/nbdev_clean

clean:
	rm -rf .cache _docs _proc build *.egg-info .pytest_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
