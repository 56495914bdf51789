"""Published tables: what they sum to, how far apart they are, and what follows from them."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from algorithms.rules.base import as_domains
from algorithms.rules.fixed import preset
from algorithms.rules.presets import PRESETS, published_weights
from mixer.errors import InputError
from mixer.mixture import Mixture
from tests.helpers import data_folder

PILE = ["pile-baseline", "pile-doremi-280m", "pile-doremi-1b"]
PILE_50K = ["pile-baseline-50k", "pile-baseline-50k-packed", "pile-doremi-120m-50k"]


def total_variation(a, b):
    one, other = published_weights(a), published_weights(b)
    return 0.5 * sum(abs(one[domain] - other[domain]) for domain in one)


@pytest.mark.parametrize("name", PILE)
def test_four_digit_columns_of_the_pile_sum_to_one_up_to_their_digits(name):
    assert len(PRESETS[name]) == 22
    assert sum(PRESETS[name].values()) == pytest.approx(1.0001, abs=1e-9)


@pytest.mark.parametrize("name", PILE_50K)
def test_the_repositorys_columns_sum_to_one(name):
    assert list(PRESETS[name]) == list(PRESETS["pile-baseline"])
    assert sum(PRESETS[name].values()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    "name, total",
    [
        ("redpajama-baseline", 0.9999),
        ("redpajama-baseline-write-config", 1.0075),
        ("glam-doremi-r1", 1.00),
        ("glam-doremi-r2", 1.01),
        ("glam-doremi-r3", 1.01),
        ("glam-tuned", 0.99),
        ("llama-3.1", 1.00),
    ],
)
def test_other_columns_sum_to_what_is_printed(name, total):
    assert sum(PRESETS[name].values()) == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_normalised_and_makes_a_mixture(name):
    weights = published_weights(name)
    assert sum(weights.values()) == pytest.approx(1.0, abs=1e-12)
    rule = preset(name)
    found = rule.weights(rule.init(sorted(weights)))
    np.testing.assert_allclose(
        found, [Mixture(PRESETS[name]).weights[domain] for domain in sorted(weights)], atol=1e-12
    )


def test_doremi_weights_are_a_property_of_the_setup_not_of_the_corpus():
    assert total_variation("pile-doremi-280m", "pile-doremi-1b") == pytest.approx(0.57, abs=0.005)
    assert total_variation("pile-doremi-280m", "pile-doremi-120m-50k") == pytest.approx(0.54, abs=0.005)
    assert total_variation("pile-doremi-120m-50k", "pile-baseline-50k") == pytest.approx(0.165, abs=0.0005)


def test_the_pile_mixes_spread_over_fewer_and_fewer_domains():
    def effective(name):
        weights = np.array(list(published_weights(name).values()))
        return float(np.exp(-np.sum(weights * np.log(weights))))

    measured = [effective(name) for name in (*PILE, "pile-baseline-50k", "pile-doremi-120m-50k")]
    np.testing.assert_allclose(measured, [13.7, 5.1, 9.3, 14.2, 13.0], atol=0.06)


def test_glam_rounds_move_less_and_less_and_end_near_the_tuned_weights():
    names = ("doremi-r1", "doremi-r2", "doremi-r3", "tuned")
    rounds = [np.array(list(PRESETS[f"glam-{name}"].values())) for name in names]
    changes = [np.abs(b - a).max() for a, b in pairwise(rounds)]
    np.testing.assert_allclose(changes, [0.12, 0.0, 0.09], atol=1e-9)


def test_domains_that_doremi_raises_most_and_lowers_most():
    ratio = {
        domain: PRESETS["pile-doremi-280m"][domain] / weight for domain, weight in PRESETS["pile-baseline"].items()
    }
    ordered = sorted(ratio, key=ratio.__getitem__)
    assert ordered[-3:] == ["Pile-CC", "PhilPapers", "YoutubeSubtitles"]
    assert ordered[:3] == ["ArXiv", "PubMed Central", "USPTO Backgrounds"]
    assert max(PRESETS["pile-doremi-1b"], key=PRESETS["pile-doremi-1b"].__getitem__) == "OpenWebText2"


# arXiv:2305.10429, Table 4: log-perplexity of 8B models, baseline and DoReMi with 70M, 150M, 280M and 1B proxies.
TABLE_4 = """
Pile-CC 1.64 1.51 1.48 1.41 1.55; PubMed Central 1.60 1.58 1.54 1.46 1.56; Books3 1.65 1.52 1.50 1.42 1.57;
OpenWebText2 1.66 1.48 1.54 1.36 1.58; ArXiv 1.64 1.56 1.53 1.38 1.51; Github 1.65 1.55 1.54 1.42 1.53;
FreeLaw 1.64 1.55 1.54 1.45 1.55; StackExchange 1.61 1.52 1.54 1.39 1.55; USPTO Backgrounds 1.70 1.53 1.50 1.41 1.56;
PubMed Abstracts 1.61 1.56 1.51 1.44 1.55; Gutenberg (PG-19) 1.70 1.56 1.54 1.35 1.52;
OpenSubtitles 1.58 1.56 1.52 1.40 1.55; Wikipedia (en) 1.66 1.49 1.53 1.35 1.56;
DM Mathematics 1.63 1.50 1.56 1.38 1.48; Ubuntu IRC 1.71 1.53 1.49 1.42 1.48; BookCorpus2 1.64 1.57 1.54 1.43 1.57;
EuroParl 1.59 1.52 1.51 1.37 1.53;
HackerNews 1.66 1.50 1.55 1.45 1.55; YoutubeSubtitles 1.67 1.63 1.55 1.42 1.53; PhilPapers 1.67 1.55 1.49 1.39 1.53;
NIH ExPorter 1.63 1.51 1.48 1.36 1.52; Enron Emails 1.62 1.48 1.52 1.44 1.56
"""


def test_the_papers_summary_follows_from_its_per_domain_table():
    rows = [row.strip().rsplit(" ", 5) for row in TABLE_4.replace("\n", " ").split(";")]
    assert {row[0] for row in rows} == set(PRESETS["pile-baseline"])
    table = np.array([[float(number) for number in row[1:]] for row in rows])
    np.testing.assert_allclose(table.mean(axis=0), [1.644, 1.535, 1.523, 1.405, 1.540], atol=6e-4)
    np.testing.assert_allclose(table.max(axis=0), [1.71, 1.63, 1.56, 1.46, 1.58])
    assert np.all(table[:, 1:] < table[:, :1])  # better on 22 of 22 domains with every proxy


# Table 5: exact match of the 8B models, in per cent: baseline, and DoReMi with 1B, 280M, 150M and 70M proxies.
TABLE_5 = {
    "LAMBADA": (20.10, 22.55, 29.19, 20.59, 26.20),
    "NaturalQuestions": (4.35, 6.01, 7.73, 6.26, 5.10),
    "SQuADv2": (44.43, 42.22, 51.89, 46.53, 40.99),
    "TriviaQA": (24.55, 32.25, 34.86, 30.01, 26.30),
    "WebQuestions": (6.74, 8.71, 9.15, 9.15, 6.99),
}


def test_every_proxy_helps_downstream_on_average_and_the_middle_one_most():
    average = np.mean(list(TABLE_5.values()), axis=0)
    np.testing.assert_allclose(average, [20.03, 22.35, 26.56, 22.51, 21.11], atol=0.011)
    assert np.all(average[1:] > average[0]) and np.argmax(average) == 2


# Tables 6 and 7: worst and average log-perplexity, and how many of 22 domains beat the baseline.
TABLE_6 = {
    "280M": ((2.39, 2.32), (2.19, 2.13, 22), (2.33, 2.27, 19)),
    "510M": ((2.14, 2.08), (2.14, 2.06, 15), (2.23, 2.18, 0)),
    "760M": ((2.05, 1.97), (2.00, 1.94, 17), (2.15, 2.10, 0)),
    "1B": ((1.94, 1.87), (1.92, 1.83, 19), (2.11, 2.02, 0)),
}
TABLE_7 = {"hardest": (2.66, 2.62), "easiest": (4.27, 4.18)}


def test_the_proxy_is_worse_than_a_model_on_its_weights_and_the_gap_grows_with_size():
    gaps = [proxy[1] - main[1] for _, main, proxy in TABLE_6.values()]
    assert min(gaps) > 0 and np.argsort(gaps)[-1] == 3 and gaps[0] < gaps[-1]
    assert all(main[1] < base[1] and main[0] <= base[0] for base, main, _ in TABLE_6.values())
    assert [proxy[1] < base[1] for base, _, proxy in TABLE_6.values()] == [True, False, False, False]


def test_the_ablations_are_worse_than_the_baseline_and_easiest_is_worst():
    baseline = TABLE_6["280M"][0]
    assert TABLE_7["easiest"] > TABLE_7["hardest"] > baseline > TABLE_6["280M"][1][:2]


def test_doremis_own_mixture_repeats_small_domains_beyond_four_epochs():
    """200k steps of 512 x 1024 tokens, 4 bytes each, over raw sizes in GiB: a ceiling would have bound."""
    sizes = {"YoutubeSubtitles": 3.73, "PhilPapers": 2.38, "Wikipedia (en)": 6.38, "Enron Emails": 0.88}
    budget = 200_000 * 512 * 1024
    weights = published_weights("pile-doremi-280m")
    epochs = {name: weights[name] * budget * 4 / (size * 2**30) for name, size in sizes.items()}
    assert [name for name, times in epochs.items() if times > 4] == list(sizes)[:3]
    np.testing.assert_allclose(list(epochs.values()), [5.3, 4.5, 4.3, 3.1], atol=0.06)


def test_names_match_whatever_their_case_and_punctuation():
    rule = preset("redpajama-baseline", names={"cc": "common_crawl", "wiki": "wikipedia", "c4-rp": "c4"})
    domains = ["ArXiv", "Book", "C4-RP", "GitHub", "StackExchange", "cc", "wiki"]
    with pytest.raises(InputError, match=r"has no domains \['C4-RP'\]"):
        rule.init(domains)
    domains[2] = "c4-rp"
    weights = dict(zip(domains, rule.weights(rule.init(domains))))
    assert weights["cc"] == pytest.approx(0.7256 / 0.9999)


def test_a_part_of_a_preset_must_be_asked_for():
    with pytest.raises(InputError, match=r"also has \['code', 'multilingual'\]"):
        preset("llama-3.1").init(["general", "math"])
    part = preset("llama-3.1", partial=True)
    np.testing.assert_allclose(part.weights(part.init(["general", "math"])), [2 / 3, 1 / 3])


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(InputError, match="no preset 'pile'; there are pile-baseline,"):
        preset("pile")


@pytest.mark.parametrize(
    "name, file, digits",
    [
        ("pile-baseline", "pile_baseline_256kvocab", 4),
        ("pile-doremi-280m", "pile_doremi_280M_256kvocab_paper", 4),
        ("pile-baseline-50k", "pile_baseline_50kvocab_nopack", 6),
        ("pile-baseline-50k-packed", "pile_baseline_50kvocab", 6),
        ("pile-doremi-120m-50k", "pile_doremi_r1_120M_50kvocab", 6),
        ("redpajama-baseline", "rp_baseline", 4),
    ],
)
def test_tables_equal_the_repositorys_files(name, file, digits):
    path = data_folder("doremi-weights") / f"{file}.json"
    published = json.loads(path.read_text(encoding="utf-8"))["train_domain_weights"]
    assert PRESETS[name] == pytest.approx(published, abs=0.51 * 10.0**-digits)


def test_size_proportional_weights_come_from_the_shards_not_from_a_table():
    rule = preset("llama-3.1")
    sizes = as_domains(["code", "general", "math", "multilingual"], num_tokens=[1, 1, 1, 97])
    assert rule.weights(rule.init(sizes)).tolist() == [0.17, 0.5, 0.25, 0.08]
