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

# Bounds where XLA compiles the whole step.
XLA = dict.fromkeys(("xla_resnet50", "xla_matrices", "xla_small300"), 1.1)


def markdown(runs: Dict[str, List]) -> str:
    """All tables.

    Args:
      runs: for each workload its figures, once for each process that has measured it.
    """
    parts = []
    for name, figures in runs.items():
        if name == "long_run":
            parts.append(long_run(median_of(figures)))
        elif name == "scaling":
            parts += [scaling(what, points) for what, points in median_of(figures).items()]
        elif name == "rows":
            parts += [embedding(what, points) for what, points in median_of(figures).items()]
        elif name != "import_seconds":
            parts.append(workload(name, median_of(list(map(with_ratios, figures))), len(figures)))
    parts.append(targets(runs))
    milliseconds = 1e3 * median_of(runs["import_seconds"])
    parts.append(f"`import tf_averaging` after `import tf_keras`: {milliseconds:.0f} ms.\n")
    return "\n".join(parts)


def median_of(figures: List):
    """The median of numbers, or of each number in dictionaries of the same structure."""
    if isinstance(figures[0], dict):
        return {key: median_of([one[key] for one in figures]) for key in figures[0]}
    if all(one == figures[0] for one in figures):
        return figures[0]  # A count stays an int.
    return statistics.median(figures)


def targets(runs: Dict[str, List]) -> str:
    """The project's targets, and what was measured: the median over the processes."""
    measured: Dict[str, List[float]] = {}
    bounds = {}
    for name, figures in runs.items():
        for one in figures:
            for text, (value, bound) in ratios(name, one).items():
                measured.setdefault(text, []).append(value)
                bounds[text] = bound
    rows = []
    for text, values in measured.items():
        each = ", ".join(f"{value:.3f}" for value in sorted(values)) if len(values) > 1 else ""
        rows.append([text, f"{statistics.median(values):.3f}", each, f"{bounds[text]}"])
    return "### Targets\n\n" + table(["ratio", "measured", "each process", "at most"], rows)


def ratios(name: str, figures: Dict) -> Dict[str, Tuple[float, float]]:
    """The ratios of a workload in one process, by name, each with its upper bound."""

    def added(contender: str = names.EMA) -> float:
        return figures["steps"][contender]["added"]["median_ms"]

    def median(what: str, contender: str = names.EMA) -> float:
        return figures[what][contender]["median_ms"]

    found = {}

    def add(text: str, bounds: Dict[str, float], measured: Callable[[], float]) -> None:
        if name in bounds:
            found[f"{text}: {name}"] = measured(), bounds[name]

    add(
        "EMA / use_ema",
        {"resnet50": 0.6, "matrices": 0.6, "small": 0.85, **XLA},
        lambda: added() / added(names.USE_EMA),
    )
    add(
        "EMA around Keras 3 / Keras 3's use_ema",
        {"resnet50": 0.5, "matrices": 0.5, "small300": 0.6, **XLA},
        lambda: added(names.EMA_KERAS_3) / added(names.KERAS_3),
    )
    add(
        "EMA / memory limit",
        {"resnet50": 1.25, "matrices": 1.2},
        lambda: added() / figures["limit"]["median_ms"],
    )
    add(
        "swap / Keras 3's",
        {"matrices": 0.02},
        lambda: median("swap") / median("swap", names.KERAS_3),
    )
    add(
        "SWA between snapshots / EMA",
        {"resnet50": 0.1, "matrices": 0.02},
        lambda: added(names.SWA) / added(),
    )
    add(
        "SWA between snapshots / use_ema",
        {"small": 0.15},
        lambda: added(names.SWA) / added(names.USE_EMA),
    )
    add(
        "SWA between snapshots / whole step",
        {"fit": 0.02},
        lambda: added(names.SWA) / figures["steps"][names.BARE]["step"]["median_ms"],
    )
    for what, bound in (("first_step", 1.4), ("first_swap", 0.1), ("first_assign", 0.1)):
        add(
            f"{what.replace('_', ' ')} / first step of SGD alone",
            dict.fromkeys(("resnet50", "small"), bound),
            lambda what=what: median(what) / median("first_step", names.BARE),
        )
    for what in ("update", "swap"):
        add(
            f"extra memory of EMA's {what} / averages",
            dict.fromkeys(("resnet50", "matrices", "small", "transformer"), 0.05),
            lambda what=what: figures["extra_memory"][names.EMA][what] / figures["averaged_bytes"],
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


def with_ratios(figures: Dict) -> Dict:
    """The figures of one process, with what each adds relative to the best peer and the limit."""
    peer = best_peer(figures)
    limit = figures.get("limit", {}).get("median_ms")
    steps = {}
    for contender, step in figures["steps"].items():
        steps[contender] = {"step": step["step"]}
        for what in ("added", "added_on_snapshot"):
            if what in step:
                added = step[what]["median_ms"]
                steps[contender][what] = {**step[what], "of_peer": added / peer}
                if limit is not None:
                    steps[contender][what]["of_limit"] = added / limit
    return {**figures, "steps": steps}


def workload(name: str, figures: Dict, processes: int) -> str:
    """The table of one workload: medians over this many processes."""
    rows = []
    for contender, step in figures["steps"].items():
        if contender == names.SWA:
            rows.append(row("SWA, between snapshots", contender, step["added"], figures))
            rows.append(row("SWA, on a snapshot", None, step["added_on_snapshot"], figures))
        else:
            rows.append(row(contender, contender, step.get("added"), figures))
    head = [
        "",
        "step, ms",
        "added, ms (quartiles)",
        "/ best peer",
        "/ memory limit",
        "swap, ms",
        "assign, ms",
        "first step, swap, assign, s",
        "extra memory: update, swap, assign",
    ]
    title = f"### {name}\n\n"
    if "elements" in figures:
        megabytes = figures["averaged_bytes"] / 1e6
        title += f"{figures['variables']} variables, {figures['elements']:,} elements, "
        title += f"{megabytes:.1f} MB of averages. "
        title += f"Memory limit {figures['limit']['median_ms']:.2f} ms."
        title += f" Medians of {processes} processes.\n\n" if processes > 1 else "\n\n"
    return title + table(head, rows)


def row(label: str, contender: Optional[str], added: Optional[Dict], figures: Dict) -> List[str]:
    """One contender's row; `contender` is None in its second row."""

    def median(what: str, digits: int = 2, unit: float = 1.0) -> str:
        found = figures.get(what, {}).get(contender)
        return "" if found is None else f"{found['median_ms'] * unit:.{digits}f}"

    cells = [label]
    cells.append("" if contender is None else f"{figures['steps'][contender]['step']['median_ms']:.2f}")
    if added is None:
        cells += ["", "", ""]
    else:
        cells.append(f"{added['median_ms']:.2f} ({added['low_ms']:.2f}–{added['high_ms']:.2f})")
        cells.append(f"{added['of_peer']:.2f}")
        cells.append(f"{added['of_limit']:.2f}" if "of_limit" in added else "")
    first = [median(what, 2, 1e-3) for what in ("first_step", "first_swap", "first_assign")]
    cells += [median("swap", 3), median("assign", 3), ", ".join(filter(None, first))]
    taken = figures.get("extra_memory", {}).get(contender, {})
    total = figures.get("averaged_bytes", 1)
    shares = [f"{taken[what] / total:.1%}" for what in ("update", "swap", "assign") if what in taken]
    return [*cells, ", ".join(shares)]


def long_run(figures: Dict) -> str:
    """What changes over many steps."""
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


def embedding(what: str, points: Dict) -> str:
    """What is added to a step that moves some rows of a table."""
    contenders = list(next(iter(points.values())))
    cells = [
        [f"{int(point):,}", *(f"{values[name]:.2f}" for name in contenders)]
        for point, values in points.items()
    ]
    return f"### What is added to a step, by {what} (ms)\n\n" + table([what, *contenders], cells)


def plot_embedding(curves: Dict[str, Dict], path: str) -> None:
    """Draws both curves into a PNG file."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, (what, points) in zip(axes, curves.items()):
        for name in next(iter(points.values())):
            style = "k--" if name == names.BARE_ADAGRAD else "o-"
            # What is added may come out negative where it is less than the noise.
            values = [max(values[name], 1e-2) for values in points.values()]
            axis.plot([float(point) for point in points], values, style, label=name)
        axis.set(xscale="log", yscale="log", xlabel=what, ylabel="milliseconds added to a step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def plot_scaling(curves: Dict[str, Dict], path: str) -> None:
    """Draws both curves into a PNG file."""
    pyplot = _pyplot()
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


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
