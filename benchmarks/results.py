"""Results of the benchmark: a line of JSON each, and the table, CSV and plot made of them."""

import argparse
import csv
import json
import math
import os
import shlex
import statistics
from itertools import cycle
from pathlib import Path

from ddpm_utils import plots, runtime


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.3g}"


def read_rows(out: Path) -> list[dict]:
    """The results so far; a last line that was cut short is left out."""
    rows = []
    for line in out.read_text(encoding="utf-8").splitlines() if out.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"left out a line of {runtime.short_path(out)} that is cut short: {line[:40]} …")
    return rows


def comparable_rows(out: Path, same: dict) -> list[dict]:
    """The results so far.

    SystemExit if one of them differs in `same`, which is what results must share to be compared.
    """
    rows = read_rows(out)
    for row in rows:
        if {key: row[key] for key in same} != same:
            weights = f", weights of {row['weights']}" if "weights" in same else ""
            raise SystemExit(
                f"{runtime.short_path(out)} holds results of another machine or setting "
                f"({row['machine']}, {row['threads']} threads, torch {row['torch']}, "
                f"{row['data']}{weights}): name another file with --out"
            )
    return rows


def append(out: Path, row: dict) -> None:
    """One result on disk, whatever happens next."""
    out.parent.mkdir(parents=True, exist_ok=True)
    broken = out.is_file() and out.stat().st_size > 0 and not out.read_bytes().endswith(b"\n")
    with open(out, "a", encoding="utf-8") as file:
        file.write("\n" * broken + json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_csv(out: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    """`rows` as CSV beside the results in `out`."""
    with open(out.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def place_and_command(
    module: str, arguments: list[str], given: Path | None, stem: str
) -> tuple[Path, str]:
    """The file of the results, `given` or `stem` in the usual folder, and the command line without
    folders of this machine.
    """
    folder = runtime.output_dir("benchmarks") if runtime.is_fast() else Path(__file__).parent
    out = given or folder / f"{stem}.jsonl"
    shown = [out.name if text == str(given) else text for text in arguments]
    return out, shlex.join(["python", "-m", f"benchmarks.{module}", *shown])


def results_parser(module: str, description: str) -> argparse.ArgumentParser:
    """The parser of a benchmark, with the options of all that keep results in a file by device."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}", description=description.split("\n\n")[0]
    )
    parser.add_argument("--device", help="cpu, cuda, mps; the best one here if left out")
    parser.add_argument("--out", type=Path, help=f"results (benchmarks/{module}_<device>.jsonl)")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing, report the results there are"
    )
    return parser


def rows_to_report(out: Path, module: str) -> list[dict]:
    """The results in `out`. Raises FileNotFoundError if there are none."""
    rows = read_rows(out)
    if not rows:
        raise FileNotFoundError(
            f"no results in {runtime.short_path(out)}: run `python -m benchmarks.{module}` first"
        )
    return rows


def current(rows: list[dict]) -> list[dict]:
    """The results of each contestant's latest recipe, and of those that
    stand twice the later one.
    """
    recipe = {row["contestant"]: row["settings"] for row in rows}
    places = ("contestant", "mark", "seed", "n", "sampler")
    latest = {
        tuple(row[place] for place in places): row
        for row in rows
        if row["settings"] == recipe[row["contestant"]]
    }
    return list(latest.values())


def summary(rows: list[dict], n: int, sampler: str) -> dict[str, dict[float, list[dict]]]:
    """{contestant: {mark: its rows, one a seed}} at one n."""
    found: dict = {}
    for row in sorted(rows, key=lambda row: (row["mark"], row["seed"])):
        if (row["n"], row["sampler"]) == (n, sampler):
            found.setdefault(row["contestant"], {}).setdefault(row["mark"], []).append(row)
    order = [row["contestant"] for row in rows]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def median(rows: list[dict]) -> float | None:
    """The median distance over seeds; a run that diverged counts as worse than all."""
    value = statistics.median(math.inf if r["distance"] is None else r["distance"] for r in rows)
    return None if math.isinf(value) else value


def cell(rows: list[dict] | None) -> str:
    """Distance, its multiple of the floor, and the range over seeds."""
    if not rows:
        return ""
    middle = median(rows)
    if middle is None:
        return "diverged"
    text = f"{middle:.1f} ({middle / rows[0]['floor']:.1f}×)"
    values = [r["distance"] for r in rows if r["distance"] is not None]
    return (
        text
        if len(rows) == 1
        else f"{text} [{min(values):.1f} … {max(values):.1f}, {len(rows)} seeds]"
    )


def peaks(rows: list[dict]) -> dict[str, float]:
    """The best matrix product of all measured, in each precision that somebody trained in."""
    kinds = sorted({row["precision"] for row in rows})
    return {
        kind: max(row["peak_flops"] for row in rows if row["precision"] == kind) for kind in kinds
    }


def table(found: dict, peaks: dict[str, float]) -> list[str]:
    """Markdown: a line a contestant, a column a mark."""
    marks = sorted({mark for by_mark in found.values() for mark in by_mark})
    head = [
        "contestant",
        "parameters",
        "images/s",
        "MFLOP/image",
        "of the peak in",
        *(f"{minutes(m)} min" for m in marks),
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for name, by_mark in found.items():
        rows = [row for of_mark in by_mark.values() for row in of_mark]
        speed = statistics.median(row["images_per_second"] for row in rows)
        flops, kind = rows[0]["flops_per_image"], rows[0]["precision"]
        figures = [
            f"{rows[0]['parameters']:,}",
            f"{speed:.0f}",
            f"{flops / 1e6:.0f}",
            f"{speed * flops / peaks[kind]:.0%} {kind}",
        ]
        lines.append(
            "| " + " | ".join([name, *figures, *(cell(by_mark.get(mark)) for mark in marks)]) + " |"
        )
    return lines


def comparison(found: dict) -> list[str]:
    """Ours against the others in words, at the marks that both have, and when ours reaches what the
    sketch ends with.
    """
    lines = []
    ours = {mark: median(rows) for mark, rows in found.get("ours", {}).items()}
    for name in found:
        theirs = {mark: median(rows) for mark, rows in found[name].items()}
        both = [m for m in ours if None not in (ours[m], theirs.get(m))]
        if name == "ours" or not both:
            continue
        shares = ", ".join(f"{ours[m] / theirs[m]:.2f} at {minutes(m)} min" for m in both)
        lines.append(f"- ours, as a share of the distance of {name}: {shares}")
    for mark, rows in found.get("sketch", {}).items():
        value = median(rows)
        reached = [m for m in ours if None not in (ours[m], value) and ours[m] <= value]
        if reached:
            lines.append(
                f"- the sketch's {value:.1f} of {minutes(mark)} min: ours is there at "
                f"{minutes(min(reached))} min"
            )
    return lines


def draw_plot(found: dict, path: Path) -> None:
    """Distance over floor against minutes, both logarithmic, a line a contestant: white ground,
    legible on a dark page too.
    """
    fig, ax = plots.figure(width=7.0, height=4.2)
    colors = [plots.MODEL, plots.EXTRA, plots.DATA, plots.NOISE, "#E69F00"]
    for (name, by_mark), color, sign in zip(
        found.items(), cycle(colors), cycle("osD^v"), strict=False
    ):
        points = [
            (mark / 60, median(rows) / rows[0]["floor"], rows)
            for mark, rows in by_mark.items()
            if median(rows)
        ]
        ax.plot(
            [p[0] for p in points], [p[1] for p in points], color=color, marker=sign, label=name
        )
        for x, _, rows in points:  # every seed, where there are several
            seeds = [r["distance"] / r["floor"] for r in rows if r["distance"] is not None]
            ax.plot([x] * len(seeds), seeds, color=color, marker=sign, markersize=3, linewidth=0.8)
    ax.axhline(1, color=plots.REFERENCE, linestyle="--", label="floor: real test images")
    ax.set(
        xscale="log", yscale="log", xlabel="minutes of training", ylabel="Fréchet distance / floor"
    )
    marks = sorted({mark for by_mark in found.values() for mark in by_mark})
    ax.set_xticks([mark / 60 for mark in marks], [minutes(mark) for mark in marks], minor=False)
    top = max(p[1] for line in ax.lines for p in line.get_xydata()) if ax.lines else 1
    heights = [h for h in (1, 2, 5, 10, 20, 50, 100, 200, 500) if h <= top]
    ax.set_yticks(heights, [str(h) for h in heights])
    ax.minorticks_off()
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    fig.savefig(path)


def preface(rows: list[dict]) -> list[str]:
    """What was measured, on what, and what the figures are not."""
    last, dates = rows[-1], sorted({row["date"] for row in rows})
    period = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    best = " and ".join(f"{peak / 1e9:.0f} GFLOP/s in {kind}" for kind, peak in peaks(rows).items())
    commands = "; ".join(
        f"`{command}`" for command in dict.fromkeys(row["command"] for row in rows)
    )
    return [
        "# Fréchet distance after minutes of training",
        "",
        f"{last['data']}; {last['machine']}; {last['device']}; torch {last['torch']}; {period}; "
        f"{commands}.",
        f"A large matrix product reaches {best} here, the best of all measured.",
        "",
        "Distances are between features of this project's own classifier, not Inception's: "
        "compare them with nothing outside",
        "this page. In brackets the multiple of the floor, which is the mean distance of as many "
        "real test images from the",
        "same reference, the whole training set. Only time inside training steps counts.",
    ]


COLUMNS = (
    "contestant",
    "mark",
    "seed",
    "sampler",
    "n",
    "distance",
    "floor",
    "seconds",
    "warm_up_seconds",
    "steps",
    "images",
    "images_per_second",
    "parameters",
    "flops_per_image",
    "precision",
    "peak_flops",
    "date",
)


def report(out: Path) -> str:
    """Table (returned, and `.md`), `.csv` and `.png` beside the results in `out`.

    Raises FileNotFoundError if there are none.
    """
    rows = current(rows_to_report(out, "recipes"))
    write_csv(out, COLUMNS, rows)
    lines = [*preface(rows), ""]
    for sampler, title in (
        ("common", "the common sampler, a clamped DDIM"),
        ("own", "the contestant's own sampler"),
    ):
        for n in sorted({row["n"] for row in rows if row["sampler"] == sampler}, reverse=True):
            found = summary(rows, n, sampler)
            one = next(iter(next(iter(found.values())).values()))[0]
            lines += [
                f"## {title} of {one['calls']} calls, n = {n:,}, floor {one['floor']:.2f}",
                "",
            ]
            lines += [*table(found, peaks(rows)), "", *comparison(found), ""]
    largest = max(row["n"] for row in rows if row["sampler"] == "common")
    if len({row["mark"] for row in rows}) > 1:
        draw_plot(summary(rows, largest, "common"), out.with_suffix(".png"))
    text = "\n".join(lines)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    return text
