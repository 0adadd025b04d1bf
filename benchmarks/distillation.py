"""What distillation brings: arms of one protocol over several seeds, each in pieces that can be interrupted anywhere.

    python -m edgedistill.benchmarks.distillation benchmarks/protocols/distillation-elpv.toml --minutes 28  # until done
    python -m edgedistill.benchmarks.distillation benchmarks/protocols/distillation-elpv.toml --summary

A protocol is a TOML file: the data, the seeds, the options of `distill` that teachers and students share over all arms,
and one line of options per arm. In each seed the teachers are trained once, by the arm named ``teachers_with``, and all
arms use them; every arm gets the same epochs of the same student (its seconds are recorded too). ``[peers]`` are arms of
timm's distillation task (see peer_timm_distillation.py), with a teacher of the same network, trained as timm has it: on
all training images.

A row per (data, seed, arm) goes to RESULTS/NAME.csv, the answers on each test image to RESULTS/NAME/seed-S/, and at the end
of each piece RESULTS/NAME.json gets each arm minus the reference arm with the paired 95% interval over seeds and images.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import shlex
import shutil
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill import console
from edgedistill.artifacts import atomic_path, read_array, read_json, read_jsonl, write_array, write_json
from edgedistill.benchmarks.command import exit_with
from edgedistill.benchmarks.machine import machine_record
from edgedistill.benchmarks.reference_runs import run_piece, write_subset
from edgedistill.data.deal import SplitSettings
from edgedistill.data.sources import open_source
from edgedistill.errors import UsageError
from edgedistill.metrics import MetricName, hierarchical_difference

RESULTS = Path("benchmarks/results/distillation")
METRICS: tuple[MetricName, ...] = ("accuracy", "macro_f1")
TEACHERS = "teachers"
UNLABELLED = "{unlabelled}"  # in an arm's options: the folder of the protocol's unlabelled images
TIMES_UP = 3  # exit code: run the same command again to go on
DISTILL = "import sys; from edgedistill.cli import distill_main; distill_main()"
KEYS = {
    "data",
    "train_images",
    "unlabelled_images",
    "test_fraction",
    "seeds",
    "data_options",
    "teacher_options",
    "student_options",
    "teachers_with",
    "reference",
    "references",
    "compared",
    "arms",
    "peer_teacher",
    "peers",
    "processes",
}


@dataclass(frozen=True)
class Protocol:
    """``data_options``, ``teacher_options``, ``student_options`` and each arm: options of `distill`.

    ``train_images``: so many of the data's training images, evenly by class (0: all). ``unlabelled_images``: so many of
    the others, without their labels, in the folder that arms name ``{unlabelled}``. ``test_fraction``: where the data have
    no test split of their own and train_images are given, each seed cuts one first. ``teachers_with``: the distilled arm
    whose run trains the teachers. ``reference``: the arm that the others are compared with; ``references``: the one of an
    arm that has another student or another number of steps (its own name: with none), so that only like is compared with
    like. ``compared``: options of `distill` in which arms differ on purpose, beside their losses and mixing (the rest of the
    budget is equal, or a test fails). ``peer_teacher``: options of `distill` for the teacher of the ``peers``, whose own options are those of
    peer_timm_distillation. ``processes``: how many train an arm together, one thread each, where it is not one alone.
    """

    name: str
    data: str
    seeds: tuple[int, ...]
    data_options: str
    teacher_options: str
    student_options: str
    teachers_with: str
    reference: str
    arms: dict[str, str]
    train_images: int = 0
    unlabelled_images: int = 0
    test_fraction: float = 0.0
    peer_teacher: str = ""
    peers: dict[str, str] = field(default_factory=dict)
    processes: dict[str, int] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    compared: tuple[str, ...] = ()

    def reference_of(self, arm: str) -> str:
        return self.references.get(arm, self.reference)


@dataclass(frozen=True)
class Piece:
    """One training of one seed: ``arm`` of a protocol, or the peers' teacher (arm '')."""

    seed: int
    arm: str
    folder: Path
    command: list[str]


def read_protocol(path: Path) -> Protocol:
    """Raises UsageError that names what is missing, unknown or contradictory."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not TOML ({error})") from error
    unknown = sorted(values.keys() - KEYS)
    if unknown:
        raise UsageError(f"{path}: {', '.join(unknown)} unknown; expected {', '.join(sorted(KEYS))}")
    try:
        protocol = Protocol(
            path.stem, **values | {"seeds": tuple(values["seeds"]), "compared": tuple(values.get("compared", ()))}
        )
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path}: {error}; see benchmarks/protocols for examples") from error
    for name in (protocol.teachers_with, protocol.reference):
        if name not in protocol.arms:
            raise UsageError(f"{path}: {name!r} is not one of its arms {', '.join(protocol.arms)}")
    if "--no-distillation" in protocol.arms[protocol.teachers_with]:
        raise UsageError(f"{path}: teachers_with {protocol.teachers_with!r} distils nothing, so it trains no teachers")
    if protocol.unlabelled_images and not protocol.train_images:
        raise UsageError(f"{path}: unlabelled_images are the training images beyond train_images: give that too")
    if protocol.test_fraction and not protocol.train_images:
        raise UsageError(
            f"{path}: test_fraction goes with train_images; without them say --test-fraction in data_options"
        )
    for name in (*protocol.references, *protocol.references.values()):
        if name not in protocol.arms:
            raise UsageError(f"{path}: {name!r} of references is not one of its arms {', '.join(protocol.arms)}")
    strange = sorted(protocol.processes.keys() - protocol.arms.keys())
    if strange or not all(isinstance(count, int) and count > 0 for count in protocol.processes.values()):
        raise UsageError(
            f"{path}: processes are a number for an arm, such as contest = 2; the arms: {', '.join(protocol.arms)}"
        )
    if protocol.peers and not protocol.peer_teacher:
        raise UsageError(f"{path}: peers need a peer_teacher, options of distill")
    return protocol


def pieces(protocol: Protocol, runs: Path) -> Iterator[Piece]:
    """In the order in which they run: a seed's teachers come first. ``prepare_data`` makes what they read."""
    for seed in protocol.seeds:
        root = runs / protocol.name / f"seed-{seed}"
        common = ["--data", data_argument(protocol, runs, seed), "--seed", str(seed), "--no-baseline", "--resume"]
        common += shlex.split(protocol.data_options)
        others = [arm for arm in protocol.arms if arm != protocol.teachers_with]
        for arm in (protocol.teachers_with, *others):
            options = f"{protocol.student_options} {protocol.arms[arm]}"
            if arm == protocol.teachers_with:
                options = f"{protocol.teacher_options} {options}"
            elif "--no-distillation" not in options:
                options += f" --soft-labels {shlex.quote(str(root / TEACHERS / 'soft_labels'))}"
            folder = root / (TEACHERS if arm == protocol.teachers_with else arm)
            options = options.replace(UNLABELLED, shlex.quote(str(unlabelled_folder(protocol, runs, seed))))
            command = [*common, *shlex.split(options), "--out", str(folder)]
            yield Piece(seed, arm, folder, [*_launch(protocol.processes.get(arm, 1)), *command])
        if protocol.peers:
            folder = root / "peer-teacher"
            command = [*common, "--no-distillation", *shlex.split(protocol.peer_teacher), "--out", str(folder)]
            yield Piece(seed, "", folder, [sys.executable, "-c", DISTILL, *command])
        for arm, options in protocol.peers.items():
            program = [sys.executable, "-m", "edgedistill.benchmarks.peer_timm_distillation"]
            files = ["--dataset", str(root / "peer-teacher" / "dataset.csv"), "--seed", str(seed)]
            files += ["--teacher", str(root / "peer-teacher" / "model.pt"), "--out", str(root / arm)]
            yield Piece(seed, arm, root / arm, [*program, *files, *shlex.split(options)])


def _launch(processes: int) -> list[str]:
    """What starts `distill`."""
    if processes == 1:
        return [sys.executable, "-c", DISTILL]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, "-m", *torchrun, "-m", "edgedistill", "distill"]


def share_manifest(piece: Piece) -> None:
    """All arms of a seed have the images and splits of its teachers."""
    source = piece.folder.parent / TEACHERS
    if piece.folder == source or (piece.folder / "dataset.csv").exists():
        return
    for name in ("data_report.json", "dataset.csv"):
        if (source / name).exists():
            with atomic_path(piece.folder / name) as temporary:
                shutil.copyfile(source / name, temporary)


def data_argument(protocol: Protocol, runs: Path, seed: int) -> str:
    """What --data is given: the protocol's data, or a CSV that names fewer training images of it."""
    return str(subset_path(protocol, runs, seed)) if protocol.train_images else protocol.data


def subset_path(protocol: Protocol, runs: Path, seed: int) -> Path:
    name = f"{protocol.data.replace(':', '-').replace('/', '_')}-{protocol.train_images}"
    return runs / (f"{name}-seed-{seed}.csv" if protocol.test_fraction else f"{name}.csv")


def unlabelled_folder(protocol: Protocol, runs: Path, seed: int) -> Path:
    return subset_path(protocol, runs, seed).with_suffix("") / f"unlabelled-{protocol.unlabelled_images}"


def prepare_data(protocol: Protocol, runs: Path, seed: int) -> None:
    """Writes the CSV and links the unlabelled images, where the protocol asks for them. Another driver may do the same
    beside this one: both write the same."""
    if not protocol.train_images:
        return
    path = subset_path(protocol, runs, seed)
    if not path.exists():
        cut = SplitSettings(test_fraction=protocol.test_fraction, seed=seed) if protocol.test_fraction else None
        write_subset(protocol.data, protocol.train_images, path, cut=cut)
    if protocol.unlabelled_images:
        link_unlabelled(protocol, path, unlabelled_folder(protocol, runs, seed))


def link_unlabelled(protocol: Protocol, subset: Path, folder: Path) -> None:
    """Links to the first images of a seeded shuffle of the training images that the subset leaves out."""
    with subset.open(newline="", encoding="utf-8") as file:
        taken = {row["path"] for row in csv.DictReader(file)}  # labelled ones and the test split
    left = [item.path for item in open_source(protocol.data).items if str(item.path) not in taken]
    if len(left) < protocol.unlabelled_images:
        raise UsageError(f"{protocol.name}: {len(left)} training images are left, not {protocol.unlabelled_images}")
    folder.mkdir(parents=True, exist_ok=True)
    for row in np.random.default_rng(0).permutation(len(left))[: protocol.unlabelled_images]:
        link = folder / f"{row:06d}{left[row].suffix}"
        with contextlib.suppress(FileExistsError):  # another piece may run beside this one
            link.symlink_to(left[row].resolve())


def rows_of(protocol: Protocol, piece: Piece, out: Path) -> list[dict[str, Any]]:
    """The arm's row, and the teachers' when it trained them; their answers are kept for the intervals."""
    evaluation = read_json(piece.folder / "evaluation" / "evaluation.json", format="edgedistill-evaluation")
    names = {"student" if "student" in evaluation["models"] else "hard_label_student": piece.arm}
    if piece.arm == protocol.teachers_with:
        names["teacher"] = TEACHERS
    kept = out / protocol.name / f"seed-{piece.seed}"
    labels = read_array(piece.folder / "evaluation" / "test_labels.npy")
    write_array(kept / "test_labels.npy", labels.astype(np.int16))
    rows = []
    for model, arm in names.items():
        probabilities = read_array(piece.folder / "evaluation" / f"{model}.probs.npy")
        write_array(kept / f"{arm}.npy", probabilities.argmax(axis=1).astype(np.int16))
        values = evaluation["models"][model]
        folders = ("student", "student-hard-labels") if model != "teacher" else ("teacher/fold-*",)
        logs = [path for name in folders for path in sorted(piece.folder.glob(f"{name}/metrics.jsonl"))]
        rows.append(
            {
                "data": protocol.data,
                "train_images": protocol.train_images,
                "seed": piece.seed,
                "arm": arm,
                "test_images": evaluation["n"],
                "accuracy": round(values["accuracy"], 5),
                "macro_f1": round(values["macro_f1"], 5),
                "train_s": round(sum(row["seconds"] for path in logs for row in read_jsonl(path)), 1),
                "command": _shown(piece.command) if model != "teacher" else "",
            }
        )
    return rows


def _shown(command: list[str]) -> str:
    """Without this machine's paths."""
    if DISTILL in command:
        return shlex.join(["distill", *command[command.index(DISTILL) + 1 :]])
    return shlex.join(["python", *command[1:]])


def append(rows: list[dict[str, Any]], path: Path) -> None:
    """Earlier rows of the same seed and arm are replaced; another piece may run beside this one."""
    keys = {(str(row["seed"]), row["arm"]) for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = [old for old in read_rows(path) if (old["seed"], old["arm"]) not in keys]
        with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), extrasaction="ignore")
            writer.writeheader()
            writer.writerows([*kept, *rows])


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summarise(protocol: Protocol, out: Path, reference: str = "") -> dict[str, Any]:
    """Each arm over the seeds that it shares with its reference arm; written to NAME.json, or, where ``reference`` is
    given and not the protocol's, all arms minus that one to NAME-minus-REFERENCE.json."""
    given = "" if reference == protocol.reference else reference
    rows = read_rows(out / f"{protocol.name}.csv")
    answers = {(int(row["seed"]), row["arm"]): row for row in rows}
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    result: dict[str, Any] = {}
    for arm in arms:
        reference = given or protocol.reference_of(arm)
        seeds = sorted(seed for seed, name in answers if name == arm)
        shared = [seed for seed in seeds if (seed, reference) in answers]
        values: dict[str, Any] = {"seeds": seeds, "reference": reference}
        for metric in METRICS:
            numbers = [float(answers[seed, arm][metric]) for seed in seeds]
            values[metric] = {"mean": float(np.mean(numbers)), "sd": float(np.std(numbers, ddof=len(numbers) > 1))}
            if arm != reference and shared:
                ours = out / protocol.name
                values[metric] |= _difference(metric, (ours, arm), (ours, reference), shared)
        values["train_s"] = float(np.median([float(answers[seed, arm]["train_s"]) for seed in seeds]))
        result[arm] = values
    name = f"{protocol.name}-minus-{given}" if given else protocol.name
    record = {"reference": given or protocol.reference, "arms": result, "machine": machine_record()}
    write_json(out / f"{name}.json", record, format="edgedistill-distillation-benchmark")
    return record


def compare(protocol: Protocol, other: Protocol, out: Path, reference: str = "") -> dict[str, Any]:
    """Each arm minus the arm of that name in another protocol, or minus its arm ``reference``, over the seeds that both
    have; written to NAME-minus-OTHER.json or NAME-minus-OTHER-REFERENCE.json. Raises UsageError where the two were judged
    on different test images."""
    rows = {(int(row["seed"]), row["arm"]): row for row in read_rows(out / f"{protocol.name}.csv")}
    others = {(int(row["seed"]), row["arm"]): row for row in read_rows(out / f"{other.name}.csv")}
    ours, theirs = out / protocol.name, out / other.name
    result: dict[str, Any] = {}
    against = " ".join(filter(None, (other.name, reference)))
    for arm in dict.fromkeys(arm for seed, arm in rows if (seed, reference or arm) in others):
        seeds = sorted(seed for seed, name in rows if name == arm and (seed, reference or arm) in others)
        values: dict[str, Any] = {"seeds": seeds, "reference": against}
        for metric in METRICS:
            numbers = [float(rows[seed, arm][metric]) for seed in seeds]
            values[metric] = {"mean": float(np.mean(numbers)), "sd": float(np.std(numbers, ddof=len(numbers) > 1))}
            values[metric] |= _difference(metric, (ours, arm), (theirs, reference or arm), seeds)
        values["train_s"] = float(np.median([float(rows[seed, arm]["train_s"]) for seed in seeds]))
        result[arm] = values
    if not result:
        raise UsageError(f"{protocol.name} and {other.name}: no arm was trained with one seed in both")
    record = {"reference": against, "arms": result, "machine": machine_record()}
    name = f"{protocol.name}-minus-{against.replace(' ', '-')}"
    write_json(out / f"{name}.json", record, format="edgedistill-distillation-benchmark")
    return record


def _difference(metric: MetricName, one: tuple[Path, str], other: tuple[Path, str], seeds: list[int]) -> dict[str, Any]:
    """Of two arms, each the folder of a protocol's answers and its name there."""

    def kept(folder: Path, name: str) -> list[npt.NDArray[np.int64]]:
        return [read_array(folder / f"seed-{seed}" / f"{name}.npy").astype(np.int64) for seed in seeds]

    truth, theirs = kept(one[0], "test_labels"), kept(other[0], "test_labels")
    if not all(np.array_equal(ours, same) for ours, same in zip(truth, theirs, strict=True)):
        raise UsageError(f"{one[0].name} and {other[0].name}: judged on different test images")
    paired = hierarchical_difference(metric, kept(*one), kept(*other), truth)
    return {"minus_reference": paired.difference, "ci95": list(paired.ci95), "paired_seeds": len(seeds)}


def table(record: dict[str, Any], name: str) -> Any:
    rows = []
    for arm, values in record["arms"].items():
        usual = values["reference"] in (record["reference"], arm)
        cells: list[Any] = [arm if usual else f"{arm} (minus {values['reference']})"]
        cells.append(len(values["seeds"]))
        for metric in METRICS:
            cells.append(f"{values[metric]['mean']:.4f}")
            if "ci95" in values[metric]:
                low, high = (100 * bound for bound in values[metric]["ci95"])
                cells.append(f"{100 * values[metric]['minus_reference']:+.2f} [{low:+.2f}, {high:+.2f}]")
            else:
                cells.append("-")
        rows.append([*cells, f"{values['train_s'] / 60:.1f}"])
    columns = ("arm", "seeds", "accuracy", "points", "macro-F1", "points", "minutes")
    return console.table(f"{name}: points minus {record['reference']}, 95% over seeds and images", columns, rows)


def run(protocol: Protocol, args: argparse.Namespace) -> bool:
    """Whether all that was asked for is done."""
    deadline = time.monotonic() + 60 * args.minutes
    results = args.out / f"{protocol.name}.csv"
    done = {(int(row["seed"]), row["arm"]) for row in read_rows(results)}
    for piece in pieces(protocol, args.runs):
        asked = piece.arm in args.arms or (not piece.arm and not protocol.peers.keys().isdisjoint(args.arms))
        needed = piece.arm == protocol.teachers_with or not args.arms or asked
        if not needed or (args.seeds and piece.seed not in args.seeds) or (piece.seed, piece.arm) in done:
            continue
        if not piece.arm and (piece.folder / "model.pt").exists():
            continue
        prepare_data(protocol, args.runs, piece.seed)
        share_manifest(piece)
        console.note(f"{protocol.name}, seed {piece.seed}: {piece.arm or 'the peers teacher'}")
        if not run_piece(piece.command, deadline - time.monotonic()):
            console.note("time is up; run the same command again to go on")
            return False
        if piece.arm:
            append(rows_of(protocol, piece, args.out), results)
    return True


def _refuse_unknown(arms: list[str], protocol: Protocol, path: Path) -> None:
    known = protocol.arms.keys() | protocol.peers.keys()
    unknown = sorted({*arms} - known)
    if unknown:
        raise UsageError(f"{','.join(unknown)}: not in {path}: {', '.join(known)}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("protocol", type=Path, help="a TOML file of benchmarks/protocols")
    parser.add_argument("--minutes", type=float, default=28.0, help="of this piece; run again to go on")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=[], help="only these, comma between")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[])
    parser.add_argument("--runs", type=Path, default=Path("runs/distillation"), help="where the runs lie")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--summary", action="store_true", help="train nothing; sum up what is there")
    parser.add_argument(
        "--reference",
        default="",
        help=f"with --summary: the arm (or {TEACHERS}) to compare with, if not the protocol's; with --against one of the other",
    )
    parser.add_argument(
        "--against", type=Path, help="with --summary: another protocol, whose arms of the same names to compare with"
    )
    parser.add_argument("--list", action="store_true", help="train nothing; print the commands")
    args = parser.parse_args(argv)
    protocol = read_protocol(args.protocol)
    if (args.reference or args.against) and not args.summary:
        raise UsageError(f"{'--reference' if args.reference else '--against'} is of --summary")
    other = read_protocol(args.against) if args.against else protocol
    _refuse_unknown(args.arms, protocol, args.protocol)
    _refuse_unknown(
        [args.reference] if args.reference not in ("", TEACHERS) else [], other, args.against or args.protocol
    )
    if args.list:
        for piece in pieces(protocol, args.runs):
            console.out.print(shlex.join(piece.command), markup=False)
        return 0
    if args.against:
        record = compare(protocol, other, args.out, args.reference)
        console.out.print(table(record, protocol.name))
        return 0
    finished = args.summary or run(protocol, args)
    if read_rows(args.out / f"{protocol.name}.csv"):
        console.out.print(table(summarise(protocol, args.out, args.reference), protocol.name))
    return 0 if finished else TIMES_UP


if __name__ == "__main__":
    exit_with(main)
