"""Collects the results of a campaign: each run over its seeds, and its differences from the baseline by seed."""

import math

from .definition import Campaign, Training
from .records import is_finished, last_iteration, load_results

MODELS = ("teacher", "student")
ENTRIES = ("last", "best")  # of results.json; "best" is chosen on the images that it is measured on
METRIC = "mIoU"
CLASS = "IoU-"  # prefix of a class's metric
ENOUGH = 3  # seeds; with fewer, a comparison is no result


def collect(campaign: Campaign) -> dict:
    """The content of comparison.json.

    Only finished trainings count. A seed counts in a difference if it is finished on both sides.

    Returns:
        runs: {run: {"config", "overrides", "seeds": {seed: {model: {entry: mIoU}}}, "summary": {model: {entry:
            statistics}}}}
        differences: {run: {"unpaired": seeds that only one side has, "per_class": rows, model: {entry: statistics}}},
            of every run except the baseline; the statistics also have "seeds" {seed: difference} and "positive", the
            number of positive differences
        unfinished: [{"run", "seed", "iteration", "of"}]
    """
    finished = {training: load_results(training) for training in campaign.trainings if is_finished(training)}
    results = {run: {t.seed: finished[t] for t in campaign.of_run(run) if t in finished} for run in campaign.runs}
    return {
        "campaign": campaign.path,
        "dataset": campaign.dataset,
        "metric": METRIC,
        "baseline": campaign.baseline,
        "seeds": list(campaign.seeds),
        "runs": {run: _run(campaign, run, results[run]) for run in campaign.runs},
        "differences": {
            run: _difference(results[run], results[campaign.baseline], campaign.dataset)
            for run in campaign.runs
            if campaign.baseline and run != campaign.baseline
        },
        "unfinished": [_unfinished(training) for training in campaign.trainings if training not in finished],
    }


def statistics(values: list) -> dict | None:
    """Mean, range and number of values; None if there are none."""
    if not values:
        return None
    return {
        "mean": math.fsum(values) / len(values),
        "min": min(values),
        "max": max(values),
        "count": len(values),
    }


def _run(campaign, run, results):
    """results: {seed: content of results.json}."""
    training = campaign.of_run(run)[0]
    seeds = {
        seed: {
            model: {entry: _metrics(result, entry, campaign.dataset, model)[METRIC] for entry in ENTRIES}
            for model in MODELS
        }
        for seed, result in results.items()
    }
    return {
        "config": training.config,
        "overrides": training.given,
        "iterations": training.iterations,
        "seeds": seeds,
        "summary": {
            model: {entry: statistics([seed[model][entry] for seed in seeds.values()]) for entry in ENTRIES}
            for model in MODELS
        },
    }


def _metrics(result, entry, dataset, model):
    return result[entry][dataset][model]


def _difference(results, baseline, dataset):
    """results, baseline: {seed: content of results.json} of the two sides."""
    paired = [seed for seed in results if seed in baseline]
    return {
        "unpaired": sorted(set(results) ^ set(baseline)),
        **{
            model: {entry: _paired(results, baseline, paired, dataset, model, entry) for entry in ENTRIES}
            for model in MODELS
        },
        "per_class": _per_class(results, baseline, paired, dataset),
    }


def _paired(results, baseline, paired, dataset, model, entry):
    differences = {
        seed: _metrics(results[seed], entry, dataset, model)[METRIC]
        - _metrics(baseline[seed], entry, dataset, model)[METRIC]
        for seed in paired
    }
    if not differences:
        return None
    positive = sum(value > 0 for value in differences.values())
    return {"seeds": differences, **statistics(list(differences.values())), "positive": positive}


def _per_class(results, baseline, paired, dataset):
    """Rows {"class", "baseline", "run", "difference", "min", "max", "count"} of the teacher's last IoU, largest gain
    first. Each class is averaged over the seeds for which both sides have an IoU."""
    sides = [
        (_metrics(baseline[seed], "last", dataset, MODELS[0]), _metrics(results[seed], "last", dataset, MODELS[0]))
        for seed in paired
    ]
    names = dict.fromkeys(key for before, after in sides for key in before if key.startswith(CLASS) and key in after)
    rows = []
    for name in names:
        pairs = [(before[name], after[name]) for before, after in sides if name in before and name in after]
        change = statistics([after - before for before, after in pairs])
        rows.append(
            {
                "class": name.removeprefix(CLASS),
                "baseline": statistics([before for before, _ in pairs])["mean"],
                "run": statistics([after for _, after in pairs])["mean"],
                "difference": change["mean"],
                **{key: change[key] for key in ("min", "max", "count")},
            }
        )
    return sorted(rows, key=lambda row: -row["difference"])


def _unfinished(training: Training):
    return {
        "run": training.run,
        "seed": training.seed,
        "iteration": last_iteration(training),
        "of": training.iterations,
    }
