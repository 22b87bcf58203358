"""What a step moves and takes on 8 and 64 GPUs, on paper, under weak scaling: nothing is run.

    python benchmarks/scaling.py [student=1e9] [teacher=8e9] [tokens=16384] …

Each GPU has `tokens` of its own. Bytes are what a GPU sends in a step: a ring passes (n - 1)/n of
a tensor for a gathering or a scattering, twice that for a sum. Communication is hidden behind
computation where the two can overlap, so a step takes the longer of both; `efficiency` is
computation over that. Machines have eight GPUs, and a ring that leaves one is as slow as the link
between them.
"""

import sys
from dataclasses import dataclass, fields

NODE = 8


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is assumed.

    Attributes:
        student, teacher: parameters.
        tokens: of a GPU, a step.
        kept: logits of a token in a cached signal, with their ids.
        weight_bytes: of a parameter, and of its gradient, as it is sent.
        flops: a GPU does in a second, as trainings reach it (H100, bf16, 40 % of the peak).
        within, between: bytes a second that a GPU sends inside of a machine (NVLink 4, one
            direction) and to another one (a network card of 400 Gbit/s each), reached.
    """

    student: float = 1e9
    teacher: float = 8e9
    tokens: float = 16384
    kept: float = 64
    weight_bytes: float = 2
    flops: float = 4e14
    within: float = 3.6e11
    between: float = 4e10


@dataclass(frozen=True, kw_only=True)
class Way:
    """How the weights lie.

    Attributes:
        name: of the row.
        shards_student, shards_teacher: whether ranks have parts of them.
        cached: whether the teacher's signal is read, and there is no teacher.
    """

    name: str
    shards_student: bool = False
    shards_teacher: bool = False
    cached: bool = False


WAYS = (
    Way(name="ddp, live teacher"),
    Way(name="ddp, cached signal", cached=True),
    Way(name="fsdp, teacher whole", shards_student=True),
    Way(name="fsdp, teacher sharded", shards_student=True, shards_teacher=True),
    Way(name="fsdp, cached signal", shards_student=True, cached=True),
)


def sent(setting: Setting, way: Way, gpus: int) -> float:
    """Return the bytes that a GPU sends in a step."""
    student, teacher = (setting.weight_bytes * size for size in (setting.student, setting.teacher))
    # DDP sums gradients; FSDP gathers weights forward and backward, and scatters gradients.
    times = 3 if way.shards_student else 2
    teachers = 1 if way.shards_teacher else 0
    return (gpus - 1) / gpus * (times * student + teachers * teacher)


def read(setting: Setting, way: Way) -> float:
    """Return the bytes of cached signal that a GPU reads in a step: a logit and an id each."""
    return setting.tokens * setting.kept * (2 + 4) if way.cached else 0.0


def computed(setting: Setting, way: Way) -> float:
    """Return the FLOPs of a GPU's step: 6 a parameter and token that learns, 2 a frozen one."""
    teacher = 0.0 if way.cached else 2 * setting.teacher
    return setting.tokens * (6 * setting.student + teacher)


def held(setting: Setting, way: Way, gpus: int) -> float:
    """Return the bytes of weights, gradients and Adam's states of a GPU: 16 a parameter."""
    student = 16 * setting.student / (gpus if way.shards_student else 1)
    if way.cached:
        return student
    return student + setting.weight_bytes * setting.teacher / (gpus if way.shards_teacher else 1)


def efficiency(setting: Setting, way: Way, gpus: int) -> float:
    """Return the share of a step that is computation, when all that can be hidden is."""
    computing = computed(setting, way) / setting.flops
    link = setting.within if gpus <= NODE else setting.between
    return computing / max(computing, sent(setting, way, gpus) / link)


def main(*words: str) -> None:
    """Print the table."""
    given = dict(word.split("=", 1) for word in words)
    unknown = sorted(given.keys() - {field.name for field in fields(Setting)})
    if unknown:
        names = ", ".join(field.name for field in fields(Setting))
        sys.exit(f"{unknown[0]}: expected some of {names}")
    setting = Setting(**{name: float(value) for name, value in given.items()})
    print("| | GPUs | held | sent a step | signal read | computing | efficiency |")
    print("|---|---|---|---|---|---|---|")
    for way in WAYS:
        for gpus in (8, 64):
            cells = [
                way.name,
                str(gpus),
                f"{held(setting, way, gpus) / 1e9:.1f} GB",
                f"{sent(setting, way, gpus) / 1e9:.1f} GB",
                f"{read(setting, way) / 1e6:.1f} MB",
                f"{computed(setting, way) / setting.flops * 1e3:.0f} ms",
                f"{efficiency(setting, way, gpus):.2f}",
            ]
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
