# Copyright 2026 The tf_averaging Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Results as Markdown tables."""

import statistics
from typing import Callable, Dict, List, Optional, Tuple

from benchmarks import names


def markdown(runs: Dict[str, List]) -> str:
    """All tables.

    Args:
      runs: for each workload its figures, once for each process that has measured it.
    """
    results = median_of_each(runs)
    parts = []
    for name, figures in results.items():
        if name == "long_run":
            parts.append(long_run(figures))
        elif name == "scaling":
            parts += [scaling(what, points) for what, points in figures.items()]
        elif name != "import_seconds":
            parts.append(workload(name, figures, len(runs[name])))
    parts.append(targets(runs))
    milliseconds = 1e3 * results["import_seconds"]
    parts.append(f"`import tf_averaging` after `import tf_keras`: {milliseconds:.0f} ms.\n")
    return "\n".join(parts)


def median_of(figures: List):
    """The medians of numbers, or of all the numbers in dictionaries that are built alike."""
    if isinstance(figures[0], dict):
        return {key: median_of([one[key] for one in figures]) for key in figures[0]}
    return statistics.median(figures)


def median_of_each(runs: Dict[str, List]) -> Dict:
    return {name: median_of(figures) for name, figures in runs.items()}


def targets(runs: Dict[str, List]) -> str:
    """What the project has set itself, and what is measured: by the medians, and by each process."""
    rows = []
    single = [ratios({name: [one]}) for name, figures in runs.items() for one in figures]
    for text, (measured, bound) in ratios(runs).items():
        values = [f"{found[text][0]:.3f}" for found in single if text in found]
        each = ", ".join(sorted(values, key=float)) if len(values) > 1 else ""
        rows.append([text, f"{measured:.3f}", each, f"{bound}"])
    return "### Targets\n\n" + table(["ratio", "measured", "each process", "at most"], rows)


def ratios(runs: Dict[str, List]) -> Dict[str, Tuple[float, float]]:
    """What can be told from these runs: by name, the ratio of the medians and its upper bound."""
    results = median_of_each(runs)

    def added(name: str, contender: str = names.EMA) -> float:
        return results[name]["steps"][contender]["added"]["median_ms"]

    def ratio(name: str, what: str, other: str) -> float:
        figures = results[name][what]
        return figures[names.EMA]["median_ms"] / figures[other]["median_ms"]

    found = {}

    def add(text: str, name: str, bound: float, measured: Callable[[], float]) -> None:
        if name in results:
            found[f"{text}: {name}"] = measured(), bound

    for name, bound in (("resnet50", 0.5), ("matrices", 0.5), ("small", 1.0)):
        add("EMA / best peer", name, bound, lambda n=name: added(n) / best_peer(results[n]))
    add(
        "EMA / memory limit",
        "matrices",
        1.2,
        lambda: added("matrices") / results["matrices"]["limit"]["median_ms"],
    )
    add("swap / Keras 3's", "matrices", 0.02, lambda: ratio("matrices", "swap", names.KERAS_3))
    for name, bound in (("resnet50", 0.1), ("matrices", 0.02), ("small", 0.5)):
        add("SWA between snapshots / EMA", name, bound, lambda n=name: added(n, names.SWA) / added(n))
    add(
        "SWA between snapshots / whole step",
        "fit",
        0.02,
        lambda: added("fit", names.SWA) / results["fit"]["steps"][names.BARE]["step"]["median_ms"],
    )
    for name in ("resnet50", "small"):
        add("first step / use_ema's", name, 1.5, lambda n=name: ratio(n, "first_step", names.USE_EMA))
    for name in ("resnet50", "matrices", "small", "transformer"):
        for what in ("update", "swap"):
            add(
                f"extra memory of EMA's {what} / averages",
                name,
                0.05,
                lambda n=name, w=what: (
                    results[n]["extra_memory"][names.EMA][w] / results[n]["averaged_bytes"]
                ),
            )
    return found


def table(head: List[str], rows: List[List[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def best_peer(figures: Dict) -> float:
    """The least that a peer adds to a step, in milliseconds."""
    return min(
        figures["steps"][peer]["added"]["median_ms"] for peer in names.PEERS if peer in figures["steps"]
    )


def workload(name: str, figures: Dict, processes: int) -> str:
    """The table of one workload, medians over so many processes."""
    limit = figures.get("limit", {}).get("median_ms")
    peer = best_peer(figures)
    rows = []
    for contender, step in figures["steps"].items():
        if contender == names.SWA:
            rows.append(row("SWA, between snapshots", contender, step["added"], figures, peer, limit))
            rows.append(row("SWA, on a snapshot", None, step["added_on_snapshot"], figures, peer, limit))
        else:
            rows.append(row(contender, contender, step.get("added"), figures, peer, limit))
    head = [
        "",
        "step, ms",
        "added, ms (quartiles)",
        "/ best peer",
        "/ memory limit",
        "swap, ms",
        "assign, ms",
        "first step, s",
        "extra memory: update, swap, assign",
    ]
    title = f"### {name}\n\n"
    if "elements" in figures:
        megabytes = figures["averaged_bytes"] / 1e6
        title += f"{figures['variables']} variables, {figures['elements']:,} elements, "
        title += f"{megabytes:.1f} MB of averages. Memory limit {limit:.2f} ms."
        title += f" Medians of {processes} processes.\n\n" if processes > 1 else "\n\n"
    return title + table(head, rows)


def row(
    label: str,
    contender: Optional[str],
    added: Optional[Dict],
    figures: Dict,
    peer: float,
    limit: Optional[float],
) -> List[str]:
    """One contender's row; `contender` is None in a second row of the same one."""

    def median(what: str, digits: int = 2, unit: float = 1.0) -> str:
        found = figures.get(what, {}).get(contender)
        return "" if found is None else f"{found['median_ms'] * unit:.{digits}f}"

    cells = [label]
    cells.append("" if contender is None else f"{figures['steps'][contender]['step']['median_ms']:.2f}")
    if added is None:
        cells += ["", "", ""]
    else:
        cells.append(f"{added['median_ms']:.2f} ({added['low_ms']:.2f}–{added['high_ms']:.2f})")
        cells.append(f"{added['median_ms'] / peer:.2f}")
        cells.append("" if limit is None else f"{added['median_ms'] / limit:.2f}")
    cells += [median("swap", 3), median("assign", 3), median("first_step", 2, 1e-3)]
    taken = figures.get("extra_memory", {}).get(contender, {})
    total = figures.get("averaged_bytes", 1)
    shares = [f"{taken[what] / total:.1%}" for what in ("update", "swap", "assign") if what in taken]
    return [*cells, ", ".join(shares)]


def long_run(figures: Dict) -> str:
    """What changes in many steps."""
    return (
        f"### {figures['steps']:,} steps\n\n"
        f"Median of the first tenth {figures['first_tenth_ms']:.3f} ms, of the last, with `iterations` "
        f"beyond 10^9, {figures['last_tenth_ms']:.3f} ms. TensorFlow's allocator holds "
        f"{figures['memory_growth_bytes']:,} bytes more at the end than at the beginning.\n"
    )


def scaling(what: str, points: Dict) -> str:
    """One curve."""
    curves = [names.EMA, names.ADDONS, "memory limit"]
    rows = [
        [f"{int(point):,}", *(f"{values[n]:.2f}" if n in values else "" for n in curves)]
        for point, values in points.items()
    ]
    return f"### An update, by number of {what} (ms)\n\n" + table([what, *curves], rows)


def plot_scaling(curves: Dict[str, Dict], path: str) -> None:
    """Draws both curves into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    labels = ("parameters", "variables (3 million parameters in all)")
    for axis, points, label in zip(axes, curves.values(), labels):
        for name in (names.EMA, names.ADDONS, "memory limit"):
            known = [(float(x), values[name]) for x, values in points.items() if name in values]
            style = "k--" if name == "memory limit" else "o-"
            axis.plot(*zip(*known), style, label=name)
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="milliseconds for an update")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)
