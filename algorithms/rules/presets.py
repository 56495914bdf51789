"""Published domain weights, as printed; ``published_weights`` normalises them, since printed columns rarely sum to 1.

Weights belong to a tokenizer, a corpus version and a proxy: two DoReMi runs on the same corpus differ by 0.57 in total
variation (280M against 1B proxies). Use them as baselines, not as truths.

Sources: arXiv:2305.10429, Tables 1, 2 and 8, and configs/ of github.com/sangmichaelxie/doremi (MIT): the Pile and
RedPajama. The Llama 3.1 shares are those of the model's report, arXiv:2407.21783, section 3.1.
"""

from __future__ import annotations

from mixer.errors import InputError

__all__ = ["PRESETS", "published_weights"]

_PILE = (
    "ArXiv",
    "BookCorpus2",
    "Books3",
    "DM Mathematics",
    "Enron Emails",
    "EuroParl",
    "FreeLaw",
    "Github",
    "Gutenberg (PG-19)",
    "HackerNews",
    "NIH ExPorter",
    "OpenSubtitles",
    "OpenWebText2",
    "PhilPapers",
    "Pile-CC",
    "PubMed Abstracts",
    "PubMed Central",
    "StackExchange",
    "USPTO Backgrounds",
    "Ubuntu IRC",
    "Wikipedia (en)",
    "YoutubeSubtitles",
)
_GLAM = ("Wikipedia", "Filtered webpages", "Conversations", "Forums", "Books", "News")
_REDPAJAMA = ("common_crawl", "c4", "github", "wikipedia", "book", "arxiv", "stackexchange")


def _table(names: tuple[str, ...], numbers: str) -> dict[str, float]:
    return dict(zip(names, map(float, numbers.split()), strict=True))


# name: domain -> weight as printed.
PRESETS: dict[str, dict[str, float]] = {
    # The Pile, 256k vocabulary: baseline, DoReMi with a 280M and with a 1B proxy.
    "pile-baseline": _table(
        _PILE,
        "0.1052 0.0044 0.0676 0.0198 0.0030 0.0043 0.0386 0.0427 0.0199 0.0075 0.0052 "
        "0.0124 0.1247 0.0027 0.1121 0.0845 0.1071 0.0929 0.0420 0.0074 0.0919 0.0042",
    ),
    "pile-doremi-280m": _table(
        _PILE,
        "0.0036 0.0061 0.0224 0.0018 0.0070 0.0062 0.0043 0.0179 0.0072 0.0134 0.0063 "
        "0.0047 0.1019 0.0274 0.6057 0.0113 0.0046 0.0153 0.0036 0.0093 0.0699 0.0502",
    ),
    "pile-doremi-1b": _table(
        _PILE,
        "0.0384 0.0029 0.0739 0.0004 0.0033 0.0078 0.0148 0.0129 0.0250 0.0058 0.0094 "
        "0.0017 0.3289 0.0063 0.1199 0.1461 0.0149 0.0452 0.0260 0.0044 0.0962 0.0159",
    ),
    # The Pile, 50k vocabulary, the repository's own: baselines by unpacked and packed chunks, DoReMi with a 120M proxy.
    "pile-baseline-50k": _table(
        _PILE,
        "0.088618 0.004370 0.072011 0.020432 0.002939 0.007476 0.040289 0.055384 0.021822 0.007869 0.004654 "
        "0.010985 0.124184 0.003154 0.109025 0.075583 0.113906 0.090734 0.040149 0.009786 0.089434 0.007197",
    ),
    "pile-baseline-50k-packed": _table(
        _PILE,
        "0.120737 0.006136 0.101308 0.025314 0.001687 0.010292 0.049148 0.058014 0.030663 0.007294 0.002571 "
        "0.014649 0.106431 0.004341 0.094750 0.028753 0.149918 0.065973 0.033872 0.013779 0.064856 0.009513",
    ),
    "pile-doremi-120m-50k": _table(
        _PILE,
        "0.053539 0.003705 0.075663 0.001870 0.003953 0.011973 0.038014 0.032475 0.029194 0.008439 0.008403 "
        "0.003220 0.190496 0.009265 0.137887 0.096987 0.060811 0.074641 0.032686 0.008286 0.106830 0.011665",
    ),
    # GLaM, after one, two and three rounds of DoReMi, and as tuned on downstream tasks.
    "glam-doremi-r1": _table(_GLAM, "0.09 0.44 0.10 0.16 0.11 0.10"),
    "glam-doremi-r2": _table(_GLAM, "0.05 0.51 0.22 0.04 0.17 0.02"),
    "glam-doremi-r3": _table(_GLAM, "0.05 0.51 0.22 0.04 0.17 0.02"),
    "glam-tuned": _table(_GLAM, "0.06 0.42 0.27 0.02 0.20 0.02"),
    # RedPajama by size: the repository's config file, and other numbers in its own write_config.py.
    "redpajama-baseline": _table(_REDPAJAMA, "0.7256 0.1446 0.0488 0.0198 0.0215 0.0231 0.0165"),
    "redpajama-baseline-write-config": _table(_REDPAJAMA, "0.7316 0.1458 0.0492 0.02 0.0216 0.0233 0.016"),
    "llama-3.1": {"general": 0.50, "math": 0.25, "code": 0.17, "multilingual": 0.08},
}


def published_weights(name: str) -> dict[str, float]:
    """Return the weights of a preset by its own domain names; they sum to 1.

    Raises: InputError: if there is no such preset.

    >>> published_weights("llama-3.1")["general"]
    0.5
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError(f"no preset {name!r}; there are {', '.join(PRESETS)}.")
    total = sum(PRESETS[name].values())
    return {domain: weight / total for domain, weight in PRESETS[name].items()}
