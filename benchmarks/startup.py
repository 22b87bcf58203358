"""How long the command line takes to answer, warm: `--help` and `--cfg job`.

    python benchmarks/startup.py [repeats]

Printed are median seconds, and the ratio to starting Python itself.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

RUN = str(Path(__file__).parents[1] / "run.py")
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "run.py --help": [RUN, "--help"],
    "run.py --cfg job": [RUN, "--cfg", "job"],
}


def seconds(arguments: list[str]) -> float:
    """Return the wall time of one command."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


def main(repeats: int = 7) -> None:
    """Run the commands in turns and print."""
    for arguments in COMMANDS.values():
        seconds(arguments)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeats):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    base = statistics.median(times["python -c pass"])
    for name, measured in times.items():
        median = statistics.median(measured)
        print(f"{name:<18} {median:.2f} s   {median / base:.0f} x Python's own start")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
