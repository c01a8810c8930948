"""Reads a campaign file and checks all of it, so that a mistake does not show up after hours of training."""

import difflib
import os
import re
from dataclasses import dataclass

from detectron2.config import CfgNode

from hiervl.config import load_config, read_config_file
from hiervl.errors import UserError
from hiervl.paths import find_file

KEYS = ("output", "config", "overrides", "seeds", "jobs", "baseline", "runs")
RUN_KEYS = ("config", "overrides")
OWN_KEYS = ("SEED", "OUTPUT_DIR")  # set by the campaign
SEED = "{seed}"  # stands for the seed in the value of an override
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True, eq=False)
class Training:
    """One run with one seed.

    Attributes:
        config: path of the config file.
        given: overrides {key: value} as in the campaign file, with "{seed}".
        overrides: flat list KEY VALUE ..., as on train_net.py's command line, with SEED and OUTPUT_DIR.
        cfg: the resulting config.
    """

    run: str
    seed: int
    config: str
    given: dict
    overrides: tuple
    cfg: CfgNode

    @property
    def label(self) -> str:
        return f"{self.run}/seed_{self.seed}"

    @property
    def folder(self) -> str:
        return self.cfg.OUTPUT_DIR

    @property
    def log(self) -> str:
        """The file with everything that the training prints."""
        return os.path.join(self.folder, "campaign.log")

    @property
    def iterations(self) -> int:
        return self.cfg.SOLVER.MAX_ITER


@dataclass(frozen=True)
class Campaign:
    """A checked campaign file.

    Attributes:
        output: folder of the tables; each training has its own folder in it.
        jobs: number of trainings at a time.
        baseline: name of the run that the others are compared with, "" for none.
        trainings: all seeds of all runs, in the order in which they are started: seed by seed, so that pairs are
            complete early.
    """

    path: str
    output: str
    seeds: tuple
    jobs: int
    baseline: str
    trainings: tuple

    @property
    def runs(self) -> list[str]:
        return list(dict.fromkeys(training.run for training in self.trainings))

    @property
    def dataset(self) -> str:
        """The test set of all tables: the first of DATASETS.TEST."""
        return self.trainings[0].cfg.DATASETS.TEST[0]

    def of_run(self, run: str) -> list[Training]:
        return [training for training in self.trainings if training.run == run]


def read_campaign(path: str) -> Campaign:
    """
    Raises:
        UserError: a missing or broken file, an unknown key, a wrong value, or a run whose config does not load.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such campaign file; those that come with HierVL are in configs/campaigns/.")
    content = read_config_file(path)
    _check_keys(content, KEYS, path)
    output = _text(content, "output", path)
    if not output:
        raise UserError(f"{path}: output is missing; name a folder, such as output/campaigns/camvid_23.")
    seeds, jobs = _seeds(content, path), content.get("jobs", 1)
    if not _is_count(jobs) or jobs < 1:
        raise UserError(f"{path}: jobs is {jobs!r}; it must be a whole number, at least 1.")
    runs = _runs(content, path)
    baseline = _text(content, "baseline", path)
    if baseline and baseline not in runs:
        raise UserError(f"{path}: baseline is {baseline!r}, which is none of the runs ({', '.join(runs)}).")
    common = _overrides(content, path)
    trainings = []
    for seed in seeds:
        for name, run in runs.items():
            place = f"{path}, run {name!r}"
            config = _text(run, "config", place) or _text(content, "config", path)
            overrides = common | _overrides(run, place)
            trainings.append(_training(name, seed, config, overrides, output, place))
    _check_comparable(trainings, path)
    return Campaign(path, output, seeds, jobs, baseline, tuple(trainings))


def _check_keys(content, known, place):
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
            raise UserError(f"{place}: unknown key {key!r}; {hint}")


def _text(content, key, place):
    """The text of a key, "" if it is absent."""
    value = content.get(key)
    if not isinstance(value, (str, type(None))):
        raise UserError(f"{place}: {key} is {value!r}; it must be text.")
    return value or ""


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _seeds(content, path):
    seeds = content.get("seeds")
    if not isinstance(seeds, list) or not seeds:
        raise UserError(f"{path}: seeds is {seeds!r}; list at least one, better three or more: seeds: [0, 1, 2].")
    for place, seed in enumerate(seeds):
        if not _is_count(seed):
            raise UserError(f"{path}: seeds has {seed!r}; a seed is a whole number, 0 or more.")
        if seed in seeds[:place]:
            raise UserError(f"{path}: seeds has {seed} twice; remove one.")
    return tuple(seeds)


def _runs(content, path):
    """{name: content, {} where nothing is given}."""
    runs = content.get("runs")
    if not isinstance(runs, dict) or not runs:
        raise UserError(f"{path}: runs is {runs!r}; give each run a name and its settings, such as unimatch: {{}}.")
    seen = {}
    for name, run in runs.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(
                f"{path}: {name!r} cannot name a run and its folder; use letters, digits and _ . + -, beginning with "
                "a letter or digit, in quotes where YAML reads something else (a number, yes, no)."
            )
        if name.casefold() in seen:
            raise UserError(f"{path}: runs {seen[name.casefold()]!r} and {name!r} differ in case only; rename one.")
        seen[name.casefold()] = name
        if not isinstance(run, (dict, type(None))):
            raise UserError(f"{path}, run {name!r}: is {run!r}; it takes {' and '.join(RUN_KEYS)}, or {{}}.")
        _check_keys(run or {}, RUN_KEYS, f"{path}, run {name!r}")
    return {name: run or {} for name, run in runs.items()}


def _overrides(content, place):
    """{dotted key: value as on the command line}; sections may be nested, as in a config."""
    overrides = content.get("overrides")
    if not isinstance(overrides, (dict, type(None))):
        raise UserError(f"{place}: overrides is {overrides!r}; write them as {{KEY: VALUE}}.")
    result = {}
    for key, value in _leaves(overrides or {}):
        if key in OWN_KEYS:
            raise UserError(f"{place}: overrides has {key}, which the campaign sets itself; remove it.")
        if key in result:
            raise UserError(f"{place}: overrides has {key} twice; remove one.")
        if value is None:
            raise UserError(f"{place}: overrides has no value for {key}; write '' for an empty one.")
        result[key] = str(value)
    return result


def _leaves(content, prefix=""):
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _training(run, seed, config, overrides, output, place):
    if not config:
        raise UserError(f"{place}: has no config; name one for it, or one for all runs.")
    flat = [part for key, value in overrides.items() for part in (key, value.replace(SEED, str(seed)))]
    flat += ["SEED", str(seed), "OUTPUT_DIR", os.path.join(output, run, f"seed_{seed}")]
    config = find_file(config)
    try:
        cfg = load_config(config, flat)
    except UserError as error:
        message = str(error).replace("--config-file", "config").replace("command line", "overrides")
        raise UserError(f"{place}: {message}") from None
    return Training(run, seed, config, overrides, tuple(flat), cfg)


def _check_comparable(trainings, path):
    tests = {training.run: training.cfg.DATASETS.TEST[:1] for training in trainings}
    if not all(tests.values()):
        raise UserError(f"{path}, run {next(run for run in tests if not tests[run])!r}: DATASETS.TEST is empty.")
    first, *others = tests
    for run in others:
        if tests[run] != tests[first]:
            raise UserError(
                f"{path}: {first} is evaluated on {tests[first][0]} and {run} on {tests[run][0]}; set the same "
                "DATASETS.TEST for all runs."
            )
