# make tour       one backdoor planted, found, inverted and removed, in a minute
# make repro      the data, the pipeline, the main table of one seed
#                 PROFILE=photos for another profile, PROFILE=mine PHOTOS=folder for photographs of yours, JOBS=2 side by side
# make seeds      the same for three seeds on which nothing was chosen, each with a victim and a target of its own
# make selection  how the hyper-parameters were chosen, on a seed that is never reported
# make durability what clean fine-tuning brings back, for every defense
# make unseen     a population of triggers that the defenses were not made for; make unseen-quick: a dozen of them
# make rates      fewer poisoned pairs: which attacks still take, and are found
# make adaptive   attackers who know the defense, under every defense
# make ablations  what each part of the method is worth
# make scarce     how few clean images are enough
# make domains    photographs for a model of pictograms, or the reverse (PHOTOS as above)
# make verdict    backdoored or not: a zoo of small models, and how often the verdict is right about them
# make scale      the command with its defaults on models of three sizes: two hours more, most of them to train
# make check      do the rows of the main table, and their order, hold against the committed one?
# make test       everything that can be checked in half an hour
# make bench      how fast, as ratios to one plain pass of the model, and beside busy neighbours
#                 SIZE=RN50 for a scan of a model of real size
# make lab        JupyterLab on the notebooks
# make docs       the site of all notebooks and results, in _docs/
# make prepare    what to run before a commit: modules, clean notebooks, pages
# make outputs    run the library notebooks, so that readers see what they show
# make clean      remove what can be made again, but neither results/ nor .venv

PYTHON  ?= python3
PHOTOS  ?=
PROFILE ?= $(if $(PHOTOS),mine)
BIN     := .venv/bin
READY   := .venv/ready
EXPERIMENTS := seeds selection durability unseen rates adaptive ablations scarce domains verdict
SAID    := $(if $(PROFILE),--profile $(PROFILE))

export HF_HUB_OFFLINE = 1
export PYDEVD_DISABLE_FILE_VALIDATION = 1
ifneq ($(PHOTOS),)
export INVERTUNE_PHOTOS = $(PHOTOS)
endif

.PHONY: tour repro $(EXPERIMENTS) scale unseen-quick check test test-notebooks test-modules bench lab docs readme prepare outputs clean

repro: $(READY)
	@$(BIN)/python -m invertune.run.scheduler $(SAID)

# What takes longer than the main job has a command of its own, named as its notebook, its stage and its folder of results.
$(EXPERIMENTS): $(READY)
	@$(BIN)/python -m invertune.run.scheduler $@ $(SAID)

# One profile for each size; the last one's page shows all of them.
scale: $(READY)
	@for size in small medium glyphs; do $(BIN)/python -m invertune.run.scheduler scale --profile $$size || exit 1; done

# A drawn part of the population, and the page of what has been measured so far.
unseen-quick: $(READY)
	@$(BIN)/python -m invertune.run.scheduler $$($(BIN)/python -m invertune.lab.unseen $(PROFILE)) $(SAID)
	@$(BIN)/python -m invertune.run.stages report experiment=unseen $(if $(PROFILE),profile=$(PROFILE))

# The environment is made once, and again when its description changes.
$(READY): settings.ini constraints.txt setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[lab,run,dev]'
	@touch $@

check: $(READY)
	@$(BIN)/python -m invertune.lab.tables check $(SAID)

# Two processes of one thread each at any time: threads that wait for each other spin on a machine that is also used.
test: export OMP_NUM_THREADS = 1
test: export INVERTUNE_THREADS = 1
test: $(READY)
	@echo '== 1/4 modules, notebooks and pages belong together'
	@$(BIN)/python -m pytest -q tests/test_sync.py tests/test_house.py tests/test_layers.py
	@echo '== 2/4 library notebooks'
	@$(BIN)/nbdev_test --n_workers 2 --do_print --path nbs --skip_folder_re '^(stages|[.])'
	@echo '== 3/4 stage notebooks with their own small defaults, and beside them the tests'
	@$(MAKE) --no-print-directory -j 2 test-notebooks test-modules
	@echo '== 4/4 the smoke pipeline, twice'
	@$(BIN)/python -m pytest -q -s tests/test_smoke.py
	@echo '== all passed'

test-notebooks: $(READY)
	@$(BIN)/nbdev_test --n_workers 0 --do_print --path nbs/stages

test-modules: $(READY)
	@$(BIN)/python -m pytest -q tests $(patsubst %,--ignore tests/test_%.py,sync house layers smoke)

bench: $(READY)
	@$(if $(SIZE),,OMP_NUM_THREADS=1) TQDM_DISABLE=1 $(BIN)/python -m invertune.lab.speed $(if $(SIZE),--size $(SIZE))

lab: $(READY)
	$(BIN)/jupyter lab $$(test $$(id -u) -ne 0 || echo --allow-root) nbs

tour docs readme outputs: $(READY)
	@$(BIN)/python -m invertune.run.pages $@

prepare: $(READY)
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	@$(MAKE) --no-print-directory readme

clean:
	rm -rf .cache _docs _proc build *.egg-info .pytest_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
