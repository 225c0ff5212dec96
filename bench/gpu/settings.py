"""What a run is asked to do, and the problems it knows."""

from dataclasses import dataclass
from typing import NamedTuple


class Shape(NamedTuple):
    N: int  # tokens
    D: int  # hidden size
    V: int  # vocabulary

    def __str__(self) -> str:
        return f"{self.N} x {self.D} x {self.V}"


@dataclass(frozen=True)
class ProblemSet:
    """All problems are bf16. The first of `shapes` is the one that comes first and has the extra rows."""

    shapes: tuple[Shape, ...]
    pair: Shape  # one preference pair; N / 2 tokens a side
    long: Shape  # for memory above all
    curve: tuple[int, ...]  # tokens at the hidden size and vocabulary of the first shape


PROBLEM_SETS = {
    "full": ProblemSet(
        shapes=(
            Shape(8192, 4096, 128256),
            Shape(8192, 4096, 151936),
            Shape(16384, 2048, 248320),
            Shape(4096, 2048, 131072),
            Shape(8192, 2304, 256000),
        ),
        pair=Shape(65536, 4096, 128256),
        long=Shape(262144, 2048, 131072),
        curve=(1024, 2048, 4096, 8192, 16384, 32768),
    ),
    "tiny": ProblemSet(
        shapes=(Shape(96, 64, 512), Shape(64, 48, 700)),
        pair=Shape(64, 64, 512),
        long=Shape(256, 48, 512),
        curve=(32, 96, 128),
    ),
}


@dataclass(frozen=True)
class Settings:
    device: str = "cuda"
    problems: str = "full"
    contenders: str = "bench.gpu.contenders"  # module that makes the table
    repeats: int = 7
    call_limit: float = 6.0  # seconds that one call and its units may take over all repeats
    row_limit: float = 100.0  # seconds after which a row's process counts as hung
    gate_tokens: int = 512
    seed: int = 0

    @property
    def problem_set(self) -> ProblemSet:
        return PROBLEM_SETS[self.problems]
