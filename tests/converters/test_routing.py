"""Every record goes to the one domain that rule and mapping say, or is left out for a reason; units change nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path, PurePosixPath

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.domains import mapped
from converters.options import StageOptions
from converters.plan import make_plan
from converters.stage import Document, documents_of

names = st.text(st.sampled_from("abé %"), min_size=1, max_size=3).filter(lambda name: name.strip() == name)
paths = st.lists(names, min_size=0, max_size=2).map(lambda folders: "/".join([*folders, "x.jsonl"]))
records = st.lists(st.tuples(st.one_of(st.none(), st.just(7), st.just(True), names), st.integers(0, 99)), max_size=6)
corpora = st.dictionaries(paths, records, min_size=1, max_size=4)
mappings = st.dictionaries(st.one_of(names, st.just("*")), st.one_of(st.none(), names), max_size=3)


def expected_domain(rule: str, root: str, name: str, field: object) -> str | None:
    if root.startswith("="):
        return root[1:]
    if rule == "folder":
        parts = PurePosixPath(name).parts
        return parts[0] if len(parts) > 1 else root
    if rule == "file":
        return "x"
    if rule == "field:meta.set":
        return None if field is None or field is True else str(field)
    return name[0] if name[0] in "aé" else None


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    corpus=corpora,
    mapping=mappings,
    rule=st.sampled_from(["folder", "file", "field:meta.set", "path:^([aé])"]),
    unit_bytes=st.sampled_from([None, 40]),
    is_named=st.booleans(),
)
def test_records_go_where_rule_and_mapping_say(tmp_path_factory, corpus, mapping, rule, unit_bytes, is_named):
    root = tmp_path_factory.mktemp("routing") / "in"
    expected: Counter = Counter()
    for name, rows in corpus.items():
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": f"t{n}", "meta": {"set": to}}) + "\n" for to, n in rows))
        for to, n in rows:
            domain = expected_domain(rule, "=all" if is_named else "in", name, to)
            known = None if domain is None else mapping.get(domain, mapping.get("*", domain))
            assert known == (None if domain is None else mapped(domain, mapping))
            expected["bad:domain" if domain is None else "bad:dropped" if known is None else known, n] += 1
    options = StageOptions(domain=rule, domain_map=mapping, unit_bytes=unit_bytes)
    plan = make_plan([f"all={root}" if is_named else root], options, {})
    found: Counter = Counter()
    for piece in (piece for unit in plan.units for piece in unit.pieces):
        for row in documents_of(piece, options):
            if isinstance(row, Document):
                found[row.domain, int(row.text[1:])] += 1
            else:
                found[f"bad:{row.reason}"] += 1
    left_out = {key: count for key, count in expected.items() if key[0].startswith("bad:")}
    for (reason, _), count in left_out.items():
        found[reason] -= count
    assert +found == Counter({key: count for key, count in expected.items() if key not in left_out})
