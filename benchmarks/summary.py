"""One table of what was measured last, beside the goals, and a plot: loader, startup, mixing, remote.

    python -m benchmarks.loader --full && python -m benchmarks.startup && python -m benchmarks.mixing &&
    python -m benchmarks.remote && python -m benchmarks.summary

Reads benchmarks/results/*.json; writes summary.json and summary.png there. A goal that is not reached says so, with
why; what was not measured is left out.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks import RESULTS
from benchmarks.goals import Row, print_goals


def load(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def throughput(results: dict[str, Any]) -> list[Row]:
    summary = results.get("summary", {})
    rates = {(name, int(count)): row for name, by in summary.items() for count, row in by.items() if row}
    if ("mixer", 0) not in rates:
        return []

    def over(name: str) -> float | None:
        """Return our rate ÷ another's without workers, by CPU time, which other programs disturb less."""
        return rates.get((name, 0), {}).get("ours_over_it_cpu" if by_cpu else "ours_over_it")

    by_cpu = ", per CPU s" if "ours_over_it_cpu" in rates["mixer", 0] else ""
    ours, stored = rates["mixer", 0]["rate"], rates.get(("mixer, stored dtype", 0), {}).get("rate")
    rows = [Row("samples/s, int64", f"{ours:,.0f}", "", None)]
    if stored:
        rows.append(Row("samples/s, stored dtype", f"{stored:,.0f}", "", None))
    goals = (
        ("÷ bare gather from memory maps", "bare memmap gather", 0.5),
        ("÷ torchdata.nodes over memory maps", "torchdata.nodes", 1.0),
        ("÷ LitData", "LitData", 3.0),
        ("÷ mosaicml-streaming", "mosaicml-streaming", 50.0),
    )
    why = {
        "bare memmap gather": "the conversion to int64 writes twice the bytes",
        "mosaicml-streaming": f"it delivers {rates.get(('mosaicml-streaming', 0), {}).get('rate', 0):,.0f}/s here",
    }
    for label, name, goal in goals:
        ratio = over(name)
        if ratio is not None:
            rows.append(Row(f"int64 {label}{by_cpu}", f"{ratio:.2f}", f">= {goal:g}", ratio >= goal, why.get(name, "")))
    gather = over("bare memmap gather")
    stored_over = over("mixer, stored dtype")
    if gather is not None and stored_over:
        ratio = gather / stored_over
        rows.append(Row(f"stored dtype ÷ bare gather{by_cpu}", f"{ratio:.2f}", ">= 0.5", ratio >= 0.5))
    for count in (1, 2):
        peers = {name: rate["ours_over_it"] for (name, n), rate in rates.items() if n == count and "mixer" not in name}
        if peers:
            best = min(peers, key=lambda name: peers[name])
            label = f"num_workers {count}: ÷ the best peer ({best})"
            rows.append(Row(label, f"{peers[best]:.2f}", ">= 1", peers[best] >= 1))
    own = rates["mixer", 0]["own_mb"]
    return [*rows, Row("memory of the loader, files it maps aside", f"{own:,.0f} MB", "", None)]


def startup(results: dict[str, Any]) -> list[Row]:
    ours = {int(size): row for size, row in results.get("results", {}).get("mixer", {}).items()}
    rows = []
    if {10**5, 10**9} <= set(ours):
        small, large = ours[10**5], ours[10**9]
        for key in ("first batch", "after resume"):
            ratio = large[key] / small[key]
            value = f"{1000 * large[key]:.0f} ms, {ratio:.1f} x 1e5"
            why = (
                "at 1e5 a domain is smaller than the window of 131,072 samples that is shuffled, beyond 1e7 it is flat"
            )
            rows.append(
                Row(f"{key} at 1e9 samples, cold", value, "<= 1 s, 1.5 x", ratio <= 1.5 and large[key] <= 1, why)
            )
        first = large["first of all"]
        rows.append(Row("very first start at 1e9 (parses the index)", f"{first:.2f} s", "<= 1 s", first <= 1))
        rows.append(Row("peak memory growth at 1e9", f"{large['memory']:.0f} MB", "< 100 MB", large["memory"] < 100))
    imports = results.get("imports")
    if imports:
        ratio = imports["mixer"] / imports["torch"]
        rows.append(Row("import mixer ÷ import torch", f"{ratio:.2f}", "< 1.5", ratio < 1.5))
        ratio = imports["MixtureLoader"] / imports["torch"]
        rows.append(Row("from mixer import MixtureLoader ÷ import torch", f"{ratio:.2f}", "< 1.5", ratio < 1.5))
    return rows


def mixing(results: dict[str, Any]) -> list[Row]:
    if not results:
        return []
    errors, costs = results["error_samples"], results["planning_us"]
    rows = [
        Row("mixing error at every prefix, samples", f"{errors['mixer']:.2f}", "<= 1.5", errors["mixer"] <= 1.5),
        Row(
            "the same, weights moving at every batch",
            f"{results['error_moving_weights_samples']:.2f}",
            "<= 1.5",
            results["error_moving_weights_samples"] <= 1.5,
        ),
    ]
    for name, error in errors.items():
        if name != "mixer" and error is not None:
            rows.append(Row(f"  {name}", f"{error:,.1f}", "", None))
    for (name, cost), goal in zip(costs.items(), (2, 5)):
        rows.append(Row(f"planning per draw, {name}", f"{cost:.2f} µs", f"< {goal} µs", cost < goal))
    lag = results["lag_batches"]
    return [*rows, Row("set_weights to the first batch by them", f"{lag} batches", "0", lag == 0)]


def remote(results: dict[str, Any]) -> list[Row]:
    if not results:
        return []
    label = f"remote, {results['setting']['latency_ms']:g} ms latency ÷ local, after 1st window"
    return [Row(label, f"{results['ratio']:.3f}", "<= 1.1", results["ratio"] <= 1.1)]


def plot(results: dict[str, Any]) -> None:
    """Draw the rates of all loaders by number of workers, and the time to the first batch by size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    summary, starts = results["loader"].get("summary", {}), results["startup"].get("results", {})
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", width_ratios=(3, 2))
    names = sorted(summary, key=lambda name: (summary[name].get("0") or {"rate": 0})["rate"])
    for shift, count, marker, colour in (
        (0.2, "0", "o", "#1f4e79"),
        (0, "1", "s", "#5b9bd5"),
        (-0.2, "2", "^", "#c55a11"),
    ):
        found = [(place + shift, (summary[name].get(count) or {}).get("rate")) for place, name in enumerate(names)]
        places, rates = zip(*[pair for pair in found if pair[1]]) if any(rate for _, rate in found) else ((), ())
        left.plot(rates, places, marker, color=colour, label=f"{count} worker{'s' if count != '1' else ''}")
    left.set_yticks(range(len(names)), names)
    for label in left.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith("mixer") else "normal")
    left.set_xscale("log")
    left.set_xlabel("samples of 2,048 tokens per second")
    left.legend(loc="lower right", frameon=False)
    for name, colour in (("mixer", "#1f4e79"), ("streaming", "#c55a11")):
        sizes = {int(size): row["first batch"] for size, row in starts.get(name, {}).items()}
        if sizes:
            right.loglog(list(sizes), list(sizes.values()), "o-", color=colour)
            label = "mixer" if name == "mixer" else "mosaicml-streaming"
            size, seconds = list(sizes.items())[-1]
            at = {"ha": "right", "xytext": (2, -18)} if name == "mixer" else {"ha": "left", "xytext": (9, -3)}
            right.annotate(label, (size, seconds), textcoords="offset points", color=colour, **at)
    right.set_xlabel("samples")
    right.set_ylabel("seconds to the first batch, cold, without imports")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="both" if axes is left else "y", alpha=0.3)
    figure.savefig(RESULTS / "summary.png", dpi=120)


def main() -> None:
    """Print the table and write the plot."""
    results = {name: load(name) for name in ("loader", "startup", "mixing", "remote")}
    rows = throughput(results["loader"]) + startup(results["startup"])
    rows += mixing(results["mixing"]) + remote(results["remote"])
    setting = results["loader"].get("setting", {})
    samples, seq_len = setting.get("samples", 0), setting.get("seq_len", 0)
    print_goals(f"speed and mixing; {samples:,} samples of {seq_len:,} tokens", rows)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "summary.json").write_text(json.dumps([row._asdict() for row in rows], indent=2) + "\n")
    plot(results)
    print(f"plot: {RESULTS / 'summary.png'}")


if __name__ == "__main__":
    main()
