"""One HTML file of runs or evaluations: `python eval/report.py RUN [RUN ...] [--output FILE]`.

It shows base and LoRA on the same prompts and noise, the numbers with their intervals, curves and configuration. It
holds everything in itself and opens from disk. RUN is the folder of a finished run or of eval/evaluate.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sd3_adrpo.errors import UserError, exit_code

PROGRAM = "report.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 an error the user can mend (one message, no traceback), 2 bad options."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in the first run's folder")
    parser.add_argument("--images", type=int, metavar="N", help="at most so many of a prompt; default: up to 4")
    args = parser.parse_args(argv)
    if args.images is not None and args.images < 1:
        parser.error(f"--images is {args.images}; it must be at least 1")
    return exit_code(PROGRAM, lambda: print(write(args.runs, args.output, args.images)))


def write(runs: Sequence[Path], output: Path | None, images: int | None) -> str:
    """Writes the page and says what it is."""
    from sd3_adrpo.report import page, sources

    found = sources.load(runs)
    output = output or runs[0] / "report.html"
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"output {output} is no file that could be written: give a file's name in a folder that exists")
    text = page.render(found, images)
    output.write_text(text, encoding="utf-8")
    lines = [f"{output}, {len(text.encode()) / 1e6:.1f} MB: open it in a browser"]
    lines += [
        f"no pictures of {s.folder}: it has no samples/, which older versions did not write"
        for s in found
        if not s.samples
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
