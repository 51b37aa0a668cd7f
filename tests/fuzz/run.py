"""`make fuzz`: every target on many inputs; prints counts and causes. Exit code 1 when there is a finding."""

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "support")]

from fuzz.harness import fuzz, target_files, targets_of  # noqa: E402


def main() -> int:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--inputs", type=int, default=10_000, metavar="N", help="a target (default 10,000)")
    parser.add_argument("--first", type=int, default=0, metavar="I", help="number of the first input")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other inputs")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the first input to this file")
    arguments = parser.parse_args()
    targets = target_files()
    unknown = [name for name in arguments.target or () if name not in targets]
    if unknown:
        parser.error(f"unknown target {unknown[0]}: one of {', '.join(targets)}")
    outcomes = []
    for name in arguments.target or targets:
        if arguments.save:
            target = targets_of(targets[name])[name]
            arguments.save.write_bytes(target.input(target.seeds(), arguments.seed, arguments.first))
        outcomes.append(fuzz(name, arguments.inputs, arguments.first, arguments.seed))
        print(outcomes[-1].summary(), flush=True)
        if arguments.inputs == 1:
            print("".join(found.text for found in outcomes[-1].findings))
    found = [sum(one.count(kind) for one in outcomes) for kind in ("traceback", "hang", "over memory")]
    inputs = sum(one.inputs for one in outcomes)
    print(f"{inputs} inputs: {found[0]} tracebacks, {found[1]} hangs, {found[2]} over memory")
    return int(any(found))


if __name__ == "__main__":
    sys.exit(main())
