"""Mixture regression: exact on laws it can represent, good on 1,088 real runs, optimal within bounds."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from click.testing import CliRunner

from algorithms.boosted_trees import fit_trees
from algorithms.commands.regress import FITS, regress
from algorithms.mixture_regression import (
    LogLinearLaw,
    Runs,
    cross_validated,
    descend,
    fit_kernel,
    fit_log_linear,
    read_runs,
    search,
    spearman,
)
from mixer.errors import InputError
from mixer.mixture import Mixture
from mixer.projection import project
from tests.helpers import data_folder, write_shards


def random_law(seed, num_domains=6, num_losses=4):
    rng = np.random.default_rng(seed)
    return LogLinearLaw(np.log(rng.uniform(1, 3, num_losses)), rng.normal(0, 1, (num_domains, num_losses)))


def runs_of(size, split="test") -> Runs:
    folder = data_folder("regmix-pile")
    return read_runs(folder / f"{split}_mixture_{size}.csv", folder / f"{split}_pile_loss_{size}.csv")


def mean_rank_correlation(law, runs):
    predicted = law(runs.mixtures)
    return np.mean([spearman(predicted[:, m], runs.losses[:, m]) for m in range(len(runs.metrics))])


def excess(law, weights):
    """Mean and worst loss above the least that any single domain reaches (the least of the simplex: it is convex)."""
    least = law(np.eye(len(weights))).min(axis=0)
    over = law(weights[None])[0] - least
    return over.mean(), over.max()


# ---------------------------------------------------------------- real runs


def test_the_log_linear_law_ranks_held_out_runs_of_three_sizes():
    train = runs_of("1m", "train")
    assert train.mixtures.shape == (512, 17) and train.losses.shape == (512, 13)
    law = fit_log_linear(train.mixtures, train.losses)
    assert mean_rank_correlation(law, runs_of("1m")) >= 0.97
    assert mean_rank_correlation(law, runs_of("60m")) >= 0.96
    assert mean_rank_correlation(law, runs_of("1B")) >= 0.93


def test_the_kernel_law_ranks_held_out_runs_nearly_as_well():
    train = runs_of("1m", "train")
    law = fit_kernel(train.mixtures, train.losses)
    assert mean_rank_correlation(law, runs_of("1m")) >= 0.96
    assert mean_rank_correlation(law, runs_of("60m")) >= 0.96
    assert mean_rank_correlation(law, runs_of("1B")) >= 0.92


def test_boosted_trees_rank_held_out_runs_as_regmix_has_it():
    """A tenth of the trees at ten times the rate; the whole 1,000 reach 0.989, 0.984 and 0.950 over all losses."""
    train, some = runs_of("1m", "train"), slice(None, None, 5)
    law = fit_trees(train.mixtures, train.losses[:, some], num_trees=100, rate=0.1)
    for size, least in (("1m", 0.98), ("60m", 0.97), ("1B", 0.92)):
        runs = runs_of(size)
        part = runs._replace(losses=runs.losses[:, some], metrics=runs.metrics[some])
        assert mean_rank_correlation(law, part) >= least


def test_every_proposal_from_real_runs_beats_uniform_on_average_and_at_worst():
    train = runs_of("1m", "train")
    law = fit_log_linear(train.mixtures, train.losses)
    uniform = np.full(17, 1 / 17)
    average, worst = excess(law, uniform)
    proposals = {
        "average": descend(law),
        "worst": descend(law, "worst"),
        "bounded": descend(law, "worst", lower=0.002, upper=0.25),
        "pulled": descend(law, pull=0.1),
        "searched": search(law, uniform, np.random.default_rng(0), num_samples=20_000),
    }
    for weights in proposals.values():
        assert excess(law, weights)[0] < average and excess(law, weights)[1] < worst
    assert excess(law, proposals["worst"])[1] < 0.5 * worst
    assert min(proposals, key=lambda name: excess(law, proposals[name])[0]) == "average"


# ---------------------------------------------------------------- known answers


@pytest.mark.parametrize("seed", range(5))
def test_a_log_linear_law_is_recovered_from_its_values(seed):
    truth, rng = random_law(seed), np.random.default_rng(seed)
    mixtures, others = rng.dirichlet(np.ones(6), 80), rng.dirichlet(np.ones(6), 50)
    law = fit_log_linear(mixtures, truth(mixtures))
    np.testing.assert_allclose(law(others), truth(others), rtol=1e-6)


@pytest.mark.parametrize("objective", ["average", "worst"])
@pytest.mark.parametrize("seed", range(4))
def test_no_mixture_within_the_bounds_is_better(seed, objective):
    law, rng = random_law(seed), np.random.default_rng(seed)
    lower, upper = 0.02, rng.uniform(0.3, 0.6, 6)
    best = descend(law, objective, lower=lower, upper=upper, tolerance=1e-10)
    assert np.all(best >= lower - 1e-12) and np.all(best <= upper + 1e-12) and best.sum() == pytest.approx(1)
    others = np.array([project(row, lower, upper) for row in rng.dirichlet(np.full(6, 0.7), 3000)])
    near = np.array([project(best * np.exp(rng.normal(0, 0.05, 6)), lower, upper) for _ in range(500)])
    candidates = np.concatenate([others, near])
    if objective == "average":
        assert law(best[None]).mean() <= law(candidates).mean(axis=1).min() + 1e-7
    else:
        alone = [descend(law, importance=row, lower=lower, upper=upper, tolerance=1e-12) for row in np.eye(4)]
        least = np.array([law(weights[None])[0, metric] for metric, weights in enumerate(alone)])
        smoothing = 0.002 * np.log(4)
        assert (law(best[None])[0] - least).max() <= (law(candidates) - least).max(axis=1).min() + smoothing


def test_a_strong_pull_gives_the_prior_and_importance_chooses_the_loss():
    law = LogLinearLaw(np.log([1.0, 1.0]), np.array([[-2.0, 0.0], [0.0, -2.0], [0.0, 0.0]]))
    prior = np.array([0.2, 0.3, 0.5])
    np.testing.assert_allclose(descend(law, prior=prior, pull=1e4), prior, atol=1e-3)
    assert descend(law, importance=[1.0, 0.0])[0] > 0.999
    np.testing.assert_allclose(descend(law, importance=[0.0, 1.0], upper=[1.0, 0.4, 1.0])[1], 0.4)


def test_search_is_reproducible_stays_within_bounds_and_finds_the_corner():
    law = LogLinearLaw(np.log([1.0]), np.array([[-1.0], [0.0], [1.0]]))
    prior = np.full(3, 1 / 3)
    first = search(law, prior, np.random.default_rng(5), num_samples=5000)
    assert np.array_equal(first, search(law, prior, np.random.default_rng(5), num_samples=5000))
    assert first[0] > 0.9
    bounded = search(law, prior, np.random.default_rng(5), num_samples=500, num_best=16, lower=0.1, upper=0.6)
    assert np.all(bounded >= 0.1 - 1e-12) and np.all(bounded <= 0.6 + 1e-12) and bounded[0] > 0.55


def test_trees_split_where_the_loss_jumps_and_nowhere_else():
    rng = np.random.default_rng(0)
    mixtures, others = rng.dirichlet(np.ones(3), 500), rng.dirichlet(np.ones(3), 200)

    def jumps(w):
        return 2.0 + (w[:, 0] > 0.3) + 0.5 * (w[:, 1] > 0.4)

    law = fit_trees(mixtures, jumps(mixtures), num_trees=60, rate=0.2, least=5)
    assert np.mean(np.abs(law(others)[:, 0] - jumps(others)) < 0.05) > 0.93
    flat = fit_trees(mixtures, np.full(500, 3.0), num_trees=3)
    np.testing.assert_allclose(flat(others), 3.0)
    two = fit_trees(mixtures, np.stack([jumps(mixtures), -jumps(mixtures)], axis=1), num_trees=60, rate=0.2, least=5)
    np.testing.assert_allclose(two(others), law(others) * [1, -1], atol=1e-9)
    with pytest.raises(InputError, match="need 40 runs; got 39"):
        fit_trees(mixtures[:39], np.ones(39))


def test_spearman_shares_ranks_of_equal_values():
    assert spearman([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)


# ---------------------------------------------------------------- errors


def test_too_few_runs_and_unnormalised_mixtures_are_refused():
    with pytest.raises(InputError, match="needs 4 runs or more; got 3"):
        fit_log_linear(np.eye(3), np.ones(3))
    with pytest.raises(InputError, match="sum to 1"):
        fit_log_linear(2 * np.eye(3), np.ones(3))
    with pytest.raises(InputError, match="positive losses"):
        fit_log_linear(np.random.default_rng(0).dirichlet(np.ones(2), 9), -np.ones(9))


def test_a_domain_that_no_run_has_is_refused_and_not_proposed(tmp_path):
    """A column of zeros fits a tilt of 0, less loss than any domain that was tried: all weight went there."""
    mixtures = np.column_stack([np.random.default_rng(0).dirichlet(np.ones(3), 40), np.zeros(40)])
    for fit in (fit_log_linear, fit_kernel):
        with pytest.raises(InputError, match=r"no mixture has anything of the domains in columns \[3\]"):
            fit(mixtures, np.ones(40))
    mixtures[0] = [0.5, 0.0, 0.0, 0.5]
    assert np.isnan(cross_validated(fit_log_linear, Runs(mixtures, np.ones((40, 1)), ("a", "b", "c", "d"), ("loss",))))
    (tmp_path / "w.csv").write_text("run,code,law\n1,1,0\n2,1,0\n")
    (tmp_path / "l.csv").write_text("run,loss\n1,3.0\n2,2.5\n")
    with pytest.raises(InputError, match=r"no run of .* has anything of \['law'\].* Leave their columns out"):
        read_runs(tmp_path / "w.csv", tmp_path / "l.csv")


def test_tables_of_different_runs_are_refused_and_printed_weights_normalised(tmp_path):
    (tmp_path / "w.csv").write_text("index,code,web\n1,0.2,0.6\n2,0.5,0.5\n")
    (tmp_path / "l.csv").write_text("index,loss\n1,3.0\n2,2.5\n")
    (tmp_path / "other.csv").write_text("index,loss\n1,3.0\n3,2.5\n")
    (tmp_path / "broken.csv").write_text("index,loss\n1,much\n2,2.5\n")
    runs = read_runs(tmp_path / "w.csv", tmp_path / "l.csv")
    assert runs.domains == ("code", "web") and runs.metrics == ("loss",)
    np.testing.assert_allclose(runs.mixtures, [[0.25, 0.75], [0.5, 0.5]])
    with pytest.raises(InputError, match=r"run 2 of .*w.csv is '2', of .*other.csv '3'; they must agree"):
        read_runs(tmp_path / "w.csv", tmp_path / "other.csv")
    with pytest.raises(InputError, match=r"not a table of runs.* the run '1' has 'much' for 'loss'"):
        read_runs(tmp_path / "w.csv", tmp_path / "broken.csv")
    with pytest.raises(InputError, match="cannot read the runs"):
        read_runs(tmp_path / "absent.csv", tmp_path / "l.csv")


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ("index,loss\n1,3.0\n", r"w.csv has 2 runs, .*l.csv 1; they must agree"),
        ("index,loss\n1,3.0\n2,nan\n", r"the run '2' has 'nan' for 'loss'\. Leave the run out of both"),
        ("index,loss\n1,3.0\n2,2.5,1\n", r"the run '2' has 2 entries, the header 1 after the first"),
        ("index,loss,loss\n1,3,3\n2,2,2\n", r"the header of .*l.csv has the columns \['loss'\] more than once"),
        ("", "l.csv is not a table of runs"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(tmp_path, losses, message):
    (tmp_path / "w.csv").write_text("index,code,web\n1,0.2,0.6\n2,0.5,0.5\n\n")
    (tmp_path / "l.csv").write_text(losses)
    with pytest.raises(InputError, match=message):
        read_runs(tmp_path / "w.csv", tmp_path / "l.csv")


# ---------------------------------------------------------------- the command


def write_runs(folder, law, num_runs=40, names=("code", "law", "web")):
    mixtures = np.random.default_rng(3).dirichlet(np.ones(len(names)), num_runs)
    losses = law(mixtures)
    for file, header, rows in (
        ("w.csv", [f"train_{name}" for name in names], mixtures),
        ("l.csv", ["a", "b"], losses),
    ):
        lines = [
            ",".join(["run", *header]),
            *(f"{i}," + ",".join(map(repr, row.tolist())) for i, row in enumerate(rows)),
        ]
        (folder / file).write_text("\n".join(lines) + "\n")
    return [str(folder / "w.csv"), str(folder / "l.csv"), "--strip", "train_", "--out", str(folder / "m.json")]


def test_the_command_writes_the_best_mixture_with_its_provenance(tmp_path):
    law = LogLinearLaw(np.log([1.0, 1.0]), np.array([[-1.0, 0.0], [0.0, -1.0], [1.0, 1.0]]))
    result = CliRunner().invoke(regress, write_runs(tmp_path, law), catch_exceptions=False)
    mixture = Mixture.load(tmp_path / "m.json")
    assert list(mixture.weights) == ["code", "law", "web"]
    np.testing.assert_allclose(list(mixture.weights.values()), [0.5, 0.5, 0.0], atol=1e-3)
    assert mixture.provenance["rank_correlation"] > 0.999 and mixture.provenance["runs"] == 40
    assert "runs left out in turn: 1.000" in result.output


def test_the_command_caps_domains_by_what_the_shards_hold(tmp_path):
    law = LogLinearLaw(np.log([1.0, 1.0]), np.array([[-1.0, -1.0], [0.0, -0.5], [1.0, 1.0]]))
    arguments = write_runs(tmp_path, law)
    write_shards(tmp_path / "shards", {"code": 10, "law": 100, "web": 100}, seq_len=16)
    caps = ["--shards", str(tmp_path / "shards"), "--budget", "1000", "--max-epochs", "2"]
    CliRunner().invoke(regress, arguments + caps, catch_exceptions=False)
    assert Mixture.load(tmp_path / "m.json").weights["code"] == pytest.approx(2 * 160 / 1000, abs=1e-6)
    with pytest.raises(InputError, match="belong together"):
        CliRunner().invoke(regress, [*arguments, "--max-epochs", "2"], catch_exceptions=False)
    with pytest.raises(InputError, match=r"they sum to 1.5 > 1 \(code 0.5, law 0.5, web 0.5\)"):
        CliRunner().invoke(regress, [*arguments, "--floor", "0.5"], catch_exceptions=False)
    with pytest.raises(InputError, match=r"the table has the domains \['train_code'"):
        CliRunner().invoke(regress, arguments[:2] + arguments[4:] + caps, catch_exceptions=False)


@pytest.mark.parametrize("law", ["log-linear", "kernel"])
def test_the_command_minimises_the_average_by_given_weights(law, tmp_path):
    truth = LogLinearLaw(np.log([1.0, 1.0]), np.array([[-1.0, 0.0], [0.0, -1.0], [1.0, 1.0]]))
    arguments = [*write_runs(tmp_path, truth), "--law", law]
    CliRunner().invoke(regress, arguments, catch_exceptions=False)
    alike = Mixture.load(tmp_path / "m.json").weights
    Mixture({"a": 3, "b": 1}).save(tmp_path / "goals.json")
    arguments += ["--objective", str(tmp_path / "goals.json")]
    result = CliRunner().invoke(regress, arguments, catch_exceptions=False)
    mixture = Mixture.load(tmp_path / "m.json")
    assert mixture.provenance["objective"] == {"a": 0.75, "b": 0.25} and "weighted loss" in result.output
    assert mixture.provenance["best_run_mean_loss"] == pytest.approx(
        (read_runs(tmp_path / "w.csv", tmp_path / "l.csv").losses @ [0.75, 0.25]).min()
    )
    assert mixture.weights["code"] > alike["code"] + 0.2
    if law == "log-linear":  # 3 exp(-w) = exp(-(1 - w)) has its root beyond 1
        assert mixture.weights["code"] == pytest.approx(1, abs=1e-3)


def test_the_command_fits_trees_to_what_is_aimed_at(tmp_path, monkeypatch):
    monkeypatch.setitem(FITS, "trees", partial(fit_trees, num_trees=20, rate=0.2, least=5))
    law = LogLinearLaw(np.log([1.0, 1.0]), np.array([[-1.0, 1.0], [0.0, 0.0], [1.0, -1.0]]))
    Mixture({"a": 1, "b": 0}).save(tmp_path / "goals.json")
    arguments = [*write_runs(tmp_path, law), "--law", "trees", "--objective", str(tmp_path / "goals.json")]
    CliRunner().invoke(regress, arguments, catch_exceptions=False)
    mixture = Mixture.load(tmp_path / "m.json")
    assert mixture.weights["code"] > 0.5 > 0.25 > mixture.weights["web"]
    assert mixture.provenance["metrics"] == ["a", "b"] and mixture.provenance["rank_correlation"] > 0.7


def test_the_command_stays_near_a_prior_that_it_is_pulled_to(tmp_path):
    law = LogLinearLaw(np.log([1.0, 1.0]), np.array([[-2.0, -2.0], [0.0, 0.0], [0.0, 0.0]]))
    arguments = write_runs(tmp_path, law)
    Mixture({"code": 1, "law": 2, "web": 7}).save(tmp_path / "prior.json")
    pulled = [*arguments, "--prior", str(tmp_path / "prior.json"), "--pull"]
    found = []
    for pull in ("1e-6", "0.3", "1000"):
        CliRunner().invoke(regress, [*pulled, pull], catch_exceptions=False)
        found.append(list(Mixture.load(tmp_path / "m.json").weights.values()))
    assert found[0][0] > 0.99 > found[1][0] > 0.15
    np.testing.assert_allclose(found[2], [0.1, 0.2, 0.7], atol=1e-3)
    assert Mixture.load(tmp_path / "m.json").provenance["prior"]["web"] == pytest.approx(0.7)
    # The kernel law is searched around it.
    CliRunner().invoke(regress, [*pulled[:-1], "--law", "kernel"], catch_exceptions=False)
    with pytest.raises(InputError, match="would be ignored: say with --pull"):
        CliRunner().invoke(regress, pulled[:-1], catch_exceptions=False)
    with pytest.raises(InputError, match="--pull is for the log-linear law; the law kernel"):
        CliRunner().invoke(regress, [*pulled, "1", "--law", "kernel"], catch_exceptions=False)
    Mixture({"code": 1, "web": 7}).save(tmp_path / "prior.json")
    with pytest.raises(InputError, match=r"has the domains \['code', 'web'\], the table \['code', 'law', 'web'\]"):
        CliRunner().invoke(regress, [*pulled, "1"], catch_exceptions=False)


def test_the_worst_loss_needs_the_law_whose_least_is_known(tmp_path):
    law = LogLinearLaw(np.log([1.0, 1.0]), np.array([[-1.0, 0.0], [0.0, -1.0], [1.0, 1.0]]))
    with pytest.raises(InputError, match="--objective worst needs the log-linear law"):
        arguments = [*write_runs(tmp_path, law), "--law", "kernel", "--objective", "worst"]
        CliRunner().invoke(regress, arguments, catch_exceptions=False)
