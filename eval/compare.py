"""Objectives side by side, over seeds: `python eval/compare.py --objectives adrpo,orw_cfm_w2 --seeds 0,1,2`.

Every member is a run of train_sd3.py in OUTPUT/members; options that compare.py does not know are passed on to all.
An objective can be there more than once, with options of its own: `--objectives "adrpo,adrpo penalty=fixed"`.
`--sweep KEY=V1,V2` runs every value of any option, several `--sweep` every combination. What is finished is kept: the
same command goes on where it stopped, more objectives or seeds join those of the folder, and a member that fails does
not cost the others. Writes compare.json, table.md and figures. `--quick` is a small version of everything.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sd3_adrpo import cli, comparison
from sd3_adrpo.config import Config
from sd3_adrpo.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
OBJECTIVES = "names with commas, each with options of its own after it: 'raft,adrpo beta0=2 train.learning_rate=1e-3'"
QUICK = "--config study --epochs 2 --rollout.prompts_per_epoch 64".split()


@dataclass(frozen=True)
class Member:
    label: str  # objective and swept values
    seed: int
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.label.replace(' ', '_').replace('/', '-')}_seed{self.seed}"


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="compare.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--objectives", default=",".join(cli.available("objective")), help=OBJECTIVES)
    parser.add_argument("--seeds", default="0,1,2", help="numbers with commas")
    parser.add_argument("--sweep", action="append", default=[], metavar="KEY=V1,V2", help="values of any option")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compare"), help="goes on where it stopped")
    parser.add_argument(
        "--jobs", type=int, help="members at a time, which share the cores; default: 1, or 2 without GPU"
    )
    parser.add_argument("--quick", action="store_true", help="one seed of small runs, minutes in all")
    args, options = parser.parse_known_args(argv)
    if args.quick:
        args.seeds, options = "0", [*QUICK, *options]
    if args.jobs is None:
        args.jobs = 1 if gpus() else min(2, os.cpu_count() or 1)  # two threads share a small model badly
    return args, options


def members(args: argparse.Namespace, options: Sequence[str]) -> list[Member]:
    """Seeds innermost last: the first seed of everything comes before the second of anything."""
    sweeps = []
    for sweep in args.sweep:
        key, equals, values = sweep.partition("=")
        if not equals or not values:
            raise UserError(f"--sweep {sweep!r}: write it as KEY=VALUE,VALUE, such as objective.beta0=0.3,1,3")
        sweeps.append([(key, value) for value in values.split(",")])
    chosen = []
    for seed in args.seeds.split(","):
        for entry in args.objectives.split(","):
            objective, *words = entry.split()
            variant = [f"--{word}" if _is_general(word) else f"--objective.{word}" for word in words]
            for combination in itertools.product(*sweeps):
                label = " ".join([objective, *words, *(f"{key.rpartition('.')[2]}={v}" for key, v in combination)])
                swept = [f"--{key}={value}" for key, value in combination]
                own = (
                    f"--objective={objective}",
                    f"--seed={seed}",
                    "--evaluation_epochs=1",
                    *options,
                    *variant,
                    *swept,
                )
                chosen.append(Member(label, int(seed), own))
    for member in chosen:
        cli.parse(member.options)  # exits with a message on a misspelt option, before hours of work
    return chosen


def _is_general(word: str) -> bool:
    """Whether KEY=VALUE names an option of the whole run, not one of its objective."""
    key = word.partition("=")[0]
    return "." in key or key in {field.name for field in dataclasses.fields(Config)}


def run(member: Member, folder: Path, threads: int) -> str | None:
    """Runs or resumes a member; what it says goes to its log. Returns None, or the last lines of a failure."""
    target = folder / "members" / member.name
    if (target / "summary.json").exists():
        return None
    command = [sys.executable, str(ROOT / "train_sd3.py"), f"--base_cache={folder / 'base'}", *member.options]
    if any(target.glob("checkpoints/*/state.pt")):
        command += ["--resume_from_checkpoint", str(target)]
    elif target.exists():
        target.rename(target.with_name(f"{target.name}_broken_{int(time.time())}"))
        command += ["--output_dir", str(target)]
    else:
        command += ["--output_dir", str(target)]
    log = folder / "members" / f"{member.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(log, "a") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    return None if status == 0 else f"exit {status}: " + " ".join(log.read_text()[-300:].split())


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def machine() -> str:
    import torch

    if gpus():
        return f"{gpus()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


def earlier(folder: Path, chosen: Sequence[Member], options: Sequence[str]) -> dict[str, Any]:
    """`command` and `runs` that other commands left in the folder. UserError where their common options were others."""
    path = folder / "compare.json"
    before = json.loads(path.read_text()) if path.exists() else {"options": options, "command": [], "runs": []}
    if before["options"] != list(options):
        raise UserError(
            f"{folder} holds a comparison with the options {shlex.join(before['options']) or '(none)'}: give these, or "
            "another --output_dir"
        )
    now = {(member.label, member.seed) for member in chosen}
    runs = [run for run in before["runs"] if (run["label"], run["seed"]) not in now]
    return {"command": before["command"], "runs": runs}


def collect(
    chosen: Sequence[Member], failures: dict[str, str], folder: Path, about: dict[str, Any], runs: Sequence[Any]
) -> dict[str, Any]:
    """compare.json of all members that are finished so far, after the `runs` of earlier commands."""
    finished = [member for member in chosen if (folder / "members" / member.name / "summary.json").exists()]
    return {
        **about,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "runs": [
            *runs,
            *(
                {**comparison.record(folder / "members" / member.name, member.label), "options": member.options}
                for member in finished
            ),
        ],
        "missing": [member.name for member in chosen if member not in finished],
        "failures": failures,
    }


def ceilings() -> dict[str, dict[str, float]]:
    """What the built-in world allows, as its own command measured it."""
    path = ROOT / "docs" / "world.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else {}
    return {name: known[name] for name in ("drawn", "guidance 3", "best of 16") if name in known}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args, options = parse(argv)
    try:
        chosen = members(args, options)
        before = earlier(args.output_dir, chosen, options)
    except (UserError, ValueError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    folder, failures = args.output_dir, {}
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    command = shlex.join(["python", "eval/compare.py", *argv])
    commands = [*(line for line in before["command"] if line != command), command]
    about = {"command": commands, "options": options}

    def work(member: Member) -> None:
        failure = run(member, folder, threads)
        if failure:
            failures[member.name] = failure

    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in tqdm(pool.map(work, chosen), total=len(chosen), desc="members", dynamic_ncols=True):
            result = collect(chosen, failures, folder, about, before["runs"])
            (folder / "compare.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, failure in failures.items():
        print(f"{name} failed, its log is {folder / 'members' / name}.log: {failure}", file=sys.stderr)
    if not result["runs"]:
        return 1
    text = comparison.table(result["runs"])
    (folder / "table.md").write_text(f"`{'`, `'.join(commands)}`\n{result['machine']}, {result['date']}\n\n{text}")
    built_in = all("--model" not in option for option in options)
    pictures = comparison.figures(result["runs"], folder, ceilings() if built_in else None)
    print(text)
    print(f"{folder / 'compare.json'}, {folder / 'table.md'}; look at {', '.join(str(path) for path in pictures)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
