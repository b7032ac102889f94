"""Times small ONNX models in ONNX Runtime; alone on a device it is all that is needed there besides its folder.

    python run.py [--threads 1] [--provider CPUExecutionProvider] [--seconds 0.05]
    python run.py --bench network.onnx compressed.onnx

The folder holds ``kit.json``, ``network.onnx`` and ``models/``; the result, ``latency.json``, is for
``tdfx plan --latency``. A run that was stopped goes on from there. With --bench files are timed in turn on inputs drawn
for them. Needs Python 3.10, numpy and onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 2  # of latency.json
CPU = "CPUExecutionProvider"
TRIES = 3  # of a group, until nothing else takes its processor
MOST_WAITING = 0.1  # share of the time for which a thread may wait
MOST_WAITING_OF_SEVERAL = 0.4  # the same where it also waits for others of its own, of small operators above all
CONFIG = {"session.force_spinning_stop": "1"}
"""By default: threads of a session that is done would go on spinning, and take the processors of the next one's."""
ROUNDS = (7, 60)  # of a group, at least and at most
BYTES = 10**9  # of weights that are loaded at once
WARM_UP = 2  # rounds that do not count: the first ones allocate
SECONDS = 0.05  # that the runs of one model take
NETWORK_ROUNDS = (15, 100)
NETWORK_SECONDS = 1.0
GRIDS = (1, 2, 4, 8, 16, 32)
WASTE = 1.03  # seconds per multiply-accumulate that a grid may take, as a multiple of the best grid's

NUMBERS = ("float16", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "bool")
DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64", **{f"tensor({name})": name for name in NUMBERS}}
"""numpy's names of what ONNX Runtime's types hold, of those that numpy has."""

OF_PROVIDER = "provider."

Run = Callable[[], object]
Feed = Mapping[str, np.ndarray[Any, Any]]
Clock = Callable[[], float]


def interleaved(
    runs: Sequence[Run],
    *,
    rounds: tuple[int, int] = ROUNDS,
    warm_up: int = WARM_UP,
    seconds: float = SECONDS,
    clock: Clock = time.perf_counter,
) -> list[list[float]]:
    """Seconds of every timed call of each run, in rounds in which each is called once, every other one in reverse.

    Whatever slows the machine down meets all alike. There are as many rounds as ``seconds`` a run allow, within
    ``rounds``.
    """
    times: list[list[float]] = [[] for _ in runs]
    order = list(range(len(runs)))
    started, wanted, done = 0.0, rounds[0], 0
    while done < warm_up + wanted:
        if done == warm_up:
            started = clock()
        for index in order if done % 2 else reversed(order):
            before = clock()
            runs[index]()
            times[index].append(clock() - before)
        done += 1
        if done == warm_up + 1:
            wanted = min(max(rounds[0], int(seconds * len(runs) / max(clock() - started, 1e-9))), rounds[1])
    return [values[warm_up:] for values in times]


def check_provider(provider: str) -> None:
    """Raises ValueError unless ONNX Runtime has it here."""
    import onnxruntime as ort

    available = ort.get_available_providers()
    if provider not in available:
        raise ValueError(f"provider {provider!r} is not in this ONNX Runtime; expected one of {', '.join(available)}")


def open_session(model: bytes | str, runtime: Mapping[str, Any]) -> Any:
    """An ONNX Runtime session.

    Args:
        model: a file's path, or its bytes.
        runtime: "threads" (intra-op), "provider", and "config" besides ``CONFIG``: entries of the session's
            configuration, which have a dot in their names; those that begin with "provider." are the provider's own
            options, and without a dot attributes of SessionOptions, as "graph_optimization_level": "ORT_ENABLE_BASIC".

    Raises:
        ValueError: the provider is not there, with which ONNX Runtime itself would go on with the CPU, or it does not
            take the options or the model.
    """
    import onnxruntime as ort

    provider = runtime["provider"]
    check_provider(provider)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions
    options.intra_op_num_threads = runtime["threads"]
    options.inter_op_num_threads = 1
    try:
        own = {}
        for key, value in {**CONFIG, **runtime.get("config", {})}.items():
            if key.startswith(OF_PROVIDER):
                own[key.removeprefix(OF_PROVIDER)] = value
            elif "." in key:
                options.add_session_config_entry(key, value)
            else:
                setattr(options, key, _as_attribute(options, key, value))
        session = ort.InferenceSession(model, options, providers=[(provider, own)])
    except Exception as error:  # onnxruntime's have no class in common
        raise ValueError(f"ONNX Runtime {ort.__version__} opens no session: {str(error).splitlines()[0]}") from error
    taken = session.get_providers()[0]
    if taken != provider:
        raise ValueError(
            f"provider {provider!r} does not start here, ONNX Runtime took {taken!r}: mend its libraries or drivers, "
            "or choose another"
        )
    return session


def _as_attribute(options: object, name: str, text: str) -> object:
    """What a text means for an attribute of SessionOptions: a member of its type, or a number."""
    kind: Any = type(getattr(options, name, ""))
    members = getattr(kind, "__members__", {})
    if kind is str or not (text in members or text.isdecimal()):
        raise ValueError(f"{name}={text}: expected {', '.join(members) or 'a whole number'} for a session option")
    return members[text] if members else kind(int(text))


def session_run(model: bytes | str, runtime: Mapping[str, Any], feed: Feed | None = None) -> Run:
    """A function that runs a model once and returns its outputs; see ``open_session``.

    Args:
        model: as for ``open_session``, as is:
        runtime: options of the session.
        feed: inputs by name; None to draw them, open dimensions taken for 1.

    Raises:
        ValueError: inputs of a type cannot be drawn, or as for ``open_session``.
    """
    session = open_session(model, runtime)
    generator = np.random.default_rng(0)
    inputs = feed or {value.name: _draw(generator, value) for value in session.get_inputs()}
    return lambda: session.run(None, inputs)


def host() -> dict[str, str]:
    """The processor, and ONNX Runtime's version."""
    import onnxruntime as ort

    return {"processor": processor(), "onnxruntime": str(ort.__version__)}


def processor() -> str:
    """The processor's model name, as the system tells it; on boards that tell none, the board and its cores' parts."""
    lines = [line.partition(":") for line in _read("/proc/cpuinfo").splitlines()]
    told = [(name.strip(), value.strip()) for name, _, value in lines]
    names = [value for name, value in told if name == "model name"]
    if names:
        return names[0]
    parts = dict.fromkeys(value for name, value in told if name in ("CPU implementer", "CPU part", "CPU revision"))
    board = " ".join(filter(None, [_read("/proc/device-tree/model").strip("\0\n"), *parts]))
    return board or _apple() or platform.processor() or platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _apple() -> str:
    asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def waiting(since: tuple[float, float]) -> float:
    """The share of the time since then for which this thread was not on a processor.

    Args:
        since: ``time.perf_counter()`` and ``time.thread_time()`` of then.
    """
    wall_s = time.perf_counter() - since[0]
    return 1 - (time.thread_time() - since[1]) / wall_s if wall_s > 0 else 0.0


def undisturbed(take: Callable[[], list[float]], runtime: Mapping[str, Any]) -> tuple[list[float], bool]:
    """What was measured while nothing else took this thread's processor, and whether that was so in one of the tries.

    On other providers than the CPU threads wait for the device, and nothing is known.
    """
    most_waiting = MOST_WAITING if runtime["threads"] == 1 else MOST_WAITING_OF_SEVERAL
    for _ in range(TRIES):
        since = time.perf_counter(), time.thread_time()
        found = take()
        if runtime["provider"] != CPU or waiting(since) <= most_waiting:
            return found, True
    return found, False


def group_ratios(runs: Sequence[Run], seconds: float, clock: Clock = time.perf_counter) -> list[float]:
    """Median seconds of each run over those of the first."""
    medians = [statistics.median(values) for values in interleaved(runs, seconds=seconds, clock=clock)]
    return [value / medians[0] for value in medians]


def network_seconds(runs: Sequence[Run]) -> list[float]:
    """Median seconds of a whole network and of what runs beside it."""
    times = interleaved(runs, rounds=NETWORK_ROUNDS, seconds=NETWORK_SECONDS / 2)
    return [statistics.median(values) for values in times]


def network_times(models: Sequence[str], runtime: Mapping[str, Any], feed: Feed | None = None) -> list[list[float]]:
    """Seconds of every timed run of whole networks, in turn; inputs as for ``session_run``."""
    runs = [session_run(model, runtime, feed) for model in models]
    return interleaved(runs, rounds=NETWORK_ROUNDS, seconds=NETWORK_SECONDS)


def _draw(generator: np.random.Generator, value: Any) -> np.ndarray[Any, Any]:
    if value.type not in DTYPES:
        raise ValueError(f"input {value.name} is a {value.type}; values are drawn for {', '.join(DTYPES)} only")
    shape = [size if isinstance(size, int) else 1 for size in value.shape]
    dtype = np.dtype(DTYPES[value.type])
    if np.issubdtype(dtype, np.floating):
        return generator.standard_normal(shape).astype(dtype)
    return np.zeros(shape, dtype)


def batches(keys: Sequence[str], sizes: Mapping[str, int], room: int) -> list[list[str]]:
    """The keys in order, in lists whose sizes together are within the room; at least one key a list."""
    found: list[list[str]] = []
    left = 0
    for key in keys:
        if not found or sizes[key] > left:
            found.append([])
            left = room
        found[-1].append(key)
        left -= sizes[key]
    return found


def best_grid(seconds: Mapping[int, float], macs: Mapping[int, int]) -> int:
    """The finest grid of ranks that takes little more time per multiply-accumulate than the best grid.

    Args:
        seconds: in any unit, by width: of a chain with so many channels inside.
        macs: the chain's multiply-accumulates, likewise.
    """
    widths = sorted(seconds)
    # A rank never costs more than a larger one, which could be padded to; that also passes over disturbed times.
    least = accumulate((seconds[width] for width in reversed(widths)), min)
    per_mac = {width: value / macs[width] for width, value in zip(reversed(widths), least, strict=True)}
    by_grid = {grid: statistics.mean(per_mac[width] for width in widths if width % grid == 0) for grid in GRIDS}
    return next(grid for grid in GRIDS if by_grid[grid] <= WASTE * min(by_grid.values()))


def usable_ratios(values: object) -> dict[str, dict[str, float]]:
    """Ratios that were stored, by key of the layer and of the chain; {} if any of them is no finite number above 0."""
    if not isinstance(values, dict) or not all(isinstance(known, dict) for known in values.values()):
        return {}
    numbers = [value for known in values.values() for value in known.values()]
    return values if all(isinstance(value, float) and 0 < value < math.inf for value in numbers) else {}


def time_groups(
    groups: Sequence[Sequence[str]],
    sizes: Mapping[str, int],
    load: Callable[[str], bytes | str],
    runtime: Mapping[str, Any],
    *,
    ratios: dict[str, dict[str, float]],
    keep: Callable[[], None],
    progress: Callable[[int, int], None],
    seconds: float,
) -> tuple[dict[str, dict[str, float]], int]:
    """Ratios of all groups' models to the first of each, and how many groups, or parts of one, others disturbed.

    Args:
        groups: keys of models that are timed beside each other.
        sizes: bytes of their weights.
        load: as for ``measure``, as all of these are:
        runtime: options of the session.
        ratios: what is known, and is added to.
        keep: called after each group, or part of one.
        progress: called with groups done, and groups in all.
        seconds: that the runs of one model take.
    """
    taken: dict[str, dict[str, float]] = {}
    disturbed = 0
    for done, (dense, *others) in enumerate(groups):
        progress(done, len(groups))
        known = ratios.setdefault(dense, {dense: 1.0})
        taken[dense] = dict(known)
        missing = [key for key in others if key not in known]
        for part in batches(missing, sizes, BYTES - sizes[dense]):
            keys = [dense, *part]
            runs = [session_run(load(key), runtime) for key in keys]
            found, is_sure = undisturbed(partial(group_ratios, runs, seconds), runtime)
            taken[dense].update(zip(keys, found, strict=True))
            if not is_sure:
                disturbed += 1
                continue
            known.update(zip(keys, found, strict=True))
            keep()
    progress(len(groups), len(groups))
    return taken, disturbed


def measure(
    kit: Mapping[str, Any],
    network: bytes | str,
    load: Callable[[str], bytes | str],
    runtime: Mapping[str, Any],
    *,
    ratios: dict[str, dict[str, float]],
    keep: Callable[[], None],
    progress: Callable[[int, int], None],
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Times what a kit lists.

    A group is a model of a layer as it is, first, and those of the chains that may take its place; these are timed as
    multiples of it, and all layers as they are once more beside the network, so that times of all groups compare.
    Where the kit has a grid, its models are one more group.

    Args:
        kit: "groups", lists of keys; "bytes" of their weights; "rows", each a site, method, rank, and pairs of keys, of
            the layer and of the chain, one for every call; "structure", a fingerprint; "grid", if it is there, of each
            model the key, width and multiply-accumulates, for ``best_grid``.
        network: the whole network's model.
        load: gives a model by its key.
        runtime: as for ``open_session``.
        ratios: known ones by key of the layer and of the chain; those measured are added, but for groups that other
            processes disturbed in all tries.
        keep: called after each group, or part of one.
        progress: called with groups done, and groups in all.
        seconds: that the runs of one model take.

    Returns:
        "structure", "network_s", "disturbed" (groups, or parts of one; what runs beside the network counts as one),
        "rank_grid" (None without a grid, or where others ran beside it), and "rows" with "site", "method", "rank" and
        "latency_s".

    Raises:
        ValueError: as for ``session_run``.
    """
    layers = [dense for dense, *_ in kit["groups"]]
    session_run(network, runtime)  # before anything is timed in vain
    taken, disturbed = time_groups(
        groups_of(kit), kit["bytes"], load, runtime, ratios=ratios, keep=keep, progress=progress, seconds=seconds
    )
    networks_s, multiples = [], {}
    for part in batches(layers, kit["bytes"], BYTES) or [[]]:
        runs = [session_run(model, runtime) for model in (network, *map(load, part))]
        (alone_s, *layers_s), is_sure = undisturbed(partial(network_seconds, runs), runtime)
        disturbed += not is_sure
        networks_s.append(alone_s)
        multiples.update({key: layer_s / alone_s for key, layer_s in zip(part, layers_s, strict=True)})
    network_s = statistics.median(networks_s)
    dense_s = {key: multiple * network_s for key, multiple in multiples.items()}
    rows = [
        {
            "site": site,
            "method": method,
            "rank": rank,
            "latency_s": round(sum(dense_s[dense] * taken[dense][key] for dense, key in pairs), 9),
        }
        for site, method, rank, pairs in kit["rows"]
    ]
    return {
        "structure": kit["structure"],
        "network_s": round(network_s, 9),
        "disturbed": disturbed,
        "rank_grid": rank_grid(kit.get("grid", ()), ratios),
        "rows": rows,
    }


def groups_of(kit: Mapping[str, Any]) -> list[list[str]]:
    """Keys that are timed beside each other: of each layer, then of the grid if there is one."""
    grid = [key for key, *_ in kit.get("grid", ())]
    return [*kit["groups"], *([grid] if grid else [])]


def rank_grid(grid: Sequence[tuple[str, int, int]], ratios: Mapping[str, Mapping[str, float]]) -> int | None:
    """``best_grid`` by ratios of the models listed by key, width and multiply-accumulates; None if one is missing."""
    known = ratios.get(grid[0][0], {}) if grid else {}
    if not grid or any(key not in known for key, *_ in grid):
        return None
    return best_grid({width: known[key] for key, width, _ in grid}, {width: macs for _, width, macs in grid})


# --- alone on a device ---


def main(folder: Path, arguments: Sequence[str] | None = None) -> None:
    """Measures what ``kit.json`` lists and writes ``latency.json``."""
    options = argparse.ArgumentParser(description="Times the models of this folder in ONNX Runtime.")
    options.add_argument("--threads", type=_threads, default=1, help="of one operator")
    options.add_argument("--provider", default=CPU)
    options.add_argument("--session-config", metavar="KEY=VALUE", action="append", default=[], help="of the session")
    options.add_argument("--seconds", type=_seconds, default=SECONDS, help="that the runs of one model take")
    options.add_argument("--bench", metavar="FILE", nargs="+", help="time these ONNX files in turn instead")
    given = options.parse_args(arguments)
    if given.bench:
        try:
            _bench(given.bench, _runtime(given))
        except ValueError as error:
            options.error(str(error))
        return
    try:
        kit = json.loads((folder / "kit.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        options.error(f"cannot read kit.json beside this file: {error}; copy the whole folder that tdfx wrote")
    missing = _missing(folder, kit)
    if missing:
        options.error(f"{missing} is missing beside this file; copy the whole folder that tdfx wrote")
    try:
        _measure_folder(folder, kit, _runtime(given), given.seconds)
    except ValueError as error:
        options.error(str(error))
    except OSError as error:
        options.error(f"cannot write beside this file: {error}; copy the folder to where you may write")


def _runtime(given: argparse.Namespace) -> dict[str, Any]:
    check_provider(given.provider)
    return {"threads": given.threads, "provider": given.provider, "config": entries(given.session_config)}


def _bench(files: Sequence[str], runtime: Mapping[str, Any]) -> None:
    """Prints how long files take, beside the first, and how far their outputs are from the first one's."""
    runs = [session_run(file, runtime) for file in files]
    outputs = [run() for run in runs]
    times = interleaved(runs, rounds=NETWORK_ROUNDS, seconds=NETWORK_SECONDS)
    for file, seconds, found in zip(files, times, outputs, strict=True):
        ratios = [one / first for one, first in zip(seconds, times[0], strict=True)]
        lower, middle, upper = statistics.quantiles(ratios, n=4)
        print(
            f"{file}: {1e3 * statistics.median(seconds):.3f} ms, {middle:.1%} of the first's time (quartiles "
            f"{lower:.1%} and {upper:.1%}), {_difference(outputs[0], found)}"
        )


def _difference(wanted: Any, found: Any) -> str:
    if [np.shape(a) for a in wanted] != [np.shape(b) for b in found]:
        return "outputs of other shapes"
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(wanted, found, strict=True)]
    worst = max(float(np.abs(b - a).max(initial=0) / max(np.abs(a).max(initial=0), 1e-30)) for a, b in pairs)
    return f"outputs differ by {worst:.2g} of the largest"


def _missing(folder: Path, kit: object) -> str:
    """What a kit needs and lacks, "" if nothing."""
    if not isinstance(kit, dict):
        return "what kit.json should hold"
    absent = [name for name in ("groups", "bytes", "rows", "structure") if name not in kit]
    if absent:
        return f"{absent[0]!r} of kit.json"
    files = ["network.onnx", *(f"models/{key}.onnx" for keys in groups_of(kit) for key in keys)]
    return next((file for file in files if not (folder / file).is_file()), "")


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text}; expected a whole number of 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"found {text}; expected a number of 0 or more")
    return value


def _measure_folder(folder: Path, kit: Mapping[str, Any], runtime: Mapping[str, Any], seconds: float) -> None:
    header = {"version": VERSION, "runtime": runtime, "host": host()}
    unfinished, result = folder / "unfinished.json", folder / "latency.json"
    alike = {**header, "seconds": seconds}
    ratios = _kept_ratios(unfinished, alike)
    write(unfinished, {**alike, "ratios": ratios})  # before anything is timed in vain
    measured = measure(
        kit,
        str(folder / "network.onnx"),
        lambda key: str(folder / "models" / f"{key}.onnx"),
        runtime,
        ratios=ratios,
        keep=lambda: write(unfinished, {**alike, "ratios": ratios}),
        progress=partial(_say, work_of(kit, ratios), time.perf_counter()),
        seconds=seconds,
    )
    write(result, {**header, **measured})
    if measured["disturbed"]:
        again = f"other processes ran beside {measured['disturbed']} groups of models; run this again to time them"
        print(again, file=sys.stderr)
    print(f"{result}: for tdfx plan --latency", file=sys.stderr)


def _kept_ratios(path: Path, alike: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What an earlier run under the same options has measured; nothing where there is none, or its file is broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict) or {**found, **alike} != found:
        return {}
    return usable_ratios(found.get("ratios"))


def work_of(kit: Mapping[str, Any], ratios: Mapping[str, Mapping[str, float]]) -> list[int]:
    """Models of each group that are still to be timed."""
    return [sum(key not in ratios.get(dense, {}) for key in others) for dense, *others in groups_of(kit)]


def seconds_left(work: Sequence[int], done: int, elapsed_s: float) -> float | None:
    """What the groups after those done take at the pace of those; None where none of them had to be timed."""
    timed = sum(work[:done])
    return elapsed_s / timed * sum(work[done:]) if timed else None


def _say(work: Sequence[int], started: float, done: int, total: int) -> None:
    left_s = seconds_left(work, done, time.perf_counter() - started)
    left = "" if left_s is None or done == total else f", about {left_s:.0f} s left"
    print(f"{done} of {total} groups of models{left}", file=sys.stderr, flush=True)


def entries(texts: Sequence[str]) -> dict[str, str]:
    """What "key=value" texts say.

    Raises:
        ValueError: one has no "=", or no key.
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"session configuration {text!r}; expected KEY=VALUE")
        found[key] = value
    return found


def write(path: Path, value: object) -> None:
    """Writes JSON; the file is there whole or as it was."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    main(Path(__file__).resolve().parent)
